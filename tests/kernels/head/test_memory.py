"""Logits of one chunk at a time, in every pass."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from aepo_kernels import RowSampling, linear_logprob, linear_token_loss
from aepo_kernels.head import projection
from aepo_kernels.head.tokens import Tokens
from bench.common.timing import peak_extra_bytes
from tests.kernels.head.test_token_loss import grpo_like, make_columns, run
from tests.kernels.oracle import make_case


@pytest.fixture
def most_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks' logits were in memory whenever another one's had just been made."""
    alive: list[weakref.ref] = []
    counts: list[int] = []
    raw_logits = projection.Head.raw_logits

    def watched(
        self: projection.Head, tokens: Tokens, space: torch.Tensor | None = None
    ) -> torch.Tensor:
        made = raw_logits(self, tokens, space)
        alive.append(weakref.ref(made))
        counts.append(sum(reference() is not None for reference in alive))
        return made

    monkeypatch.setattr(projection.Head, "raw_logits", watched)
    return counts


@pytest.mark.parametrize("weight_slice", [None, 50])
def test_token_loss(most_alive: list[int], weight_slice: int | None) -> None:
    case = make_case(60, 16, 200, option="all")
    leaves = case.fresh()
    columns = make_columns(case)
    run(leaves, grpo_like, *columns, chunk_tokens=10, weight_slice=weight_slice).loss.backward()
    # Slices take the last chunk's logits as they are.
    assert len(most_alive) > 3 and max(most_alive) == (1 if weight_slice is None else 2)


def test_logprob(most_alive: list[int]) -> None:
    case = make_case(60, 16, 200).fresh()
    output = linear_logprob(case.hidden, case.weight, case.targets, chunk_tokens=10)
    output.logprob.sum().backward()
    assert len(most_alive) == 12 and max(most_alive) == 1


def test_logprob_of_a_frozen_head(most_alive: list[int]) -> None:
    case = make_case(60, 16, 200).fresh()
    case.weight.requires_grad_(False)
    output = linear_logprob(case.hidden, case.weight, case.targets, chunk_tokens=10)
    output.logprob.sum().backward()
    assert len(most_alive) == 6 and max(most_alive) == 1


LIMIT = 64 * 2**20
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # of malloc.h


def check_extra(run: Callable[[], None], *leaves: torch.Tensor, kept: int) -> None:
    """One of three runs takes no more than LIMIT: a first one also pages in code."""

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    for _ in range(3):
        extra = peak_extra_bytes(run, clear, kept, torch.device("cpu")) or 0
        if extra <= LIMIT:
            break
    assert 0 < extra <= LIMIT


@pytest.fixture
def all_at_once() -> Iterator[None]:
    """Large memory goes back to the system when it is freed, whatever small things lie behind it.

    A run in this process may have told malloc to keep it (aepo_fast.memory).
    """
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_TRIM_THRESHOLD, 2**17)
    mallopt(_TOP_PAD, 0)
    mallopt(_MMAP_MAX, 2**16)
    mallopt(_MMAP_THRESHOLD, 2**18)
    yield
    mallopt(_MMAP_THRESHOLD, 2**25)  # where malloc's own adjustments end


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize(("vocab", "size"), [(50_000, 16), (300_000, 16), (50_000, 320)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", ["score", "train", "slices", "frozen"])
def test_at_most_64_mib_on_a_cpu(vocab: int, size: int, dtype: torch.dtype, call: str) -> None:
    tokens = 1200
    hidden = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, size, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    weight_slice = 2_000 if call == "slices" else None
    weight.requires_grad_(call != "frozen")

    def run() -> None:
        if call == "score":
            with torch.no_grad():
                linear_logprob(hidden, weight, targets)
            return
        if call == "frozen":
            linear_logprob(hidden, weight, targets).logprob.sum().backward()
            return
        output = linear_token_loss(
            hidden, weight, targets, lambda logprob, *_: logprob.sum(), weight_slice=weight_slice
        )
        output.loss.backward()

    kept = 0 if call == "score" else hidden.nbytes + weight.nbytes
    if call == "frozen":
        kept = hidden.nbytes + 4 * hidden.numel()  # the direction, as said
    check_extra(run, hidden, weight, kept=kept)


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize(
    ("tokens", "vocab", "passive", "dtype"),
    [
        (4_096, 6_000, slice(None, None, 100), torch.bfloat16),  # so that the others are picked
        (4_700, 6_000, slice(None, None, 100), torch.bfloat16),
        (4_096, 6_000, slice(None, None, 100), torch.float32),
        (20_000, 600, slice(None, None, 100), torch.bfloat16),
        (20_000, 600, slice(0), torch.bfloat16),
    ],
)
def test_at_most_64_mib_whatever_number_of_hidden_states_has_a_gradient(
    tokens: int, vocab: int, passive: slice, dtype: torch.dtype
) -> None:
    hidden = torch.randn(tokens, 1536, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 1536, dtype=dtype, requires_grad=True)
    targets, advantage = torch.randint(vocab, (tokens,)), torch.ones(tokens)
    advantage[passive] = 0

    def run() -> None:
        linear_token_loss(
            hidden, weight, targets, lambda logprob, _, __, a: (a * logprob).sum(), advantage
        ).loss.backward()

    kept = hidden.nbytes + weight.nbytes
    check_extra(run, hidden, weight, kept=kept)


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
@pytest.mark.usefixtures("all_at_once")
def test_at_most_64_mib_where_rows_are_sampled() -> None:
    hidden = torch.randn(1200, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50_000, 16, dtype=torch.bfloat16, requires_grad=True)
    targets, sampling = torch.randint(50_000, (1200,)), RowSampling(1e-12)

    def run() -> None:
        linear_token_loss(
            hidden, weight, targets, lambda logprob, *_: logprob.sum(), row_sampling=sampling
        ).loss.backward()

    # A sum of the weight's gradients in float32, as said.
    kept = hidden.nbytes + 3 * weight.nbytes
    check_extra(run, hidden, weight, kept=kept)


@pytest.mark.parametrize("option", ["plain", "second"])
def test_results_hold_nothing_once_they_are_gone(option: str) -> None:
    case = make_case(20, 8, 30, option=option).fresh()
    inputs = case.hidden * 1.0
    inputs_node = weakref.ref(inputs)
    output = linear_logprob(inputs, case.weight, case.targets, **case.options, ignore_index=None)
    del inputs, output
    assert inputs_node() is None
