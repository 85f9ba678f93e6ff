"""One rank of a measured run: whole training steps, and what ranks wait for each other in them."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config, EvalConfig
from aepo_fast.config.toml import load_config
from aepo_fast.model.batch import MicroBatch
from aepo_fast.samples import Sample
from aepo_fast.training.assemble import load_inputs
from aepo_fast.training.interrupt import InterruptGuard
from aepo_fast.training.trainer import Trainer
from aepo_fast.world import part

# Names of a profiled collective: what gloo and NCCL call theirs, and NCCL's kernels.
_COLLECTIVES = "gloo:", "nccl:", "ncclDevKernel"
# So small that every step starts from the same weights.
_LEARNING_RATE = 1e-12


@dataclasses.dataclass
class _Counted:
    """Micro-batches of this rank, and those of them that only keep others company."""

    all: int = 0
    idle: int = 0


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Median times of steps, the share of time in collectives, and idle micro-batches.

    settings: model, prompts (of a rank), samples, tokens, tokens_per_microbatch, batch_tokens and
    rounds. The first step, which warms up, and the last one, which is profiled, are not timed.
    """
    with tempfile.TemporaryDirectory() as folder, InterruptGuard() as guard:
        cfg = _config(settings, Path(folder))
        machine = resolve_machine(cfg)
        cfg, world = machine.settled(cfg), machine.world
        trainer = Trainer(cfg, machine, load_inputs(cfg, resume=False, overwrite=False), guard)
        trainer.policy.batch_tokens = settings["batch_tokens"] or trainer.policy.batch_tokens
        counted = _count_microbatches(trainer)
        steps = []
        for _ in range(settings["rounds"] + 1):
            world.wait()
            result = trainer.step(lambda tokens: None)
            steps.append({**result.times.metrics(), "samples": len(result.rollout.samples)})
            tokens = result.rollout.num_tokens
        collectives_s, profiled_s = _profiled(trainer)
        idle = world.sums({"all": counted.all, "idle": counted.idle})
        weights = sum(one.numel() for one in trainer.model.parameters())
        size = torch.finfo(machine.rollout_dtype).bits // 8
        found = {
            "ranks": world.size,
            "device": str(machine.device.type),
            "parameters": weights,
            "layers": trainer.model.config.get_text_config().num_hidden_layers,
            "weight_bytes": {
                "compute": weights * (torch.finfo(machine.compute_dtype).bits // 8),
                "rollout": weights * size,
            },
            "completion_tokens": tokens,
            "microbatches": idle["all"] / world.size / len(steps + [None]),
            "idle_share": idle["idle"] / idle["all"],
            "collective_share": statistics.fmean(world.gather(collectives_s / profiled_s)),
            "steps": steps[1:],
        }
        trainer.close()
    part()
    return found


def _config(settings: dict[str, Any], folder: Path) -> Config:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    cfg = load_config(
        "first-light",
        [
            f"model.path={json.dumps(settings['model'])}",
            f"output_dir={json.dumps(str(folder / 'run'))}",
            f"trainer.prompts_per_step={settings['prompts'] * ranks}",
            f"trainer.group_size={settings['samples']}",
            f"trainer.tokens_per_microbatch={settings['tokens_per_microbatch']}",
            f"trainer.steps={settings['rounds'] + 2}",
            f"trainer.lr={_LEARNING_RATE}",
            f"rollout.max_new_tokens={settings['tokens']}",
            'rollout.backend="hf"',
        ],
    )
    return dataclasses.replace(cfg, eval=EvalConfig(prompts=0))


def _count_microbatches(trainer: Trainer) -> _Counted:
    """Count those that the policy lays out from now on."""
    counted, policy, lay_out = _Counted(), trainer.policy, trainer.policy.microbatches

    def microbatches(samples: Sequence[Sample], indices: Sequence[int]) -> list[MicroBatch]:
        batches = lay_out(samples, indices)
        counted.all += len(batches)
        counted.idle += sum(batch.idle for batch in batches)
        return batches

    policy.microbatches = microbatches  # type: ignore[method-assign]
    return counted


def _profiled(trainer: Trainer) -> tuple[float, float]:
    """Seconds of one more step in which a collective ran, and those of the step."""
    activities = [ProfilerActivity.CPU]
    if trainer.policy.machine.is_gpu:
        activities.append(ProfilerActivity.CUDA)
    start = time.perf_counter()
    with profile(activities=activities) as profiler:
        trainer.step(lambda tokens: None)
        if trainer.policy.machine.is_gpu:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.name.startswith(_COLLECTIVES)
    )
    return covered(spans) / 1e6, seconds


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals, which are in the order of their starts."""
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _main() -> None:
    settings_path, result_path = map(Path, sys.argv[1:])
    found = measure(json.loads(settings_path.read_text()))
    if os.environ.get("RANK", "0") == "0":
        result_path.write_text(json.dumps(found))


if __name__ == "__main__":
    _main()
