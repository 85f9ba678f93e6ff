"""A run of several processes in which something happens to one of them after each start.

torchrun -m tests.rank_faults train CONFIG --resume
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from aepo_fast.__main__ import main
from aepo_fast.model.policy import Policy
from aepo_fast.training import rank_watch
from aepo_fast.training.trainer import Trainer


def _fails(*args: Any, **options: Any) -> None:
    raise ValueError("a fault of one rank")


def _hangs(*args: Any, **options: Any) -> None:
    time.sleep(1000)


def _is_killed(*args: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Of each start: the step and the rank that something happens to, where, and what.
FAULTS: list[tuple[int, int, str, Callable[..., None]]] = [
    (2, 1, "token_loss", _fails),  # while the other one waits within FSDP
    (3, 1, "logprobs", _hangs),
    (4, 0, "token_loss", _is_killed),
]


def _arrange(step: int, rank: int, name: str, happens: Callable[..., None]) -> None:
    original = Trainer.step

    def with_fault(trainer: Trainer, on_tokens: Callable[[int], None]) -> Any:
        if trainer.steps_done + 1 == step and int(os.environ["RANK"]) == rank:
            setattr(Policy, name, happens)
        return original(trainer, on_tokens)

    Trainer.step = with_fault


if __name__ == "__main__":
    rank_watch._OTHERS_COME_S = rank_watch._OTHERS_END_S = 1.0
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(FAULTS):
        _arrange(*FAULTS[start])
    main()
