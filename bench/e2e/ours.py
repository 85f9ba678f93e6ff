"""A run of this trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config
from aepo_fast.training.assemble import load_inputs
from aepo_fast.training.interrupt import InterruptGuard
from aepo_fast.training.malloc import keep_freed_memory
from aepo_fast.training.trainer import Trainer
from bench.e2e.phases import LEARNING, LOGPROBS, OPTIMIZER, OTHER, REWARD, ROLLOUT
from bench.e2e.recorder import Recorder

# The trainer's own phases, by which its laps are named. New weights for the sampler are part of
# sampling, as for a trainer that samples with the weights it trains.
_PHASES = {
    "rollout": ROLLOUT,
    "reward": REWARD,
    "score": LOGPROBS,
    "train": LEARNING,
    "sync": ROLLOUT,
    "wait": OTHER,
}


def train(cfg: Config, recorder: Recorder) -> dict[str, Any]:
    """Train as `aepo-fast train` does, and say what with."""
    machine = resolve_machine(cfg)
    cfg = machine.settled(cfg)
    if not machine.is_gpu:
        keep_freed_memory()
    with InterruptGuard() as guard:
        inputs = load_inputs(cfg, resume=False, overwrite=True)
        trainer = Trainer(cfg, machine, inputs, guard)
        clock = recorder.clock
        clock.watch(trainer.optimizer)

        def save(folder: Path) -> None:
            trainer.model.save_pretrained(folder)
            inputs.tokenizer.save_pretrained(folder)

        try:
            for _ in range(cfg.trainer.steps):
                clock.start()
                result = trainer.step(lambda tokens: None)
                by_lap(clock.seconds, result.times.seconds)
                metrics = trainer.metrics(result)
                recorder.end_step(
                    save,
                    tokens=sum(sample.length for sample in result.rollout.samples),
                    **{name: metrics[name] for name in ("reward", "loss", "grad_norm", "entropy")},
                )
        finally:
            trainer.close()
    return {"layout": trainer.policy.layout, "attention": _attention(trainer.model)}


def by_lap(seconds: dict[str, float], laps: dict[str, float]) -> None:
    """Divide a clock's seconds, in which only the optimizer is a phase, by the trainer's laps."""
    for lap, value in laps.items():
        seconds[_PHASES[lap]] += value
        seconds[OTHER] -= value
    # The optimizer's steps lie within a lap, and were not in OTHER.
    seconds[LEARNING] -= seconds[OPTIMIZER]
    seconds[OTHER] += seconds[OPTIMIZER]


def _attention(model: Any) -> str:
    return model.config._attn_implementation
