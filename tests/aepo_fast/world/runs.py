"""Whole runs of the tiny model, as each rank does them or one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aepo_fast.config.sections import Config
from aepo_fast.training.run import train
from aepo_fast.world import part
from tests.tiny_run import tiny_config


def untied(model: Path, folder: Path) -> Path:
    """A copy of a model whose head is a tensor of its own."""
    made = AutoModelForCausalLM.from_pretrained(model)
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone() * 1.1)
    made.save_pretrained(folder)
    for path in model.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def run_config(model: Path, output: Path, changes: dict[str, dict[str, Any]]) -> Config:
    """The tiny run with the settings of sections changed."""
    cfg = tiny_config(model, output)
    parts = {name: replace(getattr(cfg, name), **values) for name, values in changes.items()}
    return replace(cfg, **parts)


def train_each(configs: list[Config], resume: bool = False) -> list[int]:
    """Run one after the other in these processes."""
    torch.set_num_threads(1)
    try:
        return [train(cfg, resume=resume) for cfg in configs]
    finally:
        part()


def weights_of(cfg: Config, step: int | None = None) -> dict[str, torch.Tensor]:
    """What the last checkpoint of a run holds, or that of a step."""
    folder = Path(cfg.output_dir) / "checkpoints" / f"step_{step or cfg.trainer.steps}"
    name = "adapter_model.safetensors" if cfg.model.lora.rank else "model.safetensors"
    return load_file(folder / name)


def lines_of(cfg: Config) -> list[dict[str, Any]]:
    """What a run has logged."""
    return [json.loads(line) for line in (Path(cfg.output_dir) / "metrics.jsonl").open()]
