"""Where in a completion its final answer stands, in characters and in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aepo_fast.rewards.final_answer import boxed, tagged


def answer_span(text: str) -> tuple[int, int] | None:
    r"""Characters [start, end) of the final answer in a completion's text, None without one.

    It is what stands inside the last <answer>...</answer>, else inside the last complete
    \boxed{...}, else the last line that is not empty; white space around it is left out.
    """
    inside = tagged(text) or boxed(text)
    if inside is None:
        last = text.rstrip().splitlines()[-1:]
        end = len(text.rstrip())
        inside = (end - len(last[0]), end) if last else (0, 0)
    start, end = inside
    body = text[start:end]
    start, end = start + len(body) - len(body.lstrip()), start + len(body.rstrip())
    return (start, end) if start < end else None


def answer_tokens(text: str, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> range:
    """Positions in `ids` of the tokens that hold a character of the final answer.

    text: decode(ids). A token that holds a bit of the answer belongs to it; the end token, which
    has no text, does not. Tokens do not decode one by one, as one may hold part of a character, so
    the ends of the answer are found by decoding the last k tokens for a few k, or the first k
    where the answer stands early.
    """
    span = answer_span(text)
    if span is None:
        return range(0)
    (start, end), num = span, len(ids)
    early = 2 * end < len(text)
    # From its end of the text: what is outside the answer, and with the answer.
    outside, through = (text[:start], text[:end]) if early else (text[end:], text[start:])
    begins = str.startswith if early else str.endswith

    def piece(k: int) -> str:
        return decode(ids[:k] if early else ids[num - k :])

    guess = num * len(outside) // len(text)
    out = _most(lambda k: begins(outside, piece(k)), 0, num - 1, guess=guess)
    guess = out + num * (end - start) // len(text)
    lacking = _most(lambda k: not begins(piece(k), through), out, num - 1, guess=guess)
    return range(out, lacking + 1) if early else range(num - lacking - 1, num - out)


def _most(holds: Callable[[int], bool], low: int, high: int, *, guess: int) -> int:
    """The largest k in [low, high] with holds(k), which is true up to it and known for `low`.

    It is looked for from a guess by steps that double, then by halving.
    """
    step, first_not = 1, high + 1
    guess = min(max(guess, low + 1), high)
    while first_not - low > 1:
        if holds(guess):
            low, guess = guess, guess + step
        else:
            first_not, guess = guess, guess - step
        step *= 2
        if not low < guess < first_not:
            guess = (low + first_not) // 2
    return low
