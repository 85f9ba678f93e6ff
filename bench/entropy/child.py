"""One run in a process of its own: trains, evaluates and writes the part.

`python -m bench.entropy.child FOLDER PART KEY=VALUE...`, with overrides that name local paths.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from aepo_fast.config.sections import Config
from aepo_fast.config.toml import load_config
from aepo_fast.report.logger import read_lines
from aepo_fast.training.checkpoint import complete_checkpoints
from aepo_fast.training.optimizer_state import OPTIMIZER_NAME
from aepo_fast.training.run import train
from bench.common.environment import describe
from bench.entropy.evaluation import evaluate_run, trained_model
from bench.entropy.measures import held_within, late_mean
from bench.entropy.settings import BASE, SIZES

# Metric -> its name in a part, and the digits that are kept.
_SERIES = {
    "entropy": ("entropy", 4),
    "aepo/temperature": ("temperature", 4),
    "reward": ("reward", 4),
    "completions/mean_length": ("mean_length", 2),
    "completions/clipped_ratio": ("clipped_ratio", 4),
    "time/step": ("step_s", 3),
}


def main(folder: Path, part: Path, local: list[str]) -> int:
    """Do what the folder's plan says; returns the exit code of the training."""
    plan = json.loads((folder / "plan.json").read_text())
    cfg = configuration(plan, [*local, f"output_dir={folder}"])
    model, training = cfg.model.path, {}
    if plan["setting"] != BASE:
        code = _finish_training(cfg)
        if code:
            return code
        checkpoint = trained_model(folder)
        # A finished run never goes on. Its optimizer's state takes 1 GB for SmolLM2.
        (checkpoint / OPTIMIZER_NAME).unlink(missing_ok=True)
        model = str(checkpoint)
        training = training_record(read_lines(folder / "metrics.jsonl"), plan["target"])
    prompts = SIZES[plan["size"]].prompts
    record = {
        "benchmark": "entropy",
        "environment": describe(),
        **plan,
        **training,
        "evaluation": evaluate_run(model, cfg, prompts=prompts, samples=plan["samples"]),
    }
    part.parent.mkdir(parents=True, exist_ok=True)
    draft = part.with_suffix(".tmp")
    draft.write_text(as_text(record))
    os.replace(draft, part)
    return 0


def _finish_training(cfg: Config) -> int:
    """Train what is left of a run's steps; returns the exit code."""
    checkpoints = complete_checkpoints(Path(cfg.output_dir) / "checkpoints")
    if checkpoints and checkpoints[-1].name == f"step_{cfg.trainer.steps}":
        return 0
    return train(cfg, resume=True)


def as_text(record: dict[str, Any]) -> str:
    """A part's JSON, one line a key: a series of 300 steps is one line, too."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def configuration(plan: dict[str, Any], local: list[str]) -> Config:
    """The run's configuration; the plan's settings come last."""
    return load_config(str(SIZES[plan["size"]].config), [*local, *plan["settings"]])


def training_record(lines: list[dict[str, Any]], target: float | None) -> dict[str, Any]:
    """The series of a finished run, and how well its entropy was held."""
    steps = [line for line in lines if "entropy" in line]
    record: dict[str, Any] = {
        name: [round(line.get(metric, 0.0), digits) for line in steps]
        for metric, (name, digits) in _SERIES.items()
    }
    evals = [line for line in lines if "eval/avg@k" in line]
    record["heldout"] = [[line["step"], round(line["eval/avg@k"], 4)] for line in evals]
    entropy = [line["entropy"] for line in steps]
    record["late_entropy"] = round(late_mean(entropy), 4)
    if target is not None:
        record["held"] = held_within(entropy, target)
    return record


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
