"""Runs from Python: what `from aepo_fast import train` gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aepo_fast.config.sections import Config
from aepo_fast.config.toml import with_overrides
from aepo_fast.report.json_lines import read_lines
from aepo_fast.training import run
from aepo_fast.training.checkpoint import complete_checkpoints, load_state


@dataclass(frozen=True)
class Run:
    """A run that has ended; stands for its folder where a path is asked for.

    exit_code: that of the command: 0, or 130, 143 or 129 where a signal ended it and it was saved.
    """

    folder: Path
    exit_code: int

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one a step; step 0 is the evaluation before training."""
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint, a folder in Hugging Face format."""
        return complete_checkpoints(self.folder / "checkpoints")[-1]

    @property
    def best_checkpoint(self) -> Path | None:
        """The best one by `checkpoint.keep_best`; None where none was kept."""
        best = load_state(self.checkpoint).get("best")
        return None if best is None else self.checkpoint.with_name(f"step_{best['step']}")


def train(
    cfg: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start_from: str | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Train as `cfg` says, in the main thread; the options are those of `aepo-fast train`.

    Raises ConfigError before any model loads, also for values that a TOML file may not have, and
    what `training.run.train` does where the run cannot go on.
    """
    cfg = with_overrides(cfg, overrides)
    code = run.train(cfg, resume=resume, overwrite=overwrite, start_from=start_from)
    return Run(Path(cfg.output_dir), code)
