"""The counter of live bytes, over real tensors and fake ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from aepo_fast.memory.live_storages import LiveStorages


def test_counts_what_lives_and_the_most_of_it() -> None:
    with LiveStorages(unit=1) as counter:
        one = torch.ones(100)  # 400 bytes
        two = one + 1
        view = two[:10].reshape(2, 5)  # no memory of its own
        assert counter.live == 800
        del one, two
        assert counter.live == 400  # the view holds it
        view.add_(1)
        del view
        assert counter.live == 0
    assert counter.peak == 800


def test_rounds_up_and_leaves_out_what_was_there() -> None:
    weight = torch.ones(100)
    counter = LiveStorages(unit=512)
    counter.ignore([weight])
    with counter:
        kept = weight.view(10, 10).t()
        made = weight * 2
        assert kept.shape == (10, 10) and counter.live == 512
        weight.add_(made)
        assert counter.live == 512


def test_segments_keep_peaks_of_their_own() -> None:
    counter = LiveStorages(unit=1)
    with counter:
        with counter.segment("first"):
            big = torch.ones(1000)
            del big
        with counter.segment("second"):
            small = torch.ones(10)
        assert small.numel() == 10
    assert counter.peaks["first"] == 4000 and counter.peaks["second"] == 40


def _bytes_of_a_pass(device_mode: FakeTensorMode | None) -> dict[str, int]:
    counter = LiveStorages(unit=64)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32))
    x = torch.randn(17, 32)
    counter.ignore([*model.parameters(), x])
    with counter:
        with counter.segment("forward"):
            loss = model(x).square().sum()
        with counter.segment("backward"):
            loss.backward()
    return counter.peaks | {"live": counter.live}


def test_fake_tensors_count_as_real_ones() -> None:
    real = _bytes_of_a_pass(None)
    with FakeTensorMode() as mode:
        fake = _bytes_of_a_pass(mode)
    assert fake == real


def test_agrees_with_what_torch_allocates() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    x = torch.randn(512, 64)

    def work() -> None:
        model(x).sum().backward()

    work()
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    now = most = 0
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [one for one in results.events() if one.name() == "[memory]"]
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    model.zero_grad(set_to_none=True)
    counter = LiveStorages(unit=1)
    counter.ignore([*model.parameters(), x])
    with counter:
        work()
    assert abs(counter.peak - most) <= 0.02 * most
