"""Errors that nobody foresaw, and terminals as they are found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.cli import app as app_module
from aepo_fast.config.data import SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import CheckpointConfig, Config
from aepo_fast.config.toml import dump_config, load_config
from aepo_fast.data.sources import find_files, read_hub
from aepo_fast.model.load import resolve
from aepo_fast.report.plot import plot_run
from aepo_fast.report.unexpected import TRACEBACK_NAME, describe, doing
from aepo_fast.rollout.hf import HfRollout
from bench.common.environment import ROOT
from tests.tiny_run import tiny_config, with_trainer

PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])


def start(command: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A shell command in which "$@" is Python with some arguments."""
    return subprocess.Popen(
        ["bash", "-c", command, "bash", sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATHS, **environment},
    )


def shell(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same, with its end."""
    process = start(command, *arguments, **environment)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of aepo-fast, run in this process."""
    monkeypatch.setattr(sys, "argv", ["aepo-fast", *arguments])
    monkeypatch.setattr(app_module, "open_closed_streams", lambda: None)
    with pytest.raises(SystemExit) as ended:
        app_module.run()
    return int(ended.value.code or 0)


@pytest.fixture
def cfg(tiny_model_dir: Path, tmp_path: Path) -> Config:
    return with_trainer(tiny_config(tiny_model_dir, tmp_path / "run"), steps=2)


def write(cfg: Config, tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(dump_config(cfg))
    return str(path)


def test_an_unforeseen_error_is_one_line_and_a_file(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, calls = HfRollout.generate, []

    def generate(self: HfRollout, *args: Any, **kwargs: Any) -> Any:
        calls.append("on_tokens" in kwargs)  # the look at start-up has none
        if calls[-1] and calls.count(True) == 2:
            raise ZeroDivisionError("one\ntwo")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(HfRollout, "generate", generate)
    cfg = replace(cfg, checkpoint=CheckpointConfig(every=0))
    assert run_here(monkeypatch, "train", write(cfg, tmp_path)) == 1
    folder = tmp_path / "run"
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line == (
        "error: while training, in step 2: ZeroDivisionError: one. Saved "
        f"{folder}/checkpoints/step_1; go on with --resume. "
        f"The traceback is in {folder / TRACEBACK_NAME}."
    )
    saved = (folder / TRACEBACK_NAME).read_text()
    assert saved.startswith("Traceback") and "in generate" in saved
    assert run_here(monkeypatch, "train", write(cfg, tmp_path), "--overwrite") == 0
    assert not (folder / TRACEBACK_NAME).exists()


@pytest.mark.parametrize("folder_exists", [True, False])
def test_a_traceback_finds_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_exists: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "run"
    if folder_exists:
        (folder / TRACEBACK_NAME).mkdir(parents=True)  # cannot be written
    try:
        with doing("outside"), doing("inside"):
            raise ValueError("\ud800 half")
    except ValueError as error:
        line = describe(error, "running", folder)
    assert line.startswith("while inside: ValueError: ")
    (path,) = tmp_path.glob(f"aepo-fast-*/{TRACEBACK_NAME}")
    assert str(path) in line and "outside" in path.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert describe(ValueError(), "running", None) == (
        "while running: ValueError. The traceback cannot be saved."
    )


ENDLESS = """
import sys
from aepo_fast.cli.streams import open_closed_streams, outlive_the_terminal, show_every_character
open_closed_streams()
show_every_character()
outlive_the_terminal()
with open(sys.argv[1], "w") as file:
    for _ in range(2000):
        print("x" * 100)
        print("y" * 100, file=sys.stderr)
        file.write("step\\n")
sys.stdout.flush()
"""


@pytest.mark.parametrize(
    "command",
    [
        '"$@" | head -1',
        '"$@" 2>&1 | true',
        '"$@" >&- 2>&-',
        '"$@" > /dev/full 2>&1',
        '"$@" <&- >&-',
    ],
)
def test_a_run_outlives_its_terminal(tmp_path: Path, command: str) -> None:
    path = tmp_path / "log"
    done = shell(f"set -o pipefail; {command}", "-c", ENDLESS, str(path))
    assert done.returncode == 0
    assert path.read_text() == "step\n" * 2000  # and no line of the output


def test_messages_come_in_their_order() -> None:
    code = (
        "import sys; from aepo_fast.cli.streams import *; outlive_the_terminal()\n"
        "print(1, file=sys.stderr); print(2, flush=True); print(3, file=sys.stderr); print(4)"
    )
    assert shell('"$@" 2>&1', "-c", code).stdout == "1\n2\n3\n4\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_a_character_that_the_terminal_lacks_is_escaped(encoding: str) -> None:
    code = (
        "import sys; from aepo_fast.cli.streams import *; from rich.console import Console\n"
        "show_every_character(); outlive_the_terminal()\n"
        "print('\u6570 \U0001f600'); Console().print('\u6570'); print('\u6570', file=sys.stderr)"
    )
    done = shell('"$@"', "-c", code, PYTHONIOENCODING=encoding)
    assert done.stdout == "\\u6570 \\U0001f600\n\\u6570\n" and done.stderr == "\\u6570\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [('"$@" > /dev/full', "No space left on device"), ('"$@" | true', ""), ('"$@" >&-', "")],
)
def test_output_that_nobody_takes_is_no_traceback(command: str, message: str) -> None:
    done = shell(command, "-m", "aepo_fast", "configs", "first-light")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == bool(message)


WAITS = """
import sys, time
from aepo_fast.training.interrupt import Interrupted, InterruptGuard
with InterruptGuard() as guard:
    print("ready", flush=True)
    try:
        while not sys.stdin.readline():
            guard.check()
        guard.check()
        print("goes on")
    except Interrupted as stop:
        time.sleep(0.3)  # a checkpoint is being written
        print("saved")
        sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_saves_unless_it_is_to_be_ignored(ignored: bool) -> None:
    before = "trap '' HUP; " if ignored else ""
    process = start(before + 'exec "$@"', "-c", WAITS)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)  # terminal and shell send one each
    out, _ = process.communicate("go\n")
    assert (process.returncode, out) == ((0, "goes on\n") if ignored else (129, "saved\n"))


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "none://127.0.0.1:9", "http://[::1"])
def test_a_proxy_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
    with pytest.raises(ConfigError, match="model.path = 'someone/model'.*the hub did not give it"):
        resolve("someone/model")
    with pytest.raises(ConfigError, match="data.sources.name = 'someone/rows'.*the hub did not"):
        list(read_hub(SourceConfig("hub", "someone/rows")))


def test_a_home_is_meant_in_every_path(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(cfg, tmp_path)
    assert load_config("~/tiny.toml", ["output_dir=~/new"]).output_dir == str(tmp_path / "new")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?", "answer": "1"}\n')
    assert find_files("~/rows.jsonl") == [tmp_path / "rows.jsonl"]
    (tmp_path / "model").symlink_to(cfg.model.path)
    assert resolve("~/model") == tmp_path / "model"
    log = tmp_path / "run" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 1, "reward": 0.5}\n')
    assert plot_run("~/run", Path("~/here.png")) == tmp_path / "here.png"
