"""`aepo-fast eval` samples with the engine that is configured, under the checks of training."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from aepo_fast.cli.evaluate import evaluate_model
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RolloutConfig
from aepo_fast.config.toml import dump_config
from aepo_fast.rollout.engine import RolloutError
from aepo_fast.training.evaluate import EvalResult
from aepo_fast.training.run import train
from tests.aepo_fast.rollout import fake_vllm
from tests.tiny_run import tiny_config, with_trainer

VLLM = ['rollout.backend="vllm"', "rollout.allow_untested_vllm=true"]


@pytest.fixture
def config_file(tiny_model_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(dump_config(tiny_config(tiny_model_dir, tmp_path / "run")))
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where transformers loads a model."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[fake_vllm.LLM]]:
    """The vLLM engines that were made, with a stand-in of vLLM; `arguments` lists what they got."""
    made: list[weakref.ref[fake_vllm.LLM]] = []

    class Watched(fake_vllm.LLM):
        asked: list[dict[str, Any]] = []

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            made.append(weakref.ref(self))
            self.asked.append(arguments)

    fake_vllm.install(monkeypatch)
    monkeypatch.setattr(sys.modules["vllm"], "LLM", Watched)
    return made


def evaluate(model: Path, config: Path | None, overrides: list[str]) -> EvalResult:
    given = None if config is None else str(config)
    return evaluate_model(
        str(model), config=given, task=None, samples=2, prompts=3, overrides=overrides
    )


@pytest.mark.usefixtures("no_model")
def test_vllm_is_used_where_the_configuration_says_so(
    tiny_model_dir: Path, config_file: Path, engines: list[weakref.ref[fake_vllm.LLM]]
) -> None:
    settings = [
        "rollout.max_new_tokens=7",
        "rollout.max_prompt_tokens=90",
        "rollout.gpu_memory_utilization=0.6",
        "rollout.enforce_eager=true",
        "trainer.seed=3",
    ]
    result = evaluate(tiny_model_dir, config_file, VLLM + settings)
    assert (result.num_prompts, result.num_samples) == (3, 2)
    assert result.mean_length == 7 and result.truncated == 1 and result.avg_at_k == 0
    (arguments,) = sys.modules["vllm"].LLM.asked
    expected = {
        "model": str(tiny_model_dir),
        "dtype": "float32",
        "max_model_len": 97,
        "gpu_memory_utilization": 0.6,
        "enforce_eager": True,
        "seed": 3,
    }
    assert expected.items() <= arguments.items()
    assert engines[0]() is None  # its memory is let go


def test_vllm_is_let_go_when_sampling_fails(
    tiny_model_dir: Path,
    config_file: Path,
    engines: list[weakref.ref[fake_vllm.LLM]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake_vllm.Inner, "add_request", lambda *_, **__: None)
    with pytest.raises(RolloutError, match="answered 0 of 3") as caught:
        evaluate(tiny_model_dir, config_file, VLLM)
    assert engines[0]() is None
    del caught  # up to here its traceback holds what evaluated


@pytest.mark.usefixtures("no_model")
def test_vllm_that_is_not_installed_is_refused_by_name(
    tiny_model_dir: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> Any:
        return None if name == "vllm" else find(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", absent)
    with pytest.raises(ConfigError, match="rollout.backend = 'vllm': vLLM is not installed"):
        evaluate(tiny_model_dir, config_file, VLLM)
    # Before anything of the model is looked for:
    with pytest.raises(ConfigError, match="rollout.backend = 'vllm': vLLM is not installed"):
        evaluate(Path("no-such-folder"), config_file, VLLM)


@pytest.mark.usefixtures("no_model", "engines")
def test_a_vllm_that_is_too_old_is_refused(
    tiny_model_dir: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.25.1")
    with pytest.raises(ConfigError, match=r"vLLM 0.25.1 is installed.*>=0.26"):
        evaluate(tiny_model_dir, config_file, VLLM[:1])


def test_recurrent_layers_are_refused_with_hf_as_in_training(
    tiny_model_dir: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "recurrent"
    shutil.copytree(tiny_model_dir, model)
    config = json.loads((model / "config.json").read_text())
    config["layer_types"] = ["linear_attention", "full_attention"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cannot take rows out of the state") as trained:
        train(tiny_config(model, tmp_path / "other"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail())
    with pytest.raises(ConfigError) as evaluated:
        evaluate(model, config_file, [])
    assert str(evaluated.value) == str(trained.value)


def test_samples_ahead_are_a_matter_of_training(
    tiny_model_dir: Path, tmp_path: Path, engines: list[weakref.ref[fake_vllm.LLM]]
) -> None:
    """Where a run drew ahead with vLLM or another dtype, eval may do with neither."""
    cfg = tiny_config(
        tiny_model_dir,
        tmp_path / "run",
        rollout=RolloutConfig(max_new_tokens=6, dtype="bfloat16", steps_ahead=1),
    )
    train(with_trainer(cfg, steps=1))
    run = tmp_path / "run"
    for overrides in ([], ['rollout.dtype="float32"']):
        assert evaluate(run, None, overrides).num_prompts == 3
    assert evaluate(run, None, VLLM).mean_length == 6
    (arguments,) = sys.modules["vllm"].LLM.asked
    assert arguments["model"] == str(run / "checkpoints" / "step_1")
