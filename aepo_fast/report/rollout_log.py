"""Sample completions of each step, one JSON object a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aepo_fast.report.json_lines import append_text, drop_lines_after, json_line
from aepo_fast.samples import Rollout


class RolloutLog:
    """Appends sampled completions of each step to rollouts.jsonl."""

    def __init__(self, folder: Path, rows_per_step: int) -> None:
        self.path = folder / "rollouts.jsonl"
        self.rows_per_step = rows_per_step

    def write(self, step: int, rollout: Rollout, advantages: torch.Tensor) -> None:
        """Write evenly spaced samples of a step; -1 samples a step writes all."""
        count = len(rollout.samples)
        wanted = count if self.rows_per_step < 0 else min(self.rows_per_step, count)
        records: list[dict[str, Any]] = []
        for position in range(wanted):
            index = position * count // wanted
            sample = rollout.samples[index]
            records.append(
                {
                    "step": step,
                    "prompt": rollout.prompts[sample.group].messages[-1]["content"],
                    "completion": rollout.texts[index],
                    "completion_ids": list(sample.completion.completion_ids),
                    "reward": sample.reward,
                    "advantage": None if sample.is_aux else round(float(advantages[index]), 6),
                    "temperature": sample.completion.temperature,
                    "finish_reason": sample.completion.finish_reason,
                    "weights_version": sample.completion.weights_version,
                }
            )
        append_text(self.path, "".join(map(json_line, records)))

    def truncate_after(self, step: int) -> None:
        """Forget the rollouts of later steps, which a resumed run will make again."""
        drop_lines_after(self.path, step)
