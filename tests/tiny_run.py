"""A complete run of the tiny model, small enough to repeat many times."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    TrainerConfig,
)
from bench.common.environment import ROOT

PRODUCTS = SourceConfig(
    "reasoning_gym", "products", {"min_terms": 2, "max_terms": 2, "max_digits": 1}, size=60
)


def tiny_config(model: Path, output: Path, **sections: Any) -> Config:
    """Two minibatches a step of 4 x 4 samples, AEPO as published; `sections` replace sections."""
    cfg = Config(
        model=ModelConfig(path=str(model), compute_dtype="float32", gradient_checkpointing=False),
        data=DataConfig(sources=(PRODUCTS,)),
        output_dir=str(output),
        reward=RewardConfig(function="tests.tiny_rewards:even_start"),
        rollout=RolloutConfig(max_new_tokens=6, dtype="float32"),
        aepo=AepoConfig(controller="published", alpha=0.5, entropy_target=5.65),
        trainer=TrainerConfig(
            steps=4, prompts_per_step=4, group_size=4, minibatches=2, lr=1e-2, device="cpu"
        ),
        eval=EvalConfig(prompts=0),
        checkpoint=CheckpointConfig(every=1, keep=2),
        logging=LoggingConfig(plot=False),
    )
    # A loss of its own: defaults that depend on other sections are settled when a Config is built.
    return replace(cfg, **{"loss": LossConfig(), **sections})


def a_machine(
    device: str | torch.device = "cpu",
    *,
    weights: torch.dtype = torch.float32,
    compute: torch.dtype = torch.float32,
) -> Machine:
    """A machine with the head backend "auto", on the CPU and in float32 unless told otherwise."""
    return Machine(torch.device(device), weights, compute, compute, head_backend="auto")


def with_trainer(cfg: Config, **changes: Any) -> Config:
    """The same run with other trainer settings."""
    return replace(cfg, trainer=replace(cfg.trainer, **changes))


def copy_until(step: int, run: Config, copy: Config) -> None:
    """Make `copy` the run as it was after a step; `run` has kept every checkpoint."""
    shutil.copytree(run.output_dir, copy.output_dir)
    for later in range(step + 1, run.trainer.steps + 1):
        shutil.rmtree(Path(copy.output_dir) / "checkpoints" / f"step_{later}")


def explained_metrics() -> set[str]:
    """The metrics that docs/metrics.md explains."""
    glossary, _ = (ROOT / "docs" / "metrics.md").read_text().split("## When a number looks wrong")
    rows = re.findall(r"^\| (`.*?) \|", glossary, flags=re.M)
    return {name for row in rows for name in re.findall(r"`(.+?)`", row)}
