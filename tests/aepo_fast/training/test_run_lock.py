"""A folder has one run at a time, and a run that was killed does not keep it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.config.errors import ConfigError
from aepo_fast.training import run_lock
from aepo_fast.training.run import train
from aepo_fast.training.run_lock import LOCK_NAME, RunLock
from bench.common.environment import ROOT
from tests.tiny_run import tiny_config, with_trainer

# Holds the folder, says so, and stays until its input ends.
HOLD = """
import sys
import time
from pathlib import Path
from aepo_fast.training.run_lock import RunLock
try:
    with RunLock(Path(sys.argv[1])):
        print("holds", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def words(folder: Path) -> dict[str, Any]:
    return json.loads((folder / LOCK_NAME).read_text())


def leave(folder: Path, **changes: Any) -> None:
    """The lock file of a killed run, with some of its words changed."""
    (folder / LOCK_NAME).unlink(missing_ok=True)
    with RunLock(folder):
        left = words(folder) | changes
    (folder / LOCK_NAME).write_text(json.dumps(left))


def test_of_runs_started_together_one_runs_and_the_others_name_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    starts = [start(folder) for _ in range(4)]
    answers = {process.pid: said(process) for process in starts}
    (holder,) = [pid for pid, answer in answers.items() if answer == "holds\n"]
    for pid, answer in answers.items():
        assert pid == holder or f"process {holder} on " in answer and "started 20" in answer
    for process in starts:
        process.communicate()
    assert not folder.exists()  # they wrote nothing


def test_a_folder_made_by_a_run_that_is_refused_goes_with_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    first = RunLock(folder)
    mkdir = Path.mkdir

    def overtaken(path: Path, **options: Any) -> None:
        mkdir(path, **options)
        if path == folder and first._handle is None:
            monkeypatch.undo()
            starts.append(start(folder))
            time.sleep(1.0)  # time enough to take the folder

    starts: list[subprocess.Popen[str]] = []
    monkeypatch.setattr(Path, "mkdir", overtaken)
    with first:
        assert f"process {os.getpid()} on " in said(starts[0])
    starts[0].communicate()
    assert not folder.exists()


def test_a_parent_that_another_program_keeps_locked_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with RunLock(tmp_path / "run"):
        assert words(tmp_path / "run")["pid"] == os.getpid()
    os.close(handle)
    assert not (tmp_path / "run").exists()


def test_a_killed_run_leaves_a_lock_that_the_next_one_takes(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    killed = start(tmp_path)
    assert said(killed) == "holds\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert words(tmp_path)["pid"] == killed.pid
    with RunLock(tmp_path):
        assert words(tmp_path)["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture
def no_file_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_file_locks")
def test_without_file_locks_the_holder_s_words_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = os.getppid()
    lives = {"pid": parent, "ticks": run_lock._start_ticks(parent)}
    leave(tmp_path, **lives)
    with pytest.raises(ConfigError, match=f"process {parent} on ") as refused, RunLock(tmp_path):
        pass
    assert "delete" not in str(refused.value)
    assert "has no file locks" in capsys.readouterr().err
    # The number of the process has been given to another one, or the machine has restarted.
    for changed in ({"ticks": "1"}, {"boot": "another"}, {"pid": 2**22 + 1}):
        leave(tmp_path, **(lives | changed))
        with RunLock(tmp_path):
            pass


def test_another_machine_s_word_counts_until_its_file_is_deleted(tmp_path: Path) -> None:
    leave(tmp_path, host="elsewhere", boot="another")
    with (
        pytest.raises(ConfigError, match="on elsewhere.*If that run has ended.*delete .*run.lock"),
        RunLock(tmp_path),
    ):
        pass
    (tmp_path / LOCK_NAME).unlink()
    with RunLock(tmp_path):
        pass
    # A container has a name of its own, and the kernel of its machine.
    leave(tmp_path, host="elsewhere")
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "\0\0\0", "[1]", "{}", "half of"])
def test_a_lock_file_that_says_nothing_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    with RunLock(tmp_path):
        assert words(tmp_path)["pid"] == os.getpid()


def test_a_forked_child_does_not_keep_the_folder(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with RunLock(tmp_path):
        child = os.fork()
        if not child:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    with RunLock(tmp_path):
        pass
    os.close(writing)
    os.waitpid(child, 0)


def test_a_live_run_s_files_are_not_touched(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cfg = with_trainer(tiny_config(tiny_model_dir, folder), steps=1)
    assert train(cfg) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert folder / LOCK_NAME not in before
    with RunLock(folder):
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match="output_dir = .*a run is using it"):
                train(cfg, **how)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_start_that_is_refused_leaves_no_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = tiny_config(tiny_model_dir, tmp_path / "new" / "run")
    with pytest.raises(ConfigError, match="Give one of the two"):
        train(cfg, resume=True, overwrite=True)
    assert list(tmp_path.iterdir()) == []
