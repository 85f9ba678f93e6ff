"""An adapter in the real vLLM: handed over unmerged, over base weights that are never reloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from aepo_fast.config.sections import LoraConfig, ModelConfig, RolloutConfig, TrainerConfig
from aepo_fast.model.load import load_model, resolve
from aepo_fast.model.lora import save_adapter
from aepo_fast.model.policy import Policy
from aepo_fast.rollout.canary import Canary, StaleWeightsError
from tests.aepo_fast.rollout.test_rollout_vllm import DTYPE, MODEL
from tests.aepo_fast.rollout.test_rollout_vllm import pytestmark as vllm_marks
from tests.tiny_run import a_machine

pytestmark = vllm_marks


@pytest.fixture(scope="module", params=["none", "nf4"])
def quantization(request: pytest.FixtureRequest) -> str:
    if request.param != "none":
        pytest.importorskip("vllm_bnb_plugin")
    return request.param


@pytest.fixture(scope="module")
def engine(quantization: str) -> Iterator[Any]:
    from aepo_fast.rollout.vllm import VllmRollout

    folder = str(resolve(MODEL))
    cfg = RolloutConfig(
        backend="vllm", max_prompt_tokens=300, max_new_tokens=32, dtype=DTYPE, enforce_eager=True
    )
    ids, on_gpu = [AutoTokenizer.from_pretrained(folder).eos_token_id], a_machine().vllm_on_gpu
    made = VllmRollout(
        folder, cfg, eos_ids=ids, seed=0, on_gpu=on_gpu, lora_rank=4, quantization=quantization
    )
    yield made
    made.close()


@pytest.fixture
def model(quantization: Any) -> PreTrainedModel:
    cfg = ModelConfig(
        path=MODEL,
        gradient_checkpointing=False,
        lora=LoraConfig(rank=4),
        quantization=quantization,
    )
    machine = a_machine(compute=getattr(torch, DTYPE))
    return load_model(cfg, resolve(MODEL), machine)


def move(model: PreTrainedModel, seed: int) -> None:
    """A step that changes log-probs by some tenths of a nat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def test_the_canary_agrees_after_each_sync_and_sees_one_that_is_missing(
    engine: Any, model: PreTrainedModel, quantization: str, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL))
    chats = [[{"role": "user", "content": f"What is {n} times {n + 2}?"}] for n in range(2, 6)]
    prompts = [
        tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        for chat in chats
    ]
    policy = Policy(model, a_machine(compute=getattr(torch, DTYPE)), TrainerConfig())
    canary = Canary(engine, policy, prompts, max_new_tokens=4)  # adapters are slow on a CPU
    assert canary.fresh < 0.06
    engine.sync_weights(model, 0)  # an adapter that changes nothing
    assert canary.check() <= canary.limit
    move(model, 1)
    with pytest.raises(StaleWeightsError):
        canary.check()
    engine.sync_weights(model, 1)
    assert canary.check() <= canary.limit
    assert engine.weights_version == 1
    if quantization != "none":  # it is slower still, and adapters come to it in the same way
        return
    # As a run that goes on gets the adapter of its checkpoint.
    save_adapter(model, tmp_path)
    move(model, 2)
    engine.sync_weights(model, 2)
    engine.load_adapter(tmp_path, 3)
    with pytest.raises(StaleWeightsError):
        canary.check()
