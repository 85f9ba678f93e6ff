"""Low-rank adapters of peft inside a model: added, switched off, loaded and merged."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import LoraConfig
from aepo_fast.model.folder import ADAPTER_CONFIG
from aepo_fast.model.lora_layers import ADAPTER_NAME, fuse_adapters
from aepo_fast.model.quantized import dequantize, dequantized, import_bitsandbytes, is_4bit
from aepo_fast.model.sharded import whole
from aepo_fast.report.unexpected import first_line

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_lora(cfg: LoraConfig) -> None:
    """Raise ConfigError where adapters are asked for and peft is not installed."""
    if cfg.rank and importlib.util.find_spec("peft") is None:
        fix = "pip install 'aepo-fast[lora]', or set it to 0"
        raise ConfigError("model.lora.rank", cfg.rank, "peft is not installed", fix)


def add_adapter(model: PreTrainedModel, cfg: LoraConfig, *, seed: int) -> None:
    """Add an adapter to a model and freeze all else; the model computes what it did before.

    The adapter's weights are float32. seed: of its first half; the second is zero. Raises
    ConfigError for targets that the model does not have, or that peft cannot adapt.
    """
    import peft

    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if _is_linear(m)})
    missing = [name for name in cfg.targets if name not in (*linear, "all-linear")]
    if missing:
        reason = f"{type(model).__name__} has no linear layer {missing[0]!r}"
        fix = f'Use "all-linear", or names of {", ".join(linear)}'
        raise ConfigError("model.lora.targets", list(cfg.targets), reason, fix)
    settings = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # any number
        use_rslora=cfg.rslora,
        target_modules="all-linear" if cfg.targets == ("all-linear",) else list(cfg.targets),
        task_type="CAUSAL_LM",
    )
    try:
        # Another run's adapter would otherwise depend on what was drawn before it.
        if importlib.util.find_spec("bitsandbytes") is not None:
            import_bitsandbytes()  # before peft does
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            torch.manual_seed(seed)
            model.add_adapter(settings, adapter_name=ADAPTER_NAME)
            for parameter in model.parameters():
                if parameter.requires_grad:  # a step is smaller than what bfloat16 tells apart
                    parameter.data = parameter.data.float()
            fuse_adapters(model)
    except Exception as error:  # of peft, for layers that it does not know
        reason = f"peft cannot adapt {type(model).__name__}: {first_line(error)}"
        fix = "Name other layers, or set model.lora.rank = 0"
        raise ConfigError("model.lora.targets", list(cfg.targets), reason, fix) from error


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's


def adapter_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model's adapter, under the names that peft gives them in a file."""
    # peft's own function looks at all modules for each weight: a third of a sync to vLLM. Not by
    # named_parameters(): after an error within a pass, FSDP2 makes shards again for state_dict().
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): weight
        for name, weight in model.state_dict().items()
        if ".lora_" in name
    }


def save_adapter(
    model: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a model's adapter to a folder in peft's format, which `peft.PeftModel` reads, too.

    state: its weights, where they have been gathered.
    """
    from safetensors.torch import save_file

    state = adapter_state(model) if state is None else state
    tensors = {f"base_model.model.{name}": whole(one).contiguous() for name, one in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    model.peft_config[ADAPTER_NAME].save_pretrained(folder)  # type: ignore[index]


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, e.g. a checkpoint of a run that trained one."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_same_adapter(checkpoint: Path, cfg: LoraConfig) -> None:
    """Raise ConfigError where a checkpoint has another adapter than a configuration, or none."""
    if not holds_adapter(checkpoint):
        if cfg.rank:
            reason = f"the checkpoint {checkpoint} has no adapter: its run trained all weights"
            fix = "Set it to 0, or start a new run"
            raise ConfigError("model.lora.rank", cfg.rank, reason, fix)
        return
    saved = json.loads((checkpoint / ADAPTER_CONFIG).read_text())
    for key, name in (("rank", "r"), ("alpha", "lora_alpha"), ("rslora", "use_rslora")):
        if cfg.rank == 0 or saved[name] != getattr(cfg, key):
            reason = f"the adapter of the checkpoint {checkpoint} has {saved[name]}"
            fix = "Set it to that, or start a new run"
            raise ConfigError(f"model.lora.{key}", getattr(cfg, key), reason, fix)


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter that was saved in a folder in the place of the model's own.

    Raises ConfigError where it is of other layers.
    """
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / ADAPTER_WEIGHTS)
    try:
        problem: Any = set_peft_model_state_dict(model, saved, adapter_name=ADAPTER_NAME)
        unknown = list(getattr(problem, "unexpected_keys", ()))
        missing = [name for name in getattr(problem, "missing_keys", ()) if "lora_" in name]
    except RuntimeError as error:  # other shapes
        unknown, missing = [first_line(error)], []
    if unknown or missing:
        targets = sorted(model.peft_config[ADAPTER_NAME].target_modules)  # type: ignore[index]
        reason = f"the adapter in {folder} is of other layers: {(unknown + missing)[0]}"
        fix = "Resume with its settings, or start a new run"
        raise ConfigError("model.lora.targets", targets, reason, fix)


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether an adapter is trained in the place of the weights."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before any training."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


@torch.no_grad()
def merge_adapter(model: PreTrainedModel) -> None:
    """Add the adapter to the weights that it stands beside, and take it out of the model.

    Weights of 4 bits become what they stand for, in the dtype that they were made from, on the CPU:
    the sum has more digits than 4 bits hold, and the run never had the weights before them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    head: Any = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and head.weight is model.get_input_embeddings().weight:
        base: Any = head.get_base_layer()
        base.weight = nn.Parameter(base.weight.clone())  # its adapter is not the embedding's
        model.config.tie_word_embeddings = False
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            merged: Any = module
            if is_4bit(merged.get_base_layer()):  # peft would round the sum to 4 bits
                plain = dequantized(merged.get_base_layer())
                plain.weight += merged.get_delta_weight(ADAPTER_NAME).cpu()
                model.set_submodule(name, plain)
            else:
                merged.merge(safe_merge=True)
                model.set_submodule(name, merged.get_base_layer())
    dequantize(model)
    model._hf_peft_config_loaded = False
    del model.peft_config  # type: ignore[attr-defined]
