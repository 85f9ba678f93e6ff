"""The mean of the logits, and whether the target has the largest one, from every row operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aepo_kernels import LogprobOutput, backends, linear_logprob
from aepo_kernels.cpu import library as cpu_library
from aepo_kernels.rows import torch_rows
from tests.kernels.oracle import IGNORED, Case, make_case

ROWS = ["reference", "torch rows", "c++ rows", "triton rows", "fused"]


@pytest.fixture(params=ROWS)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend whose row operations are the named ones."""
    kind = request.param
    if kind in ("triton rows", "fused"):
        module = pytest.importorskip("aepo_kernels.gpu.rows", reason="needs triton")
        if torch.cuda.is_available():
            pytest.skip("on a GPU these kernels take its tensors alone")
        if kind == "triton rows":
            monkeypatch.setattr(backends, "row_operations", lambda _: module)
    elif kind == "torch rows":
        monkeypatch.setenv(cpu_library.ISA_VARIABLE, "torch")
    elif kind == "c++ rows" and cpu_library.unavailable_reason() is not None:
        pytest.skip("without the C++ part")
    return kind if kind in ("reference", "fused") else "chunked"


def logits_of(case: Case) -> Tensor:
    """Logits [N, V] before temperature, in float64."""
    wide = case.fresh(torch.float64)
    logits = (wide.hidden @ wide.weight.T).detach()
    if wide.bias is not None:
        logits = logits + wide.bias.detach()
    logits = logits * case.options.get("logit_scale", 1.0)
    cap = case.options.get("softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def run(case: Case, backend: str, **options: Any) -> LogprobOutput:
    return linear_logprob(
        case.hidden,
        case.weight,
        case.targets,
        **{**case.keywords(), "mean_logits": True, "is_top1": True, **options},
        backend=backend,
    )


def check(case: Case, output: LogprobOutput, *, atol: float = 1e-5) -> None:
    logits, keep = logits_of(case), case.targets != IGNORED
    temperature = torch.as_tensor(case.options.get("temperature", 1.0), dtype=torch.float64)
    mean = (logits / temperature.reshape(-1, 1)).mean(1).where(keep, 0.0)
    assert output.mean_logits is not None and output.is_top1 is not None
    torch.testing.assert_close(output.mean_logits.double(), mean, rtol=1e-5, atol=atol)
    assert output.is_top1.dtype == torch.bool
    assert torch.equal(output.is_top1, (logits.argmax(1) == case.targets) & keep)


def at_largest(case: Case) -> Case:
    """The same case with the largest token as the target of every other row that has one."""
    largest = logits_of(case).argmax(1)
    some = (torch.arange(len(largest)) % 2 == 0) & (case.targets != IGNORED)
    return Case(
        case.hidden,
        case.weight,
        torch.where(some, largest, case.targets),
        case.bias,
        case.options,
    )


@pytest.mark.parametrize("option", ["plain", "second", "scale", "all", "shift_up", "shift_down"])
@pytest.mark.parametrize("vocab", [1, 300])
def test_matches_float64(vocab: int, option: str, rows: str) -> None:
    case = at_largest(make_case(40, 16, vocab, option=option)).fresh()
    output = run(case, rows, chunk_tokens=15)
    check(case, output, atol=1e-4 if option.startswith("shift") else 1e-5)
    assert not output.mean_logits.requires_grad and not output.is_top1.requires_grad  # type: ignore[union-attr]
    output.logprob.sum().backward()
    assert case.hidden.grad is not None


def test_of_equal_logits_the_first_is_the_largest(rows: str) -> None:
    # One dimension: a row's logits are those of the weight, exactly.
    weight = torch.tensor([[1.0], [3.0], [-2.0], [3.0], [3.0], [0.0]])
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    case = Case(torch.ones(6, 1), weight, targets)
    assert run(case, rows).is_top1.tolist() == [False, True, False, False, False, False]  # type: ignore[union-attr]
    equal = Case(torch.ones(6, 1), torch.ones(6, 1), targets)
    assert run(equal, rows).is_top1.tolist() == [True] + 5 * [False]  # type: ignore[union-attr]


@pytest.mark.parametrize("vocab", [5, 2100])
def test_logits_of_minus_infinity_and_nan(vocab: int, rows: str) -> None:
    case = make_case(6, 8, vocab)
    bias = torch.zeros(vocab)
    bias[1:3] = -torch.inf
    targets = torch.tensor([0, 1, 2, 3, 4, 4])
    logits = logits_of(case) + bias
    targets[:2] = logits.argmax(1)[:2]
    case = Case(case.hidden.clone(), case.weight, targets, bias)
    case.hidden[0, 0] = torch.nan
    output = run(case, rows)
    assert output.mean_logits is not None and output.is_top1 is not None
    assert output.mean_logits.isnan().tolist() == [True] + 5 * [False]
    assert (output.mean_logits[1:] == -torch.inf).all()
    right = logits.argmax(1) == targets
    right[0] = False
    assert torch.equal(output.is_top1, right)
    nothing = Case(case.hidden[1:], case.weight, targets[1:] * 0, torch.full((vocab,), -torch.inf))
    assert not run(nothing, rows).is_top1.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("wants", ["mean_logits", "is_top1"])
def test_each_alone(wants: str, rows: str) -> None:
    case = make_case(5, 8, 30)
    other = {"mean_logits": "is_top1", "is_top1": "mean_logits"}[wants]
    output, both = run(case, rows, **{other: False}), run(case, rows)
    assert getattr(output, other) is None
    assert torch.equal(getattr(output, wants), getattr(both, wants))


def test_not_asked_for_they_are_none() -> None:
    case = make_case(5, 8, 30)
    output = linear_logprob(case.hidden, case.weight, case.targets)
    assert output.mean_logits is None and output.is_top1 is None


@pytest.mark.parametrize("count", [0, 4])
def test_no_tokens_or_only_ignored_ones(count: int, rows: str) -> None:
    case = make_case(count, 8, 30)
    case.targets.fill_(IGNORED)
    output = run(case, rows)
    assert output.mean_logits is not None and output.is_top1 is not None
    assert output.mean_logits.tolist() == [0.0] * count
    assert output.is_top1.tolist() == [False] * count


@pytest.mark.usefixtures("isa", "layout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "vocab"), [(21, 40_003), (300, 4099)])
def test_long_rows_on_each_instruction_set(count: int, vocab: int, dtype: torch.dtype) -> None:
    # Several slices of the vocabulary, and hidden states of small whole numbers: the logits are
    # exact in bfloat16, and many are equal.
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randint(-1, 2, (count, 8), generator=generator).to(dtype)
    weight = torch.randint(-2, 3, (vocab, 8), generator=generator).to(dtype)
    bias = torch.randint(-3, 4, (vocab,), generator=generator).to(dtype)
    targets = torch.randint(vocab, (count,), generator=generator)
    case = Case(hidden, weight, targets, bias, {"temperature": 0.7, "logit_scale": 0.5})
    logits = logits_of(case)
    assert (logits == logits.amax(1, keepdim=True)).sum(1).float().mean() > 1.5
    last = vocab - 1 - logits.flip(1).argmax(1)
    case = at_largest(Case(hidden, weight, last, bias, case.options))
    output = run(case, "chunked")
    check(case, output)
    assert 0.3 < output.is_top1.float().mean() < 0.9  # type: ignore[union-attr]


def test_a_low_rank_head_and_float64() -> None:
    case = make_case(20, 16, 100, dtype=torch.float64)
    down, up = torch.randn(2, 16, dtype=torch.float64), torch.randn(100, 2, dtype=torch.float64)
    merged = Case(case.hidden, case.weight + 0.5 * up @ down, case.targets)
    case = at_largest(merged)
    more = {"lora_a": down, "lora_b": up, "lora_scale": 0.5}
    weight = case.weight - 0.5 * up @ down
    check(case, run(Case(case.hidden, weight, case.targets), "chunked", **more))


def test_torch_rows_by_blocks_give_the_same() -> None:
    case = make_case(9, 8, 50)
    given = case.hidden @ case.weight.T, case.targets, 1.0, None
    more: dict[str, Any] = {"dtype": torch.float32, "logit_stats": True}
    plain = torch_rows.LogitMap(None, None, 1.0)
    whole = torch_rows.row_stats(*given, plain, **more)
    parts = torch_rows.row_stats(*given, plain, **more, block_elements=100)
    assert torch.equal(whole.logit_sum, parts.logit_sum)  # type: ignore[arg-type]
    assert torch.equal(whole.is_top1, parts.is_top1)  # type: ignore[arg-type]
