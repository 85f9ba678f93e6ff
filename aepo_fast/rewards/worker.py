"""The process that runs verifiers and reward functions: everything that is given a model's text.

It is started by `process.ScoringProcess`, which can kill it: a text may hold 9**9**9**9, and
evaluating that never returns to the interpreter, so no thread and no Python signal handler could
stop it. Requests are pickles of the trusted parent. Replies are lines of JSON, as the process may
be under a text's control by then, and loading a pickle of its would run that control's code.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import pickle
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PACKAGE = Path(__file__).resolve().parents[1]
# Characters of an error and of its traceback that a reply holds at most.
_MOST_ERROR, _MOST_TRACEBACK = 2000, 6000


@dataclass(frozen=True)
class Setup:
    """What a process is started for.

    function: "module:function" of this package; called with `arguments`, it gives (handler, info).
    The handler turns a request into a value that JSON knows. info: told to the parent, JSON too.
    path: sys.path, None for the interpreter's own. memory: bytes. alarm_s: seconds after which
    the process ends itself, None where the user's code may have timers of its own.
    """

    function: str
    arguments: tuple[Any, ...]
    path: list[str] | None
    memory: int
    alarm_s: float | None


def read_frame(stream: IO[bytes]) -> Any:
    """The next object that the parent has sent; EOFError where there is none."""
    length = int.from_bytes(stream.read(8), "little")
    if not length:
        raise EOFError
    return pickle.loads(stream.read(length))


def frame(value: Any) -> bytes:
    """What `read_frame` reads."""
    body = pickle.dumps(value)
    return len(body).to_bytes(8, "little") + body


def describe(error: BaseException) -> tuple[str, str]:
    """An exception as its type and message, and its traceback without our own frames."""
    with contextlib.suppress(Exception):  # of the exception's own __str__
        trace = error.__traceback__
        while trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
            trace = trace.tb_next
        lines = traceback.format_exception(type(error), error, trace, limit=-20)
        text = "".join(lines).rstrip() if trace is not None else ""
        return f"{type(error).__name__}: {error}"[:_MOST_ERROR], text[-_MOST_TRACEBACK:]
    return type(error).__name__, ""


def main() -> None:
    """Serve the parent until it closes the pipe or is gone."""
    request_fd, reply_fd, lifeline = map(int, sys.argv[1:])
    for fd in (request_fd, reply_fd, lifeline):
        os.set_inheritable(fd, False)
    _end_with_the_parent(lifeline)
    _leave_signals_to_the_parent()
    requests = os.fdopen(request_fd, "rb")
    setup: Setup = _as_this_package(requests)
    _limit(setup)
    if setup.path is not None:
        sys.path[:] = setup.path
    else:
        os.dup2(2, 1)  # what a verifier prints is no result of the command
    try:
        module, function = setup.function.split(":")
        handler, info = getattr(importlib.import_module(module), function)(*setup.arguments)
        if setup.path is None:  # after the imports, which may write their compiled files
            importlib.import_module("aepo_fast.rewards.confinement").confine()
    except BaseException as error:  # also SystemExit: the parent is to hear of it
        _reply(reply_fd, [None, *describe(error)])
        return
    _reply(reply_fd, [info, "", ""])
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            for request in read_frame(requests):
                _reply(reply_fd, _answer(handler, request, setup.alarm_s))


def _as_this_package(requests: IO[bytes]) -> Setup:
    """Read the setup with this very package importable, wherever the interpreter looks.

    Its folder is not put on sys.path: what else lies there must not stand in for other modules.
    """
    where = PACKAGE / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        PACKAGE.name, where, submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE.name] = module
    spec.loader.exec_module(module)
    return read_frame(requests)


def _answer(handler: Callable[[Any], Any], request: Any, alarm_s: float | None) -> list[Any]:
    if alarm_s is not None:
        signal.setitimer(signal.ITIMER_REAL, alarm_s)
    try:
        answer = [handler(request), "", ""]
    except BaseException as error:  # of code fed with anything
        answer = [None, *describe(error)]
    if alarm_s is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
    for stream in (sys.stdout, sys.stderr):  # a kill must not lose what was printed
        with contextlib.suppress(Exception):
            stream.flush()
    return answer


def _reply(fd: int, answer: list[Any]) -> None:
    line = json.dumps(answer).encode() + b"\n"
    while line:
        line = line[os.write(fd, line) :]


def _end_with_the_parent(lifeline: int) -> None:
    """Have the kernel kill this process and its children when the parent is gone.

    lifeline: a pipe whose other end the parent holds and never writes to. Other systems than Linux
    know no such signal; there the process ends at its timeout or when it next reads.
    """
    if sys.platform != "linux":
        return
    import fcntl

    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it was gone before
        sys.exit(1)


def _leave_signals_to_the_parent() -> None:
    """A batch system signals all processes of a job; the parent decides when this one ends.

    Programs and processes started from here get the usual behaviour: a handler, unlike SIG_IGN,
    does not outlive exec, and a fork takes it back.
    """
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    usual = {number: signal.getsignal(number) for number in heard}

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)
        unblock()

    for number in heard:
        signal.signal(number, lambda *_: None)
    # Blocked meanwhile: what a fork is sent before it has its own handlers must not be lost.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, heard),
        after_in_parent=unblock,
        after_in_child=restore,
    )
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _limit(setup: Setup) -> None:
    """Cap the memory; an attempt to go beyond it is a MemoryError. No limit is ever raised."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    # The whole address space would count what CUDA only reserves, which the user's code may use.
    kind = resource.RLIMIT_AS if setup.path is None else resource.RLIMIT_DATA
    now = [limit for limit in resource.getrlimit(kind) if limit != resource.RLIM_INFINITY]
    most = min([setup.memory, *now])
    resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main()
