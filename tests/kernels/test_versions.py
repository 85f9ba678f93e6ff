"""Newer versions than tested: one warning in a process, and the kernels beside plain torch."""

from __future__ import annotations

import warnings

import pytest
import torch

from aepo_kernels import self_check, versions


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        ("2.15.0", False),
        ("2.15.3+cu130", False),
        ("2.9", False),
        ("2.16.0.dev20261101", True),
        ("2.16", True),
        ("3.0.0", True),
        ("unknown", False),
    ],
)
def test_patches_of_the_newest_are_not_newer(version: str, newer: bool) -> None:
    assert versions.is_newer(version, "2.15") == newer


def test_a_newer_version_is_said_once_in_a_process() -> None:
    versions._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"^torch 2\.16\.0 is newer than tested \(2\.15\): so$"):
        assert versions.warn_if_newer("torch", "2.16.0", "2.15", "so")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert versions.warn_if_newer("torch", "2.16.0", "2.15", "so")
        assert not versions.warn_if_newer("torch", "2.15.1", "2.15", "so")
        assert not versions.warn_if_newer("torch", None, "2.15", "so")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_kernels_pass_their_check(dtype: torch.dtype, backend: str) -> None:
    state = torch.get_rng_state()
    assert self_check.difference(torch.device("cpu"), dtype, backend) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_triton_s_kernels_pass_their_check() -> None:
    pytest.importorskip("triton", reason="needs triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert self_check.difference(device, torch.float32, "fused") is None


@pytest.mark.parametrize("name", ["the entropy", "the gradient by the weight"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_a_wrong_result_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, size: float
) -> None:
    right = self_check._ours

    def slightly_wrong(case: self_check._Case, backend: str) -> dict[str, torch.Tensor]:
        found = right(case, backend)
        found[name] *= 1 + size
        return found

    monkeypatch.setattr(self_check, "_ours", slightly_wrong)
    wrong = self_check.difference(torch.device("cpu"), dtype)
    assert wrong is not None and wrong.startswith(f"{name} is wrong by ")


def test_numbers_that_are_not_finite_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_check._ours
    monkeypatch.setattr(
        self_check, "_ours", lambda *given: {k: v * torch.nan for k, v in right(*given).items()}
    )
    assert self_check.difference(torch.device("cpu"), torch.float32) is not None
