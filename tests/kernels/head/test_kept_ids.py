"""Log-probs and losses of the ids that a sampler kept, against float64 softmax with a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels import RowSampling, VocabShard, linear_logprob, linear_token_loss
from aepo_kernels.head.budget import Budget
from aepo_kernels.head.kept_ids import _chunks
from tests.kernels.budgets import logprob_within, token_loss_within
from tests.kernels.oracle import IGNORED, OPTIONS, Case, make_case, output_weights

VOCAB = 200
SMALL = Budget(kept_bytes=3 * 4 * 32 * 50)  # 50 gathered rows of 32 numbers
BACKENDS = ["chunked", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUNDINGS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def kept_of(case: Case, most: int = 24, seed: int = 5) -> Tensor:
    """The target and others, at most so many, in any order and padded: [N, most]."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(VOCAB, generator=rng)[:most] for _ in case.targets])
    counts = torch.randint(1, most + 1, (len(ids), 1), generator=rng)
    ids = torch.where(torch.arange(most) < counts, ids, -1)
    has_target = (ids == case.targets[:, None]).any(1)
    ids[:, 0] = torch.where(has_target, ids[:, 0], case.targets)
    ids[case.targets == IGNORED, 0] = -1
    return ids.gather(1, torch.rand(ids.shape, generator=rng).argsort(1))


def with_lora(case: Case) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(9)
    down = torch.randn(3, case.hidden.shape[1], generator=rng, dtype=torch.float64)
    up = torch.randn(VOCAB, 3, generator=rng, dtype=torch.float64) * 0.3
    return {"lora_a": down, "lora_b": up, "lora_scale": 0.5}


def truth(case: Case, ids: Tensor, lora: dict[str, Any]) -> list[Tensor | None]:
    """The four outputs from all logits in float64; everything that was not kept is -inf."""
    logits = case.hidden @ case.weight.T
    if lora:
        logits = logits + lora["lora_scale"] * (case.hidden @ lora["lora_a"].T) @ lora["lora_b"].T
    logits = (logits if case.bias is None else logits + case.bias).double()
    logits = logits * case.options.get("logit_scale", 1.0)
    if cap := case.options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    found: list[list[Tensor]] = [[], [], [], []]
    for row, target, some, index in zip(logits, case.targets, ids, range(len(ids)), strict=True):
        if target == IGNORED:
            for values in found:
                values.append(torch.zeros((), dtype=torch.float64))
            continue
        inside = sorted({int(i) for i in some if i >= 0 and row[i] > -torch.inf})
        for number, name in enumerate(("temperature", "second_temperature")):
            value = case.options.get(name, 1.0)
            value = float(value[index]) if isinstance(value, Tensor) else value
            tempered = row[inside] / value
            logp = torch.log_softmax(tempered, 0)
            found[3 * number].append(logp[inside.index(int(target))])
            if not number:
                found[1].append(torch.special.entr(logp.exp()).sum())
                found[2].append(tempered.logsumexp(0))
    outputs: list[Tensor | None] = [torch.stack(values) for values in found]
    if "second_temperature" not in case.options:
        outputs[3] = None
    return outputs


def gradients(leaves: list[Tensor], outputs: list[Tensor | None]) -> list[Tensor]:
    weights = output_weights(len(leaves[0]))
    terms = [(w * x).sum() for x, w in zip(outputs, weights, strict=True) if x is not None]
    return list(torch.autograd.grad(torch.stack(terms).sum(), leaves))


def near(found: Tensor, wanted: Tensor, unit: float) -> None:
    assert found.shape == wanted.shape
    off = (found.double() - wanted).abs()
    assert (off <= unit * (1 + wanted.abs().max())).all(), off.max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_float64(option: str, dtype: torch.dtype, lora: bool, backend: str) -> None:
    case = make_case(40, 32, VOCAB, dtype=dtype, option=option)
    ids, more = kept_of(case), with_lora(case) if lora else {}
    more = {k: x.to(dtype) if isinstance(x, Tensor) else x for k, x in more.items()}
    ours, exact = case.fresh(), case.fresh(torch.float64)

    def leaves_of(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
        leaves = {
            k: x.detach().clone().to(dtype).requires_grad_() if isinstance(x, Tensor) else x
            for k, x in more.items()
        }
        return [*case.tensors(), *(x for x in leaves.values() if isinstance(x, Tensor))], leaves

    leaves, options = leaves_of(ours, dtype)
    options |= {**ours.keywords(), "kept_ids": ids, "backend": backend}
    output = logprob_within(SMALL, ours.hidden, ours.weight, ours.targets, **options)
    exact_leaves, exact_lora = leaves_of(exact, torch.float64)
    wanted = truth(exact, ids, exact_lora)
    unit = 1e-13 if dtype == torch.float64 else 4e-6
    unit *= 20 if "shift" in option else 1
    for one, other in zip(output[:4], wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            near(one, other, unit)
    rounding = ROUNDINGS.get(dtype, unit)
    pairs = zip(
        gradients(leaves, [*output[:4]]), gradients(exact_leaves, wanted), leaves, strict=True
    )
    for one, other, leaf in pairs:
        assert one.dtype == leaf.dtype
        near(one, other, rounding)
    if backend == "chunked":
        assert output.backend == "chunked" and output.row_kernels == "torch (kept_ids)"


@pytest.mark.parametrize("most", [3, 24, 120])
def test_any_chunk_gives_the_same(most: int) -> None:
    case = make_case(40, 32, VOCAB, option="all")
    ids, results = kept_of(case, most), []
    for budget, tokens in ((SMALL, None), (SMALL, 7), (Budget(), None)):
        leaves = case.fresh()
        options = leaves.keywords() | {"kept_ids": ids, "chunk_tokens": tokens}
        output = logprob_within(budget, leaves.hidden, leaves.weight, leaves.targets, **options)
        results.append([*output[:4], *gradients(leaves.tensors(), [*output[:4]])])
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            near(one, other, 1e-6)


def test_memory_is_bounded_at_any_number_of_ids() -> None:
    case = make_case(10, 32, VOCAB)
    from aepo_kernels.problem import Problem

    problem = Problem(case.hidden, case.weight, case.targets, kept_ids=kept_of(case, 120))
    for chunk in _chunks(problem, None, SMALL):
        widest = max(some.stop - some.start for some in chunk.columns)
        assert len(chunk.targets) * widest <= 50


def test_all_ids_give_what_no_kept_ids_give() -> None:
    case, outputs = make_case(40, 32, VOCAB, option="all"), []
    for ids in (None, torch.arange(VOCAB).expand(40, VOCAB)):
        leaves = case.fresh()
        found = linear_logprob(
            leaves.hidden, leaves.weight, leaves.targets, kept_ids=ids, **leaves.keywords()
        )
        outputs.append([*found[:4], *gradients(leaves.tensors(), [*found[:4]])])
    for one, other in zip(*outputs, strict=True):
        near(one, other, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_id_is_certain(backend: str) -> None:
    leaves = make_case(40, 32, VOCAB, option="token_second").fresh()
    options = leaves.options | {"kept_ids": leaves.targets[:, None], "backend": backend}
    output = linear_logprob(leaves.hidden, leaves.weight, leaves.targets, **options)
    for values in (output.logprob, output.entropy, output.second_logprob):
        assert torch.equal(values, torch.zeros(40))  # type: ignore[arg-type]
    first, second = torch.autograd.grad(output.logprob.sum(), leaves.tensors())
    assert not first.any() and not second.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_that_stands_twice_counts_once(backend: str) -> None:
    case = make_case(40, 32, VOCAB, option="bias")
    ids, found = kept_of(case), []
    for given in (ids, torch.cat([ids, ids.flip(1)], 1)):
        leaves = case.fresh()
        options = leaves.keywords() | {"kept_ids": given, "backend": backend}
        output = linear_logprob(leaves.hidden, leaves.weight, leaves.targets, **options)
        found.append([*output[:3], *gradients(leaves.tensors(), [*output[:4]])])
    for one, other in zip(*found, strict=True):
        near(one, other, 1e-6)


def test_extreme_logits_and_masked_columns_stay_finite() -> None:
    case = make_case(40, 32, VOCAB, option="bias")
    assert case.bias is not None
    case = replace(case, weight=case.weight * 100)
    ids = kept_of(case)
    masked = torch.ones(VOCAB, dtype=torch.bool)
    masked[case.targets] = False
    case.bias[masked] = -torch.inf
    ours, exact = case.fresh(), case.fresh(torch.float64)
    outputs = linear_logprob(
        ours.hidden, ours.weight, ours.targets, kept_ids=ids, **ours.keywords()
    )[:4]
    wanted = truth(exact, ids, {})
    for one, other in zip(outputs, wanted, strict=True):
        if one is not None and other is not None:
            near(one, other, 1e-5)
    for one, other in zip(
        gradients(ours.tensors()[:2], [*outputs]),
        gradients(exact.tensors()[:2], wanted),
        strict=True,
    ):
        near(one, other, 2e-4)


def policy_gradient(
    logprob: Tensor, entropy: Tensor, second: Tensor | None, advantage: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    loss = -(torch.exp(logprob) * advantage).sum() - 0.1 * entropy.sum()
    return loss + (0 if second is None else second.sum()), {"entropy": entropy.sum()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("active", [False, True], ids=["", "active"])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_a_token_loss_matches_float64(option: str, active: bool, backend: str) -> None:
    case = make_case(40, 32, VOCAB, option=option)
    ids, advantage = kept_of(case), torch.linspace(-1, 1, 40)
    some = torch.arange(0, 40, 3) if active else None
    ours, exact = case.fresh(), case.fresh(torch.float64)
    options = ours.keywords() | {"kept_ids": ids, "active": some, "backend": backend}
    given = ours.hidden, ours.weight, ours.targets, policy_gradient, advantage
    output = token_loss_within(SMALL, *given, **options)
    first, entropy, _, second = truth(exact, ids, {})
    keep = case.targets != IGNORED
    inside = keep.clone()
    if some is not None:
        inside = torch.zeros_like(keep).index_fill(0, some, True) & keep
    vectors = [
        None if x is None else x.where(inside, x.detach())[keep] for x in (first, entropy, second)
    ]
    wanted, metrics = policy_gradient(*vectors, advantage.double()[keep])  # type: ignore[arg-type]
    near(output.loss.detach(), wanted.detach(), 1e-6)
    near(output.metrics["entropy"], metrics["entropy"].detach(), 1e-6)
    assert first is not None
    near(output.logprob, first.detach(), 1e-6)
    grads = torch.autograd.grad(2.5 * output.loss, ours.tensors())
    for one, other in zip(grads, torch.autograd.grad(wanted, exact.tensors()), strict=True):
        near(one, 2.5 * other, 2e-6)


def test_no_token_at_all() -> None:
    leaves = make_case(4, 32, VOCAB, option="all").fresh()
    leaves.targets.fill_(IGNORED)
    ids = torch.full((4, 3), -1)
    given = leaves.hidden, leaves.weight, leaves.targets
    output = linear_logprob(*given, kept_ids=ids, **leaves.keywords())
    assert torch.equal(output.logprob, torch.zeros(4))
    assert not torch.autograd.grad(output.logprob.sum(), leaves.weight)[0].any()
    loss = linear_token_loss(
        *given, policy_gradient, torch.ones(4), kept_ids=ids, **leaves.keywords()
    )
    assert loss.loss == 0 and not torch.autograd.grad(loss.loss, leaves.weight)[0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept_ids": torch.zeros(4, dtype=torch.int64)}, r"kept_ids = \(4,\): must be \[5, K\]"),
        ({"kept_ids": torch.zeros(5, 0, dtype=torch.int64)}, r"must be \[5, K\]"),
        ({"kept_ids": torch.zeros(5, 2)}, "kept_ids = torch.float32: must be int64"),
        ({"kept_ids": torch.full((5, 2), VOCAB)}, f"kept_ids = {VOCAB}: outside"),
        ({"kept_ids": torch.full((5, 2), -2)}, "kept_ids = -2: outside"),
        ({"kept_ids": torch.full((5, 2), -1)}, "targets = 3: is not among its kept_ids"),
        ({"kept_ids": [[3]] * 5}, "kept_ids = .*: is no tensor"),
        ({"weight_slice": 64}, "weight_slice = 64: does not go together with kept_ids"),
        ({"sum_squares": True}, "sum_squares = True: does not go together"),
        ({"weight_grad": torch.zeros(VOCAB, 32)}, "does not go together|frozen"),
        ({"backend": "fused"}, "fused|needs"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    case = make_case(5, 32, VOCAB)
    options = {"kept_ids": torch.full((5, 2), 3)} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(case.hidden, case.weight, torch.full((5,), 3), **options)


@pytest.mark.parametrize("name", ["shard", "row_sampling"])
def test_a_token_loss_refuses_by_name(name: str) -> None:
    case = make_case(5, 32, VOCAB)
    value = {"row_sampling": RowSampling(1.0), "shard": VocabShard(0, VOCAB)}[name]
    if name == "shard":
        pytest.importorskip("torch.distributed")
    given = case.hidden, case.weight, torch.full((5,), 3), policy_gradient, torch.ones(5)
    with pytest.raises(ValueError, match=f"{name}.*"):
        linear_token_loss(*given, kept_ids=torch.full((5, 2), 3), **{name: value})  # type: ignore[arg-type]


def test_a_second_derivative_raises_but_with_the_reference() -> None:
    leaves = make_case(5, 32, VOCAB).fresh()
    ids = kept_of(leaves)
    for backend in BACKENDS:
        output = linear_logprob(
            leaves.hidden, leaves.weight, leaves.targets, kept_ids=ids, backend=backend
        )
        if backend == "reference":
            torch.autograd.grad(output.logprob.sum(), leaves.hidden, create_graph=True)
            continue
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(output.logprob.sum(), leaves.hidden, create_graph=True)


def test_torch_compile_breaks_the_graph_there() -> None:
    case = make_case(40, 32, VOCAB)
    ids, found = kept_of(case), []

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(hidden * 1.0, weight, case.targets, kept_ids=ids).logprob * 2.0

    for call in (head, torch.compile(head, backend="aot_eager")):
        leaves = case.fresh()
        values = call(*leaves.tensors())
        found.append([values, *torch.autograd.grad(values.sum(), leaves.tensors())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_autocast_leaves_it_in_float32() -> None:
    case, found = make_case(40, 32, VOCAB), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            given = case.hidden, case.weight, case.targets
            found.append(linear_logprob(*given, kept_ids=kept_of(case)).logprob)
    assert torch.equal(*found)
