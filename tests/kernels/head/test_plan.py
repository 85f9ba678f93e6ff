"""How many tokens a GPU takes at once; tensors without memory stand in for a GPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aepo_kernels import RowSampling, VocabShard, backends
from aepo_kernels import problem as problem_module
from aepo_kernels.cpu import rows as cpu_rows
from aepo_kernels.head.plan import Strategy, make_plan
from aepo_kernels.problem import Problem


def chunk_size(problem: Problem) -> int:
    return make_plan(problem).gradient_tokens


def gradient_chunk_size(problem: Problem, needs_weight: bool, rows: int) -> int:
    return make_plan(problem, needs_weight=needs_weight, rows=rows).gradient_tokens


def problem(hidden_size: int = 4096, vocab: int = 151_936, **more) -> Problem:
    hidden = torch.empty(64, hidden_size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocab, hidden_size, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(64, dtype=torch.int64, device="meta")
    return Problem(hidden, weight, targets, ignore_index=None, **more)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("hidden_size", [896, 4096])
def test_one_chunk_where_it_needs_no_more_memory_than_a_sum_of_gradients(
    hidden_size: int, logits_dtype: torch.dtype | None
) -> None:
    head = problem(hidden_size, logits_dtype=logits_dtype)
    vocab, size, width = 151_936, chunk_size(head), 2 if logits_dtype is None else 6
    most = next(n for n in range(60_000, 0, -1) if gradient_chunk_size(head, True, n) == n)
    assert most * vocab * width <= size * vocab * width + vocab * hidden_size * 4
    assert most > size
    for several in (most + 1, 3 * most):
        assert gradient_chunk_size(head, True, several) <= size


@pytest.mark.parametrize(
    "more",
    [
        {"weight_grad": torch.empty(0, device="meta")},  # its sum is there anyway
        {"row_sampling": RowSampling(0.1)},  # the sampled rows' logits are a copy
        {"chunk_tokens": 5000},
    ],
    ids=str,
)
def test_no_larger_chunks_where_they_spare_nothing(more: dict) -> None:
    head = problem(**more)
    assert gradient_chunk_size(head, True, 8192) <= chunk_size(head)
    assert gradient_chunk_size(problem(), False, 8192) <= chunk_size(problem())


def test_several_chunks_are_equal() -> None:
    head = problem(896)
    assert chunk_size(head) < 8192 < gradient_chunk_size(head, True, 10**6) * 10**6
    size = gradient_chunk_size(head, True, 8192)
    assert size == 4096
    assert gradient_chunk_size(head, True, 8200) == 4160  # whole multiples of 64


def test_fused_writes_the_gradient_once_only_where_it_goes_forward_at_once() -> None:
    head = problem(backend="fused")
    assert gradient_chunk_size(head, True, 4096) == 4096
    # Two parts would be added up in bfloat16.
    assert gradient_chunk_size(head, True, 4097) <= chunk_size(head) < 4096


@pytest.mark.parametrize(
    ("rows", "more"), [(4097, {}), (20_000, {"chunk_tokens": 100_000})], ids=str
)
def test_parts_of_the_fused_forward_pass_are_added_up_in_float32(rows: int, more: dict) -> None:
    small = problem(vocab=8_192, backend="fused", **more)
    assert rows <= gradient_chunk_size(small, True, rows)
    for count, once in ((4096, True), (rows, False)):
        assert make_plan(small, needs_weight=True, rows=count).written_once == once


def test_ranks_agree_on_chunks_where_their_rows_are_uneven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(problem_module.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(backends, "upcasts_gemms", lambda hidden: True)
    monkeypatch.setattr(backends, "gemms_in_cpp", lambda hidden: True)
    monkeypatch.setattr(backends, "row_operations", lambda hidden: cpu_rows)
    sizes = []
    for start, stop in ((0, 100_000), (100_000, 160_000)):
        shard = VocabShard(start, 160_000)
        part = problem(512, stop - start, shard=shard)
        part = replace(part, hidden=torch.empty(0, 512, dtype=torch.bfloat16))
        sizes.append(make_plan(part, needs_weight=True, rows=2000).stash)
    assert sizes[0] == sizes[1] and sizes[0].dtype == torch.float16 and sizes[0].beside > 0


def test_the_strategy_follows_device_and_memory() -> None:
    on_gpu = problem(64)
    assert make_plan(on_gpu, needs_weight=True, rows=10**6).strategy is Strategy.CHUNKS
    for hidden_size, expected in ((64, Strategy.SLICES), (4096, Strategy.BLOCKS)):
        on_cpu = problem(hidden_size)
        on_cpu = replace(on_cpu, hidden=torch.empty(0, hidden_size, dtype=torch.bfloat16))
        assert make_plan(on_cpu, needs_weight=True, rows=5000).strategy is expected
        assert make_plan(on_cpu, needs_weight=False, rows=5000).strategy is Strategy.CHUNKS
        assert make_plan(on_cpu, needs_weight=True, rows=10).strategy is Strategy.CHUNKS
    asked = replace(on_gpu, weight_slice=1000)
    assert make_plan(asked, needs_weight=True, rows=10).strategy is Strategy.SLICES
