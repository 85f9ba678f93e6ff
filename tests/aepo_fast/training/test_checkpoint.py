"""The state of random generators, on machines unlike the one that saved it."""

from __future__ import annotations

import pytest
import torch

from aepo_fast.training.checkpoint import rng_state, set_rng_state


@pytest.mark.parametrize("more", [1, 2])
def test_a_run_goes_on_where_there_are_fewer_gpus(more: int) -> None:
    state = rng_state(with_gpu=torch.cuda.is_available())
    expected = torch.rand(3)
    one = torch.get_rng_state() if not torch.cuda.is_available() else torch.cuda.get_rng_state()
    set_rng_state({**state, "cuda": [*state.get("cuda", []), *[one] * more]})
    assert torch.equal(torch.rand(3), expected)
