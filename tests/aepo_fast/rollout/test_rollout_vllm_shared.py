"""vLLM's own weights as the trainer's storage, on real vLLM without the CPU build's packing.

What is left then is how vLLM keeps weights on a GPU: q, k and v in one tensor, gate and up in one,
nothing rearranged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from aepo_fast.config.sections import RolloutConfig, TrainerConfig
from aepo_fast.model.load import resolve
from aepo_fast.model.policy import Policy
from aepo_fast.rollout.canary import Canary, StaleWeightsError
from tests.tiny_run import a_machine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
MODEL = "package:smollm2-135m-instruct"


@pytest.fixture(scope="module")
def folder() -> str:
    return str(resolve(MODEL))


@pytest.fixture(scope="module")
def engine(folder: str) -> Iterator[Any]:
    from vllm.model_executor.layers import utils

    from aepo_fast.rollout.vllm import VllmRollout

    def leave_as_loaded(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    cfg = RolloutConfig(
        "vllm", max_prompt_tokens=100, max_new_tokens=32, dtype="bfloat16", enforce_eager=True
    )
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(utils, "dispatch_cpu_unquantized_gemm", leave_as_loaded)
        on_gpu = a_machine().vllm_on_gpu
        made = VllmRollout(folder, cfg, eos_ids=[2], seed=0, on_gpu=on_gpu)
        yield made
        made.close()


@pytest.fixture(scope="module")
def prompts(folder: str) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tuple(tokenizer(f"{n} and {n} make")["input_ids"]) for n in ("two", "five", "nine")]


def trained(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def canary_of(engine: Any, model: PreTrainedModel, prompts: list[tuple[int, ...]]) -> Canary:
    machine = a_machine(model.device, weights=model.dtype, compute=torch.bfloat16)
    policy = Policy(model, machine, TrainerConfig())
    return Canary(engine, policy, prompts)


def one_update(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
    torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True).step()


def test_weights_of_another_dtype_are_copied_in_one_call(
    engine: Any, folder: str, prompts: list[tuple[int, ...]]
) -> None:
    """First, because sharing gives vLLM's storage away."""
    model = trained(folder, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    canary = canary_of(engine, model, prompts)
    engine.sync_weights(model, 0)
    assert engine.metrics["sync/bytes_copied"] == sum(2 * p.numel() for p in model.parameters())
    assert canary.check() <= canary.limit
    one_update(model)
    with pytest.raises(StaleWeightsError):
        canary.check()
    engine.sync_weights(model, 1)
    assert canary.check() <= canary.limit
    model.load_state_dict(before)
    engine.sync_weights(model, 2)


def test_shared_weights_are_the_trainers_and_nothing_is_copied(
    engine: Any, folder: str, prompts: list[tuple[int, ...]]
) -> None:
    model = trained(folder, torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    canary = canary_of(engine, model, prompts)
    engine.sync_weights(model, 0)
    assert engine.metrics["sync/bytes_copied"] == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    (theirs,) = engine.llm.apply_model(
        lambda inner: {p.untyped_storage().data_ptr() for p in inner.parameters()}
    )
    assert all(p.untyped_storage().data_ptr() in theirs for p in model.parameters())
    for version in range(1, 4):
        one_update(model)
        engine.sync_weights(model, version)
        assert engine.metrics["sync/bytes_copied"] == 0
        assert canary.check() <= canary.limit
