"""Ctrl-C, SIGTERM and SIGHUP: stop where a checkpoint can be written, then exit 130, 143 or 129."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from aepo_fast.report.phase import progress


class Interrupted(Exception):
    """The run was asked to stop by `signal_number`."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(signal.Signals(signal_number).name)

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return Interrupted, (self.signal_number,)

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + signal number."""
        return 128 + self.signal_number


class InterruptGuard:
    """Turns the first SIGINT, SIGTERM or SIGHUP into `Interrupted` at the next `check`.

    The second SIGINT or SIGTERM ends the process as if there were no guard. Outside the main thread
    no signal arrives.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Ignored by whoever started the run, e.g. nohup: the run goes on without its terminal.
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore(*self._previous)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if signal.SIGHUP in self._previous:  # a terminal that closes sends more than one
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._restore(*self._previous.keys() - {signal.SIGHUP})

    @property
    def received(self) -> int | None:
        """The number of the signal that has arrived."""
        return self._received

    def receive(self, number: int) -> None:
        """Take a signal that another process of the run has got."""
        if self._received is None:
            self._received = number

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        progress()
        if self._received is not None:
            raise Interrupted(self._received)
