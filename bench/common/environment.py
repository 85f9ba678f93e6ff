"""What a result depends on besides the code: machine, versions, commit; and its file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def device_name() -> str:
    """Folder name of this device's results: "cpu" or the GPU's name, such as "h200"."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
        return name.replace(" ", "-")
    return "cpu"


def installed_version(package: str) -> str | None:
    """An installed distribution's version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def version_text(package: str) -> str:
    """An installed distribution's version, or that there is none."""
    return installed_version(package) or "not installed"


def result_path(results: Path, benchmark: str) -> Path:
    """Where a result of now belongs, among those of this device."""
    return results / device_name() / f"{benchmark}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def write_result(path: Path, record: dict[str, Any]) -> None:
    """Write a benchmark's record as JSON; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))


def command_line() -> str:
    """The benchmark's command, as a shell takes it, but for where it reads and writes."""
    places = "--results", "--runs", "--peers"
    words, kept = iter(sys.argv[1:]), ["python", "-m", "bench"]
    for word in words:
        if word in places:
            next(words, None)
        elif word.split("=")[0] not in places:
            kept.append(word)
    return shlex.join(kept)


def child_environment(first: Path | None = None) -> dict[str, Any]:
    """Folder and variables for a process that runs a module of this repository.

    first: a folder of packages that it sees before those that are installed.
    """
    paths = [first, ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(str(one) for one in paths if one)
    return {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": path}}


def describe() -> dict[str, str | int]:
    """Machine, versions, commit and date, for a result file.

    The commit is that of the checkout, or AEPO_COMMIT where the code lies without its history.
    """
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_text("transformers"),
        "commit": os.environ.get("AEPO_COMMIT") or _commit(),
    }


def _commit() -> str:
    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        return done.stdout.strip()

    if shutil.which("git") is None:
        return ""
    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
