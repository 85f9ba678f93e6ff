"""The final answer of a completion: which characters, and which tokens hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aepo_fast.rewards.answer_span import answer_span, answer_tokens
from tests.tiny_model import build_tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so <answer> 42 </answer> then", "42"),
        ("<answer>1</answer> or <ANSWER>2\n3</Answer>", "2\n3"),
        ("<answer>1</answer> or <answer>2", "1"),
        ("<answer>a<answer>b</answer></answer>", "b"),
        (r"<answer>1</answer> \boxed{2}", "1"),
        (r"it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed {2}, no more", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\{1, 2\}} {", r"\{1, 2\}"),
        (r"} \boxed{a \boxed{b} c}", "b"),
        (r"{ \boxed{7}", "7"),
        ("3 * 4\n = 12 \n\n", "= 12"),
        ("12", "12"),
        ("", None),
        (" \n ", None),
        ("said <answer> </answer> nothing", None),
        ("\u0130 <answer>\u2082</answer>", "\u2082"),  # lower-case \u0130 has two characters
    ],
)
def test_the_answer_of_a_text(text: str, answer: str | None) -> None:
    span = answer_span(text)
    assert (None if span is None else text[slice(*span)]) == answer


TEXTS = [
    "The product is 12.\n<answer> 12 </answer>",
    "<answer>7</answer>" + " and so on, the answer is the sum of numbers" * 20,
    "\u20ac\u20ac <answer>\u20ac7\u20ac</answer>\u20ac and \U0001f600, the answer is the sum",
    "so \\boxed{12} it is, two numbers",
    "What?\nThe answer is 12 ",
    "\u20ac 5, \u7b54\u6848\n \u20ac\U0001f600 \n",
    "<answer>\u20ac</answer>\u20ac",
    "7",
    " 7 ",
    "the sum",
]


def expected(text: str, pieces: Sequence[bytes]) -> list[int]:
    """The pieces that hold a byte of the answer; they make up the text's UTF-8."""
    assert b"".join(pieces).decode() == text
    span = answer_span(text)
    assert span is not None
    start, end = (len(text[:at].encode()) for at in span)
    found, at = [], 0
    for index, piece in enumerate(pieces):
        if piece and at < end and at + len(piece) > start:
            found.append(index)
        at += len(piece)
    return found


def byte_level() -> tuple[Callable[[str], list[int]], Callable[..., str], Callable[[int], bytes]]:
    tokenizer = build_tiny_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # GPT-2's letters: bytes that print stand for themselves, the others for U+0100 and on.
    printed = [b for b in range(256) if chr(b) in alphabet and b < 256]
    others = [b for b in range(256) if b not in printed]
    byte_of = {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}

    def piece(token: int) -> bytes:
        if token < 3:
            return b""
        return bytes(byte_of[letter] for letter in tokenizer.convert_ids_to_tokens(token))

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return lambda text: tokenizer(text)["input_ids"], decode, piece


def sentencepiece() -> tuple[
    Callable[[str], list[int]], Callable[..., str], Callable[[int], bytes]
]:
    """Llama 2's way: a space is part of the piece it precedes, rare characters are bytes."""
    words = "▁ ▁the ▁sum ▁answer ▁is ▁1 2 7 1 <answer> </answer> . , \n ▁<answer>".split(" ")
    letters = sorted(set("".join(TEXTS)) - set(" \u20ac\u7b54\u6848\U0001f600") - set(words))
    names = [f"<0x{b:02X}>" for b in range(256)] + words + letters
    names = list(dict.fromkeys(names))
    scored = [(name, -1.0 if len(name) > 1 else -2.0) for name in names]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )

    def piece(token: int) -> bytes:
        name = names[token]
        if token < 256:
            return bytes([token])
        return name.replace("▁", " ").encode()

    return lambda text: tokenizer.encode(text).ids, tokenizer.decode, piece


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("end_tokens", [0, 1, 2])
def test_tokens_of_a_byte_level_tokenizer(text: str, end_tokens: int) -> None:
    encode, decode, piece = byte_level()
    ids = encode(text) + [2] * end_tokens
    found = answer_tokens(text, ids, decode)
    assert list(found) == expected(text, [piece(token) for token in ids])


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_a_sentencepiece_tokenizer(text: str) -> None:
    encode, decode, piece = sentencepiece()
    ids = encode(text)
    text = decode(ids)
    pieces = [piece(token) for token in ids]
    # Decoding drops a space before the first word, which encoding adds.
    pieces[0] = pieces[0].removeprefix(b" ")
    assert list(answer_tokens(text, ids, decode)) == expected(text, pieces)


def test_texts_without_an_answer_have_no_answer_tokens() -> None:
    _, decode, _ = byte_level()
    assert not answer_tokens("", [2], decode)
    assert not answer_tokens("", [], decode)


def test_bytes_that_are_no_text_still_give_positions() -> None:
    encode, decode, _ = byte_level()
    broken = encode("\u20ac")[:1] + encode("12\n") + encode("\u20ac\u20ac")[1:]
    found = answer_tokens(decode(broken), broken, decode)
    assert 0 <= found.start < found.stop == len(broken)


def test_few_tokens_are_decoded() -> None:
    encode, decode, _ = byte_level()
    decoded = 0

    def counted(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    text = "What is the sum of two numbers? " * 60 + "\nThe answer is 12."
    ids = [*encode(text), 2]
    assert list(answer_tokens(text, ids, counted))[-1] == len(ids) - 2
    assert decoded < 300 < len(ids)
    text, decoded = "<answer>12</answer>" + text, 0
    ids = [*encode(text), 2]
    assert "12" in decode([ids[i] for i in answer_tokens(text, ids, counted)])
    assert decoded < 300
