"""Runs that sample with the real vLLM, as each of several ranks does them."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.sections import Config
from aepo_fast.samples import Completion
from aepo_fast.training.run import train
from aepo_fast.world import join, part


@dataclass
class Seen:
    """What a rank has seen of a run.

    sampled: by its engine for the steps, call by call. shared_memory: what it has open of vLLM's.
    """

    sampled: list[list[list[Completion]]] = field(default_factory=list)
    shared_memory: set[str] = field(default_factory=set)
    exit_code: int = 0
    error: str = ""


def train_with_vllm(cfgs: list[Config], wrong: str, stopped: str) -> list[Seen]:
    """Do one run after the other.

    wrong: the folder of the run whose rank 1 hands over other weights than its own at the end.
    stopped: that of the run whose rank 1 gets SIGTERM while it samples for the last step.
    """
    from vllm.distributed.parallel_state import destroy_model_parallel

    from aepo_fast.rollout import vllm

    torch.set_num_threads(1)
    world = join(on_gpu=False, timeout_s=600)
    plain_generate, plain_weights = vllm.VllmRollout.generate, vllm.whole_weights

    def run(cfg: Config) -> Seen:
        seen, syncs = Seen(), itertools.count()
        of_rank_1 = world.rank == 1 and cfg.output_dir

        def generate(self: Any, *args: Any, on_tokens: Any = None, **options: Any) -> Any:
            for_a_step = on_tokens is not None  # else for the canary
            if for_a_step and of_rank_1 == stopped and len(seen.sampled) == cfg.trainer.steps - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            groups = plain_generate(self, *args, on_tokens=on_tokens, **options)
            if for_a_step:
                seen.sampled.append(groups)
                maps = Path("/proc/self/maps").read_text().splitlines()
                seen.shared_memory.update(
                    line[line.index("/") :] for line in maps if "cpushm" in line
                )
            return groups

        def weights(*args: Any) -> Any:
            other = of_rank_1 == wrong and next(syncs) == cfg.trainer.steps
            return ((name, one + 0.02 * other) for name, one in plain_weights(*args))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm.VllmRollout, "generate", generate)
            patch.setattr(vllm, "whole_weights", weights)
            try:
                seen.exit_code = train(cfg)
            except RuntimeError as error:
                seen.error = f"{type(error).__name__}: {error}"
        return seen

    found = []
    for cfg in cfgs:
        found.append(run(cfg))
        gc.collect()
        destroy_model_parallel()  # the next engine may have other groups
    part()
    return found
