"""Does a run take the memory that its plan predicts?"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.common.environment import (
    RESULTS,
    child_environment,
    command_line,
    describe,
    result_path,
    write_result,
)
from bench.memory.cases import SHAPES, runs, settings
from bench.sampling.engines import save_random_weights


def add_command(commands: Any) -> None:
    """Add `memory` to the benchmark's commands."""
    parser = commands.add_parser("memory", help=__doc__)
    parser.add_argument("--gpu", action="store_true", help="the runs for a CUDA device")
    parser.add_argument("--dry-run", action="store_true", help="plan the runs, and run none")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="of a run's settings"
    )
    parser.add_argument(
        "--swap", action="store_true", help="each run on a CPU with the other of two models"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes that share each run, on this CPU"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(run=compare)


def compare(arguments: argparse.Namespace) -> None:
    """Run every case in a process of its own, and keep both figures."""
    ranks = arguments.ranks
    cases = [
        (name, case)
        for name, case in runs(on_gpu=arguments.gpu, swap=arguments.swap, ranks=ranks)
        if all(any(part in item for item in (name, *case)) for part in arguments.only)
    ]
    found: list[dict[str, Any]] = []
    record = {
        "benchmark": "memory",
        "environment": describe(),
        "command": command_line(),
        "settings": {"gpu": arguments.gpu, "only": arguments.only, "ranks": ranks},
        "threads": torch.get_num_threads(),
        "cases": found,
    }
    path = result_path(arguments.results, "memory" if ranks == 1 else "memory-ranks")
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases:
            config = _config(Path(folder), name, on_gpu=arguments.gpu)
            if arguments.dry_run:
                planned = _planned(config, case, on_gpu=arguments.gpu, ranks=ranks)
                print(name, *case, "\n" + planned, flush=True)
                continue
            found.append({"model": name, "settings": list(case), **_run(config, case, ranks)})
            print(_line(found[-1]), flush=True)
            write_result(path, record)  # a run of many minutes may be stopped
    if found:
        print(f"{table(found)}\nresult: {path}")


def table(cases: list[dict[str, Any]]) -> str:
    """A row per run, as Markdown."""
    rows = [
        "| model | settings | predicted, GiB | measured, GiB | ratio |",
        "|---|---|---|---|---|",
    ]
    for one in cases:
        cells = [one["model"], ", ".join(map(_short, one["settings"]))]
        if one["status"] == "ok":
            cells += [f"{one[key]:.2f}" for key in ("predicted_gib", "measured_gib")]
            cells += [f"{one['ratio']:.3f}"]
        else:
            cells += ["-", "-", one["message"]]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _short(setting: str) -> str:
    """A setting without its section and quotes."""
    key, value = setting.split("=")
    name = key.split(".", 1)[1]
    return f"{name} {value.strip(chr(34))}"


def _line(record: dict[str, Any]) -> str:
    return table([record]).splitlines()[-1]


def _config(folder: Path, name: str, *, on_gpu: bool) -> Path:
    import tomli_w

    model = folder / name.replace(" ", "-")
    if not model.exists():
        _build(model, name)
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(settings(model, folder / "run", on_gpu=on_gpu)))
    return path


def _build(folder: Path, name: str) -> None:
    """Random weights of a shape, with the tokenizer of the model that comes in a package."""
    from aepo_fast.model.load import load_tokenizer, resolve

    save_random_weights(folder, SHAPES[name])
    load_tokenizer(resolve("package:smollm2-135m-instruct")).save_pretrained(folder)


def _run(config: Path, case: tuple[str, ...], ranks: int) -> dict[str, Any]:
    result = config.with_name("result.json")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += ["bench.memory.child", str(config), str(result), *case]
    done = subprocess.run(command, capture_output=True, text=True, **child_environment())
    if done.returncode or not result.exists():
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {"status": "failed", "message": lines[-1]}
    return {"status": "ok", "message": "", **json.loads(result.read_text())}


def _planned(config: Path, case: tuple[str, ...], *, on_gpu: bool, ranks: int) -> str:
    from aepo_fast.cli.plan import plan_text

    return plan_text(str(config), list(case), gpu="80GiB" if on_gpu else None, devices=ranks)
