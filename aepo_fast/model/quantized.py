"""Linear layers whose weights have 4 bits, by bitsandbytes: loaded, computed with, turned back."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import ModelConfig
from aepo_fast.report.unexpected import first_line

# Of the weights beside embedding and head, the share that may stay as it is.
_MOST_LEFT = 0.1


def check_quantization(cfg: ModelConfig) -> None:
    """Raise ConfigError where 4-bit weights are asked for and bitsandbytes is not installed."""
    if cfg.quantization == "none":
        return
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            fix = "pip install 'aepo-fast[qlora]', or leave it out"
            raise _refusal(cfg, f"{package} is not installed", fix)


def quantization_settings(cfg: ModelConfig, machine: Machine) -> BitsAndBytesConfig | None:
    """What transformers loads a model with; None where its weights are not quantised.

    Raises ConfigError where bitsandbytes is not installed, or does not run on the machine's device.
    """
    check_quantization(cfg)
    if cfg.quantization == "none":
        return None
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=cfg.quantization,
        bnb_4bit_use_double_quant=True,  # the blocks' scales in 8 bits
        bnb_4bit_compute_dtype=machine.compute_dtype,
    )
    try:
        bnb = import_bitsandbytes()
        weight = torch.ones(64, 64, dtype=machine.compute_dtype, device=machine.device)
        packed, state = bnb.functional.quantize_4bit(
            weight, quant_type=cfg.quantization, compress_statistics=True
        )
        works = bnb.matmul_4bit(weight, packed, quant_state=state).isfinite().all()
    except Exception as error:  # of a library for another device, mostly
        reason = f"bitsandbytes does not run on {machine.device.type}: {first_line(error)}"
        raise _refusal(cfg, reason, "Install a build for this device, or leave it out") from error
    if not works:
        reason = f"bitsandbytes computes wrongly on {machine.device.type}"
        raise _refusal(cfg, reason, "Install another version, or leave it out")
    return settings


def _refusal(cfg: ModelConfig, reason: str, fix: str) -> ConfigError:
    return ConfigError("model.quantization", cfg.quantization, reason, fix)


def import_bitsandbytes() -> ModuleType:
    """The module, imported without the code that it would fetch from the hub for a CPU.

    That is of GEMMs that are not used here, see `keep_layout`.
    """
    logger = logging.getLogger("bitsandbytes")
    level, kernels = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)  # it warns of what is missing then
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
    return bitsandbytes


def check_layers(cfg: ModelConfig, config: PretrainedConfig) -> None:
    """Raise ConfigError for a model whose weights are not mostly those of linear layers.

    bitsandbytes would leave the others as they are without a word: GPT-2's Conv1D, stacked experts.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    apart = (model.get_input_embeddings(), model.get_output_embeddings())
    quantized, left = 0, {}
    for name, module in model.named_modules():
        if module in apart or isinstance(module, nn.Embedding):
            continue
        for own, weight in module.named_parameters(recurse=False):
            if type(module) is nn.Linear and own == "weight":
                quantized += weight.numel()
            elif weight.ndim > 1:
                left[f"{name}.{own}"] = weight.numel()
    kept = sum(left.values())
    if kept > _MOST_LEFT * (quantized + kept):
        largest = max(left, key=lambda name: left[name])
        share = kept / (quantized + kept)
        reason = (
            f"{type(model).__name__} holds {share:.0%} of its layers' weights outside of linear "
            f"layers, e.g. {largest}, where bitsandbytes does not quantise them"
        )
        raise _refusal(cfg, reason, "Leave it out, or train another architecture")


def check_whole(config: PretrainedConfig, path: str) -> None:
    """Raise ConfigError for a model whose files hold quantised weights already."""
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else None
        reason = f"its weights are quantised already ({method or 'in some way'})"
        fix = 'Name the model that they were made from, with model.quantization = "nf4" for 4 bits'
        raise ConfigError("model.path", path, reason, fix)


def check_same_quantization(checkpoint: Path, cfg: ModelConfig) -> None:
    """Raise ConfigError where the adapter of a checkpoint was trained over other weights."""
    saved = json.loads((checkpoint / "config.json").read_text()).get("quantization_config") or {}
    before = saved.get("bnb_4bit_quant_type", "none")
    if before != cfg.quantization:
        reason = f"the adapter of the checkpoint {checkpoint} was trained with {before!r}"
        raise _refusal(cfg, reason, "Set it to that, or start a new run")


def linears_4bit(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers of a model whose weights have 4 bits, by name."""
    for name, module in list(model.named_modules()):
        if is_4bit(module):
            yield name, module


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight has 4 bits."""
    return type(module).__name__ == "Linear4bit" and isinstance(module, nn.Linear)


def keep_layout(model: nn.Module) -> None:
    """Let the layers of a model keep their weights as they are laid out.

    In eval mode, on a CPU with bfloat16 instructions, bitsandbytes lays the trainer's own weights
    out anew, for GEMMs that give no gradient, then or ever after.
    """
    for _, layer in linears_4bit(model):
        layer.support_avx512bf16_for_cpu = False


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While 4-bit layers compute in a dtype, instead of the one that they were loaded with."""
    layers = [layer for _, layer in linears_4bit(model)]
    before = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = dtype
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            layer.compute_dtype = kept


@torch.no_grad()
def dequantized(layer: Any) -> nn.Linear:
    """A linear layer on the CPU with the weights that a 4-bit one computes with."""
    held = layer.weight
    weight = import_bitsandbytes().functional.dequantize_4bit(held.data, held.quant_state)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.cpu(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to("cpu", weight.dtype), requires_grad=False)
    return plain


def dequantize(model: PreTrainedModel) -> None:
    """Put plain layers in the place of a model's 4-bit ones, and forget that it had any."""
    for name, layer in linears_4bit(model):
        model.set_submodule(name, dequantized(layer))
    for name in ("hf_quantizer", "is_loaded_in_4bit", "quantization_method"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # type: ignore[attr-defined]
