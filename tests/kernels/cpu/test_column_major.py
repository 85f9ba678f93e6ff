"""The C++ row operations on bfloat16 logits that lie by columns, against float64."""

from __future__ import annotations

import pytest
import torch

from aepo_kernels import backends
from aepo_kernels.cpu import library as cpu_library
from aepo_kernels.cpu import rows as cpu_rows
from aepo_kernels.rows.interface import LogitMap, RowCoefs
from tests.kernels.cpu.test_rows import PLAIN, check, laid, raw_logits_of, targets_of

pytestmark = [
    pytest.mark.skipif(cpu_library.library() is None, reason="without the C++ part"),
    pytest.mark.usefixtures("isa", "threads"),
]
BF16 = torch.bfloat16


@pytest.mark.parametrize("count", [1, 5, 16, 37, 130])
@pytest.mark.parametrize("vocab", [1, 7, 31, 2048, 2049, 5003])
def test_shapes(count: int, vocab: int) -> None:
    check(raw_logits_of(count, vocab, BF16), targets_of(count, vocab), column_major=True)


def test_a_whole_vocabulary() -> None:
    check(raw_logits_of(20, 50257, BF16), targets_of(20, 50257), second=0.7, column_major=True)


@pytest.mark.parametrize(
    ("bias", "softcap", "scale"),
    [(True, None, 1.0), (False, 30.0, 1.0), (True, 5.0, 0.7), (False, None, 1.3)],
)
def test_logits_may_be_mapped(bias: bool, softcap: float | None, scale: float) -> None:
    vector = torch.randn(333, generator=torch.Generator().manual_seed(0)) if bias else None
    logit_map = LogitMap(vector, softcap, scale)
    raw_logits, targets = raw_logits_of(19, 333, BF16), targets_of(19, 333)
    check(raw_logits, targets, logit_map=logit_map, second=0.8, rtol=1e-5, column_major=True)


def test_temperatures_per_row_and_twice() -> None:
    inverse, second = torch.linspace(0.5, 2, 21), torch.linspace(3, 0.6, 21)
    raw_logits, targets = raw_logits_of(21, 3001, BF16), targets_of(21, 3001)
    check(raw_logits, targets, inverse=inverse, second=second, column_major=True)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e2, 1e4])
def test_equal_small_and_large_logits(size: float) -> None:
    raw_logits = raw_logits_of(3, 4099, BF16, size=size) - 3 * size
    check(raw_logits, targets_of(3, 4099), rtol=1e-5, column_major=True)


@pytest.mark.parametrize("where", ["first", "last", "most"])
def test_columns_that_are_minus_infinity(where: str) -> None:
    raw_logits = raw_logits_of(3, 5000, BF16)
    hidden = {"first": slice(0, 2100), "last": slice(4000, None), "most": slice(1, 4999)}[where]
    raw_logits[:, hidden] = float("-inf")
    raw_logits[1, 7] = 1.0
    targets = torch.tensor([0, 4999 if where == "most" else 3000, 0])
    found, grad = check(raw_logits, targets, column_major=True)
    assert found.entropy.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("vocab", [17, 2065])
@pytest.mark.parametrize("others", [1.0, float("-inf")])
def test_nan_is_not_lost_in_any_column(vocab: int, others: float) -> None:
    raw_logits = torch.full((vocab, vocab), others, dtype=BF16).fill_diagonal_(float("nan"))
    targets = torch.zeros(vocab, dtype=torch.long)
    found = cpu_rows.row_stats(laid(raw_logits, True), targets, 1.0, None, PLAIN, torch.float32)
    assert found is not None
    assert found.logprob.isnan().all() and found.entropy.isnan().all()


def test_gradients_in_place() -> None:
    raw_logits, targets = laid(raw_logits_of(20, 1000, BF16), True), targets_of(20, 1000)
    stats, expected = check(raw_logits, targets, column_major=True)
    generator = torch.Generator().manual_seed(1)
    coefs = RowCoefs(*(torch.randn(20, generator=generator) for _ in range(3)), None)
    distribution = targets, 1.0, None, PLAIN
    cpu_rows.row_grad(raw_logits, *distribution, stats, coefs, out=raw_logits, bias_grad=None)
    assert torch.equal(raw_logits, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_threads_gives_the_same_bits(bias: bool) -> None:
    logit_map = LogitMap(torch.linspace(-1, 1, 7001) if bias else None, None, 1.0)
    raw_logits, targets = raw_logits_of(77, 7001, BF16), targets_of(77, 7001)
    results = []
    for number in (1, 2, 8):
        torch.set_num_threads(number)
        distribution = {"logit_map": logit_map, "second": 1.1, "rtol": 1e-5}
        stats, grad = check(raw_logits, targets, column_major=True, **distribution)  # type: ignore[arg-type]
        results.append([*(x for x in stats if x is not None), grad])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


def test_other_dtypes_are_refused() -> None:
    raw_logits, targets = laid(raw_logits_of(4, 30, torch.float32), True), targets_of(4, 30)
    with pytest.raises(TypeError, match="aepo_row_stats: no kernel for these dtypes and strides"):
        cpu_rows.row_stats(raw_logits, targets, 1.0, None, PLAIN, torch.float32)


@pytest.mark.parametrize(("amx", "dtype"), [(True, BF16), (True, torch.float32), (False, BF16)])
def test_logits_lie_by_columns_where_gemms_want_it(
    amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_has_amx", lambda: amx)
    hidden = torch.zeros(4, 8, dtype=dtype)
    assert backends.gemms_want_column_major(hidden) == (amx and dtype == BF16)
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "torch")
    assert not backends.gemms_want_column_major(hidden)
