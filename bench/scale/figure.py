"""The figure of the scale benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.scale.simulate import Expected

_PARTS = {
    "sampling": ("rollout", "#56b4e9"),
    "passes and optimizer": ("work", "#0072b2"),
    "waiting for the fullest rank": ("waiting", "#e69f00"),
    "collectives in sight": ("collectives", "#d55e00"),
    "weights to the sampler": ("sync", "#999999"),
}


def draw(
    steps: Sequence[Expected], measured: Mapping[int, float], assumptions: str, path: Path
) -> Path:
    """Throughput a device over that of one, and where the time of a step goes, by devices.

    steps: expected ones, that of one device first. measured: throughput a device over that of one,
    by devices.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 3.6))
    devices = [step.devices for step in steps]
    ratios = [steps[0].seconds / step.seconds for step in steps]
    left.plot(devices, ratios, color="#0072b2", label="expected")
    if measured:
        style = {"color": "#d55e00", "linestyle": "none", "marker": "o"}
        left.plot(list(measured), list(measured.values()), **style, label="measured")
    left.set_ylim(0, 1.1)
    left.set_ylabel("tokens/s a device, over one device's")
    left.legend(frameon=False)
    shares = {
        label: [getattr(step, name) / steps[0].seconds for step in steps]
        for label, (name, _) in _PARTS.items()
    }
    shares = {label: values for label, values in shares.items() if any(values)}
    colours = [_PARTS[label][1] for label in shares]
    right.stackplot(devices, *shares.values(), labels=list(shares), colors=colours)
    right.set_ylabel("time of a step, over one device's")
    right.set_ylim(0, 1.5 * max(step.seconds for step in steps) / steps[0].seconds)
    right.legend(frameon=False, fontsize=8, loc="upper left")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("devices")
        axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, -0.02, assumptions, fontsize=8, va="top")
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
