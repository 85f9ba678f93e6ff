"""The optimizer's state in CPU memory: the same steps and the same checkpoints, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aepo_fast.config.sections import TrainerConfig
from aepo_fast.training.offload import OffloadedOptimizer, offloaded
from aepo_fast.training.optim import (
    HalfUpdateError,
    MasterAdamW,
    build_optimizer,
    guarded_step,
    set_learning_rate,
)

KINDS = [
    ("adamw", torch.float32),
    ("adamw", torch.bfloat16),
    ("adamw_8bit", torch.float32),
    ("adamw_8bit", torch.bfloat16),
    ("adamw_bf16", torch.bfloat16),
    ("muon", torch.float32),
]


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(64, 128, dtype=dtype), nn.RMSNorm(128, dtype=dtype)
        self.layer = nn.Linear(128, 128, dtype=dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def built(name: Any, dtype: torch.dtype, *, away: bool) -> tuple[Small, Any, list[Any]]:
    model = Small(dtype)
    optimizer: Any = build_optimizer(model, TrainerConfig(optimizer=name, lr=1e-2))
    parts: list[OffloadedOptimizer] = []
    if away:
        optimizer, parts = offloaded(optimizer, part_bytes=1000)  # a parameter at a time
        for part in parts:
            part.to_cpu()
    return model, optimizer, parts


def train(model: Small, optimizer: Any, steps: range, parts: Sequence[Any] = ()) -> list[Any]:
    done: list[Any] = []
    for step in steps:
        for backward in range(2):
            generator = torch.Generator().manual_seed(10 * step + backward)
            ids = torch.randint(64, (32,), generator=generator)
            model.layer(model.norm(model.embedding(ids))).float().square().sum().backward()
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        for part in parts:  # as around sampling
            part.to_cpu() if step % 2 else part.to_device()
        torch.manual_seed(step)  # torchao rounds by chance
        done.append(guarded_step(optimizer, 0.0, max_grad_norm=1.0))
    return done


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        if hasattr(one, "codes"):
            one, other = (torch.cat([x.codes.flatten(), x.scale]) for x in (one, other))
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize(("name", "dtype"), KINDS)
@pytest.mark.parametrize("moves", [False, True], ids=["stays away", "comes and goes"])
def test_steps_from_cpu_memory_are_the_optimizers_own(
    name: str, dtype: torch.dtype, moves: bool
) -> None:
    model, optimizer, _ = built(name, dtype, away=False)
    other, away, parts = built(name, dtype, away=True)
    for steps in (range(2), range(2, 5)):
        expected = train(model, optimizer, steps)
        assert train(other, away, steps, parts if moves else ()) == expected
        assert all(taken and norm > 1 for norm, taken in expected)
        assert_same(list(model.state_dict().values()), list(other.state_dict().values()))
        assert_same(optimizer.state_dict(), away.state_dict())


@pytest.mark.parametrize(("name", "dtype"), KINDS)
@pytest.mark.parametrize("saved_away", [False, True])
def test_a_saved_state_goes_on_with_and_without_offloading(
    name: str, dtype: torch.dtype, saved_away: bool
) -> None:
    model, optimizer, _ = built(name, dtype, away=saved_away)
    train(model, optimizer, range(2))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    train(model, optimizer, range(2, 4))
    for away in (False, True):
        other, again, _ = built(name, dtype, away=away)
        other.load_state_dict(weights)
        buffer.seek(0)
        again.load_state_dict(torch.load(buffer, weights_only=True))
        train(other, again, range(2, 4))
        assert_same(list(model.state_dict().values()), list(other.state_dict().values()))
        assert_same(optimizer.state_dict(), again.state_dict())


def test_what_is_away_takes_no_memory_of_the_device() -> None:
    model, optimizer, (part,) = built("adamw", torch.bfloat16, away=True)
    train(model, optimizer, range(1))
    inner: Any = optimizer.inner
    assert isinstance(inner, MasterAdamW)
    assert all(one.untyped_storage().nbytes() == 4 for one in inner.masters)
    held = [p for values in part._host.values() for p in values.values()]
    assert {name for state in inner.state.values() for name in state} >= {"exp_avg", "exp_avg_sq"}
    in_state = {id(v) for s in inner.state.values() for v in s.values() if v.ndim}
    assert in_state == {id(one) for one in held}
    part.to_device()
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in inner.masters)


def test_a_step_that_fails_leaves_the_groups_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = built("adamw", torch.float32, away=True)
    groups = optimizer.param_groups

    def fail() -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(optimizer.inner, "step", fail)
    with pytest.raises(HalfUpdateError, match="OutOfMemoryError: no memory"):
        train(model, optimizer, range(1))
    assert optimizer.param_groups is groups
