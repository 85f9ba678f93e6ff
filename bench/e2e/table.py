"""Tables of the e2e benchmark: seconds a step by phase, and accuracy by wall-clock."""

from __future__ import annotations

from typing import Any

from bench.e2e import TRL

_HEADS = (
    "run",
    "s a step",
    "tokens/s",
    f"/ {TRL}'s",
    "rollout",
    "log-probs",
    "loss and backward",
    "optimizer",
    "reward and other",
    "peak memory",
    "accuracy",
    "says",
)


def table(candidates: dict[str, dict[str, Any]]) -> str:
    """A row per run, as Markdown."""
    rows = [f"| {' | '.join(_HEADS)} |", "|" + "---|" * len(_HEADS)]
    for name, found in candidates.items():
        cells = [found["status"], *["-"] * (len(_HEADS) - 3), found["message"]]
        if "median_s" in found:
            cells = _cells(found, candidates.get(_baseline_of(name), {}).get("tokens_per_s"))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _baseline_of(name: str) -> str:
    """The run of TRL as it comes that samples with the same engine."""
    return f"{TRL}, vllm" if name.endswith("vllm") else TRL


def _cells(found: dict[str, Any], baseline: float | None) -> list[str]:
    phases, gpu = found["median_phases_s"], found["peak_gpu_bytes"]
    memory = f"{found['peak_bytes'] / 2**20:,.0f} MiB" + (
        "" if gpu is None else f", GPU {gpu / 2**20:,.0f} MiB"
    )
    points = [
        f"{one['accuracy']:.2f} after {one['wall_s']:.0f} s"
        for one in found["saved"]
        if "accuracy" in one
    ]
    rate = found["tokens_per_s"]
    return [
        f"{found['median_s']:.2f}",
        f"{rate:.0f}",
        "-" if baseline is None else f"{rate / baseline:.2f}",
        *(
            f"{phases[name]:.2f}"
            for name in ("rollout", "log-probs", "loss and backward", "optimizer")
        ),
        f"{phases['reward'] + phases['other']:.2f}",
        memory,
        "; ".join(points) or "-",
        found["message"],
    ]
