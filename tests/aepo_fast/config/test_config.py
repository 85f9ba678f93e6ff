"""Configuration: reading, overriding, writing, and every value that cannot run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import (
    CONTROLLER_DEFAULTS,
    AepoConfig,
    Controller,
    LossConfig,
)
from aepo_fast.config.shipped import shipped_configs
from aepo_fast.config.toml import dump_config, load_config
from aepo_fast.method.policy_losses import POLICY_LOSSES
from bench.entropy.settings import SETTINGS, SIZES, Size

MINIMAL = """
[model]
path = "some/model"

[[data.sources]]
kind = "reasoning_gym"
name = "products"
"""


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL)
    return str(path)


def test_a_written_configuration_reads_back_equal(minimal: str, tmp_path: Path) -> None:
    cfg = load_config(
        minimal, ["trainer.lr=3e-6", "aepo.form=dcpo", "data.sources.0.params={max_digits=1}"]
    )
    assert (cfg.trainer.lr, cfg.aepo.form) == (3e-6, "dcpo")
    assert cfg.data.sources[0].params == {"max_digits": 1}
    again = tmp_path / "resolved.toml"
    again.write_text(dump_config(cfg))
    assert load_config(str(again)) == cfg


@pytest.mark.parametrize("name", list(shipped_configs()))
def test_shipped_configs_load(name: str) -> None:
    assert load_config(name).model.path


@pytest.mark.parametrize("size", list(SIZES.values()), ids=list(SIZES))
def test_the_benchmarks_configs_load(size: Size) -> None:
    for task in size.tasks.values():
        for setting in SETTINGS.values():
            cfg = load_config(str(size.config), [*task, *setting.overrides])
            assert cfg.trainer.prompts_per_step


@pytest.mark.parametrize(
    ("key", "value", "settings", "users"),
    [
        ("gain", 1.0, {"controller": "observer"}, "published' or 'pi"),
        ("gain", 1.0, {"controller": "switch"}, "published' or 'pi"),
        ("integral_gain", 0.1, {"controller": "observer"}, "controller = 'pi"),
        ("integral_gain", 0.1, {"controller": "published"}, "controller = 'pi"),
        ("integral_gain", 0.0, {"controller": "switch"}, "controller = 'pi"),
        ("baseline", True, {}, "form = 'one_pass"),
        ("baseline", True, {"form": "dcpo"}, "form = 'one_pass"),
        ("rho_clip", 2.0, {"form": "expected"}, "'lift' or 'one_pass' or 'dcpo"),
        ("rho_clip", 2.0, {"form": "resample"}, "'lift' or 'one_pass' or 'dcpo"),
        ("normalizer", "positives", {}, "form = 'resample"),
        ("normalizer", "positives", {"controller": "pi", "form": "one_pass"}, "= 'resample"),
    ],
)
def test_a_setting_that_does_nothing_is_refused(
    key: str, value: Any, settings: dict[str, Any], users: str
) -> None:
    with pytest.raises(ConfigError, match="does nothing with") as caught:
        AepoConfig(**settings, **{key: value})
    assert caught.value.key == f"aepo.{key}" and users in caught.value.fix


@pytest.mark.parametrize("key", ["gain", "integral_gain"])
def test_a_negative_gain_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"aepo.{key} = -1.0: must not be negative"):
        AepoConfig(controller="pi", **{key: -1.0})


@pytest.mark.parametrize("controller", list(CONTROLLER_DEFAULTS))
def test_controllers_bring_their_defaults_and_give_way_to_the_user(
    minimal: str, tmp_path: Path, controller: Controller
) -> None:
    defaults = CONTROLLER_DEFAULTS[controller]
    cfg = AepoConfig(controller=controller)
    assert {name: getattr(cfg, name) for name in defaults} == defaults
    assert {"form", "alpha", "temperature_min", "temperature_max"} <= defaults.keys()
    for name, default in defaults.items():
        mine = "one_pass" if name == "form" else 1.0 if default != 1.0 else 0.9
        changed = AepoConfig(controller=controller, **{name: mine})
        assert getattr(changed, name) == mine
        assert dataclasses.replace(cfg, **{name: mine}) == changed
    overrides = [f"aepo.controller={controller}", "aepo.alpha=0.3", "aepo.temperature_max=1.7"]
    read = load_config(minimal, overrides)
    assert read.aepo == AepoConfig(controller=controller, alpha=0.3, temperature_max=1.7)
    again = tmp_path / "resolved.toml"
    again.write_text(dump_config(read))
    assert load_config(str(again)) == read


def test_policies_bring_their_defaults_and_give_way_to_the_user() -> None:
    published = {
        "grpo": ("group_norm", "sequence_mean", 0.2, 0.2),
        "dr_grpo": ("group_mean", "constant_length", 0.2, 0.2),
        "dapo": ("group_norm", "token_mean", 0.2, 0.28),
        "cispo": ("group_norm", "token_mean", 0.2, 0.28),
        "gspo": ("group_norm", "sequence_mean", 3e-4, 4e-4),
    }
    assert published.keys() <= POLICY_LOSSES.keys()
    for policy, expected in published.items():
        cfg = LossConfig(policy=policy)
        assert (cfg.advantage, cfg.aggregation, cfg.clip_low, cfg.clip_high) == expected
    assert LossConfig(policy="dapo", clip_high=0.3).clip_high == 0.3


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("trainer.learning_rat=1", "trainer.learning_rat", "Known"),
        ("trainer.step=1", "trainer.step", "Did you mean steps"),
        ("trainner.steps=1", "trainner", "Did you mean trainer"),
        ("data.sources.0.weigth=1", "data.sources.0.weigth", "Did you mean weight"),
        ("data.sources.3.size=1", "--set", "Count from 0"),
        ("trainer.lr", "--set", "trainer.lr=1e-6"),
        ("trainer.lr=fast", "trainer.lr", "type float"),
        ("trainer.steps=1.5", "trainer.steps", "type int"),
        ("trainer.steps=true", "trainer.steps", "type int"),
        ("logging.plot=1", "logging.plot", "type bool"),
        ("trainer=3", "trainer", "[trainer]"),
        ("data.sources=3", "data.sources", "[[data.sources]]"),
        ("aepo.form=resampel", "aepo.form", "Did you mean resample"),
        ("aepo.entropy_target=0", "aepo.entropy_target", "0.5"),
        ("aepo.entropy_target=-1", "aepo.entropy_target", "0.5"),
        ("aepo.temperature_min=1.1", "aepo.temperature_min/max", "contain 1"),
        ("aepo.temperature_max=0.9", "aepo.temperature_min/max", "contain 1"),
        ("aepo.alpha=0", "aepo.alpha", "positive"),
        ("aepo.rho_clip=0.5", "aepo.rho_clip", "1 or more"),
        ("aepo.baseline=true", "aepo.baseline", "one_pass"),
        ("aepo.controller=proportional", "aepo.controller", "observer"),
        ("trainer.group_size=1", "trainer.group_size", "2 or more"),
        ("trainer.minibatches=65", "trainer.minibatches", "prompts_per_step"),
        ("trainer.lr=0", "trainer.lr", "positive"),
        ("trainer.beta1=1", "trainer.beta1", "e.g. 0.9"),
        ("trainer.beta2=-0.1", "trainer.beta2", "e.g. 0.9"),
        ("loss.clip_low=1.0", "loss.clip_low", "below 1"),
        ("loss.dual_clip=0.5", "loss.dual_clip", "3.0"),
        ("loss.cov_fraction=0", "loss.cov_fraction", "(0, 1]"),
        ("data.holdout_fraction=1.0", "data.holdout_fraction", "0.2"),
        ("data.sources.0.size=0", "data.sources.size", "positive"),
        ("reward.function=nonsense", "reward.function", "my_module:my_reward"),
        ("reward.timeout_s=0", "reward.timeout_s", "positive"),
        ("rollout.max_new_tokens=0", "rollout.max_new_tokens", "positive"),
        ("checkpoint.keep=0", "checkpoint.keep", "positive"),
        ("model.path=''", "model.path", "smollm2"),
        ("data.sources=[]", "data.sources", "[[data.sources]]"),
    ],
)
def test_bad_values_name_key_value_reason_and_next_step(
    minimal: str, override: str, key: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    error = caught.value
    assert error.key == key
    assert repr(error.value) in str(error) and error.reason and error.fix
    assert hint in str(error)


def test_gspo_refuses_what_acts_on_tokens(minimal: str) -> None:
    with pytest.raises(ConfigError, match="gspo"):
        load_config(minimal, ["loss.policy=gspo", "loss.entropy_method=clip_cov"])
    with pytest.raises(ConfigError, match="gspo"):
        load_config(minimal, ["loss.policy=gspo", "aepo.form=dcpo"])


def test_an_overlong_zone_longer_than_the_completion_is_refused(minimal: str) -> None:
    with pytest.raises(ConfigError, match="soft_overlong_tokens"):
        load_config(minimal, ["reward.soft_overlong_tokens=99", "rollout.max_new_tokens=64"])


def test_unknown_configs_and_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean first-light"):
        load_config("first-ligth")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config(str(broken))


def test_configurations_cannot_change_after_validation(minimal: str) -> None:
    cfg = load_config(minimal)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.trainer.lr = 1.0  # type: ignore[misc]
