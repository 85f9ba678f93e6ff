"""Whole runs of the tiny model, as each rank does them or one process."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from aepo_fast.config.sections import CheckpointConfig, Config
from aepo_fast.memory.check import Prediction
from aepo_fast.training import run
from aepo_fast.world import ALONE, World, join, part
from tests.aepo_fast.world.loss_terms import measured_terms
from tests.tiny_run import copy_until, tiny_config

_TERMS = "terms.json"


def untied(model: Path, folder: Path) -> Path:
    """A copy of a model whose head is a tensor of its own."""
    shutil.copytree(model, folder)
    made = AutoModelForCausalLM.from_pretrained(model)
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone() * 1.1)
    made.save_pretrained(folder)
    return folder


def in_blocks(model: Path, folder: Path) -> Path:
    """A model of which both halves of each matrix are 4096 numbers or more, in blocks of 256."""
    shutil.copytree(model, folder)
    config = AutoConfig.from_pretrained(model)
    config.hidden_size, config.head_dim = 128, 32
    config.vocab_size += -config.vocab_size % 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def run_config(model: Path, output: Path, changes: dict[str, Any]) -> Config:
    """The tiny run with settings of sections changed, or whole sections.

    Its learning rate is lower: where a gradient is almost nothing, rounding alone decides the
    direction of AdamW's first steps.
    """
    cfg = tiny_config(model, output, checkpoint=CheckpointConfig(every=0))
    cfg = replace(cfg, trainer=replace(cfg.trainer, lr=3e-4))
    parts = {
        name: replace(getattr(cfg, name), **values) if isinstance(values, dict) else values
        for name, values in changes.items()
    }
    return replace(cfg, **parts)


def with_output(cfg: Config, output: Path) -> Config:
    """The same run in another folder."""
    return replace(cfg, output_dir=str(output))


@dataclass(frozen=True)
class Job:
    """A run, from its start or from where another was after step 2.

    saves_anew: its checkpoints are gathered as after an error, over a group made for it.
    """

    cfg: Config
    copied: Config | None = None
    saves_anew: bool = False


def train_each(jobs: list[Job]) -> None:
    """Do one job after the other, as one of the processes that torchrun's variables describe."""
    torch.set_num_threads(1)
    world = join(on_gpu=False, timeout_s=120)
    try:
        for job in jobs:
            cfg, goes_on = job.cfg, job.copied is not None
            if job.copied is not None:
                world.on_first(partial(copy_until, 2, job.copied, cfg))
            # Half of the time would go to a prediction of memory.
            with patch.object(run, "predict", _no_prediction):
                if world is not ALONE:
                    with saving_anew() if job.saves_anew else nullcontext():
                        assert run.train(cfg, resume=goes_on) == 0
                    continue
                with measured_terms() as terms:
                    assert run.train(cfg, resume=goes_on) == 0
            (Path(cfg.output_dir) / _TERMS).write_text(json.dumps(terms))
    finally:
        part()


def _no_prediction(*args: Any, **options: Any) -> Prediction:
    return Prediction(None, None)


@contextmanager
def saving_anew() -> Iterator[None]:
    """Have runs gather their checkpoints over groups of their own."""
    original = run.save_checkpoint

    def save_anew(*args: Any, world: World, **options: Any) -> Path:
        return original(*args, world=world.anew(), **options)

    run.save_checkpoint = save_anew
    try:
        yield
    finally:
        run.save_checkpoint = original


def weights_of(cfg: Config, step: int | None = None) -> dict[str, torch.Tensor]:
    """What the last checkpoint of a run holds, or that of a step."""
    folder = Path(cfg.output_dir) / "checkpoints" / f"step_{step or cfg.trainer.steps}"
    name = "adapter_model.safetensors" if cfg.model.lora.rank else "model.safetensors"
    return load_file(folder / name)


def lines_of(cfg: Config) -> list[dict[str, Any]]:
    """What a run has logged."""
    return [json.loads(line) for line in (Path(cfg.output_dir) / "metrics.jsonl").open()]


def loss_terms_of(cfg: Config, *, cancelling: bool = False) -> list[float]:
    """For each step of a run of one process, the mean of its updates' `measured_terms`.

    cancelling: with the parts of terms that nearly cancel.
    """
    pairs = json.loads((Path(cfg.output_dir) / _TERMS).read_text())
    found = [terms + parts * cancelling for terms, parts in pairs]
    each = len(found) // cfg.trainer.steps
    return [statistics.fmean(found[at : at + each]) for at in range(0, len(found), each)]
