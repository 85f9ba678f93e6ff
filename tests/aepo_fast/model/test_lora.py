"""Adapters: added, trained through the fused head, switched off, saved, and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import LoraConfig, ModelConfig, TrainerConfig
from aepo_fast.model.load import load_model
from aepo_fast.model.lora import (
    ADAPTER_WEIGHTS,
    add_adapter,
    check_lora,
    check_same_adapter,
    has_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    without_adapter,
)
from aepo_fast.model.policy import Policy
from aepo_fast.samples import Completion, Sample
from tests.kernels.gemm_units import counted
from tests.tiny_run import a_machine

IDS = torch.arange(8)[None]
TARGETS = [("all-linear",), ("q_proj", "lm_head"), ("lm_head",)]


def adapted(folder: Path, *, moved: bool = True, **settings: Any) -> PreTrainedModel:
    """The tiny model with an adapter of rank 4 that does something if `moved`."""
    cfg = ModelConfig(
        path=str(folder), gradient_checkpointing=False, lora=LoraConfig(rank=4, **settings)
    )
    model = load_model(cfg, folder, a_machine(), seed=3)
    if moved:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def trained_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("targets", TARGETS)
def test_a_new_adapter_changes_nothing_and_alone_is_trained(
    tiny_model_dir: Path, targets: tuple[str, ...]
) -> None:
    model = adapted(tiny_model_dir, moved=False, targets=targets)
    plain = load_model(ModelConfig(path=str(tiny_model_dir)), tiny_model_dir, a_machine())
    assert torch.equal(logits_of(model), logits_of(plain))
    trained = trained_of(model)
    assert trained and all("lora_" in name for name in trained)
    assert has_adapter(model) and not has_adapter(plain)
    again = adapted(tiny_model_dir, moved=False, targets=targets)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("targets", TARGETS)
def test_the_fused_head_s_gradients_are_those_of_the_model_s_own_logits(
    tiny_model_dir: Path, targets: tuple[str, ...]
) -> None:
    model = adapted(tiny_model_dir, targets=targets)
    prompt, answer = (1, 2, 3), (4, 5, 6, 7)
    completion = Completion(prompt, answer, (0.0,) * 4, "stop", 1.0, 0)
    samples = [Sample(completion, 0, False, 1.0)]
    policy = Policy(model, a_machine(), TrainerConfig())
    (batch,) = policy.microbatches(samples, [0])
    output = policy.logprobs(batch, with_entropy_gradient=True)
    trained = list(trained_of(model).values())
    found = torch.autograd.grad(output.logprob.sum() + output.entropy.sum(), trained)

    logp = model(input_ids=torch.tensor([prompt + answer])).logits[0, 2:-1].log_softmax(-1)
    chosen = logp[torch.arange(4), torch.tensor(answer)]
    entropy = -(logp.exp() * logp).sum(-1)
    truth = torch.autograd.grad(chosen.sum() + entropy.sum(), trained)
    torch.testing.assert_close(output.logprob, chosen, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "log_probs", "with_entropy", "loss"),
    [(("all-linear",), 2, 3, 2), (("q_proj", "lm_head"), 3, 3, 2)],
)
def test_gemms_of_a_frozen_head(
    tiny_model_dir: Path, targets: tuple[str, ...], log_probs: int, with_entropy: int, loss: int
) -> None:
    model = adapted(tiny_model_dir, targets=targets)
    completion = Completion((1, 2, 3), (4, 5, 6, 7), (0.0,) * 4, "stop", 1.0, 0)
    policy = Policy(model, a_machine(), TrainerConfig())
    (batch,) = policy.microbatches([Sample(completion, 0, False, 1.0)], [0])
    shape = 4, policy.weight.shape[1], policy.weight.shape[0]
    found = []
    for wanted in (False, True):
        with counted(*shape) as units:
            output = policy.logprobs(batch, with_entropy_gradient=wanted)
            (output.logprob.sum() + (output.entropy.sum() if wanted else 0)).backward()
        found.append(units.whole)
    with counted(*shape) as units:
        policy.token_loss(batch, lambda logprob, *_: (logprob.sum(), {})).loss.backward()
    assert [*found, units.whole] == [log_probs, with_entropy, loss]


@pytest.mark.parametrize("targets", TARGETS)
def test_off_saved_and_merged(
    tiny_model_dir: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    model = adapted(tiny_model_dir, targets=targets)
    plain = load_model(ModelConfig(path=str(tiny_model_dir)), tiny_model_dir, a_machine())
    moved = logits_of(model)
    assert not torch.allclose(moved, logits_of(plain), atol=1e-3)
    with without_adapter(model):
        assert torch.equal(logits_of(model), logits_of(plain))
    assert torch.equal(logits_of(model), moved)

    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    by_peft = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert written.keys() == {f"base_model.model.{name}" for name in by_peft}
    assert all(torch.equal(written[f"base_model.model.{name}"], by_peft[name]) for name in by_peft)
    other = adapted(tiny_model_dir, moved=False, targets=targets)
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits_of(other), moved)

    merge_adapter(model)
    assert not has_adapter(model) and not [n for n, _ in model.named_parameters() if "lora" in n]
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for found in (logits_of(model), logits_of(merged)):
        torch.testing.assert_close(found, moved, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_float32_beside_bfloat16_weights(tiny_model_dir: Path) -> None:
    cfg = ModelConfig(path=str(tiny_model_dir), dtype="bfloat16", lora=LoraConfig(rank=2))
    model = load_model(cfg, tiny_model_dir, a_machine(weights=torch.bfloat16))
    dtypes = {one.requires_grad: one.dtype for one in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": -1}, r"model\.lora\.rank = -1: must not be negative"),
        ({"rank": 4, "alpha": 0.0}, r"model\.lora\.alpha = 0\.0: must be above 0"),
        ({"rank": 4, "targets": ()}, r"model\.lora\.targets = \[\]: names no layer"),
        ({"rank": 4, "targets": ("all-linear", "lm_head")}, "all names but the head's"),
        ({"alpha": 8.0}, r"model\.lora\.alpha = 8\.0: does nothing with model\.lora\.rank = 0"),
    ],
)
def test_bad_settings_raise(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**settings)


def test_targets_that_match_nothing_raise(tiny_model_dir: Path) -> None:
    said = r"no linear layer 'query'.*names of down_proj, .*lm_head"
    with pytest.raises(ConfigError, match=said):
        adapted(tiny_model_dir, targets=("query",))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_lora(LoraConfig())
    said = r"peft is not installed\. pip install 'aepo-fast\[lora\]'"
    with pytest.raises(ConfigError, match=said):
        check_lora(LoraConfig(rank=4))


def test_an_adapter_of_other_settings_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = adapted(tiny_model_dir, targets=("q_proj",))
    save_adapter(model, tmp_path)
    check_same_adapter(tmp_path, LoraConfig(rank=4))
    for cfg, said in (
        (LoraConfig(rank=8), r"lora\.rank = 8: the adapter of the checkpoint .* has 4"),
        (LoraConfig(rank=4, alpha=1.0), r"lora\.alpha = 1\.0: .* has 32"),
        (LoraConfig(rank=4, rslora=True), r"lora\.rslora = True: .* has False"),
        (LoraConfig(), r"lora\.rank = 0: .* has 4"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_same_adapter(tmp_path, cfg)
    with pytest.raises(ConfigError, match=r"lora\.rank = 4: .* has no adapter"):
        check_same_adapter(tiny_model_dir, LoraConfig(rank=4))
    with pytest.raises(ConfigError, match=r"lora\.targets = \['v_proj'\]: .* of other layers"):
        load_adapter(adapted(tiny_model_dir, targets=("v_proj",)), tmp_path)


def test_what_peft_cannot_adapt_is_said(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("Target module is not supported.\nmore")

    monkeypatch.setattr(PreTrainedModel, "add_adapter", fail)
    model = load_model(ModelConfig(path=str(tiny_model_dir)), tiny_model_dir, a_machine())
    with pytest.raises(ConfigError, match="peft cannot adapt .*: Target module is not supported"):
        add_adapter(model, LoraConfig(rank=4), seed=0)
