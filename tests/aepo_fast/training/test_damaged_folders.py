"""Run folders that a crash, a full disk or another program has left its marks in."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.cli.evaluate import evaluate_model
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config
from aepo_fast.config.toml import dump_config
from aepo_fast.report.plot import plot_run
from aepo_fast.training.checkpoint import CheckpointError, complete_checkpoints
from aepo_fast.training.checkpoint_damage import damage
from aepo_fast.training.run import train
from aepo_fast.training.trainer import TrainingError
from tests.aepo_fast.training.test_run import assert_same_end, metrics_of
from tests.aepo_fast.training.test_run_ends import saved
from tests.tiny_run import copy_until, tiny_config, with_trainer

NULS = b"\0" * 64


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of three steps with all of its checkpoints."""
    cfg = tiny_config(tiny_model_dir, tmp_path_factory.mktemp("whole") / "run")
    cfg = with_trainer(replace(cfg, checkpoint=replace(cfg.checkpoint, keep=3)), steps=3)
    train(cfg)
    return cfg


@pytest.fixture
def two_steps(whole: Config, tmp_path: Path) -> Config:
    """The same run as it was after its second step."""
    cfg = replace(whole, output_dir=str(tmp_path / "run"))
    copy_until(2, whole, cfg)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        path = Path(cfg.output_dir) / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= 2))
    return cfg


@pytest.mark.parametrize(
    "tail",
    [NULS, NULS + b"\n", NULS + b'{"step": 3, "reward": 0}\n', b'{"step": 3, "rew', b"\xff\xfe\n",
     b"[1]\n", b'"words"\n', b"[" * 100_000 + b"\n"],
)  # fmt: skip
def test_a_damaged_tail_is_read_past_and_repaired(
    two_steps: Config, whole: Config, tail: bytes
) -> None:
    folder = Path(two_steps.output_dir)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(tail)
    assert plot_run(folder).exists()
    assert train(two_steps, resume=True) == 0
    assert_same_end(whole, two_steps)
    assert [line["step"] for line in metrics_of(two_steps)] == [1, 2, 3]


def test_lines_in_front_of_a_damaged_one_stay(two_steps: Config, whole: Config) -> None:
    path = Path(two_steps.output_dir) / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + NULS + second)  # after the power loss the run was resumed
    train(two_steps, resume=True)
    assert [line["step"] for line in metrics_of(two_steps)] == [1, 2, 3]


def cut(path: Path) -> None:
    os.truncate(path, 100)


def zero(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("harm", [cut, zero, Path.unlink])
@pytest.mark.parametrize("name", ["state.pt", "optimizer.pt", "model.safetensors", "config.json"])
def test_damage_is_named(two_steps: Config, name: str, harm: Callable[[Path], None]) -> None:
    first, last = complete_checkpoints(Path(two_steps.output_dir) / "checkpoints")
    assert damage(last) is None
    harm(last / name)
    found = damage(last)
    assert found is not None and found.startswith(name) and "\n" not in found
    assert damage(first) is None


def test_an_older_checkpoint_is_offered_beside_a_damaged_one(
    two_steps: Config, whole: Config, tmp_path: Path
) -> None:
    folder = Path(two_steps.output_dir)
    (folder / "config.toml").write_text(dump_config(two_steps))
    cut(folder / "checkpoints" / "step_2" / "state.pt")
    wanted = r"step_2 is damaged: --resume --from step_1 goes on from a whole one .*\(state.pt: "
    with pytest.raises(CheckpointError, match=wanted):
        train(two_steps, resume=True)
    given: dict[str, Any] = {"config": None, "task": None, "samples": 1, "prompts": 1}
    with pytest.raises(ConfigError, match="step_2 is damaged.*Evaluate .*step_1 with --config"):
        evaluate_model(str(folder), **given, overrides=[])
    assert saved(folder) == ["step_1", "step_2"]  # nothing is deleted unasked
    train(with_trainer(two_steps, steps=2), resume=True, start_from="step_1")
    assert saved(folder) == ["step_1", "step_2"]
    assert train(two_steps, resume=True) == 0
    assert_same_end(whole, two_steps)


def test_without_a_whole_checkpoint_the_run_starts_anew(two_steps: Config) -> None:
    for path in complete_checkpoints(Path(two_steps.output_dir) / "checkpoints"):
        (path / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no older.*--overwrite \(optimizer.pt is missing"):
        train(two_steps, resume=True)
    assert train(two_steps, overwrite=True) == 0


@pytest.mark.parametrize("wanted", ["step_7", "elsewhere/step_1", "", "checkpoints"])
def test_from_names_a_checkpoint_of_the_run(two_steps: Config, wanted: str) -> None:
    with pytest.raises(ConfigError, match="--from.*is no checkpoint of this run. Has: step_1, st"):
        train(two_steps, resume=True, start_from=wanted)
    with pytest.raises(ConfigError, match="--from.*Add --resume"):
        train(two_steps, start_from="step_1")


@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics.jsonl", '{"loss": 1}\n{"loss": 2}\n'), ("config.toml", 'title = "mine"\n'),
     ("config.toml", "no = toml = at all")],
)  # fmt: skip
def test_another_program_s_files_are_not_replaced(
    tiny_model_dir: Path, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    cfg = tiny_config(tiny_model_dir, tmp_path)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=f"its {name} is not of a run of aepo-fast"):
            train(cfg, **how)
    assert (tmp_path / name).read_text() == text


class FullDisk(io.FileIO):
    """Takes ten bytes, and then there is no room."""

    room = 10

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken, self.room = bytes(data[: self.room]), 0
        return super().write(taken)


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_disk_that_is_full_while_logging_is_one_line(
    whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cfg = replace(whole, output_dir=str(tmp_path / "run"))
    plain, steps = Path.open, []

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == name and mode == "ab":
            steps.append(1)
            if len(steps) == 2:
                return FullDisk(self, "a")
        return plain(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    wanted = rf"{name}: No space left on device. Go on from .*step_1 with --resume"
    with pytest.raises(TrainingError, match=wanted):
        train(cfg)
    assert (Path(cfg.output_dir) / name).read_bytes().endswith(b"}\n")  # whole lines alone
    monkeypatch.undo()
    train(cfg, resume=True)
    assert_same_end(whole, cfg)
    rollouts = [Path(one.output_dir) / "rollouts.jsonl" for one in (whole, cfg)]
    assert rollouts[0].read_bytes() == rollouts[1].read_bytes()


def test_a_plot_that_cannot_be_written_in_the_run_goes_elsewhere(
    whole: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to(Path(whole.output_dir) / "metrics.jsonl")
    (folder / "plot.png").mkdir()  # as a read-only folder refuses: root may write there
    with pytest.raises(ConfigError, match="plot.png cannot be written.*--output FILE"):
        plot_run(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "plot.png"]
    assert plot_run(folder, tmp_path / "here.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match="--output.*odd"):
        plot_run(folder, tmp_path / "here.odd")


def test_a_metrics_file_of_other_columns_is_plotted_as_far_as_it_goes(tmp_path: Path) -> None:
    lines = [{"step": 0, "eval/avg@k": None}, {"step": 1, "reward": 0.5}, {"reward": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_run(tmp_path).exists()
