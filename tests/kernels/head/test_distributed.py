"""Two ranks (gloo on the CPU): sequence parallelism, a head that is a DTensor, and DDP."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from aepo_kernels import VocabShard, cpu, linear_logprob, linear_token_loss
from aepo_kernels.cpu import layers
from aepo_kernels.integrations import backbone_of, head_arguments
from tests.kernels.gemm_units import counted
from tests.kernels.head.test_lora import factors
from tests.kernels.oracle import Case, assert_as_accurate, make_case, materialised

WORLD = 2


def work(rank: int, folder: str) -> None:
    """One rank, which checks everything itself."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    for dtype in (torch.float32, torch.bfloat16):
        for call in (by_logprob, by_token_loss, by_slices):
            sequence_parallel(mesh, call, dtype)
    frozen_head(rank)
    low_rank(rank)
    for vocab in (1000, 999):
        head_of_a_dtensor(mesh, vocab)
    refused_tensors(mesh)
    data_parallel(rank)
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=WORLD)


def minus_sum(logprob: Tensor, entropy: Tensor, second: Tensor | None) -> Tensor:
    return -logprob.sum() - 0.1 * entropy.sum()


def weighted_sum(logprob: Tensor, entropy: Tensor, second: Any, *columns: Tensor) -> Tensor:
    return (-columns[2] * (logprob + 0.1 * entropy)).sum()


def by_logprob(*inputs: Tensor, **options: Any) -> Tensor:
    output = linear_logprob(*inputs, **options)
    return minus_sum(output.logprob, output.entropy, None)


def by_token_loss(*inputs: Tensor, **options: Any) -> Tensor:
    return linear_token_loss(*inputs, minus_sum, **options).loss  # type: ignore[misc]


def by_slices(*inputs: Tensor, **options: Any) -> Tensor:
    return by_token_loss(*inputs, **options, weight_slice=150)


def gradients(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of hidden and weight, from all logits."""
    leaves = case.fresh(dtype)
    logprob, entropy, *_ = materialised(leaves)
    assert logprob is not None and entropy is not None
    return torch.autograd.grad(minus_sum(logprob, entropy, None), leaves.tensors())


def frozen_head(rank: int) -> None:
    """A direction of each rank, added up in the forward pass."""
    case = make_case(60, 32, 1000, option="ignored")
    found = []
    for shard in (VocabShard(500 * rank, 1000), None):
        leaves = case.fresh()
        weight = leaves.weight.detach()[500 * rank : 500 * rank + 500] if shard else leaves.weight
        with counted(int((case.targets != -100).sum()), 32, 500) as units:
            output = linear_logprob(leaves.hidden, weight, case.targets, shard=shard)
            (found_here,) = torch.autograd.grad(output.logprob.sin().sum(), leaves.hidden)
        assert not shard or units.total == pytest.approx(2)
        found.append(found_here)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class Gather(torch.autograd.Function):
    """All ranks' tokens, [N, H], from this rank's; backward adds up what all ranks bring."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        parts = [torch.empty_like(hidden) for _ in range(WORLD)]
        dist.all_gather(parts, hidden.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total.chunk(WORLD)[dist.get_rank()]


def sequence_parallel(mesh: DeviceMesh, call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """The head behind a gather of tokens, which is torch's own or one as Megatron has it."""

    def through_dtensor(mine: Tensor) -> Tensor:
        whole = DTensor.from_local(mine, mesh, [Shard(0)]).redistribute(mesh, [Replicate()])
        return whole.to_local(grad_placements=[Partial()])

    case = make_case(60, 32, 1000, dtype=dtype)
    truth, base = gradients(case, torch.float64), gradients(case, dtype)
    rank = dist.get_rank()
    for gather in (Gather.apply, through_dtensor):
        for reduces in (False, True):
            mine = case.hidden.chunk(WORLD)[rank].clone().requires_grad_()
            weight = case.weight[rank * 500 :][:500].clone().requires_grad_()
            shard = VocabShard(rank * 500, 1000, reduce_hidden=reduces)
            hidden: Any = gather(mine)
            call(hidden, weight, case.targets, shard=shard).backward()
            assert mine.grad is not None and weight.grad is not None
            # Added up before the gather's backward, the gradient would count once for each rank.
            times = WORLD if reduces else 1
            right, theirs = (x[0].chunk(WORLD)[rank] for x in (truth, base))
            assert_as_accurate(mine.grad / times, theirs, right, f"hidden {call.__name__}")
            right, theirs = (x[1].chunk(WORLD)[rank] for x in (truth, base))
            assert_as_accurate(weight.grad, theirs, right, f"weight {call.__name__}")


def low_rank(rank: int) -> None:
    """The gradient of lora_a, which all ranks have, is whole wherever hidden's is added up."""
    case, results = make_case(60, 32, 1000), []
    for reduces in (True, False):
        part = Case(case.hidden, case.weight.chunk(WORLD)[rank], case.targets).fresh()
        lora_a, lora_b = factors(case, 4, torch.float32)
        more = {"lora_a": lora_a, "lora_b": lora_b.chunk(WORLD)[rank]}
        shard = VocabShard(500 * rank, 1000, reduce_hidden=reduces)
        by_logprob(part.hidden, part.weight, part.targets, shard=shard, **more).backward()
        assert part.hidden.grad is not None
        results.append((part.hidden.grad, lora_a.grad))
    (whole, right), (mine, found) = results
    dist.all_reduce(mine)
    torch.testing.assert_close(mine, whole)
    assert torch.equal(found, right)


def head_of_a_dtensor(mesh: DeviceMesh, vocab: int) -> None:
    case = make_case(40, 16, vocab)
    truth, base = gradients(case, torch.float64), gradients(case, torch.float32)
    weight = torch.nn.Parameter(distribute_tensor(case.weight, mesh, [Shard(0)]))
    hidden = case.hidden.clone().requires_grad_()
    names: dict[str, Any] = {"VocabShard": VocabShard, "linear_logprob": linear_logprob}
    names |= {"hidden": hidden, "targets": case.targets}
    names["model"] = SimpleNamespace(lm_head=SimpleNamespace(weight=weight))
    exec(documented("from_dtensor"), names)
    shard, output = names["shard"], names["out"]
    assert (shard.start, shard.vocab) == (500 * dist.get_rank(), vocab) and shard.reduce_hidden
    minus_sum(output.logprob, output.entropy, None).backward()
    assert isinstance(weight.grad, DTensor) and hidden.grad is not None
    assert_as_accurate(hidden.grad, base[0], truth[0], "hidden")
    assert_as_accurate(weight.grad.full_tensor(), base[1], truth[1], "weight")
    assert not VocabShard.from_dtensor(weight, reduce_hidden=False).reduce_hidden


def refused_tensors(mesh: DeviceMesh) -> None:
    """Each is refused on all ranks, so that none waits for the other."""
    weight, rank = torch.randn(10, 4), dist.get_rank()
    square = init_device_mesh("cpu", (1, WORLD))
    by_hand = weight[:7] if rank == 0 else weight[7:]
    uneven = {"run_check": False, "shape": weight.shape, "stride": weight.stride()}
    for tensor, message in (
        (weight, r"weight = Tensor \(10, 4\): is no DTensor; pass VocabShard\(start"),
        (distribute_tensor(weight, mesh, [Replicate()]), "placed as R.*, not split by rows"),
        (distribute_tensor(weight, mesh, [Shard(1)]), "placed as S.*, not split by rows"),
        (distribute_tensor(weight, square, [Shard(0), Shard(0)]), "mesh of 2 dimensions"),
        (distribute_tensor(weight[:1], mesh, [Shard(0)]), "1 rows leave one of 2 ranks without"),
        (DTensor.from_local(by_hand, mesh, [Shard(0)], **uneven), "has [37] rows here, not the 5"),
    ):
        with pytest.raises(ValueError, match=message):
            VocabShard.from_dtensor(tensor)
    # Their kernels would read from addresses that are none.
    parts, targets = distribute_tensor(weight, mesh, [Shard(0)]), torch.tensor([1, 2, 3])
    way_out = r"weight = DTensor \(10, 4\): .*full_tensor\(\), .*VocabShard.from_dtensor\(weight\)"
    with pytest.raises(ValueError, match=way_out):
        linear_logprob(torch.randn(3, 4), parts, targets)
    with pytest.raises(ValueError, match=way_out):
        linear_token_loss(torch.randn(3, 4), parts, targets, lambda logprob, *_: -logprob.sum())
    if cpu.unavailable_reason() is None:
        with pytest.raises(TypeError, match=r"got a DTensor, which .*full_tensor\(\)"):
            layers.rms_norm(torch.randn(3, 4), parts[0], 1e-6)
        same = [
            distribute_tensor(one, mesh, [Replicate()]) for one in (weight.T, *torch.rand(2, 4))
        ]
        with pytest.raises((RuntimeError, NotImplementedError), match="cpu_sample_rows"):
            cpu.draw_tokens(*same)


class Body(torch.nn.Linear):
    """A model without its head, as transformers returns its hidden states, [B, T, H]."""

    def forward(self, inputs: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(last_hidden_state=super().forward(inputs))


class Model(torch.nn.Module):
    """What the documentation's example needs of a model."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(to_dict=dict))

    def __init__(self, body: Tensor, head: Tensor) -> None:
        super().__init__()
        self.model, self.lm_head = (
            kind(x.shape[1], x.shape[0], bias=False)
            for kind, x in ((Body, body), (torch.nn.Linear, head))
        )
        self.model.weight.data, self.lm_head.weight.data = body, head

    @property
    def base_model(self) -> torch.nn.Module:
        return self.model

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head


def documented(name: str) -> str:
    """The example of docs/kernels.md that has this text in it."""
    text = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text()
    blocks = re.findall("```python needs ranks\n(.*?)```", text, re.DOTALL)
    (block,) = (x for x in blocks if name in x)
    return block


def data_parallel(rank: int) -> None:
    """The documentation's example adds up the ranks' gradients, and what it warns of does not."""
    case, body = make_case(60, 16, 100), torch.eye(16) + 0.1
    names: dict[str, Any] = {
        "torch": torch,
        "linear_token_loss": linear_token_loss,
        "backbone_of": backbone_of,
        "head_arguments": head_arguments,
        "grpo": weighted_sum,
    }
    names["model"] = Model(body.clone(), case.weight.clone())
    inputs = torch.cat([case.hidden.chunk(WORLD)[rank], torch.zeros(1, 16)])[None]  # [1, T, H]
    targets, weight = case.targets.chunk(WORLD)[rank], torch.full((30,), WORLD / 60)
    more = dict.fromkeys(("old_logprob", "advantage", "token_weight"), weight)
    names |= {"input_ids": inputs, "targets": targets, **more}
    exec(documented("class PolicyLoss"), names)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (body.clone(), case.weight.clone())]
        logprob, entropy, *_ = materialised(
            Case(case.hidden.to(dtype) @ leaves[0].T, leaves[1], case.targets)
        )
        assert logprob is not None and entropy is not None
        loss = minus_sum(logprob, entropy, None) / 60
        results.append(torch.autograd.grad(loss, leaves))
    for parameter, truth, base in zip(names["model"].parameters(), *results, strict=True):
        assert_as_accurate(parameter.grad, base, truth, "gradient under DDP")
        parameter.grad = None
    names["policy_loss"].module(inputs, targets, weight, weight, weight).backward()
    alone = names["model"].lm_head.weight.grad
    first = alone.clone()
    dist.broadcast(first, 0)
    assert rank == 0 or not torch.allclose(first, alone)
