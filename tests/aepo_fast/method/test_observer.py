"""The observer against simulated policies whose response, drift and momentum are known."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest

from aepo_fast.config.method import AepoConfig
from aepo_fast.method import observer as observer_module
from aepo_fast.method.entropy_control import Measurement
from aepo_fast.method.observer import KNOWN_WITHIN, Observer
from bench.entropy.measures import held_within

TARGET = 0.5


class Plant:
    """v' = b v + (1 - b) (a u + d), H' = H + v', measured with an error of `stderr` nats."""

    def __init__(
        self, response: float, drift: float, momentum: float, stderr: float, *, entropy: float = 2.0
    ) -> None:
        self.response, self.drift, self.momentum = response, drift, momentum
        self.stderr, self.entropy, self.speed = stderr, entropy, 0.0
        self.random = random.Random(0)

    def step(self, temperature: float) -> Measurement:
        """What a step at T measures; then its update moves the entropy."""
        seen = self.entropy + self.random.gauss(0, self.stderr)
        b, push = self.momentum, self.response * (temperature - 1) + self.drift
        self.speed = b * self.speed + (1 - b) * push
        self.entropy = max(0.01, self.entropy + self.speed)
        return Measurement(seen, self.stderr, temperature, 1)


class SkewedPlant(Plant):
    """One whose higher measurements have higher errors, as where a few samples ramble on."""

    def step(self, temperature: float) -> Measurement:
        """`stderr` is a share of the entropy."""
        shape, entropy = self.stderr**-2, self.entropy
        super().step(temperature)
        seen = self.random.gammavariate(shape, entropy / shape)
        return Measurement(seen, self.stderr * seen, temperature, 1)


def aepo(**changes: float) -> AepoConfig:
    return AepoConfig(controller="observer", entropy_target=TARGET, **changes)


def run(controller: Observer, plant: Plant, steps: int) -> tuple[list[float], list[float]]:
    """The plant's true entropies and the temperatures of some steps."""
    entropies, temperatures = [], []
    for _ in range(steps):
        entropies.append(plant.entropy)
        temperatures.append(controller.temperature())
        controller.update(plant.step(temperatures[-1]))
    return entropies, temperatures


def known(controller: Observer) -> bool:
    metrics = controller.metrics()
    assert math.isnan(metrics["aepo/response"]) != (metrics["aepo/response_error"] < KNOWN_WITHIN)
    return not math.isnan(metrics["aepo/response"])


@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize("response", [0.02, 0.1, 0.5])
def test_the_response_is_learned_from_a_t_that_moves(response: float, momentum: float) -> None:
    # At a steady T nothing tells response and drift apart, so T goes up and down here.
    plant = Plant(response, -0.5 * response, momentum, stderr=0.01, entropy=50.0)
    controller = Observer(aepo(), momentum=momentum)
    assert not known(controller)
    for step in range(320):
        controller.update(plant.step(2.0 if step // 20 % 2 else 1.0))
    assert known(controller)
    metrics = controller.metrics()
    assert metrics["aepo/response"] == pytest.approx(response, rel=0.3)
    assert metrics["aepo/drift"] == pytest.approx(plant.drift, abs=0.3 * response)


@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize("response", [0.02, 0.1, 0.5])
def test_the_entropy_is_held_whatever_the_response(response: float, momentum: float) -> None:
    plant = Plant(response, -0.4 * response, momentum, stderr=0.03, entropy=1.0)
    controller = Observer(aepo(), momentum=momentum)
    run(controller, plant, 300)
    entropies, temperatures = run(controller, plant, 200)
    assert sum(entropies) / 200 == pytest.approx(TARGET, rel=0.05)
    assert sum(temperatures) / 200 == pytest.approx(1.4, abs=0.05)  # what the drift asks for


def test_errors_that_grow_with_what_is_measured_leave_no_bias() -> None:
    plant = SkewedPlant(0.4, -0.06, 0.5, stderr=0.2, entropy=1.0)
    controller = Observer(aepo(), momentum=0.5)
    run(controller, plant, 100)
    entropies, _ = run(controller, plant, 1000)
    assert sum(entropies) / 1000 == pytest.approx(TARGET, rel=0.03)


class FadingPlant(SkewedPlant):
    """One whose drift begins and fades as GRPO's does: a tenth of it is left."""

    full = -0.04

    def __init__(self, seed: int) -> None:
        # As SmolLM2 on products: a strong response, Adam's usual momentum, errors of a fifth.
        super().__init__(0.5, self.full, 0.9, stderr=0.18)
        self.random = random.Random(seed)

    def step(self, temperature: float) -> Measurement:
        """It fades from near the target on."""
        if self.entropy < 1.3 * TARGET or self.drift != self.full:
            self.drift = 0.1 * self.full + 0.95 * (self.drift - 0.1 * self.full)
        return super().step(temperature)


@pytest.mark.parametrize(("least", "within"), [(1.0, 0.15), (0.9, 0.05)])
def test_noise_does_not_hold_the_entropy_up(least: float, within: float) -> None:
    # What would lower T below its limit is cut off, and what would raise it acts.
    late = []
    for seed in range(20):
        controller = Observer(aepo(temperature_min=least), momentum=0.9)
        entropies, _ = run(controller, FadingPlant(seed), 160)
        late += entropies[80:]
    assert sum(late) / len(late) == pytest.approx(TARGET, rel=within)


class NoisyPlant(Plant):
    """As SmolLM2 on sums: GRPO's drift is a share of the entropy, and uneven from step to step."""

    response, drift_share = 0.3, -0.04

    def __init__(self, seed: int) -> None:
        super().__init__(self.response, 0.0, 0.5, stderr=0.07, entropy=1.0)
        self.random = random.Random(seed)
        self.seen: list[float] = []

    def step(self, temperature: float) -> Measurement:
        """Keeps what it measured, too."""
        self.drift = self.drift_share * self.entropy + self.random.gauss(0, 0.015)
        measured = super().step(temperature)
        self.seen.append(measured.entropy)
        return measured


class Told(Observer):
    """An observer that is told the response and the drift of NoisyPlant, and has to learn H."""

    def _correct(self, entropy: float, stderr: float) -> None:
        super()._correct(entropy, stderr)
        drift = NoisyPlant.drift_share * self.state[0]
        self.state[2:] = drift, math.log(NoisyPlant.response)
        self.covariance[2:] = self.covariance[:, 2:] = 0.0


@pytest.mark.parametrize("target", [0.5, 1.0])
def test_knowing_the_policy_would_help_little(target: float) -> None:
    # What is left is the noise of the samples: 16 prompts of 6, as in `bench entropy`.
    def off(kind: type[Observer]) -> float:
        cfg, distances = AepoConfig(controller="observer", entropy_target=target), []
        for seed in range(30):
            plant = NoisyPlant(seed)
            run(kind(cfg, momentum=0.5), plant, 120)
            distances.append(held_within(plant.seen, target)["mean"])
        return sum(distances) / len(distances)

    learned, told = off(Observer), off(Told)
    assert told < learned < 1.2 * told
    assert (told > 0.05) == (target == 0.5)


@pytest.mark.parametrize("steps", [20, 60, 100])  # before arrival and after
def test_a_saved_state_goes_on_with_the_same_temperatures(steps: int) -> None:
    plant, controller = FadingPlant(0), Observer(aepo(), momentum=0.9)
    run(controller, plant, steps)
    again = Observer(aepo(), momentum=0.9)
    again.load_state_dict(controller.state_dict())
    assert run(again, copy.deepcopy(plant), 60) == run(controller, plant, 60)
    assert again.state_dict() == controller.state_dict()


@pytest.mark.parametrize("cause", ["temperature_max", "above the target"])
def test_with_t_at_1_it_says_that_the_response_is_not_known(cause: str) -> None:
    most = 1.0 if cause == "temperature_max" else 2.0
    cfg = aepo(temperature_min=1.0, temperature_max=most)
    plant = Plant(0.1, -0.005, 0.9, stderr=0.01, entropy=3.0)
    controller = Observer(cfg, momentum=0.9)
    _, temperatures = run(controller, plant, 200)
    assert set(temperatures) == {1.0}
    assert not known(controller)
    assert controller.metrics()["aepo/drift"] == pytest.approx(-0.005, abs=0.003)


def test_a_long_way_to_the_target_leaves_no_debt() -> None:
    plant = Plant(0.1, -0.02, 0.5, stderr=0.01, entropy=6.0)
    controller = Observer(aepo(temperature_min=1.0), momentum=0.5)
    _, temperatures = run(controller, plant, 200)
    assert set(temperatures) == {1.0}
    entropies, temperatures = run(controller, plant, 200)
    arrived = next(step for step, entropy in enumerate(entropies) if entropy < 1.1 * TARGET)
    assert max(temperatures[: arrived - 10]) == 1.0
    assert min(entropies) > 0.9 * TARGET
    assert max(entropies[arrived:]) < 1.2 * TARGET


def test_t_changes_step_by_step_and_falls_at_once_far_above_the_target() -> None:
    most = observer_module._MOST_CHANGE
    cfg = aepo(temperature_max=3.0)
    plant = Plant(0.01, -0.1, 0.5, stderr=0.01, entropy=0.6)  # too weak to hold it
    controller = Observer(cfg, momentum=0.5)
    _, temperatures = run(controller, plant, 60)
    rises = [later - now for now, later in zip(temperatures, temperatures[1:], strict=False)]
    assert max(rises) == pytest.approx(most)
    assert max(temperatures) == cfg.temperature_max
    for _ in range(6):
        controller.update(Measurement(5.0, 0.01, controller.temperature(), 1))
    assert controller.temperature() == pytest.approx(cfg.temperature_min, abs=most)
    # A T that was not the last one asked for, as of samples drawn ahead, counts as it was.
    controller.update(Measurement(0.01, 0.01, 1.7, 1))
    assert controller.temperature() <= 1.7 + most + 1e-12


def test_the_updates_count_and_the_measurement_counts() -> None:
    plant = Plant(0.1, -0.05, 0.9, stderr=0.01, entropy=1.0)
    controller = Observer(aepo(), momentum=0.9)
    run(controller, plant, 30)
    before = controller.state_dict()

    def after(entropy: float, temperature: float, updates: int) -> dict[str, Any]:
        again = Observer(aepo(), momentum=0.9)
        again.load_state_dict(before)
        again.update(Measurement(entropy, 0.01, temperature, updates))
        state = again.state_dict()
        assert state.pop("last") == temperature
        assert all(math.isfinite(value) for row in state["covariance"] for value in row)
        return state

    unchanged = {key: value for key, value in before.items() if key != "last"}
    for entropy in (math.nan, math.inf, -math.inf):
        assert after(entropy, 1.5, 0) == unchanged
        foreseen = after(entropy, 1.5, 1)
        assert foreseen == after(math.nan, 1.5, 1) != unchanged
        assert foreseen["entropy"] == before["entropy"]
    # Without updates T had no effect; the measurement still corrects.
    assert after(0.7, 1.5, 0) == after(0.7, 1.0, 0) != unchanged
    assert after(0.7, 1.5, 1) != after(0.7, 1.0, 1)


def test_noisier_measurements_move_it_less() -> None:
    moves = []
    for stderr in (0.01, 0.1, 1.0):
        controller = Observer(aepo(), momentum=0.5)
        run(controller, Plant(0.1, 0.0, 0.5, stderr=0.01, entropy=0.6), 20)
        before = controller.state[0]
        controller.update(Measurement(1.6, stderr, 1.0, 0))
        moves.append(controller.state[0] - before)
    assert 1 > moves[0] > moves[1] > moves[2] > 0


def test_a_step_of_one_prompt_has_no_standard_error() -> None:
    controller = Observer(aepo(), momentum=0.5)
    for entropy in (0.6, 0.4, 0.4):
        controller.update(Measurement(entropy, math.nan, controller.temperature(), 1))
        assert math.isfinite(controller.temperature())


def test_on_the_way_down_it_adds_what_the_drift_lacks() -> None:
    # From 2 nats a drift of -0.08 is a fall of 4% a step and more: fast enough.
    controller = Observer(aepo(), momentum=0.5)
    entropies, temperatures = run(controller, Plant(0.1, -0.08, 0.5, stderr=0.01), 60)
    near = next(step for step, entropy in enumerate(entropies) if entropy < 2 * TARGET)
    assert set(temperatures[:near]) == {1.0}
    # 56 steps of 2% each lead from 2 to 0.65 nats.
    for drift in (0.0, -0.01):
        controller = Observer(aepo(temperature_min=0.5), momentum=0.5)
        plant = Plant(0.1, drift, 0.5, stderr=0.01)
        entropies, temperatures = run(controller, plant, 56)
        assert entropies[-1] == pytest.approx(0.65, abs=0.1)
        assert 0.5 < min(temperatures) < 0.9


def test_it_cools_to_the_minimum_after_arrival() -> None:
    plant = Plant(0.1, 0.0, 0.5, stderr=0.01, entropy=TARGET)
    controller = Observer(aepo(temperature_min=0.8), momentum=0.5)
    run(controller, plant, 20)
    plant.entropy = 2 * TARGET
    entropies, temperatures = run(controller, plant, 60)
    assert min(temperatures) == 0.8
    assert entropies[-1] == pytest.approx(TARGET, rel=0.1)


def test_another_controllers_entropy_tells_nothing_of_the_error() -> None:
    controller = Observer(aepo(), momentum=0.5)
    controller.load_state_dict({"entropy": 0.6, "integral": 0.0})
    controller.update(Measurement(0.6, 0.1, 1.0, 0))
    assert controller.entropy == 0.6 and controller.noise == pytest.approx(0.1**2)
