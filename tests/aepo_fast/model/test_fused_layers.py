"""Models whose layers use the C++ operations against the same models without them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama

from aepo_fast.config.sections import ModelConfig
from aepo_fast.model.cpu_layers import fuse_layers, fused_kinds
from aepo_fast.model.load import load_model
from aepo_kernels.cpu import library as cpu_library
from tests.tiny_run import a_machine

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason="without the C++ part")
SIZES = dict(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, head_dim=6,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
ALL = ["norm", "rotary", "swiglu"]


def model_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def loss_and_grads(
    model: PreTrainedModel, *, autocast: bool
) -> tuple[torch.Tensor, dict[str, Any]]:
    ids = torch.arange(2 * 7).view(2, 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids, use_cache=False).logits
    model.zero_grad()
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen3Config(**SIZES)])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_fused_model_is_the_same_model(config: Any, autocast: bool) -> None:
    plain = model_of(config)
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    assert fused_kinds(fused) == ALL and fused_kinds(plain) == []
    truth, exact = loss_and_grads(plain.double(), autocast=False)
    (_, rough), (found, grads) = (
        loss_and_grads(model.float(), autocast=autocast) for model in (plain, fused)
    )
    # Together no further from float64 than the plain model is, but for the luck of the rounding.
    error, usual = (
        sum(float((x[name] - exact[name]).norm() / exact[name].norm()) ** 2 for name in exact)
        for x in (grads, rough)
    )
    assert error <= 4 * usual, (error, usual)
    tolerance = 0.03 if autocast else 1e-5
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=10 * tolerance)


def test_other_norms_and_activations_stay_as_they_are() -> None:
    model = model_of(GemmaConfig(**SIZES))  # weighs with 1 + w, gates with GELU
    fuse_layers(model)
    assert fused_kinds(model) == ["rotary"]


def test_classes_stay_and_transformers_is_left_alone(tmp_path: Path) -> None:
    plain = model_of(LlamaConfig(**SIZES))
    fused = copy.deepcopy(plain)
    before = modeling_llama.apply_rotary_pos_emb
    fuse_layers(fused)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert isinstance(fused.model.norm, modeling_llama.LlamaRMSNorm)
    assert fused_kinds(copy.deepcopy(fused)) == ALL
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fused_kinds(loaded) == []
    assert loaded.state_dict().keys() == plain.state_dict().keys()


def test_nothing_is_fused_where_the_cpp_part_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "torch")
    model_of(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    cfg = ModelConfig(path=str(tmp_path), compute_dtype="float32")
    assert fused_kinds(load_model(cfg, tmp_path, a_machine())) == []
    monkeypatch.delenv(cpu_library.ISA_VARIABLE)
    assert fused_kinds(load_model(cfg, tmp_path, a_machine())) == ALL


def test_an_activation_that_is_cut_off_stays() -> None:
    model = model_of(LlamaConfig(**SIZES))
    plain = type(model.model.layers[0].mlp)

    class Clamped(plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.gate_proj(x).clamp(max=10.0)
            return self.down_proj(self.act_fn(gate) * self.up_proj(x).clamp(-10.0, 10.0))

    model.model.layers[1].mlp.__class__ = Clamped
    fuse_layers(model)
    kinds = [getattr(type(layer.mlp), "fused_kind", None) for layer in model.model.layers]
    assert kinds == ["swiglu", None]
