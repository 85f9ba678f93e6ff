"""`aepo-fast eval`: evaluate a run's last checkpoint or any model on held-out prompts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from reasoning_gym.factory import DATASETS

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config, EvalConfig, ModelConfig
from aepo_fast.config.toml import load_config, with_overrides
from aepo_fast.model.lora import check_same_adapter, holds_adapter
from aepo_fast.model.quantized import check_same_quantization
from aepo_fast.rollout.load import check_rollout_backend, load_engine
from aepo_fast.training.assemble import read_inputs, rendering_time
from aepo_fast.training.checkpoint import STATE_NAME, load_state
from aepo_fast.training.checkpoint_damage import last_checkpoint
from aepo_fast.training.evaluate import EvalResult, evaluate


def evaluate_model(
    model: str,
    *,
    config: str | None,
    task: str | None,
    samples: int,
    prompts: int,
    overrides: Sequence[str],
) -> EvalResult:
    """Evaluate `model`, a run's folder or anything `model.path` may be.

    A run brings its configuration with it; otherwise `config` names one, or `task` the data alone.
    `overrides` change it. The engine is that of its rollout section; vLLM alone then loads the
    model. The prompts are the held-out ones; a source given as `task` is held out whole.

    Raises ConfigError, where it can before a model loads, and RewardError and RolloutError as
    `evaluate` does.
    """
    cfg, path = _configuration(model, config, task, overrides)
    machine = resolve_machine(cfg, trains=False)
    cfg = machine.settled(cfg)
    check_rollout_backend(cfg)
    # A run's checkpoint: the prompts that the run evaluates on, on any day.
    state = load_state(Path(path)) if (Path(path) / STATE_NAME).is_file() else None
    adapter = Path(path) if state is not None and holds_adapter(Path(path)) else None
    if adapter is not None:
        check_same_adapter(adapter, cfg.model.lora)
        check_same_quantization(adapter, cfg.model)
        path = cfg.model.path
    inputs = read_inputs(cfg, path, rendered_at=rendering_time(state))
    for note in inputs.prompts.notes:
        print(note, file=sys.stderr)
    chosen = (inputs.prompts.train if task else inputs.prompts.heldout)[:prompts]
    if not chosen:
        reason = "holds out no prompt to evaluate on"
        raise ConfigError("data.holdout_fraction", cfg.data.holdout_fraction, reason, "Raise it")
    folder, tokenizer = inputs.model_folder, inputs.tokenizer
    with closing(load_engine(cfg, machine, folder, tokenizer, adapter=adapter)) as engine:
        return evaluate(
            engine,
            inputs.reward,
            chosen,
            inputs.decode,
            samples=samples,
            max_new_tokens=cfg.rollout.max_new_tokens,
            seed=cfg.eval.seed,
            overlap=cfg.reward.overlap,
        )


def _configuration(
    model: str, config: str | None, task: str | None, overrides: Sequence[str]
) -> tuple[Config, str]:
    """The configuration to evaluate under, and the path of the weights."""
    run = Path(model).expanduser()
    path = model
    if (run / "checkpoints").is_dir():
        again = f"Evaluate {{}} with --config {config or run / 'config.toml'}"
        path = str(last_checkpoint(run, "MODEL", again))
        config = config or str(run / "config.toml")
    if config is not None:
        cfg = load_config(config, overrides)
    elif task is not None:
        model_section = ModelConfig(path=path)
        plain = Config(model=model_section, data=DataConfig(sources=(_source(task),)))
        cfg = with_overrides(plain, overrides)
    else:
        reason = "is no run, so it is not known what to evaluate on"
        raise ConfigError("MODEL", model, reason, "Add --config NAME or --task NAME")
    if task is not None:
        source = _source(task)
        # What has nothing to do here goes: a seed draws a task's questions and holds none out, and
        # a run's evaluations are of what it holds out.
        seed = cfg.data.seed if source.kind == "reasoning_gym" else DataConfig.seed
        data = dataclasses.replace(cfg.data, sources=(source,), holdout_fraction=0.0, seed=seed)
        cfg = dataclasses.replace(cfg, data=data, eval=EvalConfig(seed=cfg.eval.seed))
    return cfg, path


def _source(task: str) -> SourceConfig:
    if task in DATASETS:
        return SourceConfig("reasoning_gym", task)
    is_file = Path(task).suffix in (".json", ".jsonl", ".parquet")
    return SourceConfig("file" if is_file else "hub", task)
