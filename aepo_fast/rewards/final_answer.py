"""Finds the final answer that a completion states: by tags, a box, a label or as its end.

Pure functions on text, without other modules of this package. An extractor decides once: it never
tries several candidates on a verifier, which would pay for guesses.
"""

from __future__ import annotations

import json
import re

# A minus belongs to the number only where no operand stands before it: 7-4 ends in 4.
NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+|/\d+)?"
)
_TAG = re.compile(r"<(/?)answer>", re.I)
_BRACE = re.compile(r"(\\(?:boxed|fbox)\s*)?\{|\}|\\.", re.S)  # \{ and \} do not open or close
_THOUGHT = re.compile(r"</?(?:think|thinking|thoughts?|reasoning|scratchpad)>|\[/?THINK\]", re.I)
_LABEL = re.compile(
    r"\banswers?\b[*_]*(?:[ \t]+(?:to|for|of)\b[^\n:=]{0,60}?)?"
    r"(?:[ \t]*[:=\uff1a]|[ \t]+(?:is|are|was|would be|should be)\b(?:[ \t]*:)?)[*_]*"
    r"|^[#*_> \t]*(?:the |my |final |correct )*answer[*_ \t]*$",
    re.I | re.M,
)
# What makes of a label a thought: "I guessed the answer is 5".
_DOUBT = re.compile(
    r"\b(?:thought|guess\w*|maybe|perhaps|might|suppose\w*|assum\w+|if|whether|wrong|not sure)\b",
    re.I,
)
_REVISED = re.compile(r"\b(?:wait|actually|hmm+|correction)\b", re.I)
_FENCE = re.compile(r"^[ \t]*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```", re.S | re.M)
_LAST_BOLD = re.compile(r"^[^*]*\*\*(?!\s)([^*\n]+?)(?<![\s:])\*\*[.!]?$")
_AROUND = (  # what may stand around an answer and is no part of it
    re.compile(r"```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```", re.S),
    re.compile(r"```([^`\n]+)```"),
    re.compile(r"\*\*(?!\*)(.+?)\*\*", re.S),
    re.compile(r"__(?! )([^_].*?)__", re.S),
    re.compile(r"\*(?![*\s])([^*]+)\*"),
    re.compile(r"`([^`]+)`"),
    re.compile(r"\$\$(.+?)\$\$", re.S),
    re.compile(r"\$([^$]+)\$"),
    re.compile(r"\\\((.+?)\\\)", re.S),
    re.compile(r"\\\[(.+?)\\\]", re.S),
    re.compile(r"\\(?:text|textbf|textit|texttt|mathrm|mathbf|boldsymbol)\{([^{}]*)\}"),
    re.compile(r"\"([^\"]+)\""),
    re.compile(r"\u201c([^\u201d]+)\u201d"),
    re.compile(r"'([^']+)'"),
    re.compile(r"#{1,6}[ \t]+(.*)", re.S),
    re.compile(r">[ \t]+(.*)", re.S),
)
_LATEX = (  # in a number, as last_number reads it
    (re.compile(r"\\[dt]?frac\{([-\u2212]?\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!)(?=\d)"), ""),
    (
        re.compile(r"(\d)\s*(?:\u00d7|\\times|\\cdot|\*)\s*10\s*(?:\^|\*\*)\s*\{?([-+]?\d+)\}?"),
        r"\1e\2",
    ),
)


def without_thoughts(text: str) -> str:
    """The text without <think>...</think> and its like.

    One that is never closed runs to the end, one that is never opened began in the prompt.
    """
    kept: list[str] = []
    start, thinking = 0, False
    for tag in _THOUGHT.finditer(text):
        if tag[0][1] == "/":
            if not thinking:
                kept.clear()
            start, thinking = tag.end(), False
        elif not thinking:
            kept.append(text[start : tag.start()])
            thinking = True
    return "".join(kept) if thinking else "".join(kept) + text[start:]


def tagged(text: str) -> tuple[int, int] | None:
    """Characters [start, end) inside the last <answer>...</answer>, None without one."""
    opened, found = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            found, opened = (opened, tag.start()), None
    return found


def boxed(text: str) -> tuple[int, int] | None:
    r"""Characters [start, end) inside the last complete \boxed{...}, None without one."""
    opened: list[tuple[bool, int]] = []
    found = None
    for brace in _BRACE.finditer(text):
        if brace[0].endswith("{") and brace[0] != r"\{":
            opened.append((brace[1] is not None, brace.end()))
        elif brace[0] == "}" and opened:
            is_box, start = opened.pop()
            if is_box and (found is None or start > found[0]):
                found = start, brace.start()
    return found


def designated(text: str) -> str | None:
    r"""What stands in the last <answer> (perhaps never closed), else in the last \boxed{}."""
    span = tagged(text)
    if span is not None:
        return text[slice(*span)]
    tags = list(_TAG.finditer(text))
    if tags and not tags[-1][1]:  # sampling may stop at </answer>
        return text[tags[-1].end() :]
    start = text.rfind(r"\boxed")
    json_at = re.compile(r"\\boxed\s*\{\s*(?=[\[{])").match(text, max(start, 0))
    if json_at:  # its strings may hold braces
        end = _json_end(text, json_at.end())
        if end is not None and text[end:].lstrip().startswith("}"):
            return text[json_at.end() : end]
    span = boxed(text)
    return None if span is None else text[slice(*span)]


def labelled(text: str) -> str | None:
    """What follows the last "answer is" or "Answer:" that is no mere thought, up to the end.

    None without one, and where a later sentence takes it back ("Wait, ...").
    """
    found, last_line = None, -1
    for label in _LABEL.finditer(text):
        line = text.rfind("\n", 0, label.start()) + 1
        # Of a line the first label counts: the answer may hold the word itself.
        if line != last_line and not _DOUBT.search(text[line : label.start()]):
            found = label
        last_line = line
    if found is None:
        return None
    rest = text[found.end() :]
    head, _, tail = rest.partition("\n")
    if head.rstrip().endswith(":"):  # "as follows:"
        rest = tail
    sentence = re.search(r"[.!?]\s|\n", rest.lstrip())
    revised = sentence and _REVISED.search(rest.lstrip(), sentence.end())
    return None if revised else rest


def _json_end(text: str, start: int) -> int | None:
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators, or None."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    found = NUMBER.findall(text)
    return found[-1].replace(",", "").replace("\u2212", "-") if found else None


def _one_number(text: str) -> str | None:
    """The number that a statement ends in: after its last = or "is", before any remark.

    Where several are left (3 or 5), none is the answer: the statement is returned as it stands.
    """
    text = re.split(r"(?<!^)\s\(|[.;!?](?:\s|$)|,\s(?!\d)|\s(?:because|since|as)\s", text.strip())[
        0
    ]
    text = re.split(r"=|\bis\b", text)[-1].strip()
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return last_number(text) if len(NUMBER.findall(text)) == 1 else text or None


def final_answer(text: str, gold: str | None) -> str | None:
    r"""The answer a completion states, in the form of the right answer `gold`; None without one.

    Thoughts in <think> are no answer. What stands inside the last <answer> counts, else what is in
    the last \boxed, else what follows the last "answer is" or "Answer:", else the end of the text.
    Where `gold` is a number: the one number of that statement, or the last of a text that states
    none. Otherwise as many lines as `gold` has, a JSON value, or the content of a code fence.
    Left out are emphasis, quotes and fences around it, and full stops that `gold` has not.
    """
    text = without_thoughts(text).strip("\n").rstrip()
    stated = designated(text)
    if gold is not None and NUMBER.fullmatch(gold.strip()):
        if stated is None:
            stated = labelled(text)
            stated = stated and stated.strip().partition("\n")[0]
        return last_number(text) if not stated else _one_number(stated)
    if stated is None:
        stated = labelled(text)
        stated = _end(text, gold) if stated is None else _start(stated, gold)
    return _plain(stated, gold or "") or None


def _start(text: str, gold: str | None) -> str:
    """The answer that a text begins with."""
    text = text.lstrip("\n") if text.strip(" \t").startswith("\n") else text.lstrip(" \t")
    fence = _FENCE.match(text)
    if fence:
        return fence[0]
    start = len(text) - len(text.lstrip("*_`$ \n"))
    if text[start : start + 1] in ("[", "{") and _is_json(gold):
        end = _json_end(text, start)
        if end is not None:
            return text[start:end]
    lines, num = text.split("\n"), _num_lines(gold)
    while 1 < num < len(lines) and _alike(lines[num], gold):
        num += 1
    return "\n".join(lines[:num])


def _end(text: str, gold: str | None) -> str:
    """The answer that a text ends with."""
    num = _num_lines(gold)
    fences = list(_FENCE.finditer(text))
    after = text[fences[-1].end() :].split("\n") if fences else []
    if fences and sum(map(bool, map(str.strip, after))) < num and (num > 1 or not any(after)):
        return fences[-1][0]
    if text.endswith(("]", "}")) and _is_json(gold):
        for line in re.finditer(r"^[ \t]*(?=[\[{])", text, re.M):
            if _json_end(text, line.end()) == len(text):
                return text[line.end() :]
    lines = text.split("\n")
    first = max(len(lines) - num, 0)
    while num > 1 and first > 0 and _alike(lines[first - 1], gold):
        first -= 1
    end = "\n".join(lines[first:])
    return end if num > 1 or (gold and "**" in gold) else last_bold(end)


def last_bold(text: str) -> str:
    """What a text's last line ends in if that is the only bold there, else that line."""
    bold = _LAST_BOLD.match(text.rpartition("\n")[2])
    return bold[1] if bold else text.rpartition("\n")[2]


def _is_json(gold: str | None) -> bool:
    return gold is None or gold.lstrip()[:1] in ("[", "{")


def _num_lines(gold: str | None) -> int:
    return 1 if gold is None else gold.strip("\n").count("\n") + 1


def _alike(line: str, gold: str | None) -> bool:
    """Whether a line could belong to an answer of several lines: it has only their characters."""
    letters = {"0" if letter.isdigit() else letter for letter in gold or ""}
    return bool(line.strip()) and all(
        ("0" if letter.isdigit() else letter) in letters for letter in line.strip()
    )


def bare(text: str, form: str = "") -> str:
    """The text without emphasis, quotes, fences and full stops around it that `form` has not.

    Of a JSON object with "answer", that value.
    """
    form = form.strip()
    num_stops = len(form) - len(form.rstrip("."))
    before = None
    while text != before:
        before = text
        text = text.strip("\n").rstrip() if "\n" in text else text.strip()
        while len(text) - len(text.rstrip(".")) > num_stops:
            text = text[:-1].rstrip()
        for around in _AROUND:
            inside = around.fullmatch(text.strip())
            if inside and not around.fullmatch(form):
                text = inside[1]
        if text.count("**") == 1 and "**" not in form:  # the other one is before the label
            text = text.removesuffix("**").removeprefix("**")
    if form[:1] != "{" and text[:1] == "{" and text[-1:] == "}":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(value, dict) and isinstance(value.get("answer"), str | int | float):
            return str(value["answer"])
    return text


def _plain(text: str, form: str) -> str:
    """The answer as verifiers read it: no LaTeX braces, no left side of an equation."""
    text = bare(text, form)
    if r"\{" in text and r"\{" not in form:
        text = text.replace(r"\{", "{").replace(r"\}", "}")
    if " = " in text and "=" not in form and "\n" not in text:
        text = text.rpartition(" = ")[2]
    return text
