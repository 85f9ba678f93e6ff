"""What a run's states take of a GPU where settings keep a part of them in CPU memory.

Not measured: the bytes follow from what `training.offload` and `model.sharded` move.
"""

from __future__ import annotations

from dataclasses import replace

from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.memory.states import StateBytes

_WHOLE_LAYERS = 2  # the one that computes, and the next one, which is on its way


def on_device(cfg: Config, machine: Machine, states: StateBytes) -> StateBytes:
    """The states that stay on the device while no optimizer steps."""
    if cfg.trainer.offload == "none":
        return states
    if cfg.trainer.offload == "optimizer":
        return replace(states, optimizer=0, step=states.step + states.optimizer_part)
    if machine.world.size > 1:  # what is whole at times is counted by `shards`
        nothing = dict.fromkeys(("weights", "gradients", "optimizer", "step", "reference"), 0)
        return replace(states, **nothing, loading=0)
    whole = states.outside_layers + _WHOLE_LAYERS * states.largest_layer
    weights = whole * machine.compute_dtype.itemsize
    trained = states.num_trained / states.num_weights
    gradients = round(whole * trained * (machine.compute_dtype.itemsize + 4))
    return replace(
        states,
        weights=weights,
        gradients=gradients,
        optimizer=0,
        step=0,
        reference=weights if states.reference else 0,
        loading=0,
    )
