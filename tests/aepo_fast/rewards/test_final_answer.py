"""Which answer a completion states: forms that count, and mentions that do not."""

from __future__ import annotations

import time

import pytest

from aepo_fast.rewards.final_answer import final_answer, last_number, without_thoughts

GRID = "1 2\n2 1"
SIX = "Move disk 1\nMove disk 2"


@pytest.mark.parametrize(
    ("text", "gold", "answer"),
    [
        # Numbers: a statement beats the last number, also a wrong one.
        ("<answer>5</answer>\nI needed 2 steps.", "5", "5"),
        ("<answer>4</answer> as 2 + 3 = 5", "5", "4"),
        (r"\boxed{4} is wrong, so \boxed{5}. It took 3 minutes.", "5", "5"),
        ("The answer is 5.\nI needed 2 steps.", "5", "5"),
        ("**Answer:** 5 (I needed 2 steps)", "5", "5"),
        ("Answer: 3 * 8 = 24, because 3 + 21 is 24", "24", "24"),
        ("### Answer\n\n**1,234**\n\nChecked in 2 ways.", "1234", "1234"),
        (r"\boxed{\frac{3}{4}}", "3/4", "3/4"),
        (r"\boxed{1{,}234}", "1234", "1234"),
        (r"it is $9.36 \times 10^{-18}$", "9.36e-18", "9.36e-18"),
        ("<answer>3, 5</answer>", "5", "3, 5"),
        ("Answer: 3 or 5", "5", "3 or 5"),
        ("I thought the answer is 5.\nBut 3 + 4 = 7.", "5", "7"),
        ("The answer is 5. Wait, 3 + 4 = 7", "5", "7"),
        ("<think>The answer is 5</think>\nIt is 7", "5", "7"),
        ("<think>\\boxed{5}", "5", None),
        ("so 5</think>7", "5", "7"),
        # Words.
        ("**Answer:** son", "son", "son"),
        ("**Answer**: son.", "son", "son"),
        ("Final answer: `son`", "son", "son"),
        ("The answer to the question is: **son**.", "son", "son"),
        ("Liam is the **son**.", "son", "son"),
        ("$\\boxed{\\text{son}}$", "son", "son"),
        ("```\nson\n```", "son", "son"),
        ('{"answer": "son"}', "son", "son"),
        ("<answer>son", "son", "son"),
        ("I guess the answer is son\nNo: daughter", "son", "No: daughter"),
        ("It could be son or daughter", "son", "It could be son or daughter"),
        ("Answer: son or daughter", "son", "son or daughter"),
        ("son\ndaughter", "son", "daughter"),
        # What the right answer has itself is left alone.
        ("The answer is The answer is near..", "The answer is near.", "The answer is near."),
        ("The answer is It is near.", "It is near.", "It is near."),
        ("Answer: '5'", "'5'", "'5'"),
        ("Answer: #B #A", "#B #A", "#B #A"),
        ("a = 2 b = 3", "a = 2 b = 3", "a = 2 b = 3"),
        (r'\boxed{{"s": "}}{"}}', '{"s": ""}', '{"s": "}}{"}'),
        # Several lines.
        (f"So:\n{GRID}", GRID, GRID),
        (f"The answer is as follows:\n\n```text\n{GRID}\n```\nDone.", GRID, GRID),
        (f"The answer is:\n{GRID}\nI needed 2 steps.", GRID, GRID),
        (f"```\n{GRID}\n```\nThat satisfies all.", GRID, GRID),
        (f"Final answer: **{GRID}**", GRID, GRID),
        (f"2 1\n{GRID}", GRID, f"2 1\n{GRID}"),  # three rows are no two
        (f"Answer:\n{GRID}\n2 1", GRID, f"{GRID}\n2 1"),
        ('[\n "a",\n "b"\n]', '["a", "b"]', '[\n "a",\n "b"\n]'),
        ('Answer: [\n "a"]\nDone.', None, '[\n "a"]'),
        ("F+1 K+1", None, "F+1 K+1"),
        ("", "son", None),
        ("", "5", None),
    ],
)
def test_the_stated_answer(text: str, gold: str | None, answer: str | None) -> None:
    assert final_answer(text, gold) == answer


def test_numbers_in_latex() -> None:
    assert last_number(r"is \dfrac{-3}{4}") == "-3/4"
    assert last_number(r"1\,000") == "1000"


def test_thoughts_are_left_out() -> None:
    assert without_thoughts("a<think>b</think>c") == "ac"
    assert without_thoughts("b</think>c<THINKING>d") == "c"
    assert without_thoughts("<answer>5</answer><reasoning>b</reasoning>") == "<answer>5</answer>"


@pytest.mark.parametrize(
    "piece",
    ["<think>", "</think>", "<answer>", r"\boxed{", "answer is ", "**", "```\n", "{[", "1,"],
)
def test_long_texts_take_milliseconds(piece: str) -> None:
    started = time.monotonic()
    for gold in ("5", "son", GRID, None):
        final_answer(piece * (60_000 // len(piece)), gold)
    assert time.monotonic() - started < 4
