"""The wheel: what it holds, and that it installs without a compiler and runs."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import aepo_kernels
from tests.page_names import blocks

ROOT = Path(__file__).parents[2]
NAME = f"aepo_fast-{aepo_kernels.__version__}"
README = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="builds wheels for Linux")


class Built(NamedTuple):
    wheel: Path
    sdist: Path


def python(*arguments: object, **environment: str) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(command, check=True, env=os.environ | {"PATH": path} | environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """As `make wheel` builds both, but in a fraction of the time: without optimisations."""
    folder = tmp_path_factory.mktemp("built")
    quick = folder / "quick"
    quick.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    quick.chmod(0o755)
    python("build", "--no-isolation", "--outdir", folder, ROOT, CXX=str(quick))
    (plain,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    done = folder / "done"
    exclude = ("--exclude", "libgomp.so.1")
    python("auditwheel", "repair", *exclude, "--wheel-dir", done, plain)
    (wheel,) = done.glob("*.whl")
    return Built(wheel, sdist)


def contents(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    files = {name for name in names if not name.endswith("/")}
    info = f"{NAME}.dist-info"
    assert {name.split("/")[0] for name in files} == {"aepo_fast", "aepo_kernels", info}
    return {name for name in files if not name.startswith(info)}


def sources() -> set[str]:
    return {
        str(path.relative_to(base))
        for base, package in ((ROOT, "aepo_fast"), (ROOT / "kernels", "aepo_kernels"))
        for path in (base / package).rglob("*")
        if path.suffix in (".py", ".toml")
    }


def test_the_wheel_holds_both_packages_the_configs_and_nothing_else(built: Built) -> None:
    tag = built.wheel.name.removeprefix(f"{NAME}-py3-none-")
    assert tag.startswith("manylinux_2_"), "an ordinary Linux cannot install it"
    assert contents(built.wheel) == sources() | {"aepo_kernels/_rows.so"}


def test_the_source_archive_holds_what_a_build_needs(built: Built) -> None:
    names = tarfile.open(built.sdist).getnames()
    files = {name.removeprefix(f"{NAME}/") for name in names}
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"} <= files
    assert "kernels/csrc/cpu/interface.cpp" in files
    assert not [name for name in files if name.startswith(("bench/results", ".venv", "runs"))]


def test_without_a_compiler_the_wheel_is_the_same_but_for_its_library(tmp_path: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    python("pip", "wheel", *options, ROOT, CXX="/without/a/compiler")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") and contents(wheel) == sources()


class Environment(NamedTuple):
    """An environment of its own that holds some installed distributions, and no compiler."""

    folder: Path

    def install(self, requirement: str) -> None:
        """With pip, which finds nothing but what is there."""
        options = ["--quiet", "--no-index", "--disable-pip-version-check"]
        python("pip", "--python", self.folder / "bin" / "python", "install", *options, requirement)

    def run(self, code: str) -> str:
        done = subprocess.run(
            [self.folder / "bin" / "python", "-c", code],
            cwd=self.folder,
            env={"PATH": str(self.folder / "bin"), "HOME": str(self.folder)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def closure(requirements: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """The installed distributions that satisfy requirements, and those that they require."""
    waiting, seen = [Requirement(text) for text in requirements], set()
    while waiting:
        wanted = waiting.pop()
        found = importlib.metadata.distribution(wanted.name)
        for extra in ("", *wanted.extras):
            if (key := (canonicalize_name(wanted.name), extra)) in seen:
                continue
            seen.add(key)
            for text in found.requires or ():
                one = Requirement(text)
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    waiting.append(one)
        yield found


def environment(folder: Path, requirements: list[str]) -> Environment:
    """An environment with links to what is installed here, rather than gigabytes of copies."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in closure(requirements):
        for top in {file.parts[0] for file in distribution.files or ()}:
            link = packages / top
            if top not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return Environment(folder)


def wheel_requires(wheel: Path, extra: str) -> list[str]:
    """What the wheel requires with an extra, as its metadata say."""
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(f"{NAME}.dist-info/METADATA").decode()
    lines = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    wanted = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines]
    return [
        str(one) for one in wanted if one.marker is None or one.marker.evaluate({"extra": extra})
    ]


KERNELS = """
import sys, torch, aepo_kernels
assert not {"numpy", "transformers", "triton", "typer"} & set(sys.modules)
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(6, 8, generator=generator).requires_grad_()
weight = torch.randn(50, 8, generator=generator).requires_grad_()
targets, advantage, old_logprob = torch.arange(6), torch.ones(6), torch.full((6,), -4.0)
"""
REPORT = """
print(out.loss.item() - loss.item())
print(aepo_kernels.row_kernels("cpu"))
maps = open("/proc/self/maps").read().splitlines()
print(len({line.split()[-1] for line in maps if "libgomp" in line}), "OpenMP")
"""


def test_it_installs_without_a_compiler_and_runs_with_torch_alone(
    built: Built, tmp_path: Path
) -> None:
    bare = environment(tmp_path / "bare", wheel_requires(built.wheel, ""))
    bare.install(str(built.wheel))
    define, before, after = [block.text for block in README if block.language == "python"]
    difference, rows, openmp = bare.run(KERNELS + define + before + after + REPORT).splitlines()
    assert abs(float(difference)) < 1e-5
    assert rows.startswith("c++ ("), rows
    # Two would each start threads of their own.
    assert openmp == "1 OpenMP"


TRAIN = """
import sys
from aepo_fast.__main__ import main
smaller = ["rollout.max_new_tokens=4", "trainer.prompts_per_step=2", "trainer.group_size=2"]
smaller += ["rollout.max_prompt_tokens=200", "data.holdout_fraction=0.5", "eval.samples=1"]
options = [part for one in smaller for part in ("--set", one)]
for command in (
    ["train", "mine.toml", "--set", "trainer.steps=1", *options],
    ["train", "mine.toml", "--set", "trainer.steps=2", *options, "--resume"],
    ["eval", "runs/mine", "--samples", "2", "--prompts", "2"],
):
    sys.argv = ["aepo-fast", *command]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
"""


@pytest.mark.slow
def test_with_the_train_extra_it_runs_the_readme_s_configuration(
    built: Built, tiny_model_dir: Path, tmp_path: Path
) -> None:
    train = environment(tmp_path / "train", wheel_requires(built.wheel, "train"))
    train.install(f"{built.wheel}[train]")
    (text,) = [block.text for block in README if block.language == "toml"]
    text = text.replace("package:smollm2-135m-instruct", str(tiny_model_dir))
    (train.folder / "mine.toml").write_text(text, encoding="utf-8")
    lines = [f'{{"prompt": "What is {n} + 1?", "answer": "{n + 1}"}}' for n in range(8)]
    (train.folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    printed = train.run(TRAIN)
    assert "avg@2" in printed, printed
    assert (train.folder / "runs" / "mine" / "checkpoints" / "step_2").is_dir()
