"""The process that scores: nothing that a text makes it do reaches, stops or outlives the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RewardConfig
from aepo_fast.rewards import confinement
from aepo_fast.rewards.process import ScoringProcess
from aepo_fast.rewards.reward import Reward, RewardError, RewardResult, build_reward
from aepo_fast.samples import Prompt
from bench.common.environment import ROOT

CALL = "aepo_fast.rewards.user_call:load_function"
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and signals of Linux")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Reward]:
    """Makes a reward of the body of a module in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(body: str, **settings: Any) -> Reward:
        (tmp_path / "mine.py").write_text(body)
        data = DataConfig(sources=(SourceConfig(name="x.jsonl"),))
        return build_reward(RewardConfig(function="mine:reward", **settings), data)

    return write


def score(reward: Reward, *texts: str, **columns: Any) -> RewardResult:
    prompt = Prompt("k", ({"role": "user", "content": "q"},), {"prompt": "q", **columns}, 0, (1,))
    return reward.score([prompt] * len(texts), list(texts), [[1]] * len(texts))


def ends(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


# What a text may do to the code that evaluates it, and what is said of it.
FATAL = {
    "hold the interpreter": ("9**9**9**9", "no result within reward.timeout_s = 1.0"),
    "sleep": ("__import__('time').sleep(60)", "no result within reward.timeout_s = 1.0"),
    "exit": ("__import__('os')._exit(3)", "ended with status 3"),
    "crash": ("__import__('ctypes').string_at(0)", "SIGSEGV"),
    "kill": ("__import__('os').kill(__import__('os').getpid(), 9)", "SIGKILL"),
    "fill the memory": ("bytearray(50 * 2**30)", r"MemoryError.*reward.memory_gib = 1"),
    "nest": ("(" * 100_000, "SyntaxError|MemoryError"),
    "recurse": ("(lambda f: f(f))(lambda f: f(f))", "RecursionError"),
    "raise": ("{}['why']", "KeyError: 'why'"),
    "stop": ("__import__('sys').exit(4)", "SystemExit: 4"),
}


@linux
@pytest.mark.parametrize("what", list(FATAL))
def test_a_sample_that_cannot_be_evaluated_costs_that_sample(
    module: Callable[..., Reward], what: str
) -> None:
    body = "def reward(completions, **_):\n    return [float(eval(c)) for c in completions]\n"
    text, problem = FATAL[what]
    reward = module(body, timeout_s=1.0, memory_gib=1.0)
    with pytest.warns(RuntimeWarning) as warned:
        result = score(reward, "1 + 1", text, "3")
    assert result.rewards == [2.0, None, 3.0] and result.errors == 1
    said = [str(one.message) for one in warned]
    assert "for 3 completions failed, so they are scored one by one" in said[0]
    assert any("sample 1 of 3" in one for one in said)
    with pytest.raises(RewardError, match=problem):
        score(module(body, timeout_s=1.0, memory_gib=1.0, on_error="stop"), text)


def test_too_many_failures_are_not_tried_one_by_one(module: Callable[..., Reward]) -> None:
    reward = module("def reward(completions, **_):\n    raise ValueError(len(completions))\n")
    with pytest.warns(RuntimeWarning, match="ValueError: 40"):
        result = score(reward, *["x"] * 40)
    assert result.errors == 40


@pytest.mark.parametrize(("share", "total", "allowed"), [(0.5, 16, 8), (0.1, 16, 1), (1.0, 8, 7)])
def test_errors_beyond_their_share_stop_with_a_sample(
    module: Callable[..., Reward], share: float, total: int, allowed: int
) -> None:
    body = "def reward(completions, **_):\n    return [1.0 if c else None for c in completions]\n"
    reward = module(body, max_error_share=share)
    reward.check_share(allowed, total, "")
    with pytest.raises(RewardError, match=f"{allowed + 1} of {total} samples.*The first: sample 7"):
        reward.check_share(allowed + 1, total, "sample 7")
    with pytest.raises(RewardError, match="1 of 1 samples"):
        reward.check_share(1, 1, "")


def test_an_error_shows_the_functions_own_lines(module: Callable[..., Reward]) -> None:
    body = "def helper(text):\n    return int(text)  # here\n"
    body += "def reward(completions, **_):\n    return list(map(helper, completions))\n"
    with pytest.raises(RewardError) as caught:
        score(module(body, on_error="stop"), "no number")
    message = str(caught.value)
    assert "return int(text)  # here" in message and "mine.py" in message
    assert "user_call.py" not in message and "worker.py" not in message


def test_math_verify_in_a_users_reward(module: Callable[..., Reward]) -> None:
    body = "from math_verify import parse, verify\n"
    body += "def reward(completions, answer, **_):\n"
    body += "    pairs = zip(completions, answer)\n"
    body += "    return [float(verify(parse(f'${a}$'), parse(c))) for c, a in pairs]\n"
    reward = module(body)
    assert score(reward, "$\\frac{6}{8}$", "$1$", answer="\\frac{3}{4}").rewards == [1.0, 0.0]


def test_state_is_kept_from_call_to_call(module: Callable[..., Reward]) -> None:
    body = "class Counter:\n    calls = 0\n"
    body += "    def __call__(self, completions, **_):\n"
    body += "        self.calls += 1\n        return [self.calls] * len(completions)\n"
    reward = module(body + "reward = Counter()\n")
    assert [score(reward, "a").rewards for _ in range(3)] == [[1.0], [2.0], [3.0]]


def test_a_client_of_the_event_loop_outlives_a_call(module: Callable[..., Reward]) -> None:
    body = "import asyncio\nlock = None\n"
    body += "async def reward(completions, **_):\n    global lock\n"
    body += "    lock = lock or asyncio.get_running_loop().create_future()\n"
    body += "    return [float(lock.get_loop() is asyncio.get_running_loop())]\n"
    reward = module(body)
    assert [score(reward, "a").rewards for _ in range(2)] == [[1.0], [1.0]]


def test_columns_of_any_type_and_prints(
    module: Callable[..., Reward], capfd: pytest.CaptureFixture[str]
) -> None:
    import datetime

    body = "import os, sys\ndef reward(completions, when, **_):\n"
    body += "    print('seen', when[0]); os.write(1, b'[1]\\n'); sys.stderr.write('beside')\n"
    body += "    return [when[0].year]\n"
    reward = module(body)
    assert score(reward, "a", when=datetime.date(1999, 1, 2), extra={1, 2}).rewards == [1999.0]
    out, error = capfd.readouterr()
    assert "seen 1999-01-02" in out and "beside" in error
    with pytest.warns(RuntimeWarning, match="a column cannot be handed on"):
        assert score(reward, "a", when=lambda: 1).rewards == [None]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit('not here')", "SystemExit: not here"),
        ("import os; os._exit(5)", "ended with status 5"),
        ("def reward(:", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError"),
    ],
)
def test_a_module_that_cannot_be_imported(
    module: Callable[..., Reward], body: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"reward.function = 'mine:reward'.*'mine'.*{message}"):
        module(body)


@pytest.mark.parametrize("argument", ["trainer_state", "log_extra", "log_metric"])
def test_what_only_trls_trainer_has_needs_a_default(
    module: Callable[..., Reward], argument: str
) -> None:
    with pytest.raises(ConfigError, match=f"{argument}.*TRL's trainer.*{argument}=None"):
        module(f"def reward(completions, {argument}, **_): return [1.0]\n")
    reward = module(f"def reward(completions, {argument}=None, **_): return [1.0]\n")
    assert score(reward, "x").rewards == [1.0]


@linux
def test_the_process_inherits_nothing_but_its_pipes(
    module: Callable[..., Reward], tmp_path: Path
) -> None:
    body = "import os\ndef reward(completions, **_):\n"
    body += "    paths = [f'/proc/self/fd/{fd}' for fd in range(3, 999)]\n"
    body += "    links = [os.readlink(path) for path in paths if os.path.lexists(path)]\n"
    body += "    return [len(links) + 0.5 * (not all('pipe:' in link for link in links))]\n"
    held = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(held, True)
    try:
        assert score(module(body), "a").rewards == [3.0]
    finally:
        os.close(held)


@linux
def test_a_verifiers_process_is_told_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    process = ScoringProcess(
        "aepo_fast.rewards.verifiers:load_verifiers",
        ({}, False),
        timeout_s=5.0,
        memory=2**30,
        user_code=False,
    )
    assert not process.start().problem and process._process is not None
    environment = Path(f"/proc/{process._process.pid}/environ").read_bytes()
    assert b"secret" not in environment and b"PATH=" in environment
    limits = Path(f"/proc/{process._process.pid}/limits").read_text()
    assert f"Max address space         {2**30}" in limits


@pytest.mark.skipif(confinement.version() < 6, reason="needs a Linux whose Landlock knows signals")
def test_a_verifier_that_evaluates_a_text_is_confined(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    file, folder, kept = (tmp_path / name for name in ("file", "folder", "kept"))
    kept.write_text("text")
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    port = server.getsockname()[1]
    system = "__import__('os')"
    attempts = [
        f"[open({str(file)!r}, 'w')]",
        f"[{system}.mkdir({str(folder)!r})]",
        f"[{system}.remove({str(kept)!r})]",
        f"[{system}.truncate({str(kept)!r}, 0)]",
        f"[{system}.system('touch {file}')]",
        f"[{system}.kill({os.getpid()}, {signal.SIGUSR1:d})]",
        f"[__import__('socket').create_connection(('127.0.0.1', {port}))]",
    ]
    verifiers = {0: ("spiral_matrix", {})}
    process = ScoringProcess(
        "aepo_fast.rewards.verifiers:load_verifiers",
        (verifiers, False),
        timeout_s=20.0,
        memory=2**33,
        user_code=False,
    )
    row = reasoning_gym.create_dataset("spiral_matrix", size=1, seed=0)[0]
    try:
        (ended,) = process.ask([(0, row, f"[{system}._exit(7)]")])
        assert "status 7" in ended.problem  # it does evaluate a text
        process.ask([(0, row, text) for text in attempts])
        assert not file.exists() and not folder.exists() and kept.read_text() == "text"
        assert not heard
        with pytest.raises(TimeoutError):
            server.accept()
    finally:
        process.close()
        server.close()
        signal.signal(signal.SIGUSR1, before)


def test_a_reply_is_never_loaded_as_a_pickle(module: Callable[..., Reward]) -> None:
    body = "import os, pickle\nclass Evil:\n    def __reduce__(self):\n"
    body += "        return os.system, ('touch loaded',)\n"
    body += "def reward(completions, **_):\n"
    body += "    for fd in range(3, 999):\n        try:\n"
    body += "            os.write(fd, pickle.dumps(Evil()) + b'\\n')\n"
    body += "        except OSError:\n            pass\n    return [1.0]\n"
    with pytest.warns(RuntimeWarning, match="wrote what is no reply"):
        assert score(module(body), "a").rewards == [None]
    assert not Path("loaded").exists()


@linux
def test_a_lower_limit_of_the_system_holds() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))\n"
        "from aepo_fast.rewards.math_worker import MathWorker\n"
        "print(MathWorker(20.0).verify('42', '42'))"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, env=env, text=True) == "True\n"


HANGS = """
import os, pathlib, subprocess
def reward(completions, **_):
    child = subprocess.Popen(["sleep", "300"])
    pathlib.Path("pids.tmp").write_text(f"{os.getpid()} {child.pid}")
    os.rename("pids.tmp", "pids")
    return [9**9**9**9]
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_process_and_its_children_end_with_the_run(tmp_path: Path, number: int) -> None:
    (tmp_path / "mine.py").write_text(HANGS)
    script = (
        # A shell's background job, which the tests may be, starts with Ctrl-C ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from aepo_fast.rewards.process import ScoringProcess\n"
        f"ScoringProcess('{CALL}', ('mine:reward',), timeout_s=300.0, memory=2**33, "
        "user_code=True).ask([(1, {'completions': ['x']})])"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    run = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "pids").exists():
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(number)
    assert run.wait(timeout=5) != 0
    assert all(ends(int(pid)) for pid in (tmp_path / "pids").read_text().split())


@linux
def test_what_a_hanging_call_has_started_ends_with_it(
    module: Callable[..., Reward], tmp_path: Path
) -> None:
    with pytest.warns(RuntimeWarning, match="no result within"):
        score(module(HANGS, timeout_s=0.5), "x")
    assert all(ends(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_programs_that_a_reward_starts_can_be_terminated(module: Callable[..., Reward]) -> None:
    body = "import multiprocessing, subprocess, time\n"
    body += "fork = multiprocessing.get_context('fork').Process\n"
    body += "def reward(completions, **_):\n"
    body += "    child = subprocess.Popen(['sleep', '60']); child.terminate()\n"
    body += "    forked = fork(target=time.sleep, args=(60,))\n"
    body += "    forked.start(); forked.terminate(); forked.join()\n"
    body += "    return [-child.wait() - forked.exitcode]\n"
    reward = module(body, timeout_s=120.0)
    assert [score(reward, "x").rewards for _ in range(10)] == [[2.0 * signal.SIGTERM]] * 10
