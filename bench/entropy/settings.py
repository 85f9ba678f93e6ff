"""The grid of the entropy benchmark: sizes, tasks, settings and the targets that a task admits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from bench.entropy.small_tasks import CEILINGS

HERE = Path(__file__).parent
TARGETS = (0.25, 0.5, 0.75, 1.0)
PASS_SAMPLES = 1024  # of each prompt of an evaluation: the largest k of pass@k


@dataclass(frozen=True)
class Size:
    """A model with its tasks.

    tasks: name -> overrides of the size's TOML. prompts: of an evaluation, at most.
    """

    name: str
    tasks: dict[str, tuple[str, ...]]
    steps: int
    prompts: int

    @property
    def config(self) -> Path:
        """What all runs of this size share."""
        return HERE / f"{self.name}.toml"


# Twice, so that GRPO is below most targets by the half of the run.
_UPDATES = "trainer.minibatches=2"
# All their 21 and 28 prompts are trained on and evaluated: they are the whole task.
_WRITE = (
    'reward.function="bench.entropy.small_tasks:reward_write"',
    "rollout.max_new_tokens=8",
    "data.holdout_fraction=0.0",
    _UPDATES,
)
_ONE_DIGIT = "params={min_terms=2, max_terms=2, min_digits=1, max_digits=1}"

SIZES = {
    size.name: size
    for size in (
        Size(
            "small",
            {
                # So that GRPO collapses: at 6e-4 it ends at 0.2 nats.
                "write": (*_WRITE, "trainer.lr=1e-3"),
                "reach": _WRITE,
                "value": (
                    'reward.function="bench.entropy.small_tasks:reward_value"',
                    "rollout.max_new_tokens=20",
                    "eval.prompts=32",  # the other tasks hold out none
                    _UPDATES,
                ),
            },
            steps=300,
            prompts=64,
        ),
        Size(
            "smollm2",
            {
                name: (f'data.sources=[{{kind="reasoning_gym", name="{name}", {_ONE_DIGIT}}}]',)
                for name in ("products", "chain_sum")
            },
            steps=120,
            prompts=32,
        ),
    )
}


@dataclass(frozen=True)
class Setting:
    """Overrides of a method, and the key that takes its target; None where it has none."""

    overrides: tuple[str, ...]
    target_key: str | None = None


def _rival(method: str, *, target: bool) -> Setting:
    overrides = ("aepo.enabled=false", f'loss.entropy_method="{method}"')
    return Setting(overrides, "loss.adaptive_target" if target else None)


_EXPECTED = 'aepo.form="expected"'
SETTINGS: dict[str, Setting] = {
    "grpo": Setting(("aepo.enabled=false",)),
    # arXiv 2510.08141 v7
    "published": Setting(('aepo.controller="published"',), "aepo.entropy_target"),
    # The default.
    "lift": Setting(('aepo.controller="observer"',), "aepo.entropy_target"),
    # The same loop with the term's other forms: what lifting alone is worth.
    "one_pass": Setting(('aepo.form="one_pass"', "aepo.baseline=true"), "aepo.entropy_target"),
    "expected": Setting((_EXPECTED,), "aepo.entropy_target"),
    # That form with the simpler law, and with T never below 1: what cooling is worth.
    "pi": Setting((_EXPECTED, 'aepo.controller="pi"'), "aepo.entropy_target"),
    "uncooled": Setting((_EXPECTED, "aepo.temperature_min=1.0"), "aepo.entropy_target"),
    "entropic": _rival("entropic", target=True),  # EntroPIC, arXiv 2511.15248
    "repo_r": _rival("repo_r", target=True),  # arXiv 2603.11682
    "adaptive_bonus": _rival("adaptive_bonus", target=True),  # Skywork-OR1, arXiv 2505.22312
    "era": _rival("era", target=False),  # arXiv 2510.08549
    "ucpo": _rival("ucpo", target=False),  # arXiv 2605.00365
    "ds_grpo": _rival("ds_grpo", target=False),  # arXiv 2511.19942
}
OURS = "lift"
# Forms of the term that were tried and not kept (docs/entropy.md); their runs stay in the tables.
TRIED = ("split", "rescue")
BASE = "base"  # the model before training, evaluated as every run is


def admits(task: str, target: float) -> bool:
    """Whether a policy that is always right can have this entropy, where that is known."""
    return target <= CEILINGS.get(task, math.inf)


@dataclass(frozen=True)
class Run:
    """One training run; target None where its setting has none."""

    size: str
    task: str
    setting: str
    target: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of its folder and part, behind the task's."""
        if self.setting == BASE:
            return BASE
        target = "" if self.target is None else f"-h{self.target:g}"
        return f"{self.setting}{target}-s{self.seed}"

    def overrides(self) -> list[str]:
        """What sets it apart from the other runs of its size."""
        task = list(SIZES[self.size].tasks[self.task])
        if self.setting == BASE:
            return task
        setting = SETTINGS[self.setting]
        found = [*task, f"trainer.seed={self.seed}", *setting.overrides]
        if self.target is not None:
            found.append(f"{setting.target_key}={self.target:g}")
        return found


def grid(
    size: str, tasks: list[str], settings: list[str], targets: list[float], seeds: list[int]
) -> list[Run]:
    """All runs, seed by seed, after the base model of each task."""
    runs = [Run(size, task, BASE) for task in tasks]
    for seed in seeds:
        for task in tasks:
            for name in settings:
                aims: list[float | None] = [None]
                if SETTINGS[name].target_key is not None:
                    aims = [target for target in targets if admits(task, target)]
                runs += [Run(size, task, name, target, seed) for target in aims]
    return runs
