"""Datasets as they are published, and rows that cannot be used."""

import datetime
import json
from typing import Any

import pytest

from aepo_fast.config.data import SourceConfig
from aepo_fast.config.errors import ConfigError
from tests.aepo_fast.data.test_data import load, write

CHAT = [{"role": "user", "content": "What is 3 + 4?"}]
BOXED = "First \\boxed{6}, no: it is $\\boxed{\\frac{1}{2\\}}}$."
# Columns of a dataset's rows, and where its question and answer are, and what the answer is.
PUBLISHED: dict[str, tuple[dict[str, Any], str, str, Any]] = {
    "GSM8K": ({"question": "Q", "answer": "3 + 4\n#### 7"}, "question", "answer", "3 + 4\n#### 7"),
    "MATH": ({"problem": "Q", "solution": BOXED}, "problem", "solution", "\\frac{1}{2\\}}"),
    "MATH-500": ({"problem": "Q", "solution": BOXED, "answer": "7"}, "problem", "answer", "7"),
    "Open-R1": (
        {
            "problem": "Q",
            "solution": BOXED,
            "answer": "7",
            "question_type": "B",
            "messages": [*CHAT, {"role": "assistant", "content": "7"}],
        },
        "problem",
        "answer",
        "7",
    ),
    "DAPO": (
        {"prompt": CHAT, "reward_model": {"ground_truth": "7", "style": "rule"}},
        "prompt",
        "reward_model.ground_truth",
        "7",
    ),
    "DAPO, processed": (
        {"prompt": "Q", "solution": "7", "reward_model": {"ground_truth": "7"}},
        "prompt",
        "reward_model.ground_truth",
        "7",
    ),
    "a plain solution": ({"prompt": "Q", "solution": "34"}, "prompt", "solution", "34"),
    "AIME": ({"Problem": "Q", "Solution": "By 3 + 4.", "Answer": 7}, "Problem", "Answer", 7),
    "OpenMath": ({"problem": "Q", "expected_answer": "7"}, "problem", "expected_answer", "7"),
    "old box": ({"problem": "Q", "solution": "So $\\boxed 7$."}, "problem", "solution", "7"),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_published_datasets_work_by_name(tmp_path, name, suffix):
    row, prompt, answer, value = PUBLISHED[name]
    found = load(write(tmp_path / f"a.{suffix}", [row]), holdout_fraction=0, columns=("answer",))
    assert found.train[0].columns == {**row, "prompt": row[prompt], "answer": value}
    said = " ".join(found.notes)
    assert (f"questions from its column {prompt!r}" in said) == (prompt != "prompt")
    assert (f"answers from its column {answer!r}" in said) == (answer != "answer")
    assert said in found.preview()


def test_named_columns_are_taken_as_named(tmp_path):
    rows = [{"prompt": "Q", "answer": "1", "extra": {"all": ["2", "3"]}, "a.b": "4"}]
    source = write(tmp_path / "a.jsonl", rows)

    def answer(source: SourceConfig, **settings: Any) -> Any:
        found = load(source, holdout_fraction=0, columns=("answer",), **settings)
        assert found.notes == ()
        return found.train[0].columns["answer"]

    assert answer(source, answer_column="extra.all.1") == "3"
    assert answer(source, answer_column="a.b") == "4"
    own = SourceConfig(name=source.name, answer_column="extra.all.0")
    assert answer(own, answer_column="a.b") == "2"
    for name in ("extra.none", "extra.all.7", "answers"):
        with pytest.raises(ConfigError, match=f"has no column '{name}'") as caught:
            load(source, columns=("answer",), answer_column=name)
        assert caught.value.key == "data.answer_column"


def test_columns_that_disagree_are_refused(tmp_path):
    rows = [
        {"prompt": f"Q{i}", "ground_truth": "7", "final_answer": answer}
        for i, answer in enumerate(["7", " 7", "8"])
    ]
    source = write(tmp_path / "a.jsonl", rows[:2])
    found = load(source, columns=("answer",), holdout_fraction=0)
    assert [prompt.columns["answer"] for prompt in found.train] == ["7", "7"]
    with pytest.raises(
        ConfigError, match="'ground_truth' and 'final_answer' disagree, '7' and '8'"
    ):
        load(write(tmp_path / "a.jsonl", rows), columns=("answer",))
    with pytest.raises(ConfigError, match="'problem' and 'question' disagree"):
        load(write(tmp_path / "b.jsonl", [{"problem": "a", "question": "b"}]))


UNUSABLE = {
    "nan": ({"prompt": "a", "answer": float("nan")}, "holds nan in column 'answer'"),
    "empty": ({"prompt": "a", "answer": " "}, "holds an empty answer in column 'answer'"),
    "empty list": ({"prompt": "a", "answer": []}, "holds an empty answer in column 'answer'"),
    "null": ({"prompt": "a", "answer": None}, "holds nothing in column 'answer'"),
    "no answer": ({"prompt": "a"}, "has no column 'answer'"),
    "no prompt": ({"answer": "1"}, "has no column 'prompt'"),
    "empty prompt": ({"prompt": "\n", "answer": "1"}, "has an empty prompt"),
    "no chat": ({"prompt": [{"role": "user"}], "answer": "1"}, "neither a string nor messages"),
    "reply": (
        {"prompt": [*CHAT, {"role": "assistant", "content": "7"}], "answer": "7"},
        "ends with the assistant's reply",
    ),
    "image": ({"prompt": "a", "answer": "1", "images": [{"path": "a"}]}, "in column 'images'"),
    "image mark": ({"prompt": "<image>Find x", "answer": "1"}, "has <image> in its prompt"),
    "half": ({"prompt": "a \ud83d b", "answer": "1"}, "has half a character.* in its prompt"),
    "half answer": ({"prompt": "a", "answer": "\udc00"}, "half a character.* column 'answer'"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_rows_are_named_or_dropped_and_counted(tmp_path, name):
    row, reason = UNUSABLE[name]
    rows = [{"prompt": f"Q{index}", "answer": index} for index in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*rows, row, row]))
    source, settings = SourceConfig(name=str(path)), {"columns": ("answer",), "holdout_fraction": 0}
    with pytest.raises(ConfigError, match=f"row 3 \\(from 0\\) of .*{reason}") as caught:
        load(source, **settings)
    assert 'set data.unusable_rows = "drop"' in str(caught.value)
    found = load(source, unusable_rows="drop", **settings)
    assert [prompt.columns for prompt in found.train] == rows
    assert "2 of 5 rows dropped: row 3" in found.preview()


def test_a_source_without_a_usable_row_is_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": ""}])
    with pytest.raises(ConfigError, match="no row can be used: row 0"):
        load(source, columns=("answer",), unusable_rows="drop")


def test_a_solution_without_a_box_is_named(tmp_path):
    rows = [{"problem": f"Q{i}", "solution": f"so \\boxed{{{i}}}"} for i in range(2)]
    source = write(tmp_path / "a.jsonl", [*rows, {"problem": "Q2", "solution": "See above."}])
    with pytest.raises(ConfigError, match=r"row 2 .* has no \\boxed answer in column 'solution'"):
        load(source, columns=("answer",))


def test_a_reward_that_reads_no_answer_needs_none(tmp_path):
    rows = [{"prompt": "a", "solution": "See above.", "answer": ""}]
    found = load(write(tmp_path / "a.jsonl", rows), holdout_fraction=0, columns=("solution",))
    assert found.train[0].columns == rows[0]


def test_dates_stay_dates(tmp_path):
    when = datetime.datetime(2024, 2, 29)
    chat = [{"role": "user", "content": "When?", "at": when}]
    found = load(write(tmp_path / "a.parquet", [{"prompt": chat, "on": when}]), holdout_fraction=0)
    assert found.train[0].columns["on"] == when and found.num_duplicates == 0
