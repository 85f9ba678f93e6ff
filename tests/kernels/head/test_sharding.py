"""A vocabulary over several ranks (gloo on the CPU) against float64 autograd of the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aepo_kernels import VocabShard, backends, linear_logprob
from tests.kernels.fuzz.ranks import in_ranks
from tests.kernels.head import test_frozen
from tests.kernels.head.test_logit_stats import at_largest, check
from tests.kernels.head.test_lora import SCALE, factors, merged
from tests.kernels.head.test_token_loss import by_autograd, grpo_like, make_columns, run
from tests.kernels.oracle import (
    Case,
    assert_as_accurate,
    make_case,
    materialised,
    output_weights,
    weighted_gradients,
)

# First ids of the ranks, and the end: as uneven as a padded last rank makes them.
BOUNDS = {2: (0, 700, 1000), 3: (0, 400, 800, 1000)}


def shard_of(case: Case, bounds: tuple[int, ...], rank: int) -> tuple[Case, VocabShard]:
    rows = slice(bounds[rank], bounds[rank + 1])
    bias = None if case.bias is None else case.bias[rows]
    part = Case(case.hidden, case.weight[rows], case.targets, bias, case.options)
    return part.fresh(), VocabShard(start=bounds[rank], vocab=bounds[-1])


def work(rank: int, world_size: int, folder: str, row_kernels: str) -> None:
    """One rank: everything it computes goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    if row_kernels == "triton":
        from aepo_kernels.gpu import rows as triton_rows

        backends.row_operations = lambda hidden: triton_rows
    results: dict[str, Any] = {}
    for option in OPTIONS[row_kernels]:
        case = at_largest(make_case(60, 32, 1000, option=option))
        part, shard = shard_of(case, BOUNDS[world_size], rank)
        more = {"shard": shard, "chunk_tokens": 25, "mean_logits": True, "is_top1": True}
        inputs = part.hidden, part.weight, part.targets
        output = linear_logprob(*inputs, **part.keywords(), **more)
        check(case, output, atol=1e-4 if option == "shift_down" else 1e-5)
        grads = weighted_gradients(part, output[:4], output_weights(60))
        results[f"logprob {option}"] = [x if x is None else x.detach() for x in output[:4]], grads
        case = make_case(60, 32, 1000, option=option)
        part, shard = shard_of(case, BOUNDS[world_size], rank)
        output = run(part, grpo_like, *make_columns(case), shard=shard, chunk_tokens=25)
        output.loss.backward()
        results[f"loss {option}"] = output.loss.detach(), [x.grad for x in part.tensors()]
        part, shard = shard_of(case, BOUNDS[world_size], rank)
        output = run(part, grpo_like, *make_columns(case), shard=shard, weight_slice=150)
        output.loss.backward()
        results[f"slices {option}"] = output.loss.detach(), [x.grad for x in part.tensors()]
    results["lora"] = with_lora(rank, world_size)
    with_equal_logits(rank, world_size)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def with_equal_logits(rank: int, world_size: int) -> None:
    # The largest logit is there once for each rank, and twice on the first.
    weight = torch.zeros(1000, 1)
    largest = torch.tensor([5, 7, *(end - 1 for end in BOUNDS[world_size][2:])])
    weight[largest] = 2.0
    case = Case(torch.ones(len(largest), 1), weight, largest)
    part, shard = shard_of(case, BOUNDS[world_size], rank)
    inputs = part.hidden, part.weight, part.targets
    output = linear_logprob(*inputs, shard=shard, is_top1=True)
    assert output.is_top1 is not None
    assert output.is_top1.tolist() == [True] + [False] * (len(largest) - 1)


def with_lora(rank: int, world_size: int) -> list[torch.Tensor]:
    case = make_case(60, 32, 1000)
    lora_a, lora_b = factors(case, 4, torch.float32)
    bounds = BOUNDS[world_size]
    mine = lora_b.detach()[bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
    part, shard = shard_of(case, bounds, rank)
    names = {"lora_a": lora_a, "lora_b": mine, "lora_scale": SCALE}
    output = linear_logprob(part.hidden, part.weight, part.targets, shard=shard, **names)
    output.logprob.sum().backward()
    assert lora_a.grad is not None and mine.grad is not None
    return [output.logprob.detach(), lora_a.grad, mine.grad]


OPTIONS = {
    "default": ("plain", "token_second", "all", "shift_down"),
    "triton": ("all",),  # the interpreter takes ten seconds for each
}


CASES = [(2, "default"), (3, "default"), (2, "triton")]


@pytest.mark.parametrize(("world_size", "row_kernels"), CASES)
def test_ranks_together_match_the_whole(world_size: int, row_kernels: str, tmp_path: Path) -> None:
    if row_kernels == "triton":
        pytest.importorskip("triton")
    mp.spawn(work, (world_size, str(tmp_path), row_kernels), nprocs=world_size)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for option in OPTIONS[row_kernels]:
        case = make_case(60, 32, 1000, option=option)
        check_logprob(at_largest(case), [rank[f"logprob {option}"] for rank in ranks])
        check_loss(case, [rank[f"loss {option}"] for rank in ranks])
        check_loss(case, [rank[f"slices {option}"] for rank in ranks])
    check_lora([rank["lora"] for rank in ranks])


def check_logprob(case: Case, ranks: list) -> None:
    exact, base = case.fresh(torch.float64), case.fresh()
    truth, theirs = materialised(exact), materialised(base)
    weights = output_weights(60)
    for outputs, _ in ranks:
        for ours, one, other in zip(outputs, theirs, truth, strict=True):
            assert (ours is None) == (other is None)
            if other is not None:
                assert_as_accurate(ours, one, other, "output")
    truth_grads = weighted_gradients(exact, truth, weights)
    check_gradients(
        [grads for _, grads in ranks], weighted_gradients(base, theirs, weights), truth_grads
    )


def check_loss(case: Case, ranks: list) -> None:
    columns = make_columns(case)
    loss, _, truth = by_autograd(case.fresh(torch.float64), grpo_like, *columns)
    base_loss, _, base = by_autograd(case.fresh(), grpo_like, *columns)
    for ours, _ in ranks:
        assert_as_accurate(ours, base_loss, loss, "loss")
    check_gradients([grads for _, grads in ranks], base, truth)


def check_gradients(ranks: list, base: list, truth: list) -> None:
    for grads in ranks:  # hidden's is whole on every rank
        assert torch.equal(grads[0], ranks[0][0])
    assert_as_accurate(ranks[0][0], base[0], truth[0], "gradient of hidden")
    for index in range(1, len(truth)):
        joined = torch.cat([grads[index] for grads in ranks])
        assert_as_accurate(joined, base[index], truth[index], f"gradient {index}")


def check_lora(ranks: list) -> None:
    case = make_case(60, 32, 1000)
    results = []
    for dtype in (torch.float64, torch.float32):
        low = factors(case, 4, dtype)
        logprob = materialised(merged(case.fresh(dtype), *low))[0]
        assert logprob is not None
        results.append([logprob, *torch.autograd.grad(logprob.sum(), low)])
    truth, base = results
    for values in ranks:
        assert_as_accurate(values[0], base[0], truth[0], "logprob")
        assert torch.equal(values[1], ranks[0][1])
    assert_as_accurate(ranks[0][1], base[1], truth[1], "lora_a")
    assert_as_accurate(torch.cat([v[2] for v in ranks]), base[2], truth[2], "lora_b")


@pytest.mark.parametrize("reduce_hidden", [True, False])
@pytest.mark.parametrize(
    ("name", "option", "dtype"),
    [(name, "all", torch.float32) for name in test_frozen.NAMES]
    + [("logprob", "plain", torch.bfloat16)],
)
def test_a_frozen_head_over_ranks(
    name: str, option: str, dtype: torch.dtype, reduce_hidden: bool
) -> None:
    case = make_case(60, 32, 1000, option=option, dtype=dtype)

    def gradient(rank: int) -> torch.Tensor:
        part, shard = shard_of(case, BOUNDS[2], rank)
        shard = replace(shard, reduce_hidden=reduce_hidden)
        part = test_frozen.frozen(part)
        options = {**part.keywords(), "shard": shard, "chunk_tokens": 25, "grad_of": (name,)}
        output = linear_logprob(part.hidden, part.weight, part.targets, **options)
        return test_frozen.by_hidden(part, output, name)

    parts = in_ranks(2, gradient)
    if reduce_hidden:
        assert torch.equal(*parts)
    whole = parts[0] if reduce_hidden else parts[0].float() + parts[1].float()
    exact, base = test_frozen.frozen(case, torch.float64), test_frozen.frozen(case)
    expected = [test_frozen.by_hidden(x, materialised(x), name) for x in (base, exact)]
    assert_as_accurate(whole, *expected, f"gradient by {name}")


def test_a_shard_without_a_process_group_raises() -> None:
    case = make_case(5, 8, 30)
    with pytest.raises(ValueError, match="not initialised; call torch.distributed"):
        linear_logprob(case.hidden, case.weight, case.targets, shard=VocabShard(0, 60))


@pytest.mark.parametrize("sum_squares", [False, True])
def test_a_rank_whose_part_can_never_be_sampled(sum_squares: bool) -> None:
    """Rows that pad a vocabulary have a bias of -inf, and a rank may have no others."""
    case = make_case(20, 8, 30)
    bias = torch.zeros(30)
    bias[15:] = -torch.inf
    targets = case.targets % 15
    options = {"second_temperature": 1.4, "sum_squares": sum_squares}

    def results(hidden: torch.Tensor, weight: torch.Tensor, rows: slice, **more: Any) -> list:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight[rows])]
        given = {"bias": bias[rows].to(hidden.dtype), **options, **more}
        output = linear_logprob(*leaves, targets, **given)
        assert output.second_logprob is not None
        (output.logprob + output.entropy + output.lse + output.second_logprob).sum().backward()
        return [output.logprob, output.entropy, output.lse, output.second_logprob] + [
            *([output.sum_squares] if sum_squares else []), *(leaf.grad for leaf in leaves)
        ]  # fmt: skip

    whole = results(case.hidden.double(), case.weight.double(), slice(0, 30), backend="reference")
    parts = in_ranks(
        2,
        lambda rank: results(
            case.hidden,
            case.weight,
            slice(15 * rank, 15 * rank + 15),
            shard=VocabShard(15 * rank, 30),
        ),
    )
    for part in parts:
        for found, truth in zip(part[:-1], whole[:-1], strict=True):
            torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)
    joined = torch.cat([part[-1] for part in parts])
    torch.testing.assert_close(joined.double(), whole[-1], rtol=1e-4, atol=1e-5)
