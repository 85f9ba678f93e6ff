"""Where an engine's loader puts trained weights, and one storage for both."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from aepo_fast.rollout.weight_sharing import copy, find_placements, share

HIDDEN = 6


class Trained(nn.Module):
    """Weights as checkpoints have them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {"embed": (11, HIDDEN), "q": (HIDDEN, HIDDEN), "k": (2, HIDDEN), "norm": (HIDDEN,)}
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)
            self.register_parameter(name, nn.Parameter(value))


class Engine(nn.Module):
    """Weights as inference engines have them: q and k in one, the vocabulary padded."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"embed": (16, HIDDEN), "qk": (8, HIDDEN), "norm": (HIDDEN,)}.items():
            empty = torch.zeros(shape, dtype=torch.bfloat16)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        rows = {"q": (0, HIDDEN), "k": (HIDDEN, 2), "embed": (0, 11)}
        for name, value in weights:
            target = self.get_parameter("qk" if name in "qk" else name).data
            if name in rows:
                target = target.narrow(0, *rows[name])
            target.copy_(value)


def pair(dtype: torch.dtype = torch.bfloat16) -> tuple[Trained, Engine]:
    trained, engine = Trained(dtype), Engine()
    engine.load_weights((name, p.detach()) for name, p in trained.named_parameters())
    return trained, engine


def agree(trained: Trained, engine: Engine) -> bool:
    other = Engine()
    other.load_weights((name, p.detach()) for name, p in trained.named_parameters())
    mine, theirs = engine.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_shared_weights_need_no_copy_and_follow_the_optimizer() -> None:
    trained, engine = pair()
    weights = list(trained.named_parameters())
    before = {name: p.detach().clone() for name, p in weights}
    places = find_placements(engine.load_weights, weights)
    assert places is not None
    assert share(weights, places) == []
    storage = {p.untyped_storage().data_ptr() for p in engine.parameters()}
    for name, parameter in weights:
        assert torch.equal(parameter, before[name])
        assert parameter.untyped_storage().data_ptr() in storage
        assert parameter.is_contiguous() and parameter.requires_grad
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
    sum(
        (p.float() * torch.arange(p.numel()).view_as(p)).sum() for p in trained.parameters()
    ).backward()
    optimizer.step()
    assert not torch.equal(trained.q, before["q"])
    assert agree(trained, engine)
    assert (engine.get_parameter("embed")[11:] == 0).all()


def test_weights_of_another_dtype_are_copied_in_one_call() -> None:
    trained, engine = pair(torch.float32)
    weights = list(trained.named_parameters())
    places = find_placements(engine.load_weights, weights)
    assert places is not None
    remaining = share(weights, places)
    assert len(remaining) == 4
    assert sum(place.num_bytes for place in remaining) == sum(2 * p.numel() for _, p in weights)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.5
    assert not agree(trained, engine)
    copy(remaining)
    assert agree(trained, engine)


def test_looking_for_placements_writes_nothing() -> None:
    trained, engine = pair()
    with torch.no_grad():
        trained.q += 1
    before = {name: value.clone() for name, value in engine.state_dict().items()}
    assert find_placements(engine.load_weights, list(trained.named_parameters())) is None
    for name, value in engine.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("change", ["rearranged", "quantised", "left out"])
def test_an_engine_that_does_not_hold_plain_copies_is_not_shared(change: str) -> None:
    trained, engine = pair()
    if change == "rearranged":  # after loading, as kernels of mixtures of experts want it
        engine.get_parameter("qk").data = engine.get_parameter("qk").data.flip(0).clone()
    plain = engine.load_weights

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, value in weights:
            if change == "quantised":
                plain([(name, value.float().round())])
            elif not (change == "left out" and name == "norm"):
                plain([(name, value)])

    assert find_placements(load, list(trained.named_parameters())) is None


def test_a_weight_held_twice_is_copied_to_both() -> None:
    trained, engine = pair()
    head = torch.zeros(11, HIDDEN, dtype=torch.bfloat16)
    head.copy_(trained.embed.detach())

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, value in weights:
            engine.load_weights([(name, value)])
            if name == "embed":
                head.copy_(value)

    weights = list(trained.named_parameters())
    places = find_placements(load, weights)
    assert places is not None
    remaining = share(weights, places)
    assert len(remaining) == 2
    with torch.no_grad():
        trained.embed += 1
        trained.k += 1
    copy(remaining)
    assert torch.equal(head, trained.embed) and agree(trained, engine)
