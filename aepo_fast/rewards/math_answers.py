"""What a right answer means and whether a completion states it: the rules of "math_verify".

Words are compared as words, all else by math-verify, after what people write for one number has
been made one: 2 1/2, 2 000, 5 dollars, 1e-05. As in math-verify a percentage equals both its number
and its hundredth, and units do not count. Without torch, for the process that compares.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from decimal import Decimal
from typing import Any

from aepo_fast.rewards.final_answer import bare, designated, labelled, last_bold, without_thoughts

# Where an answer is an object: its value is under one of these, or it has one value.
_VALUES = ("ground_truth", "final_answer", "answer", "value", "target", "solution", "text", "label")
_NOTHING = {"", "nan", "null", "n/a", "#n/a", "<na>"}
_WHOLE = re.compile(r"-?\d+(?:\.\d+)?")
_SAYS = re.compile(r"[^\W_]|[\u221e\u2205]")
_SYMBOLS = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
        "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b1": r"\pm ", "\u00d7": r"\times ",
        "\u00b7": r"\cdot ", "\u00f7": "/", "\u2264": r"\le ", "\u2265": r"\ge ",
        "\u222a": r"\cup ", "\u2205": r"\emptyset ", "\u00b0": r"^\circ ",
        "\u00b2": "^2", "\u00b3": "^3", "\u2019": "'",
        "\u00bd": " 1/2", "\u2153": " 1/3", "\u2154": " 2/3", "\u00bc": " 1/4", "\u00be": " 3/4",
    }
)  # fmt: skip
_ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|\w))")
_THIN = re.compile(r"(?<=\d)(?:\{,\}|\\[,;!: ]|,\\!)(?=\d)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|texttt|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
_SPACED = re.compile(r"[-+]?\d{1,3}(?:(?: \d{3})+|(?:,\d{3})+)(?:\.\d+)?")
_SCIENCE = re.compile(rf"({_NUMBER})[eE]([-+]?\d+)")
_MIXED = re.compile(
    r"([-+]?)(\d+)(?:\s+(\d+)/(\d+)|\s*\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d)))"
)
_UNITS = re.compile(
    rf"({_SPACED.pattern}|[-+]?\d+ \d+/\d+|{_NUMBER}(?:/\d+)?)"
    r"[\s-]+((?:[A-Za-z]{2,}|[A-Za-z]/)(?:[A-Za-z /.-]|\^\d)*)"
)
_CURRENCY = r"(?:[\u20ac\u00a3\u00a5\u20b9]|US\$|USD|EUR|GBP|Rs\.?)"
_BEFORE = re.compile(
    rf"^(?:(?:about|approximately|around|roughly|~|\u2248|\\approx|\\sim)\s*|{_CURRENCY}\s*(?=\d))",
    re.I,
)
_AFTER = re.compile(rf"(?<=\d)\s*{_CURRENCY}$")
_REMARK = re.compile(r"\s\((?=[A-Za-z]{2,}\s)|,?\s(?:because|since|as|which)\s|[.!?]\s")
_INLINE = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
_PROSE_MIXED = re.compile(r"(?<![\d./])(\d+) (\d+)/(\d+)(?![\d/])")
_LARGE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NO_UNIT = re.compile(
    r"(?:am|pm|a\.m|p\.m|bc|ad|ce|and|or|to|of|mod|choose|times|plus|minus|over|pi|sqrt|sin|cos|tan"
    r"|log|ln|exp|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)(?:[a-z]*)\b",
    re.I,
)
_CLOCK = re.compile(r"\d{1,2}:\d{2}(?::\d{2})?(?: ?[ap]m)?|\d{4}-\d{1,2}-\d{1,2}|\d+/\d+/\d{2,4}")
_MATH_NAMES = re.compile(
    r"\b(?:pi|sqrt|frac|a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|max|min|gcd|lcm|det|mod"
    r"|alpha|beta|gamma|theta|oo|inf|infinity)(?![a-z])",
    re.I,
)
_PRODUCT = re.compile(r"(?!.*(.).*\1)(?:[bcdhkmnpqrstwxyz]{2,3}|[abcd]{2}|abc)")
_FORMULA = re.compile(r"(?=.*\d)(?:[A-Z][a-z]?\d*){2,}")  # of chemistry
_CHOICE = re.compile(r"\(?([A-Z])\)?(?:[.):](?:\s.*)?|(?<=\))\s.*)?", re.S)


def gold_text(answer: Any) -> str | None:
    """The right answer of a row as text: a number, LaTeX or words; None where it says nothing.

    A string counts from its last "####" on (GSM8K) and in it what its last box holds. A list means
    all of its elements; an object means its only value, or the one named as the answer.
    """
    if isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, float | Decimal):
        if not math.isfinite(answer):
            return None
        whole = answer == int(answer)
        return str(int(answer)) if whole else format(Decimal(str(answer)), "f")
    if isinstance(answer, dict):
        named = [name for name in _VALUES if name in answer]
        if named or len(answer) == 1:
            return gold_text(answer[named[0]] if named else next(iter(answer.values())))
        return None
    if isinstance(answer, list | tuple):
        texts = [gold_text(part) for part in answer]
        return ", ".join(map(str, texts)) if texts and None not in texts else None
    text = "" if answer is None else str(answer).rsplit("####", 1)[-1].strip()
    if text[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        # [1, 2] is an interval, ["1", "2"] and [1] are lists.
        if isinstance(value, dict) or (
            isinstance(value, list) and (len(value) == 1 or any(isinstance(v, str) for v in value))
        ):
            return gold_text(value)
    stated = designated(text) if "oxed" in text or "<" in text else None
    text = (text if stated is None else stated).strip()
    return None if text.lower() in _NOTHING else text


def unusable_gold(answer: Any) -> str | None:
    """Why no completion can be compared with this right answer, None if one can.

    Of the text alone, in microseconds: rows are checked by the million.
    """
    if isinstance(answer, str) and _WHOLE.fullmatch(answer):  # most answers of most datasets
        return None
    text = gold_text(answer)
    if text is None:
        return "it holds no answer"
    if not _SAYS.search(text):
        return "it has neither digits nor letters"
    if "{" in text or "}" in text:
        braces = text.replace(r"\{", "").replace(r"\}", "")
        if braces.count("{") != braces.count("}"):
            return "its braces do not match"
        if text.count(r"\begin{") != text.count(r"\end{"):
            return r"its \begin and \end do not match"
    return None


def compare(gold: str | None, completion: str) -> bool | None:
    r"""Whether a completion's final answer equals `gold`, which is None or what `gold_text` gives.

    None where there is no right answer. The final answer is in the last <answer>, else in the last
    \boxed, else after the last "answer is", else what math-verify finds last (of words: the last
    line).
    """
    if gold is None:
        return None
    completion = without_thoughts(completion)
    stated, gold = _stated(completion), normal(gold)
    words = as_words(gold)
    if words is None:
        return _equal(gold, completion, stated)
    if stated is None:
        clocks = list(_CLOCK.finditer(completion)) if _CLOCK.fullmatch(words) else []
        stated = clocks[-1][0] if clocks else last_bold(completion.strip())
        formulas = _INLINE.findall(stated)
        stated = "".join(formulas[0]) if len(formulas) == 1 else stated
    return bool(words) and _words(normal(stated), choice=len(words) == 1) == words


def _equal(gold: str, completion: str, stated: str | None) -> bool:
    """Whether math-verify finds the statement, or what the completion ends with, equal to gold."""
    import math_verify  # slow to import, and not needed for words

    def parse(text: str) -> list[Any]:
        # Timeouts are off: math-verify's own use a signal handler, see math_worker.
        return math_verify.parse(text, parsing_timeout=None)  # type: ignore[arg-type]

    parsed = parse(f"\\boxed{{{gold}}}")
    if not parsed:
        raise ValueError(f"math-verify cannot parse the right answer {gold!r}")
    if stated is None:
        # What follows "answer" has been judged: math-verify would take what was only a thought.
        text = _prose(re.sub("answer", "result", completion, flags=re.I))
    else:
        text = normal(stated)
        prose = as_words(text) is not None
        if prose and not re.search(r"\d", text):
            return False
        text = _prose(stated) if prose else f"\\boxed{{{text}}}"
    found = parse(text)
    if all(isinstance(part, str) for part in found) and stated is not None:
        found += parse(_prose(stated))
    if math_verify.verify(parsed, found, timeout_seconds=None):
        return not _apart(parsed, found)
    if "%" not in gold + text:
        return False
    # As 20% equals 20 in math-verify, 0.5% equals 0.5.
    parsed = parse(f"\\boxed{{{gold}}}".replace("%", ""))
    found = parse(text.replace("%", ""))
    return math_verify.verify(parsed, found, timeout_seconds=None) and not _apart(parsed, found)


def _stated(text: str) -> str | None:
    """The answer that a completion states by tags, a box, JSON or a label, or is as a whole."""
    stated = designated(text)
    if stated is None:
        whole = bare(text)
        if text.rstrip().endswith(("}", "```")) and whole != text.strip():  # JSON with "answer"
            return whole
        if whole and (_known_number(_symbols(whole)) or not re.search(r"\s", whole)):
            return whole
        return _after_label(text)
    return designated(stated) or _after_label(stated) or stated


def _after_label(text: str) -> str | None:
    stated = labelled(text)
    if stated is None:
        return None
    stated = stated.strip()
    if stated.startswith(("$$", "\\[", "\\begin")):
        return stated.partition("\n\n")[0]
    return _REMARK.split(stated.partition("\n")[0], maxsplit=1)[0] or None


def _symbols(text: str) -> str:
    text = _ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2] or root[3]}}}", text)
    return text.translate(_SYMBOLS)


def _prose(text: str) -> str:
    """A text to search for its last number or formula."""
    text = _symbols(text).replace(r"\$", "")
    return _PROSE_MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", text)


def normal(text: str) -> str:
    """An answer in the form that math-verify reads: symbols as LaTeX, a number without its unit."""
    text = _THIN.sub("", bare(_symbols(bare(text))))
    text = _BEFORE.sub("", text.replace(r"\$", "").replace(r"\%", "%").strip())
    if text.count("$") % 2:
        text = text.replace("$", "", 1)
    text = _AFTER.sub("", text.strip())
    text = re.sub(
        r"(?<=[\d)}])\s*(?:\\text\{\s*(?:and|or)\s*\}|\s(?:and|or)\s)\s*(?=[-\d(\\])", ", ", text
    )
    number = _known_number(text)
    if number is None and as_words(text) is None:
        text = re.sub(r"\bsqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
        text = re.sub(
            r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty", text, flags=re.I
        )
        text = re.sub(r"(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln|theta)(?![a-zA-Z])", r"\\\1", text)
    return number or text


def _known_number(text: str) -> str | None:
    """A number as LaTeX, without its unit; None where the text is anything else."""
    plain = " ".join(_TEXT.sub(r" \1", text).split())
    scale = 0
    unit = _UNITS.fullmatch(plain)
    if unit and not _NO_UNIT.match(unit[2]):
        plain = unit[1]
        scale = _LARGE.get(unit[2].split()[0].lower(), 0)
    if _SPACED.fullmatch(plain):
        plain = re.sub("[ ,]", "", plain)
    mixed = _MIXED.fullmatch(plain)
    if mixed:
        whole, above, below = int(mixed[2]), mixed[3] or mixed[5] or mixed[6], None
        below = int(mixed[4] or mixed[7] or mixed[8])
        if int(above) < below:
            plain = f"{mixed[1]}\\frac{{{whole * below + int(above)}}}{{{below}}}"
    science = _SCIENCE.fullmatch(plain)
    if science:
        plain = f"{science[1]} \\times 10^{{{int(science[2])}}}"
    if scale:
        plain = f"{plain} \\times 10^{{{scale}}}"
    is_number = mixed or science or unit or re.fullmatch(rf"{_NUMBER}(?:/\d+)?", plain)
    return plain if is_number and not (unit and _NO_UNIT.match(unit[2])) else None


def as_words(text: str) -> str | None:
    """The words of an answer, to be compared as they stand; None where it is mathematics."""
    words = _words(text, choice=False)
    if _CLOCK.fullmatch(words) or _FORMULA.fullmatch(text):
        return words
    letter = _CHOICE.fullmatch(" ".join(_TEXT.sub(r"\1", text).split()))
    if letter and (text.strip() != letter[1] or letter[1] not in "EI"):
        return letter[1].lower()
    runs = re.findall(r"[^\W\d_]{2,}", _MATH_NAMES.sub("", words))
    if not runs or re.search(r"[\\^=+*<>|{}()\[\]$_]", words) or re.match(r"[-+.\d]+[a-z]", words):
        return None
    if _PRODUCT.fullmatch(words) and text.strip() == words:
        return None
    if re.search(r"[-/,.]", words) and max(map(len, runs)) < 3:
        return None
    return words


def _words(text: str, *, choice: bool) -> str:
    text = " ".join(_TEXT.sub(r" \1 ", text).replace("\\ ", " ").split())
    text = unicodedata.normalize("NFKC", bare(text)).strip(" .,;:!?")
    text = re.sub(r"(?<=[A-Za-z)])_\{?(\d+)\}?", r"\1", text)  # CO_2
    inside = re.fullmatch(r"\(\s*([^()]*?)\s*\)", text)
    text = inside[1] if inside else text
    letter = _CHOICE.fullmatch(text if len(text) > 1 else text.upper()) if choice else None
    text = letter[1] if letter else text
    return re.sub(r"\b([ap])\.m\b\.?", r"\1m", text.casefold())


def _apart(golds: list[Any], found: list[Any]) -> bool:
    """Whether math-verify took two numbers for one that are not: it rounds to 6 decimals."""
    gold, answer = golds[0], found[0] if found else ""
    pairs = [(gold, answer)]
    arguments = [getattr(value, "args", ()) for value in (gold, answer)]
    if type(gold).__name__ in ("Tuple", "FiniteSet", "Interval") and len(arguments[0]) == len(
        arguments[1]
    ):
        pairs = list(zip(*(sorted(args, key=str) for args in arguments), strict=True))
    return any(_numbers_apart(*pair) for pair in pairs)


def _numbers_apart(gold: Any, answer: Any) -> bool:
    import sympy

    sides = [getattr(value, "rhs", value) for value in (gold, answer)]
    if not all(isinstance(side, sympy.Expr) and side.is_number for side in sides):
        return False
    percent = any(side.has(sympy.UnevaluatedExpr) for side in sides)
    exact = not any(side.has(sympy.Float) for side in sides)
    first, second = (sympy.N(side.doit(), 40) for side in sides)
    if not (first.is_finite and second.is_finite):
        return False
    limit = sympy.Float("1e-12") if exact else sympy.Float("1e-3")
    return not any(
        abs(first * scale - second) <= limit * max(abs(first * scale), abs(second))
        for scale in ((1, 100, sympy.Rational(1, 100)) if percent else (1,))
    )
