"""The second temperature in TRL's head, for one model of each kind of head, against float64."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs TRL", allow_module_level=True)

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer import utils

from aepo_fast.integrations.trl.head import ScoringModel, _Head, add_second_temperature

pytestmark = [pytest.mark.peers, pytest.mark.slow]

V, LENGTH, T = 97, 4, 1.4
SIZES: dict[str, Any] = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HEADS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "gemma2": dict(head_dim=16, final_logit_softcapping=2.0),
    "cohere": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=4.0),
    "phi": {},  # a bias
}


def build(kind: str) -> PreTrainedModel:
    """A model with large logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **HEADS[kind]))
        with torch.no_grad():
            head = model.get_output_embeddings()
            head.weight.mul_(20)
            if head.bias is not None:
                head.bias.normal_()
    return model.eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-LENGTH] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("kind", HEADS)
def test_log_probs_and_gradient_at_both_temperatures(kind: str) -> None:
    model, inputs = build(kind), batch()
    exact = deepcopy(model).double()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    add_second_temperature(model)
    scoring = ScoringModel(model, T)
    scoring(**inputs, fused_lm_head=True)
    found = [scoring.completions(n, LENGTH) for n in ("log_probs", "entropy", "second_log_probs")]

    labels = inputs.pop("labels")[:, -LENGTH:]
    scored = labels != -100
    logits = exact(**inputs).logits[:, -LENGTH - 1 : -1]
    target = labels.clamp(min=0).unsqueeze(2)
    true = []
    for temperature in (1.0, T):
        all_words = torch.log_softmax(logits / temperature, -1)
        true.append(all_words.gather(2, target).squeeze(2) * scored)
        if temperature == 1:
            true.append(-(all_words.exp() * all_words).sum(-1) * scored)
    assert true[0][scored].std() > 0.3
    for ours, theirs in zip(found, true, strict=True):
        assert ours is not None
        assert (ours - theirs).abs().max() < 1e-5
    factors = torch.randn(3, *scored.shape, generator=torch.Generator().manual_seed(1))
    sum((f * x).sum() for f, x in zip(factors, found, strict=True)).backward()
    sum((f * x).sum() for f, x in zip(factors, true, strict=True)).backward()
    for (name, one), (_, other) in zip(
        model.named_parameters(), exact.named_parameters(), strict=True
    ):
        assert one.grad is not None and other.grad is not None
        assert (one.grad - other.grad).norm() <= 2e-5 * other.grad.norm() + 1e-7, name


def test_without_the_argument_the_forward_is_trl_s() -> None:
    model, inputs = build("qwen2"), batch()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    before = model(**inputs, fused_lm_head=True)
    logits = model(input_ids=inputs["input_ids"]).logits
    add_second_temperature(model)
    after = model(**inputs, fused_lm_head=True)
    assert torch.equal(before.log_probs, after.log_probs)
    assert not hasattr(after, "second_log_probs")
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, logits)
    assert model.generate(inputs["input_ids"], max_new_tokens=2).shape == (3, 11)
    # Without a second temperature there is no second result.
    plain = ScoringModel(model, None)
    plain(**inputs, fused_lm_head=True)
    assert plain.completions("second_log_probs", LENGTH) is None
    with pytest.raises(RuntimeError, match="TRL did not score"):
        ScoringModel(model, T).completions("log_probs", LENGTH)


def test_a_weight_that_zero_3_takes_away_is_refused() -> None:
    weight = torch.randn(V, 8).requires_grad_()
    weight.ds_id = 1
    head = _Head(torch.ones(1, 3, dtype=torch.bool), T)
    with pytest.raises(ValueError, match="ZeRO-3"):
        head.apply(torch.randn(3, 8), weight, None, torch.tensor([1, 2, 3]), 1.0, 64)
