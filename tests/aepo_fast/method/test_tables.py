"""The tables of the method against what the configuration says of their entries."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from aepo_fast.config import method as config
from aepo_fast.config.conditions import conditions_of
from aepo_fast.config.method import (
    CONTROLLER_DEFAULTS,
    AepoConfig,
    Controller,
    CorrectionName,
    EntropyMethod,
    Form,
    LossConfig,
)
from aepo_fast.config.sections import ModelConfig, TrainerConfig
from aepo_fast.method.controllers import CONTROLLERS, BonusCoefficient, RivalController
from aepo_fast.method.correction import CORRECTIONS
from aepo_fast.method.forms import FORMS, AepoForm, make_form
from aepo_fast.method.regularisers import Regulariser
from aepo_fast.method.rivals import ENTROPY_METHODS
from aepo_fast.method.tokens import StepContext, Tokens
from aepo_fast.model.batch import Layout
from aepo_kernels import backend_status

TOKEN_HOOKS = ("select", "shape_advantage", "scale_advantage", "ratio_logprobs", "on_policy_loss")


def replaces(cls: type, base: type, *hooks: str) -> bool:
    return any(getattr(cls, hook) is not getattr(base, hook) for hook in hooks)


def users(section: type, setting: str, key: str, known: Iterable[str]) -> set[str]:
    """The values of `key`, of the same section, with which the configuration lets a setting act."""
    (item,) = (item for item in dataclasses.fields(section) if item.name == setting)
    needs = [one for one in conditions_of(item) if one.keys == (key,)]
    return {name for name in known if all(one.holds(name) for one in needs)}


def readers(table: dict[str, type], section: str, setting: str) -> set[str]:
    """The entries of a table whose classes read a setting, as `section.setting`."""
    read = re.compile(rf"\b{section}\.{setting}\b")
    return {
        name
        for name, cls in table.items()
        if any(read.search(inspect.getsource(kind)) for kind in cls.__mro__[:-1])
    }


def test_every_entropy_method_has_its_class_and_the_limits_that_its_hooks_have() -> None:
    assert tuple(ENTROPY_METHODS) == typing.get_args(EntropyMethod)
    for name, cls in ENTROPY_METHODS.items():
        per_token = replaces(cls, Regulariser, *TOKEN_HOOKS)
        assert (name in config.SEQUENCE_ENTROPY_METHODS) == (not per_token), name
        own = cls(LossConfig(entropy_method=typing.cast(Any, name))).second_temperature()
        assert (name in config.SECOND_TEMPERATURE_METHODS) == (own is not None), name


def test_every_form_has_its_class_and_the_limits_that_its_hooks_have() -> None:
    assert tuple(FORMS) == typing.get_args(Form)
    for name, cls in FORMS.items():
        form = make_form(AepoConfig(form=typing.cast(Any, name)))
        assert type(form) is cls
        second = form.second_temperature(1.3)
        assert (name in config.ONE_TEMPERATURE_FORMS) == (second is None), name
        assert (name in config.TOKEN_FORMS) == replaces(cls, AepoForm, "advantage"), name
        off = make_form(AepoConfig(form=typing.cast(Any, name), enabled=False))
        assert type(off) is AepoForm


def of_need(section: type, key: str) -> list[str]:
    """The settings of a section that act with some values of `key` only."""
    items = dataclasses.fields(section)
    return [item.name for item in items if any(n.keys == (key,) for n in conditions_of(item))]


@pytest.mark.parametrize("setting", of_need(LossConfig, "entropy_method"))
def test_a_setting_acts_with_the_entropy_methods_that_read_it(setting: str) -> None:
    found = users(LossConfig, setting, "entropy_method", ENTROPY_METHODS)
    if setting == "entropy_coef":  # the first coefficient, which the bonus is given
        assert found == {
            name for name, cls in ENTROPY_METHODS.items() if replaces(cls, Regulariser, "bonus")
        }
    else:
        assert found == readers(ENTROPY_METHODS, "loss", setting)


@pytest.mark.parametrize("setting", of_need(AepoConfig, "form"))
def test_a_setting_acts_with_the_forms_that_read_it(setting: str) -> None:
    drawing = {name for name, cls in FORMS.items() if cls.draws_auxiliary}
    with_term = {name for name, cls in FORMS.items() if replaces(cls, AepoForm, "token_term")}
    expected = {"alpha": drawing | with_term, "normalizer": drawing}
    found = users(AepoConfig, setting, "form", FORMS)
    assert found == expected.get(setting, readers(FORMS, "aepo", setting))


@pytest.mark.parametrize("setting", of_need(AepoConfig, "controller"))
def test_a_setting_acts_with_the_controllers_that_have_a_default(setting: str) -> None:
    having = {name for name, defaults in CONTROLLER_DEFAULTS.items() if setting in defaults}
    assert users(AepoConfig, setting, "controller", CONTROLLER_DEFAULTS) == having


@pytest.mark.parametrize("name", FORMS)
def test_the_clip_acts_with_the_forms_whose_ratios_it_bounds(name: Any) -> None:
    form, one = make_form(AepoConfig(form=name)), torch.ones(1)
    tokens = Tokens(-0.2 * one, -one, one, -0.5 * one, {"positive": one})  # a ratio of e^0.8
    context = StepContext(1.3, 0.0, 0.0, 0, 0, 1)
    narrow, wide = (form.token_term(tokens, 2 * one, context, (c, c)) for c in (0.2, 0.5))
    bounded = narrow is not None and wide is not None and not torch.equal(narrow, wide)
    (item,) = (item for item in dataclasses.fields(LossConfig) if item.name == "clip_high")
    (needs,) = conditions_of(item)
    # The resampling term is the clipped surrogate of auxiliary samples; sapo takes no clip itself.
    assert needs.holds("sapo", True, name) == (bounded or form.draws_auxiliary)


def test_every_controller_has_its_class_and_its_defaults() -> None:
    assert tuple(CONTROLLERS) == tuple(CONTROLLER_DEFAULTS) == typing.get_args(Controller)


def test_backends_and_layouts_are_those_that_there_are() -> None:
    backends = typing.get_args(typing.get_type_hints(ModelConfig)["head_backend"])
    assert set(backends) == {"auto", *backend_status()}
    layouts = typing.get_args(typing.get_type_hints(TrainerConfig)["layout"])
    assert set(layouts) == {"auto", *typing.get_args(Layout)}


def test_every_correction_has_its_class() -> None:
    assert tuple(CORRECTIONS) == typing.get_args(CorrectionName)
    for name, cls in CORRECTIONS.items():
        loss = LossConfig(correction=typing.cast(Any, name))
        assert type(loss.importance_correction) is cls
        assert (loss.correction_low, loss.correction_high) == (cls.default_low, cls.default_high)
        assert cls.corrects == (name != "off")


def test_states_of_older_checkpoints_load() -> None:
    adapted = BonusCoefficient(LossConfig(entropy_method="adaptive_bonus", adaptive_target=0.3))
    adapted.load_state_dict({"coef": 0.02, "entropy": 0.1})
    assert adapted.value == 0.02
    constant = BonusCoefficient(LossConfig(entropy_method="bonus", entropy_coef=0.5))
    constant.load_state_dict({"coef": None, "entropy": 0.1})
    assert constant.value == 0.5
    rival = RivalController(LossConfig(entropy_method="entropic", adaptive_target=0.5))
    rival.load_state_dict({"method": "entropic", "value": 0.3, "integral": 0.2})
    rival.update(0.6)
    assert rival.value == pytest.approx(1.0 * 0.1 + 0.01 * 0.2)
