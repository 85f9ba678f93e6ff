"""Runs and evaluations from Python: the page's script, configurations, and what is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aepo_fast import Config, ConfigError, evaluate, load_config, train
from aepo_fast.config import (
    AepoConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RolloutConfig,
    SourceConfig,
    TrainerConfig,
    dump_config,
)
from tests.page_names import blocks
from tests.tiny_run import tiny_config, with_trainer

ROOT = Path(__file__).parents[2]
TOML = """
output_dir = "runs/mine"
[model]
path = "some/model"
lora.rank = 8
[[data.sources]]
kind = "reasoning_gym"
name = "products"
params = {max_digits = 1}
[aepo]
entropy_target = 1
[rollout]
backend = "vllm"
[trainer]
steps = 7
lr = 1e-5
[eval]
every = 2
[checkpoint]
keep_best = "eval/pass@k"
"""


def test_a_configuration_from_python_equals_that_of_toml(tmp_path: Path) -> None:
    from aepo_fast.config import LoraConfig

    built = Config(
        model=ModelConfig(path="some/model", lora=LoraConfig(rank=8)),
        data=DataConfig(sources=(SourceConfig("reasoning_gym", "products", {"max_digits": 1}),)),
        output_dir="runs/mine",
        rollout=RolloutConfig(backend="vllm"),
        aepo=AepoConfig(entropy_target=1),
        trainer=TrainerConfig(steps=7, lr=1e-5),
        eval=EvalConfig(every=2),
        checkpoint=CheckpointConfig(keep_best="eval/pass@k"),
    )
    for text in (TOML, dump_config(built)):
        (tmp_path / "mine.toml").write_text(text)
        assert load_config(str(tmp_path / "mine.toml")) == built


def test_the_page_s_script_of_15_lines_runs(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (script,) = [block.text for block in blocks(page) if block.needs == "aepo_run"]
    assert len(script.splitlines()) == 15
    for written, smaller in {
        '"package:smollm2-135m-instruct"': repr(str(tiny_model_dir)),
        "steps=50, prompts_per_step=12": "steps=1, prompts_per_step=2",
        "max_new_tokens=48": "max_new_tokens=3",
        "size=400": "size=40",
    }.items():
        assert script.count(written) == 1
        script = script.replace(written, smaller)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(script, scope)
    run = scope["run"]
    assert run.exit_code == 0 and [line["step"] for line in run.metrics] == [0, 1]
    assert run.checkpoint == Path("runs/products/checkpoints/step_1")
    assert run.best_checkpoint is None
    assert scope["after"].comparison.num_prompts == scope["after"].num_prompts > 1
    assert f"difference to {tiny_model_dir}" in capsys.readouterr().out


def test_a_run_resumes_and_names_its_best_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = tiny_config(
        tiny_model_dir,
        tmp_path / "run",
        eval=EvalConfig(every=1, prompts=2),
        checkpoint=CheckpointConfig(keep_best="eval/avg@k"),
    )
    first = train(cfg, overrides=["trainer.steps=1"])
    assert first.best_checkpoint == first.checkpoint == tmp_path / "run" / "checkpoints" / "step_1"
    second = train(with_trainer(cfg, steps=2), resume=True)
    assert [line["step"] for line in second.metrics] == [0, 1, 2]
    with pytest.raises(ConfigError, match="holds an earlier run"):
        train(cfg)
    scored = evaluate(second, config=cfg, samples=2, prompts=2, overrides=["eval.seed=5"])
    assert scored.settings["seed"] == 5 and scored.settings["model"] == str(second.checkpoint)


def test_values_that_toml_may_not_have_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = tiny_config(tiny_model_dir, tmp_path / "run")
    wrong = with_trainer(cfg, layout="packt")
    with pytest.raises(ConfigError, match=r"trainer.layout = 'packt'.*packed"):
        train(wrong)
    with pytest.raises(ConfigError, match="trainer.layout"):
        evaluate(str(tiny_model_dir), config=wrong)
    metric = tiny_config(
        tiny_model_dir,
        tmp_path / "run",
        eval=EvalConfig(every=1),
        checkpoint=CheckpointConfig(keep_best="eval/accuracy"),  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError, match=r"checkpoint.keep_best = 'eval/accuracy'"):
        train(metric)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_import_is_light_and_says_what_is_missing() -> None:
    code = (
        "import sys, aepo_fast\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "aepo_fast.__version__, aepo_fast.ConfigError\n"
        "assert not {'transformers', 'datasets', 'typer'} & set(sys.modules)\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    aepo_fast.train\n"
        "except ImportError as error:\n    print(error)\n"
        "try:\n    aepo_fast.no_such\n"
        "except AttributeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "aepo-fast[train]" in done.stdout, done
    assert done.stdout.endswith("module 'aepo_fast' has no attribute 'no_such'\n")
