"""Random generators' states on other machines, and which model a checkpoint was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import ModelConfig
from aepo_fast.training.checkpoint import check_same_model, rng_state, set_rng_state


@pytest.mark.parametrize("more", [1, 2])
def test_a_run_goes_on_where_there_are_fewer_gpus(more: int) -> None:
    state = rng_state(with_gpu=torch.cuda.is_available())
    expected = torch.rand(3)
    one = torch.get_rng_state() if not torch.cuda.is_available() else torch.cuda.get_rng_state()
    set_rng_state({**state, "cuda": [*state.get("cuda", []), *[one] * more]})
    assert torch.equal(torch.rand(3), expected)


def test_another_revision_is_another_model(tmp_path: Path) -> None:
    state = {"model_path": ModelConfig(path="some/model", revision="v1").origin}
    check_same_model(state, "some/model@v1", tmp_path)
    for other in ("some/model", "some/model@v2"):
        with pytest.raises(ConfigError, match="was made from 'some/model@v1'"):
            check_same_model(state, other, tmp_path)
    assert ModelConfig(path="some/model").origin == "some/model"  # as earlier checkpoints have it
