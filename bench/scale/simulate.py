"""The step that many devices are expected to take, from the step that was measured on one.

A model of arithmetic, not a measurement: `Network` holds what it assumes. Each device has as much
to do as the one that was measured. Weights are in shards over all of them (FSDP2), a layer is
gathered while the one before it computes, and samples are shared as the trainer shares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aepo_fast.world import World


@dataclass(frozen=True)
class Step:
    """A measured step of one device.

    prompts: groups of samples a step. rollout_s, train_s, sync_s: seconds of sampling, of all
    passes with the optimizer, and of the weights' way to the sampler. microbatches: of all passes.
    compute_bytes, rollout_bytes: of the whole model's weights in these dtypes. completion_tokens:
    that the step trains on.
    """

    prompts: int
    rollout_s: float
    train_s: float
    sync_s: float
    microbatches: int
    layers: int
    parameters: int
    compute_bytes: int
    rollout_bytes: int
    completion_tokens: int


@dataclass(frozen=True)
class Network:
    """What is assumed of devices and their links, and of completions.

    Bandwidths are those that a collective reaches, in one direction and a device, GB/s. latency_us:
    of a collective, once and again for each doubling of the devices. length_sigma: the standard
    deviation of the logarithm of a completion's length. cap: the longest completion over the mean.
    """

    devices_per_node: int = 8
    node_gb_s: float = 300.0
    network_gb_s: float = 40.0
    latency_us: float = 10.0
    length_sigma: float = 0.8
    cap: float = 4.0

    def seconds(self, num_bytes: float, devices: int) -> float:
        """Time to gather or to scatter a tensor of so many bytes over all devices."""
        if devices == 1:
            return 0.0
        rate = self.node_gb_s if devices <= self.devices_per_node else self.network_gb_s
        latency = self.latency_us * 1e-6 * (1 + math.log2(devices))
        return num_bytes * (devices - 1) / devices / (rate * 1e9) + latency


@dataclass(frozen=True)
class Expected:
    """Seconds of a step over so many devices, by what they pass with.

    rollout: the sampling of the slowest rank. work: passes and optimizer of a device. waiting: for
    the rank with the most tokens. collectives: what layers' work does not hide. sync: the weights'
    way to the sampler.
    """

    devices: int
    rollout: float
    work: float
    waiting: float
    collectives: float
    sync: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.rollout + self.work + self.waiting + self.collectives + self.sync


def expected(step: Step, network: Network, devices: int, *, draws: int = 5) -> Expected:
    """The mean step of `devices` over a few draws of completions' lengths."""
    random = np.random.default_rng(devices)
    unevenness, longest = [], []
    for _ in range(draws):
        tokens = _lengths(random, network, step.prompts * devices)
        shares = World(size=devices).shares(tokens.tolist(), float)
        loads = [sum(share) for share in shares]
        unevenness.append(max(loads) * devices / sum(loads))
        longest.append(tokens.max())
    own = [_lengths(random, network, step.prompts).max() for _ in range(200)]
    return Expected(
        devices=devices,
        rollout=step.rollout_s * max(1.0, float(np.mean(longest) / np.mean(own))),
        work=step.train_s,
        waiting=step.train_s * float(np.mean(unevenness) - 1),
        collectives=exposed_collectives(step, network, devices),
        sync=step.sync_s + network.seconds(step.rollout_bytes, devices),
    )


def exposed_collectives(step: Step, network: Network, devices: int) -> float:
    """Seconds of gathering weights and adding up gradients that no layer's work hides.

    Of a micro-batch a third is the forward pass. A layer's weights come while the one before it
    computes, in the backward pass again, beside the float32 gradients of the one after it.
    """
    if devices == 1:
        return 0.0
    gather = network.seconds(step.compute_bytes / step.layers, devices)
    scatter = network.seconds(4 * step.parameters / step.layers, devices)
    layer = step.train_s / step.microbatches / step.layers
    forward = gather + (step.layers - 1) * max(0.0, gather - layer / 3)
    backward = scatter + (step.layers - 1) * max(0.0, gather + scatter - layer * 2 / 3)
    return step.microbatches * (forward + backward)


def _lengths(random: np.random.Generator, network: Network, count: int) -> np.ndarray:
    """Tokens of groups, over their mean."""
    sigma = network.length_sigma
    return np.minimum(random.lognormal(-(sigma**2) / 2, sigma, count), network.cap)
