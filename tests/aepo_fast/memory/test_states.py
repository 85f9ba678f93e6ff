"""Bytes of weights, gradients and optimizers against numbers by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aepo_fast.memory.fake_model import fake_policy
from aepo_fast.memory.head_pass import head_bytes
from aepo_fast.memory.live_storages import LiveStorages
from aepo_fast.memory.states import NF4_BITS, StateBytes, state_bytes
from aepo_kernels import linear_logprob, linear_token_loss
from tests.aepo_fast.memory.models import small
from tests.aepo_fast.memory.test_model_pass import settled
from tests.tiny_run import a_machine

V, H, INNER, L, KV = 300, 64, 128, 6, 32  # vocabulary, widths, layers, width of keys
# q, k, v with biases, o; gate, up, down; two norms.
LAYER = (H * H + H) + 2 * (H * KV + KV) + H * H + 3 * H * INNER + 2 * H
WEIGHTS = V * H + L * LAYER + H
FREQUENCIES = 2 * 4 * 8  # two float32 buffers of rotary embeddings


def states(*overrides: str) -> StateBytes:
    cfg, machine = settled('rollout.dtype="float32"', *overrides)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return state_bytes(cfg, fake_policy(cfg, machine, small(), mode))


def test_float32_weights_with_adamw_take_sixteen_bytes() -> None:
    found = states()
    assert found.num_weights == found.num_trained == WEIGHTS
    assert found.weights == 4 * WEIGHTS + FREQUENCIES
    assert found.gradients == 4 * WEIGHTS
    assert found.optimizer == 8 * WEIGHTS
    assert (found.step, found.reference) == (0, 0)


def test_bfloat16_weights_have_float32_copies() -> None:
    found = states('model.dtype="bfloat16"', 'rollout.dtype="bfloat16"')
    assert found.weights == 2 * WEIGHTS + FREQUENCIES
    assert (found.gradients, found.optimizer) == (4 * WEIGHTS, 12 * WEIGHTS)


def test_optimizers_in_less() -> None:
    narrow = 'model.dtype="bfloat16"', 'rollout.dtype="bfloat16"'
    half = states(*narrow, 'trainer.optimizer="adamw_bf16"')
    assert (half.gradients, half.optimizer) == (2 * WEIGHTS, 4 * WEIGHTS)
    eight = states(*narrow, 'trainer.optimizer="adamw_8bit"')
    vectors = L * (H + 2 * KV + 2 * H) + H
    small_ones = L * 2 * H * KV if H * KV < 4096 else 0  # torchao leaves these as they are
    assert V * H % 256 == 0
    matrices = WEIGHTS - vectors - small_ones
    tables = (1 + L * 5) * 2 * 4 * 256
    expected = 2 * (matrices + 4 * matrices // 256) + tables + 2 * 2 * (vectors + small_ones)
    assert eight.optimizer == expected
    muon = states('trainer.optimizer="muon"')
    inner = L * (LAYER - (H + 2 * KV) - 2 * H)
    assert muon.optimizer == 4 * inner + 8 * (WEIGHTS - inner)


def test_a_reference_is_a_second_model_but_with_an_adapter() -> None:
    assert states("loss.kl_coef=0.1").reference == 4 * WEIGHTS + FREQUENCIES


def test_an_adapter_alone_is_trained() -> None:
    pytest.importorskip("peft")
    rank = 4
    found = states(f"model.lora.rank={rank}", "loss.kl_coef=0.1")
    pairs = 2 * (H + H) + 2 * (H + KV) + 3 * (H + INNER)  # in and out of each linear layer
    assert found.num_trained == L * rank * pairs
    assert found.gradients == 4 * found.num_trained
    assert found.optimizer == 8 * found.num_trained
    assert found.weights == 4 * (WEIGHTS + found.num_trained) + FREQUENCIES
    assert found.reference == 0


def test_four_bits_with_two_scales() -> None:
    assert NF4_BITS == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_over_kept_ids_is_as_counted(dtype: torch.dtype, trained: bool) -> None:
    tokens, kept = 2048, 300
    hidden = torch.randn(tokens, 256, dtype=dtype, requires_grad=True)
    weight = torch.randn(4000, 256, dtype=dtype, requires_grad=trained)
    ids, column = torch.randint(0, 4000, (tokens, kept)), torch.randn(tokens)
    targets = ids[:, 0].clone()
    known: dict[str, Any] = {"ignore_index": None, "check_loss": False}

    def loss(logprob: torch.Tensor, entropy: Any, second: Any, of: torch.Tensor) -> torch.Tensor:
        return (logprob * of).sum()

    counter = LiveStorages(64)
    counter.ignore([hidden, weight, ids, targets, column])
    with counter:
        given = hidden, weight, targets, loss, column
        linear_token_loss(*given, kept_ids=ids.clone(), **known).loss.backward()
    found = head_bytes(a_machine(compute=dtype), weight, tokens, trained=trained, kept=kept)
    assert counter.peak == pytest.approx(found.peak, rel=0.05)
    forward = LiveStorages(64)
    forward.ignore([hidden, weight, ids, targets])
    with torch.no_grad(), forward:
        linear_logprob(hidden, weight, targets, kept_ids=ids.clone(), ignore_index=None)
    assert forward.peak == pytest.approx(found.score, rel=0.05)
    assert found.weight_grad == weight.numel() * weight.element_size() * trained


def test_the_head_casts_once_and_sums_in_its_own_dtype() -> None:
    cfg, machine = settled()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    policy = fake_policy(cfg, machine, small(), mode)
    width = machine.compute_dtype.itemsize
    with mode:
        found = head_bytes(policy.machine, policy.weight, 100, trained=True)
        frozen = head_bytes(policy.machine, policy.weight, 100, trained=False)
    assert found.cast == (0 if width == 4 else V * H * width)
    assert found.weight_grad == 4 * V * H
    assert found.sums == 100 * H * width + 4 * V * H
    assert frozen.sums == 100 * H * width
    assert found.work >= 100 * V * width
