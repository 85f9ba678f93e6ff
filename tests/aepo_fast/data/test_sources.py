"""Files of rows: their names, encodings and folders, and large ones."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from aepo_fast.config.data import SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.data.sources import read_file
from tests.aepo_fast.data.test_data import load, write


def rows_of(*names: str) -> list[dict]:
    return [{"prompt": name, "answer": "1"} for name in names]


def prompts_of(name, **settings) -> list[str]:
    found = load(SourceConfig(name=str(name)), holdout_fraction=0, **settings)
    return [prompt.columns["prompt"] for prompt in found.train]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "A.JSONL", "a.Json", "a.jsonl.gz", "A.JSON.GZ"]
)
def test_a_mark_at_the_start_and_capitals_in_the_name(tmp_path, name):
    rows = rows_of("a", "b")
    lines = ".jsonl" in name.lower()
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    data = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert prompts_of(tmp_path / name) == ["a", "b"]


def test_one_object_a_line_in_a_json_file(tmp_path):
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows_of("a", "b"))))
    assert prompts_of(tmp_path / "a.json") == ["a", "b"]


def test_parquet_in_capitals(tmp_path):
    write(tmp_path / "a.parquet", rows_of("a"))
    (tmp_path / "a.parquet").rename(tmp_path / "A.PARQUET")
    assert prompts_of(tmp_path / "A.PARQUET") == ["a"]


def test_a_folder_and_a_pattern_are_their_files_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00001-of-00002.parquet", rows_of("c", "d"))
    write(tmp_path / "data" / "train-00000-of-00002.parquet", rows_of("a", "b"))
    write(tmp_path / "extra.jsonl", rows_of("e"))
    (tmp_path / "README.md").write_text("# about")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.json").write_text("{}")
    assert prompts_of(tmp_path) == ["a", "b", "c", "d", "e"]
    assert prompts_of(tmp_path / "data" / "train-*1-*") == ["c", "d"]
    write(tmp_path / "data" / "test-00000-of-00001.parquet", rows_of("x"))
    with pytest.raises(ConfigError, match=r"several splits: test, train.*data/train\*"):
        prompts_of(tmp_path)
    assert prompts_of(tmp_path / "data" / "train*") == ["a", "b", "c", "d"]


def test_a_folder_without_rows(tmp_path):
    (tmp_path / "README.md").write_text("# about")
    with pytest.raises(ConfigError, match="the folder holds no file of rows"):
        prompts_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b"1\n", "one JSON object per row"),
        ("a.json", b"1", "one JSON object per row"),
        ("a.parquet", b"", "is no parquet"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        prompts_of(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("chat", [False, True])
def test_repeats_in_parquet_are_skipped_and_counted(tmp_path, chat, monkeypatch):
    monkeypatch.setattr("aepo_fast.data.sources._BATCH_ROWS", 50)

    def prompt(number: int, role: str = "user"):
        return [{"content": f"Q{number}", "role": role}] if chat else f"Q{number}{role[4:]}"

    rows = [{"prompt": prompt(i * i % 7), "answer": str(i)} for i in range(100)]
    rows.append({"prompt": prompt(1, "user2"), "answer": "1"})
    source = write(tmp_path / "a.parquet", rows)
    fast, plain = (
        load(source, holdout_fraction=0, columns=("answer",), unusable_rows=kind)
        for kind in ("stop", "drop")
    )
    assert fast.train == plain.train and len(fast.train) == 5
    assert fast.num_duplicates == plain.num_duplicates == 96
    read = list(read_file(tmp_path / "a.parquet", unique="prompt"))
    assert len(read) == 101 and sum(row is not None for row in read) == 4 + 4 + 1


def test_a_long_chat_in_parquet_is_read_whole(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    write(tmp_path / "a.parquet", [{"prompt": chat}, {"prompt": chat[1:]}, {"prompt": chat}])
    assert prompts_of(tmp_path / "a.parquet") == [chat, chat[1:]]


def test_strings_of_other_arrow_types(tmp_path):
    table = pyarrow.table({"prompt": pyarrow.array(["a", "b", "a"], pyarrow.large_string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert prompts_of(tmp_path / "a.parquet") == ["a", "b"]
