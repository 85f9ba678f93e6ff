"""`aepo-fast eval`: evaluate a run's last checkpoint or any model, and compare evaluations."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from reasoning_gym.factory import DATASETS
from rich.console import Console

from aepo_fast.cli.eval_file import check_output, read_evaluation, write_evaluation
from aepo_fast.cli.eval_options import Sampling
from aepo_fast.config.conditions import conditions_of
from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine, resolve_machine
from aepo_fast.config.sections import Config, ModelConfig, RolloutConfig, TrainerConfig
from aepo_fast.config.toml import load_config, with_overrides
from aepo_fast.data.benchmarks import find_benchmark, on_benchmark, only_evaluated
from aepo_fast.model.lora import check_same_adapter, holds_adapter
from aepo_fast.model.quantized import check_same_quantization
from aepo_fast.report.logger import progress
from aepo_fast.rollout.load import check_rollout_backend, load_engine
from aepo_fast.samples import Prompt
from aepo_fast.training.assemble import Inputs, check_lengths, read_inputs, rendering_time
from aepo_fast.training.checkpoint import STATE_NAME, load_state
from aepo_fast.training.checkpoint_damage import last_checkpoint
from aepo_fast.training.eval_statistics import ProblemResult, compare_problems
from aepo_fast.training.evaluate import EvalResult, evaluate, problem_id

_PROMPTS = 64  # where no benchmark says which


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A model to evaluate, checked and not yet loaded. path: of its weights."""

    path: str
    cfg: Config
    machine: Machine
    inputs: Inputs
    adapter: Path | None
    chosen: list[Prompt]

    def evaluated(self, sampling: Sampling) -> EvalResult:
        """Load the model in its engine, sample and score."""
        cfg, inputs = self.cfg, self.inputs
        given = cfg, self.machine, inputs.model_folder, inputs.tokenizer
        shown = progress(Console(stderr=True), f"evaluating {self.path}")
        with closing(load_engine(*given, adapter=self.adapter)) as engine, shown as advance:
            result = evaluate(
                engine,
                inputs.reward,
                self.chosen,
                inputs.decode,
                samples=sampling.samples,
                max_new_tokens=cfg.rollout.max_new_tokens,
                seed=cfg.eval.seed,
                overlap=cfg.reward.overlap,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                ks=sampling.ks,
                on_tokens=advance,
            )
        return dataclasses.replace(result, settings=self._settings(sampling))

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "model": self.path,
            "sources": [
                {"kind": one.kind, "name": one.name, "subset": one.subset, "split": one.split}
                for one in cfg.data.sources
            ],
            "system_prompt": cfg.data.system_prompt,
            "instruction": cfg.data.instruction,
            "reward": cfg.reward.function,
            "backend": cfg.rollout.backend,
            "dtype": cfg.rollout.dtype,
            "max_new_tokens": cfg.rollout.max_new_tokens,
            "stop": list(cfg.rollout.stop),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "samples": sampling.samples,
            "seed": cfg.eval.seed,
        }


def evaluate_model(
    model: str | os.PathLike[str],
    *,
    config: str | Config | None = None,
    task: str | None = None,
    benchmark: str | None = None,
    data: str | None = None,
    samples: int | None = None,
    prompts: int | None = None,
    k: Sequence[int] = (),
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    greedy: bool = False,
    backend: str | None = None,
    compare: str | os.PathLike[str] | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> EvalResult:
    """Evaluate `model`, a run's folder or anything `model.path` may be.

    A run brings its configuration with it; otherwise `config` is one or names one, or `task` or
    `benchmark` the data alone. `overrides` change it. The engine is that of its rollout section, or
    `backend`; without a configuration vLLM where it is installed. vLLM alone then loads the model.
    The prompts are the held-out ones; a source given as `task` is held out whole, and so is a
    benchmark, read from the file `data` or from the hub.

    prompts: the first so many; None is all of a benchmark, else 64. samples, k, temperature, top_p,
    top_k and greedy are as `Sampling.of` takes them. compare: a file that `output` wrote, or
    another model, which is evaluated in the same way; the problems must be the same.

    Raises ConfigError before a model loads, and RewardError and RolloutError as `evaluate` does.
    """
    drawn: Any = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "greedy": greedy}
    sampling = Sampling.of(samples, k=k, **drawn)
    if prompts is not None and prompts < 1:
        raise ConfigError("--prompts", prompts, "is no number of prompts", "Set 1 or more")
    if output is not None:
        check_output(Path(output))
    other_name = None if compare is None else os.fspath(compare)
    earlier = None
    if other_name is not None and (other_name.endswith(".json") or _is_file(other_name)):
        earlier = read_evaluation(Path(other_name).expanduser())
    cfg, path = _configuration(
        os.fspath(model), config, task, overrides, benchmark=benchmark, data=data, backend=backend
    )
    whole = task is not None or benchmark is not None
    most = prompts if prompts is not None else None if benchmark is not None else _PROMPTS
    subject = _checked(cfg, path, whole=whole, most=most)
    other = None
    if earlier is not None:
        _check_same_problems(subject, [problem.id for problem in earlier[0]], str(other_name))
    elif other_name is not None:
        other = _checked(*_as_evaluated(other_name, cfg), whole=whole, most=most)
        theirs = [problem_id(prompt) for prompt in other.chosen]
        _check_same_problems(subject, theirs, other_name)
    result = subject.evaluated(sampling)
    if other is not None:
        second = other.evaluated(sampling)
        earlier = second.problems, second.settings
    if earlier is not None:
        result = _compared(result, *earlier, other=str(other_name))
    if output is not None:
        write_evaluation(Path(output), result)
    return result


def _checked(cfg: Config, path: str, *, whole: bool, most: int | None) -> _Subject:
    """All that can fail before the weights of `path` load.

    whole: evaluate all prompts, not the held-out ones. most: how many at most.
    """
    machine = resolve_machine(cfg, trains=False)
    cfg = machine.settled(cfg)
    check_rollout_backend(cfg)
    # A run's checkpoint: the prompts that the run evaluates on, on any day.
    state = load_state(Path(path)) if (Path(path) / STATE_NAME).is_file() else None
    weights = path
    adapter = Path(path) if state is not None and holds_adapter(Path(path)) else None
    if adapter is not None:
        check_same_adapter(adapter, cfg.model.lora)
        check_same_quantization(adapter, cfg.model)
        weights = cfg.model.path
    inputs = read_inputs(cfg, weights, rendered_at=rendering_time(state))
    for note in inputs.prompts.notes:
        print(note, file=sys.stderr)
    chosen = (inputs.prompts.train if whole else inputs.prompts.heldout)[:most]
    if not chosen:
        reason = "holds out no prompt to evaluate on"
        raise ConfigError("data.holdout_fraction", cfg.data.holdout_fraction, reason, "Raise it")
    check_lengths(cfg, chosen, inputs.model_folder)
    return _Subject(path, cfg, machine, inputs, adapter, chosen)


def _check_same_problems(subject: _Subject, theirs: Sequence[str], other: str) -> None:
    ours = {problem_id(prompt) for prompt in subject.chosen}
    common = len(ours & set(theirs))
    if common < len(ours) or len(theirs) != len(ours):
        reason = f"holds {len(theirs)} problems, {common} of the {len(ours)} that are evaluated"
        fix = "Evaluate the same: the data, --prompts and data.seed of both must agree"
        raise ConfigError("--compare", other, reason, fix)


def _compared(
    result: EvalResult,
    theirs: Sequence[ProblemResult],
    settings: dict[str, Any],
    *,
    other: str,
) -> EvalResult:
    known = {"stop": [], "top_k": 0, **settings}  # older files do not say these
    notes = [
        f"not the same in both: {key} {value!r} here, {known.get(key)!r} there"
        for key, value in result.settings.items()
        if key not in ("model", "sources") and known.get(key) != value
    ]
    ks = list(result.pass_at_k)
    found = compare_problems(result.problems, theirs, other=other, ks=ks, notes=notes)
    return dataclasses.replace(result, comparison=found)


def _configuration(
    model: str,
    config: str | Config | None,
    task: str | None,
    overrides: Sequence[str],
    *,
    benchmark: str | None = None,
    data: str | None = None,
    backend: str | None = None,
) -> tuple[Config, str]:
    """The configuration to evaluate under, and the path of the weights."""
    preset = None if benchmark is None else find_benchmark(benchmark, data)
    if preset is not None and task is not None:
        reason = "names what to evaluate on, and so does --benchmark"
        raise ConfigError("--task", task, reason, "Give one of the two")
    if data is not None and preset is None:
        reason = "takes the place of a benchmark's dataset, and none is named"
        raise ConfigError("--data", data, reason, "Add --benchmark NAME, or use --task FILE")
    given, path = _run_of(model, config if isinstance(config, str) else None)
    replaces = preset is not None or backend is not None  # before the overrides are read
    if isinstance(config, Config):
        cfg = with_overrides(config, () if replaces else overrides)
    elif given is not None:
        cfg = load_config(given, () if replaces else overrides)
    elif task is not None or preset is not None:
        source = SourceConfig(name="none") if task is None else _source(task)
        installed = importlib.util.find_spec("vllm") is not None
        rollout = RolloutConfig(backend="vllm" if installed and backend is None else "hf")
        plain = Config(ModelConfig(path=path), DataConfig(sources=(source,)), rollout=rollout)
        cfg = with_overrides(plain, () if replaces else overrides)
    else:
        reason = "is no run, so it is not known what to evaluate on"
        fix = "Add --config NAME, --task NAME or --benchmark NAME"
        raise ConfigError("MODEL", model, reason, fix)
    if preset is not None:
        cfg = on_benchmark(cfg, preset, data)
    if backend is not None:
        cfg = _on_engine(cfg, backend)
    if replaces:
        cfg = with_overrides(cfg, overrides)
    if task is not None:
        source = _source(task)
        # What has nothing to do here goes: a seed draws a task's questions and holds none out.
        seed = cfg.data.seed if source.kind == "reasoning_gym" else DataConfig.seed
        section = dataclasses.replace(cfg.data, sources=(source,), holdout_fraction=0.0, seed=seed)
        cfg = only_evaluated(cfg, section)
    return cfg, path


def _run_of(model: str, config: str | None, argument: str = "MODEL") -> tuple[str | None, str]:
    """The configuration of a run, or the given one, and the path of the weights."""
    run = Path(model).expanduser()
    if not (run / "checkpoints").is_dir():
        return config, model
    config = config or str(run / "config.toml")
    again = f"Evaluate {{}} with --config {config}"
    return config, str(last_checkpoint(run, argument, again))


def _on_engine(cfg: Config, backend: str) -> Config:
    """The configuration with an engine, without what only another one reads."""
    if backend not in ("hf", "vllm"):
        raise ConfigError("--backend", backend, "is no engine", 'Use "hf" or "vllm"')
    if backend == cfg.rollout.backend:
        return cfg
    items = dataclasses.fields(RolloutConfig)
    kept = {one.name: getattr(cfg.rollout, one.name) for one in items if not conditions_of(one)}
    return dataclasses.replace(cfg, rollout=RolloutConfig(**{**kept, "backend": backend}))


def _as_evaluated(model: str, cfg: Config) -> tuple[Config, str]:
    """The configuration of another model, evaluated as `cfg` says, and the path of its weights.

    A run brings its model section.
    """
    given, path = _run_of(model, None, "--compare")
    section = ModelConfig(path=path, chat_template=cfg.model.chat_template)
    if given is not None:
        section = load_config(given).model
    trainer = TrainerConfig(seed=cfg.trainer.seed, device=cfg.trainer.device)
    # What only training reads may not go with the other's model.
    rollout = dataclasses.replace(
        cfg.rollout, steps_ahead=0, sleep="cache", share_weights=True, offload_optimizer=False
    )
    kept = {"data": cfg.data, "reward": cfg.reward, "eval": cfg.eval}
    return Config(section, **kept, rollout=rollout, trainer=trainer), path


def _source(task: str) -> SourceConfig:
    if task in DATASETS:
        return SourceConfig("reasoning_gym", task)
    is_file = Path(task).suffix in (".json", ".jsonl", ".parquet")
    return SourceConfig("file" if is_file else "hub", task)


def _is_file(path: str) -> bool:
    return Path(path).expanduser().is_file()
