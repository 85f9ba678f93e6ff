"""bfloat16 GEMMs on CPUs without instructions for them: in C++, and by way of float32."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from aepo_kernels import backends, gemm
from aepo_kernels.cpu import gemm as cpu_gemm
from aepo_kernels.cpu import library as cpu_library
from aepo_kernels.gemm import Gemms
from aepo_kernels.head.budget import Budget
from aepo_kernels.head.plan import gemms_for

SHAPES = [(1, 1, 1), (5, 130, 7), (130, 5, 7), (7, 5, 130), (64, 64, 64), (3, 200, 200)]
DTYPES = [torch.bfloat16, torch.float32]
CUBLAS, SUMS = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"


needs_avx2 = pytest.mark.skipif(
    "avx2" not in cpu_library.instruction_sets(), reason="the GEMMs in C++ are for AVX2"
)


@pytest.fixture(autouse=True, params=["blocks", pytest.param("c++", marks=needs_avx2)])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way, whichever this machine would choose."""
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(cpu_gemm, "is_available", lambda: request.param == "c++")
    return request.param


@pytest.fixture
def gemms(kind: str) -> Gemms:
    """How bfloat16 hidden states are multiplied here."""
    return gemms_of(torch.bfloat16)


def gemms_of(dtype: torch.dtype) -> Gemms:
    return gemms_for(torch.zeros(2, 2, dtype=dtype), Budget(gemm_block_bytes=64))  # of 64 rows


def laid_out(rows: int, columns: int, layout: str, seed: int) -> Tensor:
    """A random bfloat16 matrix, or a part of a larger one, by rows or by columns."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "columns":
        return torch.randn(columns, rows, generator=generator).bfloat16().T
    if layout == "part":
        return torch.randn(rows + 1, columns + 9, generator=generator).bfloat16()[1:, 3:-6]
    return torch.randn(rows, columns, generator=generator).bfloat16()


def near(found: Tensor, left: Tensor, right: Tensor, before: Tensor | float = 0.0) -> None:
    """Rounded once to found's dtype, after float32 sums."""
    truth = left.double() @ right.double() + before
    size = left.double().abs() @ right.double().abs() + truth.abs()
    off = torch.finfo(found.dtype).eps * truth.abs() + 1e-6 * size
    assert ((found.double() - truth).abs() <= off).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lies", ["rows", "columns", "part"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(shape: tuple[int, int, int], lies: str, dtype: torch.dtype, gemms: Gemms) -> None:
    rows, inner, columns = shape
    left, right = laid_out(rows, inner, lies, 0), laid_out(inner, columns, lies, 1)
    near(gemms.matmul(left, right), left, right)
    near(gemms.product(left, right, dtype), left, right)
    for target in ("rows", "columns", "part"):
        out = laid_out(rows, columns, target, 2).to(dtype).fill_(float("nan"))
        assert gemms.product(left, right, dtype, out=out).data_ptr() == out.data_ptr()
        near(out, left, right)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lies", ["rows", "columns", "part"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(shape: tuple[int, int, int], lies: str, dtype: torch.dtype, gemms: Gemms) -> None:
    rows, inner, columns = shape
    left, right = laid_out(rows, inner, lies, 0), laid_out(inner, columns, lies, 1)
    total = laid_out(rows, columns, lies, 2).to(dtype)
    before = total.double()
    assert gemms.add_product(total, left, right) is total
    if dtype == torch.float32:
        near(total, left, right, before)
    else:  # the product is rounded, and the sum
        truth = left.double() @ right.double() + before
        size = left.double().abs() @ right.double().abs() + before.abs()
        assert ((total.double() - truth).abs() <= 2**-7 * size).all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 7, 0), (0, 7, 0)], ids=str)
def test_nothing(shape: tuple[int, int, int], gemms: Gemms) -> None:
    rows, inner, columns = shape
    left, right = laid_out(rows, inner, "rows", 0), laid_out(inner, columns, "rows", 1)
    assert gemms.matmul(left, right).shape == (rows, columns)
    total = torch.zeros(rows, columns)
    assert gemms.add_product(total, left, right).shape == (rows, columns)


@needs_avx2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_cpp_any_strides(dtype: torch.dtype) -> None:
    left, right = (torch.randn(2 * 9, 3 * 70)[::2, ::3].to(dtype) for _ in range(2))
    spread = torch.full((18, 27), float("nan"), dtype=dtype)
    out = spread[::2, ::3]
    assert cpu_gemm.multiply(out, left, right.T) is out
    near(out, left, right.T)
    assert int(spread.isnan().sum()) == spread.numel() - out.numel()
    with pytest.raises(KeyError):
        cpu_gemm.multiply(out.double(), left, right.T)


def test_float32_goes_by_cpp_where_that_is_fastest(kind: str) -> None:
    gemms = gemms_of(torch.float32)
    assert gemms.in_cpp == (kind == "c++") and not gemms.upcast
    assert not gemms_of(torch.float64).in_cpp
    left, right = torch.randn(5, 300), torch.randn(300, 7)
    near(gemms.matmul(left, right), left, right)
    total = torch.randn(5, 7)
    before = total.double()
    near(gemms.add_product(total, left, right), left, right, before)


def test_what_has_instructions_is_multiplied_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: True)
    gemms = gemms_of(torch.bfloat16)
    left, right = laid_out(5, 6, "rows", 0), laid_out(6, 7, "rows", 1)
    assert torch.equal(gemms.matmul(left, right), left @ right)
    assert backends.multiplies_bfloat16("cuda")


def cublas_sums() -> tuple[bool, bool]:
    """Whether cuBLAS may add in bfloat16, and whether it may split reductions."""
    return getattr(CUBLAS, SUMS), getattr(CUBLAS, f"{SUMS}_split_k")


two_switches = pytest.mark.skipif(
    not hasattr(CUBLAS, f"{SUMS}_split_k"), reason="this torch has one switch"
)


@pytest.fixture(params=[(False, False), (False, True), (True, True)], ids=str)
def chosen(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    """What the caller has chosen of cuBLAS's sums."""
    before = cublas_sums()
    setattr(CUBLAS, SUMS, request.param)
    yield request.param
    setattr(CUBLAS, SUMS, before)


@two_switches
def test_the_callers_choice_of_cublas_sums_is_put_back(chosen: tuple[bool, bool]) -> None:
    with gemm.computing_on(torch.empty(0)):
        assert cublas_sums() == (False, chosen[1])
    assert cublas_sums() == chosen


@two_switches
@pytest.mark.parametrize("failing", [False, True])
def test_the_last_of_several_threads_puts_cublas_sums_back(
    chosen: tuple[bool, bool], failing: bool
) -> None:
    def leave(one: AbstractContextManager[None]) -> None:
        if not failing:
            one.__exit__(None, None, None)
            return
        error = ValueError("out of memory")
        assert not one.__exit__(ValueError, error, None)  # raised on

    inside = (False, chosen[1])
    with ThreadPoolExecutor(1) as trainer, ThreadPoolExecutor(1) as sampler:
        first, second = (gemm.computing_on(torch.empty(0)) for _ in range(2))
        trainer.submit(first.__enter__).result()
        sampler.submit(second.__enter__).result()
        trainer.submit(leave, first).result()
        assert cublas_sums() == inside  # the sampler still computes
        sampler.submit(leave, second).result()
    assert cublas_sums() == chosen
    with gemm.computing_on(torch.empty(0)):
        assert cublas_sums() == inside
    assert cublas_sums() == chosen


@two_switches
def test_many_threads_always_have_whole_sums_inside(chosen: tuple[bool, bool]) -> None:
    def compute(_: int) -> bool:
        with gemm.computing_on(torch.empty(0)):
            return cublas_sums() == (False, chosen[1])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(compute, range(500)))
    assert cublas_sums() == chosen
