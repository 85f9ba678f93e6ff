"""Where a run's numbers go: metrics.jsonl, one line on the terminal, TensorBoard by choice."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from aepo_fast.config.errors import ConfigError
from aepo_fast.report.json_lines import append_text, drop_lines_after, json_line, read_lines

# Printed on each step's line where the step has them: label, metric, format.
_LINE = (
    ("reward", "reward", ".3f"),
    ("H", "entropy", ".3f"),
    ("H0", "aepo/entropy_target", ".2f"),
    ("T", "aepo/temperature", ".2f"),
    ("len", "completions/mean_length", ".1f"),
    ("cut", "completions/clipped_ratio", ".0%"),
    ("loss", "loss", ".4f"),
    ("grad", "grad_norm", ".2f"),
    ("skipped", "skipped_updates", "d"),
    ("reward errors", "reward_errors", "d"),
    ("rollout tok/s", "perf/rollout_tokens_per_s", ".0f"),
    ("train tok/s", "perf/train_tokens_per_s", ".0f"),
    ("GiB", "perf/peak_memory_gib", ".1f"),
    ("s", "time/step", ".1f"),
    ("held-out", "eval/avg@k", ".3f"),
)
_IF_ANY = ("skipped_updates", "reward_errors")


class MetricsLogger:
    """Writes each step's metrics to `folder`/metrics.jsonl and shows the main ones."""

    def __init__(self, folder: Path, *, tensorboard: bool, total_steps: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.total_steps = total_steps
        self.console = Console(highlight=False, soft_wrap=True)
        self._writer = _tensorboard(folder) if tensorboard else None

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite are written as null, as JSON has none."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        append_text(self.path, json_line(finite))
        self.console.print(self._line(finite))
        if self._writer is not None:
            for key, value in finite.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(key, value, metrics["step"])

    def _line(self, metrics: dict[str, Any]) -> str:
        width = len(str(self.total_steps))
        parts = [f"[bold]step {metrics['step']:>{width}}/{self.total_steps}[/bold]"]
        for label, name, form in _LINE:
            value = metrics.get(name)
            if value is None or (name in _IF_ANY and not value):
                continue
            parts.append(f"[dim]{label}[/dim] {value:{form}}")
        return "  ".join(parts)

    def lines(self) -> list[dict[str, Any]]:
        """What has been logged, the lines of an interrupted run before this one included."""
        return read_lines(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop what was logged of later steps, which a resumed run will log again."""
        drop_lines_after(self.path, step)
        if self._writer is not None:
            self._writer.close()
            self._writer = _tensorboard(self.path.parent, purge_step=step + 1)

    def progress(self, description: str) -> AbstractContextManager[Callable[[int], None]]:
        """See `progress`."""
        return progress(self.console, description)

    def close(self) -> None:
        """Flush what is buffered."""
        if self._writer is not None:
            self._writer.close()
        sys.stdout.flush()


@contextmanager
def progress(console: Console, description: str) -> Iterator[Callable[[int], None]]:
    """Count tokens of a long phase: a live line on a terminal, nothing in a log."""
    if not console.is_terminal:
        yield lambda tokens: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f} tokens, {task.fields[rate]:.0f}/s"),
        TimeElapsedColumn(),
    )
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=None, rate=0.0)
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            seconds = max(time.perf_counter() - started, 1e-9)
            bar.update(task, completed=done, rate=done / seconds)

        yield advance


def check_tensorboard() -> None:
    """Raise ConfigError where tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        reason = "tensorboard is not installed"
        fix = "pip install 'aepo-fast[tensorboard]' or set it to false"
        raise ConfigError("logging.tensorboard", True, reason, fix)


def _tensorboard(folder: Path, purge_step: int | None = None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
