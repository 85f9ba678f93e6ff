"""One run in a process of its own: `python -m bench.memory.child CONFIG RESULT OVERRIDES...`.

RESULT gets what the run predicted and measured as JSON. torchrun may start several, of one run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aepo_fast.config.toml import load_config
from aepo_fast.report.json_lines import read_lines
from aepo_fast.training.run import train
from aepo_fast.training.step_metrics import peak_memory_gib
from aepo_fast.world import join, part

PREDICTED, MEASURED = "perf/predicted_memory_gib", "perf/peak_memory_gib"


def main(config: str, result: Path, overrides: list[str]) -> None:
    """Train, and write the last step's figures."""
    cfg = load_config(config, overrides)
    train(cfg, overwrite=True)
    world = join(on_gpu=cfg.trainer.device == "cuda", timeout_s=cfg.trainer.timeout_s)
    of_each = world.gather(peak_memory_gib())
    part()
    if not world.is_first:
        return
    last = read_lines(Path(cfg.output_dir) / "metrics.jsonl")[-1]
    found = {
        "predicted_gib": last[PREDICTED],
        "measured_gib": last[MEASURED],
        "ratio": last[PREDICTED] / last[MEASURED],
        "mean_length": last["completions/mean_length"],
        **({"measured_gib_of_each": of_each} if world.size > 1 else {}),
    }
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
