"""The tables of the method against what the configuration says of their entries."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from aepo_fast.config import method as config
from aepo_fast.config.method import AepoConfig, CorrectionName, EntropyMethod, Form, LossConfig
from aepo_fast.method.controllers import BonusCoefficient, RivalController
from aepo_fast.method.correction import CORRECTIONS
from aepo_fast.method.forms import FORMS, AepoForm, make_form
from aepo_fast.method.regularisers import Regulariser
from aepo_fast.method.rivals import ENTROPY_METHODS

TOKEN_HOOKS = ("select", "shape_advantage", "scale_advantage", "scored_logprobs", "on_policy_loss")


def replaces(cls: type, base: type, *hooks: str) -> bool:
    return any(getattr(cls, hook) is not getattr(base, hook) for hook in hooks)


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
        assert (name in config.TOKEN_FORMS) == replaces(cls, AepoForm, "rho"), name
        off = make_form(AepoConfig(form=typing.cast(Any, name), enabled=False))
        assert type(off) is AepoForm


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
