"""How long is a whole training run in TRL, in TRL with our head, and in this trainer?"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from aepo_kernels import row_kernels
from bench.common.environment import (
    RESULTS,
    child_environment,
    command_line,
    describe,
    result_path,
    version_text,
    write_result,
)
from bench.e2e import CANDIDATES
from bench.e2e.table import table

SETTINGS = Path(__file__).parent / "settings.toml"
# What makes the runs equal; TRL's counterparts of all else are made from the configuration.
FIXED = (
    "aepo.",
    "loss.",
    "model.dtype",
    "rollout.backend",
    "rollout.steps_ahead",
    "trainer.epochs",
    "trainer.lr_schedule",
    "trainer.minibatches",
    "trainer.warmup_steps",
)


def add_command(commands: Any) -> None:
    """Add `e2e` to the benchmark's commands."""
    parser = commands.add_parser("e2e", help=__doc__)
    parser.add_argument("--model", help="folder, hub id or package:NAME (SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help=f"part of a name of {'; '.join(CANDIDATES)}; repeatable",
    )
    parser.add_argument(
        "--rollouts", nargs="+", choices=("hf", "vllm"), help="hf, and vllm where it is installed"
    )
    parser.add_argument("--steps", type=int, help="of each run (20)")
    parser.add_argument("--prompts", type=int, help="of a step (8)")
    parser.add_argument("--samples", type=int, help="of each prompt (8)")
    parser.add_argument("--tokens", type=int, help="of a sample at most (48)")
    parser.add_argument(
        "--eval-every", type=int, default=0, metavar="STEPS", help="0: only after the last step"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="other settings of all runs, of those that TRL's are made from",
    )
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="FOLDER/trl has TRL")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Run every candidate in turn, then evaluate what they saved; the record is kept after each."""
    # The other benchmarks run without the trainer's packages.
    from aepo_fast.config.errors import ConfigError
    from aepo_fast.config.toml import dump_config, load_config

    rollouts = arguments.rollouts or ["hf", *["vllm"] * _has_vllm()]
    try:
        cfg = load_config(str(SETTINGS), overrides(arguments))
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    model = "a folder" if Path(cfg.model.path).exists() else cfg.model.path
    shown = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=model))
    record: dict[str, Any] = {
        "benchmark": "e2e",
        "environment": describe()
        | {
            "vllm": version_text("vllm"),
            "row_kernels": row_kernels("cuda" if torch.cuda.is_available() else "cpu"),
        },
        "command": command_line(),
        "settings": {
            "model": model,
            "task": ", ".join(source.name for source in cfg.data.sources),
            "steps": cfg.trainer.steps,
            "prompts": cfg.trainer.prompts_per_step,
            "samples": cfg.trainer.group_size,
            "tokens": cfg.rollout.max_new_tokens,
        },
        "config": dump_config(shown),
        "base": {},  # the model before training
        "candidates": {},
    }
    path = result_path(arguments.results, "e2e")
    path.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written fails before the work
    peers = arguments.peers and arguments.peers.resolve() / "trl"
    with tempfile.TemporaryDirectory(prefix="bench-e2e-") as work:
        for rollout in rollouts:
            for candidate in CANDIDATES:
                if any(part.lower() in candidate.lower() for part in arguments.skip):
                    continue
                name = candidate if rollout == "hf" else f"{candidate}, {rollout}"
                folder = Path(work) / name.replace(", ", "-").replace(" ", "-")
                changes = [*overrides(arguments), f"rollout.backend={rollout}"]
                config = load_config(str(SETTINGS), [*changes, f"output_dir={folder / 'run'}"])
                print(f"{name} ...", flush=True)
                found = child(candidate, folder, dump_config(config), peers, arguments.eval_every)
                record["candidates"][name] = found
                write_result(path, record)
        evaluate(record, Path(work), dump_config(cfg), cfg.model.path)
    write_result(path, record)
    print(f"{table(record['candidates'])}\nresult: {path}")


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The changes to settings.toml that a command line asks for."""
    for change in arguments.set:
        if change.strip().startswith(FIXED):
            raise SystemExit(f"--set {change}: this is the same in all runs and cannot be changed")
    given = {
        "model.path": arguments.model,
        "trainer.steps": arguments.steps,
        "trainer.prompts_per_step": arguments.prompts,
        "trainer.group_size": arguments.samples,
        "rollout.max_new_tokens": arguments.tokens,
    }
    named = [f"{key}={value}" for key, value in given.items() if value is not None]
    return [*named, *arguments.set]


def child(
    candidate: str, folder: Path, config: str, peers: Path | None, every: int
) -> dict[str, Any]:
    """The record of a candidate's run in a process of its own, or how that failed."""
    found = _run(candidate, folder, config, {"every": every}, peers)
    if "steps" in found:
        found |= summary(found["steps"])
    return found


def evaluate(record: dict[str, Any], work: Path, config: str, base: str) -> None:
    """Replace the saved models of all candidates by their accuracy, after that of the base."""
    runs = [found for found in record["candidates"].values() if found.get("saved")]
    models = [base, *(one["folder"] for found in runs for one in found["saved"])]
    if not runs:
        return
    print("evaluating ...", flush=True)
    found = _run("evaluate", work / "evaluation", config, {"models": models}, None)
    results = iter(found["value"]) if "value" in found else None
    record["base"] = found if results is None else next(results)
    for one in (one for run in runs for one in run["saved"]):
        del one["folder"]
        if results is not None:
            one |= next(results)


def _run(
    candidate: str, folder: Path, config: str, plan: dict[str, Any], peers: Path | None
) -> dict[str, Any]:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config)
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-u", "-m", "bench.e2e.child", candidate, str(folder)]
    log = folder / "output.log"
    with log.open("wb") as output:
        # A run ends with the benchmark, however that is ended.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, **child_environment(peers)
        )
        try:
            code = process.wait()
        finally:
            process.kill()
            signal.signal(signal.SIGTERM, before)
    result = folder / "result.json"
    if code or not result.exists():
        said = log.read_text(errors="replace").strip().splitlines()[-1:]
        message = f"exit code {code}: {''.join(said)}"[:300]
        return {"status": "failed", "message": message}
    found = json.loads(result.read_text())
    return found if isinstance(found, dict) else {"value": found}


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all steps but the first, which warms up, and tokens per second of these."""
    counted = steps[1:] or steps
    return {
        "median_s": statistics.median(step["seconds"] for step in counted),
        "median_phases_s": {
            phase: statistics.median(step["phases"][phase] for step in counted)
            for phase in counted[0]["phases"]
        },
        "tokens_per_s": sum(step["tokens"] for step in counted)
        / sum(step["seconds"] for step in counted),
    }


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None
