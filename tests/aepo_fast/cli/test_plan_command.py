"""`aepo-fast plan`: its report, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aepo_fast.cli.app import app
from aepo_fast.cli.plan import plan_text
from aepo_fast.config.errors import ConfigError
from tests.aepo_fast.memory.models import SMALL, write_config

ONE_LAYER = {**SMALL, "num_hidden_layers": 1}


def overrides(folder: Path) -> list[str]:
    return [f'model.path="{folder}"', "rollout.max_prompt_tokens=64"]


def test_a_config_json_alone_is_planned(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", ONE_LAYER)
    command = ["plan", "first-light", "--gpu", "8GiB"]
    for one in overrides(folder):
        command += ["--set", one]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    for text in ("It fits", "update", "weights", "tokens_per_microbatch", "update |"):
        assert text in done.output


def test_json_has_the_same_figures(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", ONE_LAYER)
    found = json.loads(plan_text("first-light", overrides(folder), gpu="1GiB", as_json=True))
    assert found["fits"] and found["device_bytes"] == 2**30
    assert [*found["phases"]] == ["load", "sample", "score", "update", "step"]
    worst = max(sum(parts.values()) for parts in found["phases"].values())
    assert worst == found["peak_bytes"] <= found["needed_bytes"]
    assert found["largest"]["rollout.max_new_tokens"] >= 128


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    large = {**ONE_LAYER, "vocab_size": 40000, "hidden_size": 512}
    folder = write_config(tmp_path / "model", large)
    text = plan_text("first-light", overrides(folder), gpu="960MiB")
    assert "does not fit" in text and "1. --set" in text


@pytest.mark.parametrize(
    ("path", "reason"),
    [("no-such-folder", "there is no such folder"), ("package:nothing", "package")],
)
def test_a_model_that_does_not_exist_is_refused(path: str, reason: str) -> None:
    with pytest.raises(ConfigError, match="model.path") as refusal:
        plan_text("first-light", [f'model.path="{path}"'], gpu="8GiB")
    assert refusal.value.value == path and reason in str(refusal.value) and refusal.value.fix


def test_an_id_that_the_hub_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*some: str, revision: str | None) -> str:
        raise OSError("404 Client Error")

    monkeypatch.setattr("aepo_fast.cli.plan.hf_hub_download", gone)
    with pytest.raises(ConfigError, match="hub did not give its config.json: 404"):
        plan_text("first-light", ['model.path="nobody/nothing"'], gpu="8GiB")


def test_settings_that_no_model_has_are_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", {**SMALL, "model_type": "no-such-type"})
    with pytest.raises(ConfigError, match="no-such-type"):
        plan_text("first-light", overrides(folder), gpu="8GiB")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="has no config.json"):
        plan_text("first-light", overrides(empty), gpu="8GiB")


def test_a_named_card_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--measure"):
        plan_text("first-light", [], gpu="8GiB", measure=True)
