import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.data.prompts import PromptSet, load_prompts
from aepo_fast.data.sampler import PromptSampler
from aepo_fast.rewards.math_answers import unusable_gold
from aepo_fast.samples import Prompt
from tests.tiny_model import build_tiny_tokenizer

TOKENIZER = build_tiny_tokenizer()
PRODUCTS = SourceConfig(
    kind="reasoning_gym", name="products", params={"min_digits": 1, "max_digits": 1}
)


def load(*sources: SourceConfig, limit: int = 400, columns=(), **settings) -> PromptSet:
    cfg = DataConfig(sources=sources, **settings)
    return load_prompts(cfg, TOKENIZER, max_prompt_tokens=limit, required_columns=columns)


def write(path: Path, rows: list[Any]) -> SourceConfig:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    return SourceConfig(name=str(path))


def questions(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {index}", "answer": index} for index in range(count)]


def test_no_operand_pair_is_on_both_sides():
    found = load(PRODUCTS, holdout_fraction=0.25)

    def pairs(prompts: list[Prompt]) -> set[tuple[str, ...]]:
        found = (re.findall(r"\d+", prompt.columns["question"]) for prompt in prompts)
        return {tuple(sorted(operands)) for operands in found}

    train, heldout = pairs(found.train), pairs(found.heldout)
    assert not train & heldout
    assert len(heldout) == round(0.25 * (len(train) + len(heldout)))
    assert len(train | heldout) == 55  # 512 draws of 100 questions see every pair
    everyone = [prompt.columns["question"] for prompt in found.train + found.heldout]
    assert len(set(everyone)) == len(everyone) == 512 - found.num_duplicates


def test_loading_twice_gives_the_same_and_another_seed_another_split():
    first, again, other = load(PRODUCTS), load(PRODUCTS), load(PRODUCTS, seed=1)
    assert first == again
    assert {p.key for p in first.heldout} != {p.key for p in other.heldout}


def test_a_key_held_out_in_one_source_is_held_out_in_all(tmp_path):
    small = write(tmp_path / "small.jsonl", questions(10))
    large = write(tmp_path / "large.jsonl", [{"prompt": f"question  {i}"} for i in range(100)])
    found = load(small, large)
    assert len(found.train) + len(found.heldout) == 110  # two spaces: not the same question
    assert not {p.key for p in found.train} & {p.key for p in found.heldout}
    assert {p.source for p in found.heldout} == {0, 1}


def test_the_first_held_out_prompts_are_of_every_source(tmp_path):
    names = {"a": 40, "b": 40, "c": 10}
    rows = {
        name: [{"prompt": f"{name} {index}"} for index in range(count)]
        for name, count in names.items()
    }
    sources = [write(tmp_path / f"{name}.jsonl", rows[name]) for name in names]
    heldout = load(*sources).heldout
    assert [p.source for p in heldout] == [0, 1, 2] * 2 + [0, 1] * 6
    for index, name in enumerate(names):  # each in its own order, as if it were alone
        own = [p.columns["prompt"] for p in heldout if p.source == index]
        assert own == [p.columns["prompt"] for p in load(sources[index]).heldout]
        assert own == sorted(own, key=lambda prompt: int(prompt.removeprefix(name)))


def test_without_hold_out_everything_is_for_training():
    found = load(PRODUCTS, holdout_fraction=0)
    assert found.heldout == [] and len(found.train) == 512 - found.num_duplicates


def test_template_is_applied_once_and_ids_are_those_of_the_template(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "What is 12 + 7?", "answer": 19}])
    found = load(source, holdout_fraction=0, system_prompt="Be brief.", instruction="Think.")
    prompt = found.train[0]
    assert prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 12 + 7? Think."},
    )
    assert found.rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 + 7? Think.<|im_end|>\n<|im_start|>assistant\n"
    )
    encoded = TOKENIZER.apply_chat_template(list(prompt.messages), add_generation_prompt=True)
    assert list(prompt.token_ids) == encoded["input_ids"]  # type: ignore[index]
    assert prompt.columns == {"prompt": "What is 12 + 7?", "answer": 19}
    assert found.rendered in found.preview() and str(list(prompt.token_ids)) in found.preview()


def test_conversational_prompts_keep_their_own_system_message(tmp_path):
    chat = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hello"}]
    source = write(tmp_path / "a.json", [{"prompt": chat}])
    found = load(source, holdout_fraction=0, system_prompt="other")
    assert found.train[0].messages == tuple(chat)
    assert found.train[0].columns["prompt"] == chat


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_file_formats(tmp_path, suffix):
    rows = [{"question": f"q{i}", "answer": f"\\frac{{{i}}}{{7}}"} for i in range(5)]
    source = write(tmp_path / f"a.{suffix}", rows)
    source = SourceConfig(name=source.name, prompt_column="question")
    found = load(source, holdout_fraction=0, columns=("answer",))
    assert [p.columns for p in found.train] == [{**row, "prompt": row["question"]} for row in rows]


def test_json_lines_with_mixed_answers_and_odd_line_separators(tmp_path):
    rows = [
        {"prompt": "one\u2028two", "answer": 1},
        {"prompt": "b", "answer": "\\pi"},
        {"prompt": "c", "answer": 0.5},
    ]
    found = load(write(tmp_path / "a.jsonl", rows), holdout_fraction=0)
    assert [p.columns for p in found.train] == rows


def test_exact_duplicates_are_dropped_across_sources(tmp_path):
    first = write(tmp_path / "a.jsonl", questions(4))
    second = write(tmp_path / "b.jsonl", questions(6))
    found = load(first, second, holdout_fraction=0)
    assert Counter(p.source for p in found.train) == {0: 4, 1: 2}
    assert found.num_duplicates == 4


def test_source_without_training_prompts_is_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", questions(1))
    with pytest.raises(ConfigError, match="leaves no training prompt of") as caught:
        load(source)
    assert caught.value.key == "data.holdout_fraction"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", '{"prompt": "a", "answer": 1}\n\n{"prompt": \n', "line 3 is not JSON"),
        ("a.json", '{"prompt": "a"}', "one JSON object per row"),
        ("a.csv", "prompt\na", "files of type '.csv' are not read"),
        ("a.jsonl", '{"text": "a"}', "has no column 'prompt'"),
        ("a.jsonl", '{"prompt": "a", "solution": 1}', "has no column 'answer'"),
        ("a.jsonl", '{"prompt": "a", "answer": null}', "holds nothing in column 'answer'"),
        ("a.jsonl", '{"prompt": 7, "answer": 1}', "neither a string nor messages"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(SourceConfig(name=str(tmp_path / name)), columns=("answer",))


def test_missing_column_names_the_nearest(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "answers": 1}])
    with pytest.raises(ConfigError, match="Did you mean answers") as caught:
        load(source, columns=("answer",))
    assert caught.value.key == "reward.function"


def test_missing_file():
    with pytest.raises(ConfigError, match="there is no such file"):
        load(SourceConfig(name="no/such/file.jsonl"))


def test_prompts_longer_than_the_limit(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "7" * 50}])
    found = load(source, limit=40, holdout_fraction=0)
    assert [prompt.columns["prompt"] for prompt in found.train] == ["a"]
    assert re.search("1 of 2 prompts dropped: longer than .* = 40", found.preview())
    with pytest.raises(ConfigError, match="1 prompts are longer, .* has 6[0-9] tokens") as caught:
        load(source, limit=40, holdout_fraction=0, long_prompts="stop")
    assert caught.value.key == "rollout.max_prompt_tokens"
    needed = int(re.search(r"Set it to (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert len(load(source, limit=needed, holdout_fraction=0).train) == 2
    with pytest.raises(ConfigError, match="all prompts of .* are longer, up to 6[0-9] tokens"):
        load(source, limit=4, holdout_fraction=0)


def test_template_that_knows_no_system_role(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    cfg = DataConfig(sources=(source,), system_prompt="x")
    with pytest.raises(ConfigError, match="System role not supported") as caught:
        load_prompts(cfg, tokenizer, max_prompt_tokens=100, required_columns=())
    assert caught.value.key == "data.system_prompt"


def test_unreachable_hub_dataset(monkeypatch):
    def offline(*args, **options):
        raise OSError("no connection")

    monkeypatch.setattr("aepo_fast.data.sources.load_dataset", offline)
    with pytest.raises(ConfigError, match="the hub did not give this dataset: no connection"):
        load(SourceConfig(kind="hub", name="someone/something"))


def test_hub_rows_come_as_given(monkeypatch):
    calls = []

    def load_dataset(name, subset, split):
        calls.append((name, subset, split))
        return questions(3)

    monkeypatch.setattr("aepo_fast.data.sources.load_dataset", load_dataset)
    source = SourceConfig(kind="hub", name="a/b", subset="main", split="test")
    found = load(source, holdout_fraction=0, columns=("answer",))
    assert calls == [("a/b", "main", "test")]
    assert [p.columns for p in found.train] == questions(3)


def make_prompts(*counts: int) -> list[Prompt]:
    return [
        Prompt(f"{source} {index}", (), {}, source, (source, index))
        for source, count in enumerate(counts)
        for index in range(count)
    ]


def test_sampler_shows_every_prompt_once_an_epoch_in_new_order():
    sampler = PromptSampler(make_prompts(20), [1.0], seed=0)
    epochs = [[prompt.key for prompt in sampler.next(20)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 20
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_sampler_keeps_the_mix_in_every_batch():
    sampler = PromptSampler(make_prompts(5, 50, 7), [3.0, 1.0, 0.5], seed=0)
    for _ in range(10):
        counts = Counter(prompt.source for prompt in sampler.next(18))
        assert counts == {0: 12, 1: 4, 2: 2}


def test_sampler_goes_on_where_it_was_saved():
    prompts = make_prompts(7, 11)
    sampler = PromptSampler(prompts, [1.0, 2.0], seed=5)
    sampler.next(23)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = PromptSampler(prompts, [1.0, 2.0], seed=5)
    resumed.load_state_dict(state)
    assert sampler.next(40) == resumed.next(40)


def test_sampler_refuses_the_state_of_other_prompts():
    state = PromptSampler(make_prompts(7), [1.0], seed=5).state_dict()
    with pytest.raises(ConfigError, match="not those of the checkpoint"):
        PromptSampler(make_prompts(8), [1.0], seed=5).load_state_dict(state)


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"rows.jsonl.*is not UTF-8.*Save it as UTF-8"):
        load(SourceConfig("file", str(path)))
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="rows.parquet.*is no parquet"):
        load(SourceConfig("file", str(path)))


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": ["a"]}], ids=str)
def test_messages_without_text_are_refused(tmp_path, message):
    source = write(tmp_path / "rows.jsonl", [{"prompt": [message]}] * 9)
    with pytest.raises(ConfigError, match="neither a string nor messages with role and content"):
        load(source)


def test_an_answer_that_cannot_be_understood_is_named_with_its_row(tmp_path):
    rows = questions(6)
    rows[4]["answer"] = "\\frac{1}{2"
    source = write(tmp_path / "x.jsonl", rows)
    cfg = DataConfig(sources=(source, PRODUCTS))

    def read(unusable: Any) -> PromptSet:
        return load_prompts(
            cfg, TOKENIZER, max_prompt_tokens=400, required_columns=("answer",), unusable=unusable
        )

    with pytest.raises(ConfigError, match="row 4 .*, which cannot be understood"):
        read(unusable_gold)
    assert len(read(None).train) > 6  # a reward of the user's own may understand it
