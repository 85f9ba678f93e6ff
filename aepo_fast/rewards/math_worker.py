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

    def verify(self, gold: str, completion: str) -> bool:
        """Whether the boxed or last answer of a completion equals `gold`, a number or LaTeX.

        Raises MathWorkerError on a timeout or if math-verify fails.
        """
        (answer,) = self._process.ask([(0, gold, completion)])
        if answer.problem:
            raise MathWorkerError(answer.problem)
        return bool(answer.value)

    def close(self) -> None:
        """End the process; the next `verify` starts another."""
        self._process.close()


def compare(gold: str, completion: str) -> bool:
    """Whether math-verify finds the completion's answer equal to `gold`."""
    import math_verify  # not needed in the parent, and slow to import

    # Timeouts are off: math-verify's own use a signal handler, see above.
    parsed = math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None)  # type: ignore[arg-type]
    if not parsed:
        raise ValueError(f"math-verify cannot parse the right answer {gold!r}")
    found = math_verify.parse(completion, parsing_timeout=None)  # type: ignore[arg-type]
    return math_verify.verify(parsed, found, timeout_seconds=None)
