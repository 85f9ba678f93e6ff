"""Reading TOML: what test_config.py's single values do not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.toml import config_path, load_config


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("trainer.max_new_tokens=8", "Did you mean rollout.max_new_tokens"),
        ("entropy_target=0.5", "Did you mean aepo.entropy_target"),
        # A near name in the same section comes first.
        ("checkpoint.everyy=5", "Did you mean every"),
    ],
)
def test_a_key_of_another_section_is_pointed_to_it(override: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("first-light", [override])
    assert caught.value.fix == advice


def test_keeping_any_number_of_tokens_is_refused_with_the_reason() -> None:
    message = "rollout.min_p = 0.1: keeps any number of tokens.*Use rollout.top_k"
    with pytest.raises(ConfigError, match=message):
        load_config("first-light", ["rollout.min_p=0.1"])


@pytest.mark.parametrize("key", ["trainer.beta1", "loss.kl_cov_coef", "aepo.gain"])
def test_nan_is_no_setting(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = nan: is not a number"):
        load_config("first-light", [f"{key}=nan"])


def test_overrides_are_toml_and_else_strings() -> None:
    cfg = load_config(
        "first-light",
        [
            "data.instruction=Answer with a number = x.",
            'data.system_prompt="7"',
            "aepo={enabled = false}",
            "trainer.max_grad_norm=inf",
            "trainer.lr=1",
            "data.sources.1.params.max_digits=2",
        ],
    )
    assert cfg.data.instruction == "Answer with a number = x."
    assert cfg.data.system_prompt == "7"
    assert not cfg.aepo.enabled and cfg.aepo.entropy_target == 0.5
    assert cfg.trainer.max_grad_norm == float("inf")
    assert cfg.trainer.lr == 1.0 and isinstance(cfg.trainer.lr, float)
    assert cfg.data.sources[1].params["max_digits"] == 2


def test_a_later_override_wins() -> None:
    assert load_config("first-light", ["trainer.steps=3", "trainer.steps=4"]).trainer.steps == 4


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="weights.toml.*is not TOML"):
        load_config(str(path))


def test_a_mark_at_the_start_of_a_file_is_no_setting(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(b"\xef\xbb\xbf" + config_path("first-light").read_bytes())
    assert load_config(str(file)) == load_config("first-light")
