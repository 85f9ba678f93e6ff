"""Compares math answers with math-verify, in a process that no expression can hang for long.

math-verify's own timeouts use a signal handler, which 9^{9^{9^9}} never lets run.
"""

from __future__ import annotations

from aepo_fast.rewards.process import ScoringProcess

MAX_MEMORY = 8 * 2**30  # bytes


class MathWorkerError(RuntimeError):
    """A pair could not be compared: timeout, or an answer that cannot be parsed."""


class MathWorker:
    """A process that compares answers; started at the first use and again after each timeout."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._process = ScoringProcess(
            "aepo_fast.rewards.verifiers:load_verifiers",
            ({}, True),
            timeout_s=timeout_s,
            memory=MAX_MEMORY,
            user_code=False,
        )

    def verify(self, gold: str | None, completion: str) -> bool | None:
        """Whether the final answer of a completion equals `gold`; None where `gold` is None.

        Raises MathWorkerError on a timeout or if math-verify fails.
        """
        if gold is None:
            return None
        (answer,) = self._process.ask([(0, gold, completion)])
        if answer.problem:
            raise MathWorkerError(answer.problem)
        return bool(answer.value)

    def close(self) -> None:
        """End the process; the next `verify` starts another."""
        self._process.close()
