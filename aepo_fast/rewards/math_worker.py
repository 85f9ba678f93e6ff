"""Runs math-verify in a process of its own that a hanging expression cannot outlive.

A completion may hold 9^{9^{9^9}}; evaluating it never returns to the interpreter, so no thread and
no Python signal handler can interrupt it. The worker therefore arms a kernel timer whose default
action ends the process, and the parent starts another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import IO

MAX_MEMORY = 8 * 2**30


class MathWorkerError(RuntimeError):
    """A pair could not be compared: timeout, or an answer that cannot be parsed."""


class MathWorker:
    """A process that compares answers; started at the first use and again after each timeout."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None

    def verify(self, gold: str | None, completion: str) -> bool | None:
        """Whether the final answer of a completion equals `gold`; None where `gold` is None.

        Raises MathWorkerError on a timeout or if math-verify fails.
        """
        if gold is None:
            return None
        if self._process is None:
            # -P: our modules must not stand in for those that math-verify imports.
            command = [sys.executable, "-P", __file__, str(self.timeout_s)]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            _, error = self._receive()  # it is ready: imports do not count as time to compare
            if error:
                raise MathWorkerError(error)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: _receive says so
            self._process.stdin.write(json.dumps([gold, completion]) + "\n")
            self._process.stdin.flush()
        verdict, error = self._receive()
        if error:
            raise MathWorkerError(error)
        return verdict

    def _receive(self) -> tuple[bool, str]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            verdict, error = json.loads(line)
            return verdict, error
        status = self._process.wait()
        self.close()
        if status == -signal.SIGALRM:
            return False, f"no result within reward.timeout_s = {self.timeout_s}"
        return False, f"the process that runs math-verify ended with status {status}"

    def close(self) -> None:
        """End the process; the next `verify` starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.__exit__(None, None, None)  # closes the pipes and waits

    def __del__(self) -> None:
        self.close()


def compare(gold: str, completion: str) -> bool | None:
    """Whether the completion's answer equals `gold`: see `math_answers.compare`."""
    from aepo_fast.rewards import math_answers  # not needed in the parent

    return math_answers.compare(gold, completion)


def serve(requests: IO[str], replies: IO[str], timeout_s: float) -> None:
    """Answer one JSON line [gold, completion] after the other with [verdict, error]."""
    compare("1", "1")  # imports and grammar
    print(json.dumps([True, ""]), file=replies, flush=True)
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            reply = [compare(*json.loads(line)), ""]
        except (Exception, RecursionError) as error:  # of a parser fed with anything
            reply = [False, f"{type(error).__name__}: {error}"]
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


def main() -> None:
    """Serve the parent until it closes the pipe or is gone."""
    # Our package without its __init__, which imports torch.
    package = types.ModuleType("aepo_fast")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["aepo_fast"] = package
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Ctrl-C reaches the whole process group; the parent decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write into the replies
    serve(sys.stdin, replies, float(sys.argv[1]))


if __name__ == "__main__":
    main()
