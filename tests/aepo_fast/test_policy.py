"""Scores, layouts under autocast and eager attention, and the gradients of an update."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

from aepo_fast.config import ConfigError, ModelConfig, TrainerConfig
from aepo_fast.models import load_model
from aepo_fast.policy import Policy, choose_layout, token_index, token_mean, token_offsets
from tests.aepo_fast.test_batch import lone_logprobs, make_rows


def policy_of(folder: Path, *, attention: str = "sdpa", layout: str = "auto") -> Policy:
    cfg = ModelConfig(path=str(folder), compute_dtype="float32", attention=attention)  # type: ignore[arg-type]
    model = load_model(cfg, folder, torch.device("cpu"))
    return Policy(model, cfg, TrainerConfig(layout=layout, tokens_per_microbatch=40))  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "grouped"])
@pytest.mark.parametrize("layout", ["shared", "padded", "packed"])
def test_scores_are_the_models_own_logprobs(
    tiny_model_dir: Path, attention: str, layout: str
) -> None:
    policy = policy_of(tiny_model_dir, attention=attention, layout=layout)
    rows = make_rows([4, 1, 0, 9, 3])
    scores = policy.score(rows, range(5), second_temperature=1.3)
    expected = torch.cat([lone_logprobs(policy.model, row).detach() for row in rows if row.length])
    torch.testing.assert_close(scores.logprob, expected, atol=2e-5, rtol=1e-5)
    assert scores.second_logprob is not None
    assert (scores.entropy > 0).all() and (scores.second_logprob != scores.logprob).all()


def test_token_means_are_over_the_chosen_rows() -> None:
    rows = make_rows([2, 3, 1])
    values = torch.tensor([1.0, 2.0, 9.0, 9.0, 9.0, 6.0])
    assert token_mean(values, rows, [0, 2]) == 3.0
    assert token_index(token_offsets(rows), [2, 0]).tolist() == [5, 0, 1]


def test_a_sliding_window_is_never_hidden_behind_a_shared_prompt(tiny_model_dir: Path) -> None:
    policy = policy_of(tiny_model_dir)
    assert policy.layout == "shared"
    policy.model.config.layer_types = ["full_attention", "sliding_attention"]
    assert choose_layout(policy.model, "auto") == "padded"
    with pytest.raises(ConfigError, match="trainer.layout"):
        choose_layout(policy.model, "shared")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_casting_weights_once_and_sparse_embeddings_change_no_gradient(
    tiny_model_dir: Path, checkpointing: bool
) -> None:
    cfg = ModelConfig(
        path=str(tiny_model_dir),
        compute_dtype="bfloat16",
        gradient_checkpointing=checkpointing,
    )
    model = load_model(cfg, tiny_model_dir, torch.device("cpu"))
    policy = Policy(model, cfg, TrainerConfig(tokens_per_microbatch=20))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert embedding.sparse == (embedding.weight is policy.head.weight)
    rows = make_rows([4, 1, 9, 3])
    batches = policy.microbatches(rows, range(4))
    assert len(batches) > 1

    def gradients(context: AbstractContextManager[None], sparse: bool) -> list[torch.Tensor]:
        embedding.sparse = sparse
        model.zero_grad()
        with context:
            for batch in batches:
                policy.logprobs(batch).logprob.sum().backward()
        found = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None and grad.layout == torch.strided for grad in found)
        return [grad.clone() for grad in found if grad is not None]

    wanted = gradients(nullcontext(), False)
    for ours, theirs in zip(gradients(policy.same_weights(), True), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
