"""Scores, layouts under autocast and eager attention, and the gradients of an update."""

from __future__ import annotations

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
