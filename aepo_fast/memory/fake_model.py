"""The run's own model and policy over tensors that have shapes and no memory."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.model.activations import checkpoint_layers
from aepo_fast.model.attention import register
from aepo_fast.model.cpu_layers import fuse_layers, with_numbers
from aepo_fast.model.load import choose_attention, without_dropout
from aepo_fast.model.lora import add_adapter
from aepo_fast.model.policy import Policy
from aepo_fast.report.unexpected import first_line

# Attention over packed rows reads where they begin. In its place, one that keeps the same tensors.
_VARLEN = ("varlen", "flash_attention_2")
_STAND_IN = "varlen_without_numbers"


@dataclass(frozen=True)
class PlannedMachine(Machine):
    """A machine that need not be this one. Its tensors are traced on the CPU.

    for_gpu: whether the planned device is a GPU.
    """

    for_gpu: bool = False

    @property
    def is_gpu(self) -> bool:
        """Whether the planned device is a GPU."""
        return self.for_gpu

    @property
    def runs_cpp(self) -> bool:
        """Whether layers and sampling run in our C++."""
        return not self.for_gpu and super().runs_cpp


def planned(machine: Machine) -> PlannedMachine:
    """A run's machine, for tracing."""
    if isinstance(machine, PlannedMachine):
        return machine
    given = {name: getattr(machine, name) for name in Machine.__dataclass_fields__}
    given["device"] = torch.device("cpu")
    return PlannedMachine(**given, for_gpu=machine.is_gpu)


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The settings of a model with another number of layers, the first of its own."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    count = num_layers(text)
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers
    return config


def num_layers(config: PretrainedConfig) -> int:
    """The number of a model's layers."""
    return int(config.get_text_config().num_hidden_layers)


def layer_period(config: PretrainedConfig, cfg: Config) -> int:
    """After how many layers their kinds and their checkpointing repeat."""
    kinds = list(getattr(config.get_text_config(), "layer_types", None) or ())
    period = next((p for p in range(1, len(kinds)) if kinds[p:] == kinds[:-p]), 1)
    every: Any = cfg.model.gradient_checkpointing
    # True is a kind of int.
    return math.lcm(period, every if isinstance(every, int) and every > 1 else 1)


def fake_policy(
    cfg: Config,
    machine: Machine,
    config: PretrainedConfig,
    mode: FakeTensorMode,
    *,
    gathered: bool = False,
) -> Policy:
    """The policy of a run, with a model of the settings `config`, all in tensors of `mode`.

    gathered: its weights are as shards of them are gathered, in the compute dtype.

    Raises ConfigError for a model that cannot be built from its settings.
    """
    machine = planned(machine)
    with torch.device("meta"):  # where peft can add layers, as among fake tensors it cannot
        model = _model(cfg, machine, config)
        if cfg.model.lora.rank:
            add_adapter(model, cfg.model.lora, seed=0)
    with mode:
        _make_fake(model, machine.compute_dtype if gathered else None)
    if machine.runs_cpp:
        fuse_layers(model, with_numbers)
    with mode:
        checkpoint_layers(model, cfg.model.gradient_checkpointing)
        model.train()
        offloads = cfg.model.activation_offloading
        policy = Policy(model, machine, cfg.trainer, activation_offloading=offloads)
    if model.config._attn_implementation in _VARLEN:
        _register_stand_in()
        model.config._attn_implementation = _STAND_IN
    return policy


def _make_fake(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace the tensors of a model without memory by fake ones of the CPU; ties stay.

    dtype: of its weights; None is their own.
    """
    made: dict[Tensor, Any] = {}
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, old in group.items():
                if old is None:
                    continue
                if old not in made:
                    weight = isinstance(old, nn.Parameter)
                    own = dtype if weight and dtype is not None else old.dtype
                    new: Any = torch.empty(old.shape, dtype=own, device="cpu")
                    if weight:
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[old] = new
                group[name] = made[old]


def _model(cfg: Config, machine: Machine, config: PretrainedConfig) -> PreTrainedModel:
    register()
    config = without_dropout(copy.deepcopy(config))
    attention = choose_attention(cfg.model.attention, machine, config.model_type)
    wanted = None if (cfg.model.attention, attention) == ("auto", "sdpa") else attention
    if wanted in _VARLEN:
        wanted = "varlen"  # known without a GPU and without flash-attn
    try:
        with no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(
                config,
                dtype=machine.weights_dtype,
                attn_implementation=wanted,
                trust_remote_code=False,
            )
        model.tie_weights()
    except Exception as error:  # of code that builds anything
        reason = f"transformers cannot build it from its settings: {first_line(error)}"
        fix = "Check config.json, and model.attention"
        raise ConfigError("model.path", cfg.model.path, reason, fix) from error
    return model


def _register_stand_in() -> None:
    AttentionInterface.register(_STAND_IN, _unmasked_attention)
    AttentionMaskInterface.register(_STAND_IN, lambda *args, **options: None)


def _unmasked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> Any:
    scaling = options.get("scaling")
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
