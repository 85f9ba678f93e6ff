"""Ctrl-C and SIGTERM: stop at a point where a checkpoint can be written, then exit 130 or 143."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupted(Exception):
    """The run was asked to stop by `signal_number`."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(signal.Signals(signal_number).name)

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + signal number."""
        return 128 + self.signal_number


class InterruptGuard:
    """Turns the first SIGINT or SIGTERM into `Interrupted` at the next `check`.

    The second one ends the process as if there were no guard.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> InterruptGuard:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self._received is not None:
            raise Interrupted(self._received)
