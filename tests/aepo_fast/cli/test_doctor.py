"""The report on a machine says why something does not work, not only that."""

from __future__ import annotations

from pathlib import Path

import pytest

from aepo_fast.cli import doctor
from aepo_fast.model.packages import PACKAGES, converted_folder


def test_backends_are_listed_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"chunked": None, "fused": "needs a GPU"}
    monkeypatch.setattr("aepo_kernels.doctor.backend_status", lambda: status)
    report = doctor.report()
    assert "  chunked: works\n  fused: needs a GPU\n" in report


def test_attention_that_cannot_run_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    report = doctor.report()
    assert "auto: is grouped here" in report and "sdpa: works" in report
    assert "flash_attention_2: needs a GPU" in report and "varlen: needs a GPU" in report


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_REQUIRED", ("torch", "no-such-package"))
    report = doctor.report()
    assert "torch: 2." in report and "no-such-package: not installed\n" in report


def test_model_packages_are_ready_once_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AEPO_CACHE", str(tmp_path))
    assert str(tmp_path) in doctor.report()
    for name in PACKAGES:
        assert f"package:{name}: fetched when first used" in doctor.report()
    name = "smollm2-135m-instruct"
    folder = converted_folder(f"package:{name}")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert f"package:{name}: ready" in doctor.report()
