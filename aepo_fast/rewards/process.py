"""A process that scores, seen from the run: it is asked, limited, and killed where it hangs."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from aepo_fast.rewards import worker
from aepo_fast.rewards.worker import Setup, frame

T = TypeVar("T")

# What a verifier's process keeps of the environment: how to find Python and its libraries, and the
# language. No token or key is among it.
_KEPT = "HOME LANG LC_ALL LC_CTYPE LD_LIBRARY_PATH PATH TMPDIR TZ USER VIRTUAL_ENV".split()
_MOST_REPLY = 64 * 2**20  # bytes of a reply; more is no reply
_ALARM_S = 1.0  # a verifier's process ends itself; so much later it is killed
_LOOK_S = 0.1  # between two looks at whether the process is still there


@dataclass(frozen=True)
class Answer:
    """What became of a request: a value, or a problem with the traceback of the code that failed.

    problem: empty where there is none.
    """

    value: Any = None
    problem: str = ""
    traceback: str = ""


class Abandoned(Exception):
    """Nobody waits for the answers any more."""


class _Lost(Exception):
    """The process has ended, or was ended because it gave no reply."""


class ScoringProcess:
    """Answers requests one after the other; started again after a timeout, a crash or a kill.

    function, arguments: as in `worker.Setup`. timeout_s: for one request. memory: bytes.
    user_code: the function is the user's. It then has the environment and the import path of this
    process, and prints where this process does.
    """

    def __init__(
        self,
        function: str,
        arguments: tuple[Any, ...],
        *,
        timeout_s: float,
        memory: int,
        user_code: bool,
    ) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: Answer | None = None
        self._pipes: list[int] = []  # our ends of: requests, replies, lifeline
        self._buffer = bytearray()
        self._abandoned = False
        self._lock = threading.Lock()
        self._folder = os.getcwd()
        self.timeout_s, self.user_code = timeout_s, user_code
        path = [entry or self._folder for entry in sys.path] if user_code else None
        alarm_s = None if user_code else timeout_s
        self._setup = Setup(function, arguments, path, memory, alarm_s)

    def begin(self) -> None:
        """Start the process and do not wait for its imports."""
        with self._lock, suppress(_Lost):  # the first request says so
            self._begin()

    def start(self) -> Answer:
        """Start the process and wait until it is ready, however long that takes.

        The value is the info of its set-up, the problem what this failed of.
        """
        with self._lock:
            return self._whole(self._start)

    def ask(self, requests: Sequence[Any]) -> list[Answer]:
        """Put requests to the process, in order; each has `timeout_s` seconds of its own."""
        with self._lock:
            return self._whole(lambda: self._ask(requests))

    def close(self) -> None:
        """End the process and what it has started; the next request starts it again."""
        with self._lock:
            self._close()

    def abandon(self) -> None:
        """End for good, from any thread: what is being asked raises Abandoned within moments."""
        self._abandoned = True

    def __del__(self) -> None:
        self._close()

    def _whole(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except BaseException:  # Ctrl-C: a reply still to come belongs to no later request
            self._close()
            raise

    def _close(self) -> None:
        process, self._process, self._ready = self._process, None, None
        pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            os.close(pipe)
        if process is not None:
            with suppress(ProcessLookupError):  # it and its children are gone already
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _ask(self, requests: Sequence[Any]) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < len(requests):
            ready = self._start()
            if ready.problem:
                return answers + [ready] * (len(requests) - len(answers))
            try:
                data = frame(list(requests[len(answers) :]))
            except Exception as error:  # of a column's own code
                reason = f"a column cannot be handed on: {type(error).__name__}: {error}"
                return answers + [Answer(problem=reason)] * (len(requests) - len(answers))
            try:
                self._send(data)
                while len(answers) < len(requests):
                    answers.append(self._answer(self.timeout_s))
            except _Lost as lost:  # at the first request that has no answer
                answers.append(Answer(problem=str(lost)))
        return answers

    def _start(self) -> Answer:
        if self._process is not None and self._process.poll() is not None:
            self._close()  # killed while it had nothing to do, which is no sample's fault
        if self._ready is None:
            try:
                self._begin()
                ready = self._answer(None)
            except _Lost as lost:
                return Answer(problem=str(lost))
            if ready.problem:
                self._close()
                return ready
            self._ready = ready
        return self._ready

    def _begin(self) -> None:
        if self._process is not None:
            return
        request, reply, lifeline = os.pipe(), os.pipe(), os.pipe()
        theirs = (request[0], reply[1], lifeline[0])
        self._pipes, self._buffer = [request[1], reply[0], lifeline[1]], bytearray()
        os.set_blocking(request[1], False)
        # -P: our modules must not stand in for those that a verifier imports.
        command = [sys.executable, "-P", worker.__file__, *map(str, theirs)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=theirs,
                env=None if self.user_code else _environment(),
                cwd=self._folder,
                start_new_session=True,  # a group of its own, to be killed with its children
            )
        except OSError as error:
            self._lose(f"the process that scores cannot be started: {error}")
        finally:
            for pipe in theirs:
                os.close(pipe)
        self._send(frame(self._setup))

    def _send(self, frames: bytes) -> None:
        data, deadline = memoryview(frames), time.monotonic() + self.timeout_s
        poller = select.poll()
        poller.register(self._pipes[0], select.POLLOUT)
        while data:
            if poller.poll(1000 * _LOOK_S):
                try:
                    data = data[os.write(self._pipes[0], data) :]
                except BrokenPipeError:
                    return  # it has ended, as the missing answer will say
            elif self._has_ended():
                return
            elif self._ready is not None and time.monotonic() > deadline:
                self._lose(self._late())

    def _answer(self, timeout_s: float | None) -> Answer:
        """The next reply; raises _Lost. timeout_s: None waits for as long as the process lives."""
        grace = 0.0 if self.user_code else _ALARM_S
        deadline = None if timeout_s is None else time.monotonic() + timeout_s + grace
        poller = select.poll()
        poller.register(self._pipes[1], select.POLLIN)
        while b"\n" not in self._buffer:
            if self._abandoned:
                raise Abandoned
            ended = self._has_ended()  # before the look at the pipe: its last words count
            left = _LOOK_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                self._lose(self._late())
            if poller.poll(0 if ended else 1000 * min(left, _LOOK_S)):
                data = os.read(self._pipes[1], 2**16)
                self._buffer += data
                ended = not data
            if ended:
                self._lose()
            if len(self._buffer) > _MOST_REPLY:
                self._lose("the process that scores wrote what is no reply")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            value, problem, trace = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            self._lose("the process that scores wrote what is no reply")
        return Answer(value, str(problem), str(trace))

    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _late(self) -> str:
        return f"no result within reward.timeout_s = {self.timeout_s}"

    def _lose(self, reason: str = "") -> NoReturn:
        """End the process and say why; without a reason it has ended by itself."""
        process = self._process
        self._close()
        if not reason and process is not None:
            status = process.returncode
            reason = f"the process that scores ended with status {status}"
            if status == -signal.SIGALRM:
                reason = self._late()
            elif status < 0:
                reason += f" ({signal.Signals(-status).name})"
        raise _Lost(reason)


def _environment() -> dict[str, str]:
    def is_kept(name: str) -> bool:
        return name in _KEPT or name.startswith(("PYTHON", "OMP_"))

    return {name: value for name, value in os.environ.items() if is_kept(name)}
