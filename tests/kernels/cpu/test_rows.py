"""The C++ row operations against the torch ones in float64, on each instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aepo_kernels.cpu import library as cpu_library
from aepo_kernels.cpu import rows as cpu_rows
from aepo_kernels.rows import torch_rows
from aepo_kernels.rows.interface import LogitMap, RowCoefs, RowStats

pytestmark = [
    pytest.mark.skipif(cpu_library.library() is None, reason="without the C++ part"),
    pytest.mark.usefixtures("isa", "threads"),
]
PLAIN = LogitMap(None, None, 1.0)


def raw_logits_of(count: int, vocab: int, dtype: torch.dtype, *, size: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(count * 100_003 + vocab)
    return (size * torch.randn(count, vocab, generator=generator)).to(dtype)


def targets_of(count: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(vocab))


def laid(matrix: Tensor, column_major: bool) -> Tensor:
    """The same matrix with unit stride along its columns."""
    return matrix.T.contiguous().T if column_major else matrix


def double(value: float | Tensor | None) -> float | Tensor | None:
    return value.double() if isinstance(value, Tensor) else value


def check(
    raw_logits: Tensor,
    targets: Tensor,
    *,
    inverse: float | Tensor = 1.0,
    second: float | Tensor | None = None,
    logit_map: LogitMap = PLAIN,
    out_dtype: torch.dtype | None = None,
    rtol: float = 2e-6,
    column_major: bool = False,
) -> tuple[RowStats, Tensor]:
    """Both operations against float64; errors relative to the largest gradient of a row."""
    raw_logits = laid(raw_logits, column_major)
    exact = LogitMap(double(logit_map.bias), logit_map.softcap, logit_map.scale)  # type: ignore[arg-type]
    args = (targets, inverse, second, logit_map, torch.float32)
    truth_args = (targets, double(inverse), double(second), exact, torch.float64)
    more = {"squares": True, "logit_stats": True}
    found = cpu_rows.row_stats(raw_logits, *args, **more)
    truth = torch_rows.row_stats(raw_logits.double(), *truth_args, **more)  # type: ignore[arg-type]
    for name, mine, right in zip(RowStats._fields, found, truth, strict=True):
        assert (mine is None) == (right is None), name
        if mine is not None:
            # A sum of logits of both signs is as exact as its terms, not as what is left of them.
            terms = raw_logits.shape[1] if name == "logit_sum" else 1
            torch.testing.assert_close(
                mine.double() / terms,
                right / terms,
                rtol=rtol,
                atol=4e-6,
                equal_nan=True,
                msg=lambda m: f"{name}: {m}",  # noqa: B023
            )

    count, vocab = raw_logits.shape
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randn(count, generator=generator) for _ in range(4)]
    coefs = RowCoefs(columns[0], columns[1], columns[2], None if second is None else columns[3])
    exact_coefs = RowCoefs(*(double(x) for x in coefs))  # type: ignore[arg-type]
    bias_grad = None if logit_map.bias is None else torch.full((vocab,), 0.5)
    exact_bias = None if bias_grad is None else bias_grad.double()
    right_grad = torch.empty(count, vocab, dtype=torch.float64)
    torch_rows.row_grad(
        raw_logits.double(),
        *truth_args[:4],
        truth,
        exact_coefs,
        out=right_grad,
        bias_grad=exact_bias,  # type: ignore[arg-type]
    )
    grad = torch.full((count, vocab), float("nan"), dtype=out_dtype or raw_logits.dtype)
    again = torch.full_like(grad, float("nan")) if column_major else None
    grad = laid(grad, column_major)
    cpu_rows.row_grad(
        raw_logits, *args[:4], found, coefs, out=grad, bias_grad=bias_grad, row_major=again
    )
    assert again is None or torch.equal(again, grad)
    # One rounding to the output's dtype, and float32 inside.
    unit = torch.finfo(grad.dtype).eps / 2
    scale = right_grad.abs().amax(1, keepdim=True).clamp(min=1e-30)
    allowed = unit * right_grad.abs() + 1e-5 * scale + torch.finfo(grad.dtype).tiny
    assert ((grad.double() - right_grad).abs() <= allowed).all()
    if bias_grad is not None:
        torch.testing.assert_close(bias_grad.double(), exact_bias, rtol=1e-4, atol=1e-4)
    return found, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 16, 31, 2048, 2049, 50257])
def test_shapes_and_dtypes(vocab: int, dtype: torch.dtype) -> None:
    check(raw_logits_of(5, vocab, dtype), targets_of(5, vocab))


@pytest.mark.parametrize(
    ("bias", "softcap", "scale"),
    [(True, None, 1.0), (False, 30.0, 1.0), (True, 5.0, 0.7), (False, None, 1.3)],
)
def test_logits_may_be_mapped(bias: bool, softcap: float | None, scale: float) -> None:
    vector = torch.randn(333, generator=torch.Generator().manual_seed(0)) if bias else None
    logit_map = LogitMap(vector, softcap, scale)
    raw_logits = raw_logits_of(9, 333, torch.float32)
    check(raw_logits, targets_of(9, 333), logit_map=logit_map, second=0.8, rtol=1e-5)


@pytest.mark.parametrize(
    ("bias", "softcap", "scale"),
    [(False, None, 1.0), (True, None, 1.0), (False, 30.0, 1.0), (True, 5.0, 0.7)],
)
def test_logits_may_wait_as_float16(bias: bool, softcap: float | None, scale: float) -> None:
    # In two slices, the larger logits in the second one; targets are likely, so that 1 - p counts.
    count, vocab, first = 9, 2048 + 333, 2048
    raw_logits = raw_logits_of(count, vocab, torch.float32)
    raw_logits[:, first:] += 9
    vector = torch.randn(vocab, generator=torch.Generator().manual_seed(0)) if bias else None
    logit_map = LogitMap(vector, softcap, scale)
    targets, inverse, second = (
        raw_logits.argmax(1),
        torch.linspace(0.5, 2, count),
        torch.ones(count),
    )
    args = inverse, second, logit_map
    stats = cpu_rows.row_stats(raw_logits, targets, *args, torch.float32)
    generator = torch.Generator().manual_seed(1)
    coefs = RowCoefs(*(torch.randn(count, generator=generator) for _ in range(4)))
    plain, waited = torch.empty(count, vocab), torch.empty(count, vocab)
    assert stats is not None
    cpu_rows.row_grad(raw_logits, targets, *args, stats, coefs, out=plain, bias_grad=None)
    state, found = cpu_rows.new_state(count), None
    for columns in (slice(0, first), slice(first, vocab)):
        part = LogitMap(None if vector is None else vector[columns], softcap, scale)
        inside = (targets >= columns.start) & (targets < columns.stop)
        given = torch.where(inside, targets - columns.start, -1), inverse, second, part
        kept = torch.empty(count, columns.stop - columns.start, dtype=torch.float16)
        base = torch.empty(count)
        ends = {"is_first": columns.start == 0, "is_last": columns.stop == vocab}
        waits = {"kept": kept, "base": base, "state": state}
        found = cpu_rows.row_stats(raw_logits[:, columns], *given, torch.float32, **ends, **waits)
        out = waited[:, columns]
        cpu_rows.row_grad(kept, *given, stats, coefs, out=out, bias_grad=None, base=base)
        picked = torch.tensor([7, 0, 3])
        again, right = torch.empty(2, 3, kept.shape[1])
        some = given[0][picked], inverse[picked], second[picked], part
        few = *some, stats.select(picked), coefs.select(picked)
        cpu_rows.row_grad(kept, *few, out=again, bias_grad=None, base=base, picked=picked)
        cpu_rows.row_grad(kept[picked], *few, out=right, bias_grad=None, base=base[picked])
        assert torch.equal(again, right)
    assert found is not None and all(map(torch.equal, found[:6], stats[:6]))
    size = plain.abs().amax(1, keepdim=True)
    assert ((waited - plain).abs() <= 1e-3 * size).all()
    if vector is None:  # or the likeliest token need not have the largest product
        at_target = targets[:, None]
        torch.testing.assert_close(waited.gather(1, at_target), plain.gather(1, at_target))


def test_temperatures_per_row_and_twice() -> None:
    inverse = torch.tensor([0.5, 1.0, 2.0, 1 / 0.7, 1.0])
    second = torch.tensor([1.0, 0.8, 1.2, 3.0, 1.0])
    for dtype in (torch.float32, torch.bfloat16):
        raw_logits = raw_logits_of(5, 3001, dtype)
        check(raw_logits, targets_of(5, 3001), inverse=inverse, second=second)
        check(raw_logits, targets_of(5, 3001), inverse=1 / 1.3, second=1.25)


def test_output_of_another_dtype_and_rows_that_are_not_adjacent() -> None:
    wide = raw_logits_of(6, 500, torch.float32)
    check(wide[:, 3:480], targets_of(6, 477), out_dtype=torch.bfloat16)
    check(wide[::2, 1:34].bfloat16()[:, 1:], targets_of(3, 32))


def test_gradients_in_place() -> None:
    raw_logits, targets = raw_logits_of(4, 1000, torch.bfloat16), targets_of(4, 1000)
    stats, expected = check(raw_logits, targets)
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randn(4, generator=generator) for _ in range(3)]
    cpu_rows.row_grad(
        raw_logits, targets, 1.0, None, PLAIN, stats, RowCoefs(*columns, None),
        out=raw_logits, bias_grad=None,
    )  # fmt: skip
    assert torch.equal(raw_logits, expected)


def test_targets_of_other_ranks() -> None:
    raw_logits, targets = raw_logits_of(4, 100, torch.float32), torch.tensor([-1, 5, -1, 99])
    check(raw_logits, targets)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e2, 1e4])
def test_equal_small_and_large_logits(size: float) -> None:
    raw_logits = raw_logits_of(3, 4099, torch.float32, size=size) - 3 * size
    check(raw_logits, targets_of(3, 4099), rtol=1e-5)


@pytest.mark.parametrize("where", ["first", "last", "most"])
def test_columns_that_are_minus_infinity(where: str) -> None:
    raw_logits = raw_logits_of(3, 5000, torch.float32)
    hidden = {"first": slice(0, 2100), "last": slice(4000, None), "most": slice(1, 4999)}[where]
    raw_logits[:, hidden] = float("-inf")
    raw_logits[1, 7] = 1.0
    found, grad = check(raw_logits, torch.tensor([0, 4999 if where == "most" else 3000, 0]))
    assert found.entropy.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("vocab", [17, 2065])
@pytest.mark.parametrize("others", [1.0, float("-inf")])
def test_nan_is_not_lost_in_any_column(vocab: int, others: float) -> None:
    raw_logits = torch.full((vocab, vocab), others)
    raw_logits.fill_diagonal_(float("nan"))
    targets = torch.zeros(vocab, dtype=torch.long)
    found = cpu_rows.row_stats(raw_logits, targets, 1.0, None, PLAIN, torch.float32)
    assert found.logprob.isnan().all() and found.entropy.isnan().all()


def test_nan_stays_nan_and_rows_do_not_mix() -> None:
    raw_logits, targets = raw_logits_of(3, 3000, torch.float32), targets_of(3, 3000)
    clean = cpu_rows.row_stats(raw_logits, targets, 1.0, None, PLAIN, torch.float32)
    raw_logits[1, 2500] = float("nan")
    found = cpu_rows.row_stats(raw_logits, targets, 1.0, None, PLAIN, torch.float32)
    assert found.logprob[1].isnan() and found.entropy[1].isnan()
    for row in (0, 2):
        assert found.logprob[row] == clean.logprob[row] and found.entropy[row] == clean.entropy[row]


def test_no_rows() -> None:
    raw_logits = torch.empty(0, 17)
    stats = cpu_rows.row_stats(
        raw_logits, torch.empty(0, dtype=torch.long), 1.0, None, PLAIN, torch.float32
    )
    assert stats.logprob.shape == (0,)


@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_threads_gives_the_same_bits(bias: bool) -> None:
    logit_map = LogitMap(torch.linspace(-1, 1, 7001) if bias else None, None, 1.0)
    raw_logits, targets = raw_logits_of(13, 7001, torch.bfloat16), targets_of(13, 7001)
    results = []
    for number in (1, 2, 8):
        torch.set_num_threads(number)
        stats, grad = check(raw_logits, targets, logit_map=logit_map, second=1.1, rtol=1e-5)
        results.append([*(x for x in stats if x is not None), grad])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [2048, 4096, 20000])
def test_slices_of_columns_give_the_bits_of_whole_rows(size: int) -> None:
    vocab = 9001
    raw_logits, bias = raw_logits_of(5, vocab, torch.bfloat16), torch.randn(vocab)
    raw_logits[1, :5000] = -torch.inf
    targets = torch.tensor([0, 8000, 2047, 2048, 9000])
    distribution = (1.3, 0.7)
    names = {"dtype": torch.float32, "squares": True, "logit_stats": True}
    wanted = cpu_rows.row_stats(
        raw_logits, targets, *distribution, LogitMap(bias, 20.0, 1.5), **names
    )
    state, found = cpu_rows.new_state(5), None
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        assert found is None
        found = cpu_rows.row_stats(
            raw_logits[:, start:stop],
            torch.where((targets >= start) & (targets < stop), targets - start, -1),
            *distribution,
            LogitMap(bias[start:stop], 20.0, 1.5),
            **names,
            state=state,
            is_first=start == 0,
            is_last=stop == vocab,
        )
    assert found is not None and wanted is not None
    for one, other in zip(found, wanted, strict=True):
        assert one is not None and other is not None
        assert torch.equal(one, other)


def test_they_are_operators_with_shapes_for_tracing() -> None:
    raw_logits, targets = raw_logits_of(5, 300, torch.bfloat16), targets_of(5, 300)
    distribution = torch.ones(5), torch.full((5,), 2.0), torch.zeros(300), 0.0, 1.0
    operators = torch.ops.aepo_kernels
    checks = "test_schema", "test_faketensor"
    state = cpu_rows.new_state(5)
    kept = torch.empty(5, 300, dtype=torch.float16), torch.empty(5)
    for is_last, waits in ((False, (None, None)), (True, (None, None)), (True, kept)):
        given = raw_logits, targets, *distribution, True, True, state, not is_last, is_last, *waits
        torch.library.opcheck(operators.cpu_row_stats.default, given, test_utils=checks)
    stats = list(cpu_rows.row_stats(raw_logits, targets, *distribution[:2], PLAIN, torch.float32))
    coefs = [torch.randn(5), torch.randn(5), None, torch.randn(5)]
    out, bias_grad = torch.empty_like(raw_logits), torch.zeros(300)
    for source, base in ((raw_logits, None), kept):
        given = source, targets, *distribution, stats, coefs, out, bias_grad, None, base, None
        torch.library.opcheck(operators.cpu_row_grad.default, given, test_utils=checks)
    given = raw_logits, torch.ones(5), torch.rand(5, dtype=torch.float64)
    torch.library.opcheck(operators.cpu_sample_rows.default, given, test_utils=checks)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "mmx")
    with pytest.raises(
        ValueError, match=f"AEPO_CPU_ISA = 'mmx'.*{cpu_library.instruction_sets()[0]}"
    ):
        cpu_library.chosen()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 7, 31, 2048, 2049, 50257])
def test_sampled_tokens_invert_the_distribution(vocab: int, dtype: torch.dtype) -> None:
    count = 40
    raw_logits = raw_logits_of(count, vocab, dtype)
    raw_logits[:, 3 : vocab // 2 : 2] = float("-inf")
    inverse = torch.linspace(0.3, 40, count)
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    results = []
    for number in (1, 2, 8):
        torch.set_num_threads(number)
        results.append(cpu_rows.draw_tokens(raw_logits, inverse, uniform))
    tokens, logprobs = results[0]
    for other in results[1:]:
        assert torch.equal(tokens, other[0]) and torch.equal(logprobs, other[1])
    distribution = torch.log_softmax(raw_logits.double() * inverse.double()[:, None], -1)
    expected = distribution.gather(1, tokens[:, None])[:, 0]
    # t = (z - max) / T is rounded to float32, which counts where it is large.
    bound = 1e-6 + 2**-23 * expected.abs()
    assert ((logprobs.double() - expected).abs() <= bound).all()
    upper = distribution.exp().cumsum(1).gather(1, tokens[:, None])[:, 0]
    # Float32 weights, each off by two ulps and summed in 16 lanes of a block.
    off = 2e-6
    assert (upper - expected.exp() - off <= uniform).all() and (uniform <= upper + off).all()


def test_rows_without_a_distribution_give_no_token() -> None:
    logits = torch.zeros(3, 40)
    logits[0], logits[2, 20] = float("-inf"), float("nan")
    tokens, _ = cpu_rows.draw_tokens(logits, torch.ones(3), torch.full((3,), 0.5))
    assert tokens[0] == tokens[2] == -1 and 0 <= tokens[1] < 40


def test_samples_of_logits_that_lie_by_columns() -> None:
    logits, uniform = raw_logits_of(6, 50, torch.float32), torch.linspace(0, 0.9, 6).double()
    wanted = cpu_rows.draw_tokens(logits, torch.ones(6), uniform)
    for other in (laid(logits, True), torch.stack([logits, logits], -1)[..., 0]):
        assert other.stride(1) != 1
        found = cpu_rows.draw_tokens(other, torch.ones(6), uniform)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_a_gradient_that_lies_otherwise_than_its_logits_is_refused() -> None:
    raw_logits, targets = raw_logits_of(5, 40, torch.bfloat16), targets_of(5, 40)
    stats = cpu_rows.row_stats(raw_logits, targets, 1.0, None, PLAIN, torch.float32)
    assert stats is not None
    coefs = RowCoefs(torch.ones(5), None, None, None)
    given = targets, 1.0, None, PLAIN, stats, coefs
    for column_major in (True, False):
        out = laid(torch.empty_like(raw_logits), not column_major)
        with pytest.raises(TypeError, match="no kernel for these dtypes and strides"):
            cpu_rows.row_grad(laid(raw_logits, column_major), *given, out=out, bias_grad=None)
    neither = torch.stack([raw_logits, raw_logits], -1)[..., 0]
    with pytest.raises(ValueError, match="by rows or by columns"):
        cpu_rows.row_stats(neither, targets, 1.0, None, PLAIN, torch.float32)
