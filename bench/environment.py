"""What a result depends on besides the code: machine, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def device_name() -> str:
    """Folder name of this device's results: "cpu" or the GPU's name, such as "h200"."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
        return name.replace(" ", "-")
    return "cpu"


def installed_version(package: str) -> str:
    """An installed distribution's version, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def command_line() -> str:
    """The benchmark's command, as a shell takes it, but for where it writes to."""
    words, kept = iter(sys.argv[1:]), ["python", "-m", "bench"]
    for word in words:
        if word in ("--results", "--runs"):
            next(words, None)
        elif not word.startswith(("--results=", "--runs=")):
            kept.append(word)
    return shlex.join(kept)


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
        "transformers": installed_version("transformers"),
        "commit": os.environ.get("AEPO_COMMIT") or _commit(),
    }


def _commit() -> str:
    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        return done.stdout.strip()

    if shutil.which("git") is None:
        return ""
    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
