"""One run in a process of its own: `python -m bench.e2e.child CANDIDATE FOLDER`.

FOLDER has config.toml and plan.json; the run's result.json goes there. With CANDIDATE "evaluate" it
evaluates the models that plan.json names.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config
from aepo_fast.config.toml import load_config
from aepo_fast.rollout.load import load_engine
from aepo_fast.training.assemble import read_inputs
from aepo_fast.training.evaluate import evaluate
from bench.common.timing import describe_error
from bench.e2e import OURS, TRL_OUR_HEAD, ours, trl_run
from bench.e2e.recorder import Recorder

EVALUATE = "evaluate"


def main(candidate: str, folder: Path) -> None:
    """Do what the folder's plan says, and write the result."""
    cfg = load_config(str(folder / "config.toml"))
    plan = json.loads((folder / "plan.json").read_text())
    if candidate == EVALUATE:
        found: Any = [evaluate_model(cfg, model) for model in plan["models"]]
    else:
        found = run(candidate, cfg, folder, every=plan["every"])
    (folder / "result.json").write_text(json.dumps(found))


def run(candidate: str, cfg: Config, folder: Path, *, every: int) -> dict[str, Any]:
    """One candidate's record: its steps, the models it saved, memory and what it ran with."""
    recorder = Recorder(folder / "models", steps=cfg.trainer.steps, every=every)
    try:
        if candidate == OURS:
            with_what = ours.train(cfg, recorder)
        else:
            our_head = candidate == TRL_OUR_HEAD
            with_what = trl_run.train(cfg, recorder, our_head=our_head)
    except ImportError as error:
        return {"status": "not available", "message": describe_error(error)}
    known = {"status": "ok", "message": "", "threads": torch.get_num_threads()}
    return known | {"with": with_what} | recorder.record()


def evaluate_model(cfg: Config, model: str) -> dict[str, Any]:
    """Accuracy of a model on the held-out prompts at temperature 1, by the same sampler for all."""
    machine = resolve_machine(cfg, trains=False)
    cfg = machine.settled(cfg)
    inputs = read_inputs(cfg, model)
    with closing(load_engine(cfg, machine, inputs.model_folder, inputs.tokenizer)) as engine:
        found = evaluate(
            engine,
            inputs.reward,
            inputs.prompts.heldout[: cfg.eval.prompts],
            inputs.decode,
            samples=cfg.eval.samples,
            max_new_tokens=cfg.rollout.max_new_tokens,
            seed=cfg.eval.seed,
            overlap=cfg.reward.overlap,
        )
    return {
        "accuracy": found.avg_at_k,
        "ci95": list(found.ci95),
        "mean_length": found.mean_length,
        "prompts": found.num_prompts,
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
