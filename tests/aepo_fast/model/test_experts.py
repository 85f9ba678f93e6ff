"""Routers of a mixture of experts: frozen, or trained with transformers' balancing loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import ModelConfig, TrainerConfig
from aepo_fast.model.experts import check_routers
from aepo_fast.model.load import load_model
from aepo_fast.model.policy import Policy
from tests.model_checks import some_samples
from tests.tiny_architectures import architecture
from tests.tiny_run import a_machine

KINDS = ("qwen3_moe", "gpt_oss")
ROUTERS = {"qwen3_moe": "mlp.gate.", "gpt_oss": "mlp.router."}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architecture(request.param).build(tmp_path_factory.mktemp(request.param) / request.param)


def load(folder: Path, **settings) -> PreTrainedModel:
    cfg = ModelConfig(path=str(folder), **settings)
    return load_model(cfg, folder, a_machine())


def test_frozen_routers_are_all_that_gets_no_gradient(folder: Path) -> None:
    model = load(folder, freeze_router=True)
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ROUTERS[folder.name] in name}
    assert len(frozen) >= 2


@pytest.mark.parametrize(
    ("folder", "layout", "checkpointing"),
    [
        ("qwen3_moe", "padded", "full"),
        ("qwen3_moe", "packed", "none"),
        ("qwen3_moe", "shared", "full"),
        ("gpt_oss", "padded", "none"),
    ],
    indirect=["folder"],
)
def test_the_balancing_loss_has_the_gradient_of_transformers(
    folder: Path, layout, checkpointing
) -> None:
    samples, coef = some_samples(), 0.7
    model = load(folder, gradient_checkpointing=checkpointing)
    policy = Policy(model, a_machine(), TrainerConfig(layout=layout), router_aux_loss_coef=coef)
    batches = policy.microbatches(samples, range(len(samples)))
    assert len(batches) == 1 and batches[0].share == 1.0
    (0 * policy.logprobs(batches[0]).logprob.sum()).backward()  # what is left is the loss's
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = batches[0]
    mask = batch.valid.long() if layout == "padded" else batch.attention_mask
    output = plain.model(
        batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=mask,
        output_router_logits=True,
        use_cache=False,
    )
    # E sum_e f_e P_e over the tokens that are none of the padding, written out.
    flat = batch.valid.flatten()
    probs = torch.cat([logits.softmax(-1)[flat] for logits in output.router_logits])
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(2).indices, 1.0)
    loss = probs.shape[1] * (chosen.mean(0) * probs.mean(0)).sum()
    (coef * loss).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for name, grad in expected.items():
        mine = found[name].to_dense() if found[name].is_sparse else found[name]
        torch.testing.assert_close(mine, grad, rtol=1e-3, atol=1e-6)
    assert any(ROUTERS[folder.name] in name for name in expected)
    # It is no part of what is only measured.
    with torch.no_grad():
        assert torch.equal(
            policy.hidden(batch),
            Policy(model, a_machine(), TrainerConfig(layout=layout)).hidden(batch),
        )


def test_micro_batches_share_the_weight_by_their_tokens(folder: Path) -> None:
    samples = some_samples()
    policy = Policy(load(folder), a_machine(), TrainerConfig(tokens_per_microbatch=45))
    batches = policy.microbatches(samples, range(len(samples)))
    tokens = [int(batch.valid.sum()) for batch in batches]
    assert len(batches) > 1 and [batch.share for batch in batches] == pytest.approx(
        [count / sum(tokens) for count in tokens]
    )


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("llama", {"freeze_router": True}, "model.freeze_router = True: llama has no experts"),
        ("llama", {"router_aux_loss_coef": 0.1}, "router_aux_loss_coef = 0.1: llama has no exp"),
        ("deepseek_v3", {"router_aux_loss_coef": 0.1}, "no loss that balances .* deepseek_v3"),
    ],
)
def test_models_without_routers_or_such_a_loss_are_refused(
    tmp_path: Path, kind: str, settings: dict, reason: str
) -> None:
    config = architecture(kind).config()
    with pytest.raises(ConfigError, match=reason):
        check_routers(ModelConfig(path="some/model", **settings), config)
    check_routers(ModelConfig(path="some/model"), config)
    check_routers(ModelConfig(path="m", freeze_router=True), architecture("deepseek_v3").config())
