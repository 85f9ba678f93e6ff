import pytest
from hypothesis import given
from hypothesis import strategies as st

from aepo_fast.config.data import SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.data.tasks import (
    load_task,
    score_task,
    task_key,
    task_verifier,
)
from aepo_fast.rewards.final_answer import final_answer, last_number


def task(name: str, size: int = 16, **params) -> SourceConfig:
    return SourceConfig(kind="reasoning_gym", name=name, size=size, params=params)


TASKS = [
    task("products", min_digits=1, max_digits=1),
    task("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1),
    task("basic_arithmetic", min_terms=2, max_terms=2, min_digits=1, max_digits=1),
    task("gcd", max_value=20),
    task("count_bits", max_n=15),
    task("spell_backward"),
    task("fraction_simplification"),
]


@pytest.mark.parametrize("source", TASKS, ids=lambda source: source.name)
def test_right_answers_score_one_and_wrong_ones_zero(source):
    verifier = task_verifier(source)
    rows = load_task(source, seed=3)
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        answer = row["answer"]
        assert row["prompt"] == row["question"]
        assert score_task(verifier, row, f"Let me see, 1 2 3.\nThe answer is {answer}") == 1.0
        if other["answer"] != answer:
            assert score_task(verifier, row, f"The answer is {other['answer']}") == 0.0
        assert score_task(verifier, row, "") == 0.0


def test_prompts_say_how_to_write_what_the_question_leaves_open():
    for name, form in (("survo", "one a line"), ("list_functions", "[1, 2, 3]")):
        row = load_task(task(name, size=1), seed=3)[0]
        assert row["prompt"].startswith(row["question"].rstrip())
        assert form in row["prompt"].removeprefix(row["question"].rstrip())


def test_digits_are_no_part_of_a_number_with_letters():
    source = task("base_conversion")
    verifier = task_verifier(source)
    row = {"question": "", "answer": "45", "metadata": {"target_base": 14}}
    for text in ("so 45", "<answer>45</answer>", "The answer is 45.", "= 45 (in base 14)"):
        assert score_task(verifier, row, text) == float("in base" not in text), text
    for text in ("so 45a", "<answer>45a</answer>", "The answer is a45.", "45 then 46"):
        assert score_task(verifier, row, text) == 0.0, text


def test_true_and_false_are_told_apart():
    source = task("game_of_life_halting", size=8)
    verifier = task_verifier(source)
    for row in load_task(source, seed=0):
        wrong = str(row["answer"] != "True")
        assert score_task(verifier, row, f"<answer>{wrong}</answer>") == 0.0
        assert score_task(verifier, row, f"It is {row['answer']}.\n{row['answer']}.") == 1.0


def test_the_last_number_counts_not_one_on_the_way():
    source = task("products", min_digits=1, max_digits=1)
    row = {"prompt": "", "question": "3 * 8", "answer": "24", "metadata": {}}
    verifier = task_verifier(source)
    assert score_task(verifier, row, "3 * 8 = 24.") == 1.0
    assert score_task(verifier, row, "3 * 8 = 24. And 3 * 9 = 27.") == 0.0
    assert score_task(verifier, row, "it is 24") == 1.0
    assert score_task(verifier, row, "it is 124") == 0.0


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "so {}.", "= {}!", "**{}**", "${:,}$"]))
def test_last_number_finds_integers(number, form):
    assert last_number("first 17 and then " + form.format(number)) == str(number)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7-4", "4"),
        ("7 - 4 = -3", "-3"),
        ("\u22125", "-5"),
        ("1,2", "2"),
        ("1,234,567.5 metres", "1234567.5"),
        ("about 1.5e-3", "1.5e-3"),
        ("3/4", "3/4"),
        ("(-8)", "-8"),
        ("version2", "2"),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I think the answer is yes", "yes"),
        ("Answer: no\nanswer: yes", "yes"),
        ("<answer>\nyes\n</answer> bye", "yes"),
        ("Hm.\nyes\n", "yes"),
        ("", None),
    ],
)
def test_final_answer_in_words(text, answer):
    assert final_answer(text, "yes") == answer


def test_key_is_the_same_for_swapped_operands_and_another_for_other_tasks():
    products = [{"question": q, "metadata": {"expression": q}} for q in ("3 * 8", "8 * 3", "3 * 9")]
    keys = [task_key("products", row) for row in products]
    assert keys[0] == keys[1] != keys[2]
    assert task_key("chain_sum", products[0]) != keys[0]
    gcds = [{"question": "", "metadata": {"numbers": n}} for n in ([14, 2], [2, 14])]
    assert task_key("gcd", gcds[0]) == task_key("gcd", gcds[1])
    assert task_key("spell_backward", {"question": "abc", "metadata": {}}).endswith("abc")


def test_questions_depend_on_the_seed_alone():
    source = task("products")
    assert load_task(source, 1) == load_task(source, 1) != load_task(source, 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (task("product"), "no task of this name. Did you mean products"),
        (task("products", max_digit=1), "no such parameter. Did you mean max_digits"),
        (task("products", seed=1), "Set size in .* seed in"),
        (task("products", min_terms=5, max_terms=2), "refuses its parameters: max_terms must be"),
        (task("products", min_terms="two"), "refuses its parameters"),
    ],
)
def test_bad_tasks(source, message):
    with pytest.raises(ConfigError, match=message):
        load_task(source, 0)


NO_ANSWER = ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"]
RAISING = ["prime_factorization", "graph_color", "rush_hour", "propositional_logic", "rubiks_cube"]


@pytest.mark.parametrize("name", sorted({*NO_ANSWER, *RAISING}))
def test_a_verifier_that_raises_on_words_gives_zero(name):
    source = task(name, size=1)
    (row,) = load_task(source, 0)
    verifier = task_verifier(source)
    for text in ("", "I do not know", "None", "{}", "9" * 5000, "\ud800", "(" * 500):
        assert score_task(verifier, row, f"<answer>{text}</answer>") == 0.0, text


def test_memory_that_runs_out_is_no_wrong_answer():
    class Verifier:
        def score_answer(self, answer, entry):
            raise MemoryError

    with pytest.raises(MemoryError):
        score_task(Verifier(), {"answer": "1"}, "1")
