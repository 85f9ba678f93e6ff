"""A newer version than tested is said once and runs behind a check; it is never refused."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from aepo_fast.config.errors import ConfigError
from aepo_fast.versions import TESTED, check_versions
from aepo_kernels import self_check, versions
from tests.tiny_run import a_machine

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nothing_was_said() -> None:
    versions._warn.cache_clear()


def test_what_is_installed_is_tested() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions(a_machine())


def test_a_newer_torch_is_said_and_its_kernels_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda name: "2.16.1")
    asked = []

    def compare(*given: object) -> str | None:
        asked.append(given)
        return None if len(asked) == 1 else "the entropy is wrong by 0.5"

    monkeypatch.setattr(self_check, "difference", compare)
    with pytest.warns(RuntimeWarning, match=r"torch 2.16.1 is newer than tested \(2.15\): the ker"):
        check_versions(a_machine())
    assert asked == [(torch.device("cpu"), torch.float32, "auto")]
    with pytest.raises(ConfigError, match="head_backend.*wrong by 0.5.*reference.*2.11 to 2.15"):
        check_versions(a_machine())


def test_a_newer_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"transformers": "5.99.0"}
    monkeypatch.setattr(versions, "installed_version", found.get)
    with pytest.warns(RuntimeWarning, match=r"transformers 5.99.0 is newer than tested \(5.24\)"):
        check_versions(a_machine())


def test_pip_takes_any_newer_version_and_none_that_is_older() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = project["dependencies"] + extras["train"] + extras["vllm"] + extras["dev"]
    wanted = {one.name: one for one in map(Requirement, texts)}
    for name, (oldest, newest) in TESTED.items():
        allowed = wanted[name].specifier
        assert oldest in allowed and newest in allowed, name
        major, minor = Version(newest).release[:2]
        assert f"{major}.{minor + 1}.0" in allowed, name
        major, minor = Version(oldest).release[:2]
        assert f"{major}.{minor - 1}.99" not in allowed, name


@pytest.mark.parametrize(("file", "end"), [("oldest", 0), ("newest", 1)])
def test_both_ends_have_their_environment(file: str, end: int) -> None:
    lines = (ROOT / "requirements" / f"{file}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for name in ("torch", "triton", "transformers"):
        assert pins[name].startswith(f"{TESTED[name][end]}."), name
    page = (ROOT / "docs" / "versions.md").read_text()
    assert all(pins[name] in page for name in ("torch", "triton", "transformers"))
