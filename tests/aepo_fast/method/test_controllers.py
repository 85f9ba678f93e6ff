"""The controllers' laws: from what a step measured to the temperature of the next one."""

from __future__ import annotations

import math

import pytest

from aepo_fast.config.method import CONTROLLER_DEFAULTS, AepoConfig, Controller
from aepo_fast.config.sections import TrainerConfig
from aepo_fast.method.controllers import make_controller
from aepo_fast.method.entropy_control import (
    EntropyController,
    Measurement,
    ProportionalController,
    SwitchController,
    aepo_draws,
)
from aepo_fast.method.observer import Observer

CONTROLLERS: list[Controller] = list(CONTROLLER_DEFAULTS)


def tell(controller: EntropyController, *entropies: float) -> list[float]:
    """Steps that measured these entropies without error; the temperatures they ran at."""
    temperatures = []
    for entropy in entropies:
        temperatures.append(controller.temperature())
        controller.update(Measurement(entropy, 0.0, temperatures[-1], 1))
    return temperatures


def test_each_name_makes_its_controller() -> None:
    kinds = {
        name: type(make_controller(AepoConfig(controller=name), TrainerConfig()))
        for name in CONTROLLERS
    }
    assert kinds == {
        "observer": Observer,
        "pi": ProportionalController,
        "published": ProportionalController,
        "switch": SwitchController,
    }


def test_the_observer_knows_the_momentum_of_all_updates_of_a_step() -> None:
    trainer = TrainerConfig(beta1=0.9, minibatches=2, epochs=3)
    controller = make_controller(AepoConfig(controller="observer"), trainer)
    assert isinstance(controller, Observer)
    assert controller.momentum == pytest.approx(0.9**6)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_t_is_1_before_a_measurement_and_where_aepo_is_off(name: Controller) -> None:
    controller = make_controller(AepoConfig(controller=name), TrainerConfig())
    assert controller.temperature() == 1.0 and controller.entropy is None
    off = make_controller(AepoConfig(controller=name, enabled=False), TrainerConfig())
    assert tell(off, 0.1, 3.0, 0.1, 0.1) == [1.0] * 4
    assert off.entropy == 0.1


@pytest.mark.parametrize("name", CONTROLLERS)
def test_t_stays_within_its_bounds(name: Controller) -> None:
    cfg = AepoConfig(controller=name, entropy_target=1.0, temperature_min=0.7, temperature_max=1.6)
    controller = make_controller(cfg, TrainerConfig())
    falling = [3 - 0.05 * step for step in range(60)]
    cold, hot = tell(controller, *falling), tell(controller, *[0.05] * 60)
    cold += tell(controller, *[3.0] * 10)
    assert min(cold + hot) == cfg.temperature_min
    assert max(cold + hot) == cfg.temperature_max == hot[-1]


def test_the_published_law_and_the_switch() -> None:
    published = make_controller(
        AepoConfig(controller="published", entropy_target=0.5), TrainerConfig()
    )
    tell(published, 0.5)
    for entropy, expected in [(0.5, 1.0), (0.4, 1.1), (0.0, 1.2), (0.65, 0.85), (2.0, 0.8)]:
        tell(published, entropy)
        assert published.temperature() == pytest.approx(expected)
    switch = make_controller(AepoConfig(controller="switch", entropy_target=0.5), TrainerConfig())
    for entropy, expected in [(0.49, 1.2), (0.51, 0.8)]:
        tell(switch, entropy)
        assert switch.temperature() == expected


def test_pi_is_its_formula() -> None:
    cfg = AepoConfig(
        controller="pi", entropy_target=0.5, gain=0.4, integral_gain=0.2, temperature_max=1.5
    )
    controller = make_controller(cfg, TrainerConfig())
    entropies = [0.45, 0.4, 0.55, 0.45, 0.48]
    found = [*tell(controller, *entropies), controller.temperature()]
    errors = [0.5 - entropy for entropy in entropies]
    expected = [1 + 0.4 * errors[n] + 0.2 * sum(errors[: n + 1]) for n in range(len(errors))]
    assert found == pytest.approx([1.0, *expected])


def test_the_integral_removes_a_steady_error_and_does_not_wind_up() -> None:
    cfg = AepoConfig(
        controller="pi", gain=0.5, integral_gain=0.1, temperature_max=1.5, entropy_target=0.5
    )
    controller = make_controller(cfg, TrainerConfig())
    tell(controller, *[3.0] * 200)  # far above the target: T sits at its minimum
    assert controller.temperature() == cfg.temperature_min
    tell(controller, 0.4)
    assert controller.temperature() > 1.0  # no debt from the 200 steps
    temperatures = tell(controller, *[0.4] * 20)  # a small steady error
    assert temperatures == sorted(temperatures) and temperatures[-1] > 1.15
    tell(controller, *[-2.0] * 200)  # far below: T sits at its maximum
    assert controller.temperature() == cfg.temperature_max
    tell(controller, 2.0)
    assert controller.temperature() == cfg.temperature_min


@pytest.mark.parametrize("name", CONTROLLERS)
def test_an_entropy_that_is_not_finite_is_no_measurement(name: Controller) -> None:
    cfg = AepoConfig(controller=name, entropy_target=1.0, temperature_max=3.0)
    told, untold = (make_controller(cfg, TrainerConfig()) for _ in range(2))
    for entropy in (math.nan, 0.9, 0.8, math.nan, 0.75, math.inf):
        t = told.temperature()
        # Nothing moved either: without updates there is nothing to foresee.
        told.update(Measurement(entropy, 0.01, t, int(math.isfinite(entropy))))
        if math.isfinite(entropy):
            untold.update(Measurement(entropy, 0.01, t, 1))
        assert told.entropy == untold.entropy
    if name != "observer":  # which remembers the T it was told of
        assert told.state_dict() == untold.state_dict()


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_saved_state_goes_on_bitwise(name: Controller) -> None:
    cfg = AepoConfig(controller=name, entropy_target=0.6)
    entropies = [1.9, 1.2, 0.7, 0.55, 0.5, 0.65, 0.4, 0.5, 0.52]
    straight, resumed = (make_controller(cfg, TrainerConfig()) for _ in range(2))
    expected, actual = [], []
    for entropy in entropies:
        expected += tell(straight, entropy)
        again = make_controller(cfg, TrainerConfig())
        again.load_state_dict(resumed.state_dict())
        resumed = again
        actual += tell(resumed, entropy)
        assert resumed.state_dict() == straight.state_dict()
        assert resumed.metrics() == pytest.approx(straight.metrics(), rel=0, abs=0, nan_ok=True)
    assert actual == expected and len(set(expected)) > 1


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("other", [*CONTROLLERS, "older", "none yet"])
def test_the_state_of_another_controller_gives_its_last_entropy(
    name: Controller, other: str
) -> None:
    if other == "older":
        older = {"previous": 0.9, "first": 2.0, "measured": 7, "integral": 0.3}
        state = {"entropy": 0.8, **older}
    elif other == "none yet":
        state = {"entropy": None, "integral": 0.0}
    else:
        donor = make_controller(AepoConfig(controller=other), TrainerConfig())
        tell(donor, 1.1, 0.8)
        state = donor.state_dict()
    controller = make_controller(AepoConfig(controller=name), TrainerConfig())
    controller.load_state_dict(state)
    assert controller.entropy == (None if other == "none yet" else 0.8)
    temperatures = tell(controller, 0.7, 0.4, 0.3)
    assert all(math.isfinite(value) for value in temperatures)
    assert controller.temperature() > 1.0


def test_auxiliary_draws() -> None:
    assert [aepo_draws(n, 1 / 64) for n in (1, 12, 64, 512)] == [1, 1, 1, 8]
    assert aepo_draws(4, 2.0) == 4
