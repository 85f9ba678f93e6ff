"""AEPOConfig, what it refuses of TRL's settings, and TRLs that AEPO does not fit into."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs TRL", allow_module_level=True)

from trl import GRPOTrainer
from trl.trainer import utils

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import AepoConfig
from aepo_fast.integrations.trl import AEPOConfig
from aepo_fast.integrations.trl.seams import check_trl
from tests.peers.aepo_trl_runs import TARGET, config, run

pytestmark = [pytest.mark.peers, pytest.mark.slow]


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("aepo_form", dict(aepo_form="dcpo")),
        ("aepo_form", dict(aepo_controller="published")),
        ("aepo_alpha", dict(aepo_alpha=0.0)),
        ("aepo_baseline", dict(aepo_baseline=True)),
        ("aepo_normalizer", dict(aepo_normalizer="positives")),
        ("aepo_temperature_min/max", dict(aepo_temperature_min=1.1)),
        ("temperature", dict(temperature=0.9)),
        ("loss_type", dict(loss_type="bnpo")),
        ("loss_type", dict(loss_type="luspo")),
        ("loss_type", dict(loss_type="vespo")),
        ("epsilon_high", dict(loss_type="cispo", epsilon_high=0.28)),
        ("torch_compile", dict(torch_compile=True)),
        (
            "gradient_accumulation_steps",
            dict(gradient_accumulation_steps=3, steps_per_generation=2),
        ),
    ],
)
def test_what_cannot_run_together_is_refused(
    tmp_path: Path, key: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as error:
        config(tmp_path, **settings)
    assert error.value.key == key
    assert "aepo." not in str(error.value)


def test_each_setting_is_one_of_aepo_with_its_default(tmp_path: Path) -> None:
    names = {item.name for item in fields(AEPOConfig) if item.name.startswith("aepo_")}
    assert names == {f"aepo_{item.name}" for item in fields(AepoConfig)}
    assert AEPOConfig(str(tmp_path), use_cpu=True).aepo == AepoConfig()
    given = config(tmp_path, aepo_controller="switch", aepo_form="one_pass", aepo_baseline=True)
    expected = AepoConfig(
        controller="switch", form="one_pass", baseline=True, entropy_target=TARGET
    )
    assert given.aepo == expected


def test_settings_are_read_from_a_command_line(tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    words = ["--output_dir", str(tmp_path), "--use_cpu", "--aepo_form", "one_pass"]
    words += ["--aepo_alpha", "0.25", "--aepo_baseline", "true"]
    (args,) = HfArgumentParser(AEPOConfig).parse_args_into_dataclasses(words)
    assert args.aepo == AepoConfig(form="one_pass", alpha=0.25, baseline=True)


def test_another_trl_is_refused_by_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trl()
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs, items: None)
        with pytest.raises(RuntimeError, match=r"GRPOTrainer._compute_loss takes .*items"):
            check_trl()
    with monkeypatch.context() as patch:
        patch.delattr(utils, "_ChunkedLogProbFunction")
        with pytest.raises(RuntimeError, match="_ChunkedLogProbFunction is missing"):
            check_trl()


def test_trl_s_head_is_its_own_outside_of_the_forward_pass(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    before = utils._ChunkedLogProbFunction
    run(tiny_model_dir, tmp_path, max_steps=1, beta=0.1)
    assert utils._ChunkedLogProbFunction is before
