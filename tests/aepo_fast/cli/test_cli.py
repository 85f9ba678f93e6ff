"""The commands, in a process of their own where exit codes and messages count."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aepo_fast.cli.app import app
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import EvalConfig
from aepo_fast.config.toml import dump_config
from tests.tiny_run import PRODUCTS, tiny_config, with_trainer

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aepo_fast", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


@pytest.fixture
def config_file(tiny_model_dir: Path, tmp_path: Path) -> Path:
    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "run"), steps=2)
    cfg = replace(cfg, eval=EvalConfig(prompts=2, samples=2))
    path = tmp_path / "tiny.toml"
    path.write_text(dump_config(cfg))
    return path


@pytest.mark.slow
def test_train_eval_and_plot(config_file: Path, tmp_path: Path) -> None:
    done = run("train", str(config_file), "--set", "trainer.lr=0.005")
    assert done.returncode == 0, done.stderr
    assert "First prompt" in done.stdout and "ids:" in done.stdout
    assert "at step 0" in done.stdout and "at step 2" in done.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert json.loads(lines[1])["learning_rate"] == 0.005

    again = run("train", str(config_file))
    assert again.returncode == 2 and "--resume" in again.stderr
    assert "Traceback" not in again.stderr

    runner = CliRunner()
    scored = runner.invoke(app, ["eval", str(tmp_path / "run"), "--samples", "2", "--prompts", "3"])
    assert scored.exit_code == 0 and "avg@2" in scored.output and "pass@2" in scored.output
    (tmp_path / "run" / "plot.png").unlink(missing_ok=True)
    drawn = runner.invoke(app, ["plot", str(tmp_path / "run")])
    assert drawn.exit_code == 0 and (tmp_path / "run" / "plot.png").exists()


def test_a_mistake_is_one_message_and_exit_code_2() -> None:
    wrong = run("train", "first-light", "--set", "trainer.stepz=3")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: trainer.stepz = 3") and "steps" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_configs_are_listed_and_printed() -> None:
    runner = CliRunner()
    assert "first-light" in runner.invoke(app, ["configs"]).output
    printed = runner.invoke(app, ["configs", "first-light"]).output
    assert printed == (ROOT / "aepo_fast" / "config" / "presets" / "first-light.toml").read_text()


def test_doctor_reports_backends_and_packages() -> None:
    report = CliRunner().invoke(app, ["doctor"]).output
    assert "chunked: works" in report and "transformers: 5" in report


def test_eval_of_a_model_on_a_task(tiny_model_dir: Path) -> None:
    result = CliRunner().invoke(
        app, ["eval", str(tiny_model_dir), "--task", PRODUCTS.name, "--samples", "1",
              "--prompts", "2", "--backend", "hf", "--set", "rollout.max_new_tokens=8"]
    )  # fmt: skip
    assert result.exit_code == 0 and "2 prompts x 1 samples" in result.output


def test_eval_takes_overrides_with_a_task_alone(tiny_model_dir: Path) -> None:
    from aepo_fast.cli.evaluate import evaluate_model

    given = {"config": None, "task": PRODUCTS.name, "samples": 1, "prompts": 2}
    overrides = ["rollout.max_new_tokens=3", "trainer.device=cpu", "rollout.backend=hf"]
    result = evaluate_model(str(tiny_model_dir), **given, overrides=overrides)
    assert result.mean_length <= 3
    with pytest.raises(ConfigError, match="rollout.no_such"):
        evaluate_model(str(tiny_model_dir), **given, overrides=["rollout.no_such=1"])


def test_eval_needs_to_know_on_what(tiny_model_dir: Path, tmp_path: Path) -> None:
    from aepo_fast.cli.evaluate import evaluate_model

    with pytest.raises(ConfigError, match="--task"):
        evaluate_model(
            str(tiny_model_dir), config=None, task=None, samples=1, prompts=1, overrides=[]
        )
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        evaluate_model(str(tmp_path), config=None, task=None, samples=1, prompts=1, overrides=[])


def test_plot_without_a_run(tmp_path: Path) -> None:
    from aepo_fast.report.plot import plot_run

    with pytest.raises(ConfigError, match="metrics.jsonl"):
        plot_run(tmp_path)


@pytest.mark.parametrize("command", ["--help", "configs", "bench --help"])
def test_what_needs_no_model_loads_no_torch(command: str) -> None:
    code = (
        "import sys, aepo_fast.__main__ as entry\n"
        f"sys.argv = ['aepo-fast', *{command.split()}]\n"
        "try:\n    entry.main()\n"
        "finally:\n    print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("[]\n"), done


@pytest.mark.parametrize("command", ["eval", "export", "plan", "plot", "configs", "bench"])
def test_several_processes_are_for_train_and_doctor(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, [command, "one", "two"][: 1 + (command != "configs")])
    assert isinstance(done.exception, ConfigError)
    assert f"WORLD_SIZE = '2': says that several processes do this, and {command} is for one" in (
        str(done.exception)
    )
