"""Chat templates that print the date: a run's prompts stay those of its first day."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import chat_template_utils

from aepo_fast.cli.evaluate import evaluate_model
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config
from aepo_fast.training.checkpoint import STATE_NAME
from aepo_fast.training.run import train
from tests.aepo_fast.training.test_run import assert_same_end
from tests.tiny_run import copy_until, tiny_config, with_trainer

# As Llama 3.2 has it, and with a clock that no two prompts read alike.
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}"
    "{{ 'Today Date: ' + date_string + '\n' }}"
)
CLOCK = "{{ strftime_now('%H:%M:%S.%f') + '\n' }}"


class Tomorrow(datetime):
    """A clock that is days ahead."""

    days = 0

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(tz) + timedelta(days=cls.days)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Tomorrow]:
    monkeypatch.setattr(Tomorrow, "days", 0)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    monkeypatch.setattr("aepo_fast.training.assemble.datetime", Tomorrow)
    return Tomorrow


def dated_run(tiny_model_dir: Path, tmp_path: Path, prefix: str) -> Config:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    template = model / "chat_template.jinja"
    template.write_text(prefix + template.read_text())
    cfg = with_trainer(tiny_config(model, tmp_path / "whole"), steps=3)
    return replace(cfg, checkpoint=replace(cfg.checkpoint, keep=3))


@pytest.mark.parametrize("prefix", [LLAMA, CLOCK])
def test_a_run_goes_on_on_another_day(
    tiny_model_dir: Path, tmp_path: Path, clock: type[Tomorrow], prefix: str
) -> None:
    whole = dated_run(tiny_model_dir, tmp_path, prefix)
    train(whole)
    cfg = replace(whole, output_dir=str(tmp_path / "run"))
    copy_until(1, whole, cfg)
    for days, steps in ((1, 2), (400, 3)):
        clock.days = days
        train(with_trainer(cfg, steps=steps), resume=True)
    assert_same_end(whole, cfg)
    given: dict[str, Any] = {"config": None, "task": None, "samples": 1, "prompts": 2}
    later = evaluate_model(cfg.output_dir, **given, overrides=[])
    clock.days = 0
    assert later == evaluate_model(cfg.output_dir, **given, overrides=[])


def test_a_template_whose_text_has_changed_is_refused(
    tiny_model_dir: Path, tmp_path: Path, clock: type[Tomorrow]
) -> None:
    cfg = with_trainer(dated_run(tiny_model_dir, tmp_path, LLAMA), steps=1)
    train(cfg)
    template = Path(cfg.model.path) / "chat_template.jinja"
    template.write_text("Now: " + template.read_text())
    with pytest.raises(ConfigError, match="its prompts are not those of the checkpoint"):
        train(with_trainer(cfg, steps=2), resume=True)


def test_an_older_checkpoint_goes_on_on_its_own_day_alone(
    tiny_model_dir: Path,
    tmp_path: Path,
    clock: type[Tomorrow],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = with_trainer(dated_run(tiny_model_dir, tmp_path, LLAMA), steps=1)
    train(cfg)
    path = Path(cfg.output_dir) / "checkpoints" / "step_1" / STATE_NAME
    state = torch.load(path, weights_only=True)
    del state["rendered_at"]
    torch.save(state, path)
    clock.days = 1
    with pytest.raises(ConfigError, match="its prompts are not those of the checkpoint"):
        train(with_trainer(cfg, steps=2), resume=True)
    assert "does not say when its prompts were rendered" in capsys.readouterr().err
    clock.days = 0
    assert train(with_trainer(cfg, steps=2), resume=True) == 0
