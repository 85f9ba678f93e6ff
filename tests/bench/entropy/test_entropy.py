"""The entropy benchmark: its tasks, statistics and parts, and a run of the small size."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.toml import load_config
from aepo_fast.training.eval_statistics import pass_at_k
from bench import entropy
from bench.common.environment import device_name
from bench.entropy import measures, report, runs, small_model, small_tasks
from bench.entropy.child import training_record
from bench.entropy.settings import BASE, SETTINGS, SIZES, Run, admits, grid


@pytest.mark.parametrize(
    ("prompt", "text", "right"),
    [
        ("8:", "3+9-4", True),
        ("8:", "0+8+0", True),
        ("8:", "3+9-5", False),
        ("8:", "3+9-4.", False),
        ("8:", "3+5", False),
        ("8:", "-3+9+2", False),
        ("8:", "12-4+0", False),
        ("8:", "4+4=8", False),
        ("8:", "", False),
        ("18:", "9+9+0", True),
    ],
)
def test_written_expressions_are_verified(prompt: str, text: str, right: bool) -> None:
    assert small_tasks.is_written(prompt, text) is right
    assert small_tasks.reward_write([prompt], [text]) == [float(right)]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("5-82+37=-40.", True),
        ("=-40.", True),
        ("1=2=-40.", True),
        ("37+5-82=40.", False),
        ("37+5-82=-40", False),
        ("=-40.=", False),
        ("=-40.1.", False),
        ("=--40.", False),
        ("=.", False),
        ("-40.", False),
        ("", False),
    ],
)
def test_values_are_verified(text: str, right: bool) -> None:
    assert small_tasks.is_value("37+5-82:", text) is right
    assert small_tasks.reward_value(["37+5-82:"], [text]) == [float(right)]


def test_right_expressions_are_all_that_a_search_finds() -> None:
    found = small_tasks.right_expressions()
    strings = ["".join(s) for s in itertools.product("0123456789", "+-", "0123456789", "+-", "012")]
    for number in (0, 7, 20):
        by_hand = {text for text in strings if eval(text) == number}
        assert {text for text in found[number] if text[-1] in "012"} == by_hand
        assert len(set(found[number])) == len(found[number])
    assert found[27] == ("9+9+9",) and len(found[26]) == 3
    logs = [math.log(len(right)) for right in found.values()]
    assert small_tasks.CEILINGS["reach"] == pytest.approx(sum(logs) / 28 / 6)
    assert small_tasks.CEILINGS["write"] == pytest.approx(sum(logs[:21]) / 21 / 6)


def test_the_base_model_of_reach_has_not_seen_its_last_numbers() -> None:
    rng = random.Random(0)
    seen = {small_tasks.TASKS["reach"].example(rng)[0] for _ in range(2000)}
    asked = small_tasks.TASKS["reach"].prompts()
    assert len(asked) == 28 and set(asked) - seen == {f"{number}:" for number in range(21, 28)}


def test_examples_are_what_the_verifiers_take() -> None:
    rng = random.Random(0)
    written = [small_tasks.TASKS["write"].example(rng) for _ in range(200)]
    assert all(small_tasks.is_written(*pair) for pair in written)
    values = [small_tasks.TASKS["value"].example(rng) for _ in range(600)]
    assert all(small_tasks.is_value(*pair) for pair in values)
    # The end token comes on top.
    limit = load_config(
        str(SIZES["small"].config), list(SIZES["small"].tasks["value"])
    ).rollout.max_new_tokens
    assert max(len(text) for _, text in values) < limit
    prompts = small_tasks.TASKS["value"].prompts()
    assert len(set(prompts)) == len(prompts) == small_tasks.VALUE_PROMPTS


def test_the_tokenizer_gives_each_character_back() -> None:
    tokenizer = small_model.build_tokenizer()
    text = small_tasks.CHARACTERS
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    assert len(ids) == len(set(ids)) == len(text)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    chat = [{"role": "user", "content": "3+4-5:"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == "3+4-5:"


def test_labels_are_the_completions_with_their_end() -> None:
    tokenizer = small_model.build_tokenizer()
    ids, labels = small_model._as_batch([("7:", "3+4+0"), ("12:", "9")])
    assert ids.shape == labels.shape == (2, 8)
    kept = labels[0][labels[0] >= 0].tolist()
    assert kept[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(kept[:-1]) == "3+4+0"
    assert (labels[1] >= 0).sum() == 2


def test_targets_above_the_ceiling_are_dropped() -> None:
    assert admits("write", 0.75) and not admits("write", 1.0) and admits("value", 1.0)
    assert admits("reach", 0.5) and not admits("reach", 0.75)
    found = grid("small", ["write"], ["grpo", "published"], [0.5, 1.0], [0, 1])
    assert [run.name for run in found] == [
        "base", "grpo-s0", "published-h0.5-s0", "grpo-s1", "published-h0.5-s1",
    ]  # fmt: skip
    assert found[2].overrides()[-1] == "aepo.entropy_target=0.5"
    rival = Run("small", "write", "repo_r", 0.25).overrides()
    assert rival[-1] == "loss.adaptive_target=0.25" and "aepo.enabled=false" in rival


@pytest.mark.parametrize("size", SIZES)
def test_configurations_of_all_tasks_can_be_read(size: str) -> None:
    known = [name for name in ("grpo", "published", "one_pass") if name in SETTINGS]
    for run in grid(size, list(SIZES[size].tasks), known, [0.5], [3]):
        cfg = load_config(str(SIZES[size].config), run.overrides())
        assert cfg.trainer.steps == SIZES[size].steps
        assert run.setting == BASE or cfg.trainer.seed == 3


def test_held_within_by_hand() -> None:
    entropy = [9.0, 9.0, 9.0, 9.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.7]
    assert measures.trailing_means([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    # The last five means: 7.3, 5.6, 3.9, 2.2, .5, .54
    held = measures.held_within(entropy, 0.5)
    means = [5.6, 3.9, 2.2, 0.5, 0.54]
    assert held["mean"] == pytest.approx(sum(abs(m - 0.5) / 0.5 for m in means) / 5, abs=1e-4)
    assert held["max"] == pytest.approx(10.2)
    assert held["raw"] == pytest.approx(0.4 / 5)
    lines = [{"step": i + 1, "entropy": value} for i, value in enumerate(entropy)]
    record = training_record([{"step": 0, "eval/avg@k": 0.25}, *lines], 0.5)
    assert record["late_entropy"] == pytest.approx(0.54)
    assert record["heldout"] == [[0, 0.25]] and record["held"] == held
    assert "held" not in training_record(lines, None)


def test_misses_by_hand() -> None:
    entropy = [0.8] * 13 + [0.5, 0.3, 0.3, 0.6, 0.9, 1.1, 0.7, 0.2, 0.1, 0.0]
    means = [0.8, 0.8, 0.74, 0.64, 0.54, 0.5, 0.52, 0.64, 0.72, 0.7, 0.6, 0.42]
    assert measures.trailing_means(entropy)[11:] == pytest.approx(means)
    assert measures.misses(entropy, 0.5, 0.1) == measures.Misses(early=4, above=4, below=1)


def test_late_is_the_last_sixth() -> None:
    part = {"entropy": [9.0] * 10 + [0.2, 0.4], "reward": [0.0] * 10 + [0.5, 1.0]}
    assert measures.late(part) == (pytest.approx(0.3), 0.75)
    assert measures.late({"entropy": [0.3, 0.5], "reward": [0.0, 1.0]}) == (0.5, 1.0)


def _plan(**changes: Any) -> dict[str, Any]:
    return {**runs.plan_of(Run("small", "write", "grpo"), [], "base"), **changes}


def test_the_base_model_does_not_depend_on_training() -> None:
    base = Run("small", "write", BASE)
    plans = [
        runs.plan_of(base, changes, "base")
        for changes in ([], ["trainer.steps=7", "aepo.alpha=1.0"], ["rollout.max_new_tokens=9"])
    ]
    assert plans[0] == plans[1] != plans[2]


def test_parts_are_kept_refused_or_replaced(tmp_path: Path) -> None:
    part, plan = tmp_path / "part.json", _plan()
    assert not runs.is_done(plan, part, redo=False)
    part.write_text(json.dumps({**plan, "evaluation": {}}))
    assert runs.is_done(plan, part, redo=False)
    for change, word in (("method", "method hash"), ("settings", "other settings")):
        with pytest.raises(SystemExit, match=word):
            runs.is_done(_plan(**{change: "another"}), part, redo=False)
        assert not runs.is_done(_plan(**{change: "another"}), part, redo=True)
    with pytest.raises(SystemExit, match="other samples"):
        runs.is_done(_plan(samples=2048), part, redo=False)


def test_a_run_begun_with_other_settings_does_not_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.prepare(_plan(), folder, redo=False)
    (folder / "metrics.jsonl").write_text("")
    runs.prepare(_plan(), folder, redo=False)
    with pytest.raises(SystemExit, match="unfinished"):
        runs.prepare(_plan(settings=[]), folder, redo=False)
    assert (folder / "metrics.jsonl").exists()
    runs.prepare(_plan(settings=[]), folder, redo=True)
    assert not (folder / "metrics.jsonl").exists()


def test_the_method_hash_follows_the_sources_alone(tmp_path: Path) -> None:
    for name in ("aepo_fast/a.py", "aepo_fast/rollout/b.py", "kernels/aepo_kernels/cpu/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = runs.method_hash(tmp_path)
    (tmp_path / "README.md").write_text("docs")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "d.py").write_text("bench")
    assert runs.method_hash(tmp_path) == before
    (tmp_path / "kernels/aepo_kernels/cpu/c.py").write_text("changed")
    assert runs.method_hash(tmp_path) != before


def test_the_base_model_is_made_once(tmp_path: Path) -> None:
    warm_up = small_model.WarmUp(steps=2, sharpness=0.5, hidden=16, batch=4)
    task = small_tasks.TASKS["write"]
    folder = small_model.base_model(task, warm_up, tmp_path)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert small_model.base_model(task, warm_up, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert small_model.base_model(task, replace(warm_up, seed=1), tmp_path) != folder


@pytest.mark.slow
def test_two_steps_of_the_small_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warm_up = small_model.WarmUp(steps=3, sharpness=0.5, hidden=32, batch=8)
    monkeypatch.setitem(small_model.WARM_UPS, "write", warm_up)
    monkeypatch.setitem(SIZES, "small", replace(SIZES["small"], prompts=4))
    monkeypatch.setattr(runs, "PASS_SAMPLES", 16)
    parser = argparse.ArgumentParser()
    entropy.add_command(parser.add_subparsers())
    paths = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = "entropy --task write --settings published --targets 0.5 --seeds 0 --steps 2"
    arguments = parser.parse_args([*command.split(), "--jobs", "1", *paths])
    arguments.run(arguments)
    folder = tmp_path / "results" / device_name() / "entropy" / "small"
    part = json.loads((folder / "write-published-h0.5-s0.json").read_text())
    assert len(part["entropy"]) == 2 and set(part["held"]) == {"mean", "max", "raw"}
    found = part["evaluation"]
    assert list(found["pass_at_k"]) == ["1", "2", "4", "8", "16"]
    assert found["pass_at_k"]["1"] == pytest.approx(found["accuracy"], abs=1e-5)
    assert 0 < found["entropy"] < math.log(17) and found["samples"] == 16
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "write-accuracy.png", "write-entropy.png", "write-pass.png",
    ]  # fmt: skip
    assert "| published | 0.5 |" in (folder / "tables.md").read_text()
    capsys.readouterr()
    arguments.run(arguments)
    assert "2 runs are done, 0 to do" in capsys.readouterr().out
    # A finished run keeps its weights alone, and is not trained again for a part that is lost.
    checkpoint = tmp_path / "runs" / "small" / "write-published-h0.5-s0" / "checkpoints" / "step_2"
    assert (checkpoint / "model.safetensors").exists()
    assert not (checkpoint / "optimizer.pt").exists()
    (folder / "write-published-h0.5-s0.json").unlink()
    arguments.run(arguments)
    again = json.loads((folder / "write-published-h0.5-s0.json").read_text())
    assert again["evaluation"] == part["evaluation"] and again["step_s"] == part["step_s"]


def test_a_table_has_means_and_extremes_over_seeds() -> None:
    evaluation = {
        "accuracy": 0.5, "ci95": [0.4, 0.6], "greedy_accuracy": 1.0, "entropy": 0.4,
        "pass_at_k": {"1": 0.5, "2": 0.75}, "distinct_right": 3.0,
    }  # fmt: skip
    one = {"setting": "published", "target": 0.5, "seed": 0, "late_entropy": 0.4}
    one |= {"entropy": [0.4] * 6, "reward": [0.1] * 5 + [0.8]}
    one |= {"held": {"mean": 0.2, "max": 0.3, "raw": 0.2}, "evaluation": evaluation}
    two = {**one, "seed": 1, "late_entropy": 0.6, "evaluation": {**evaluation, "accuracy": 0.7}}
    rows = report.table([one, two]).splitlines()
    assert rows[2].startswith("| published | 0.5 | 0.50 (0.40 to 0.60) | 20% (20% to 20%) | 30% |")
    assert "| 0.800 (0.800 to 0.800) | 0.600 (0.500 to 0.700)" in rows[2] and "(k = 2)" in rows[2]
    assert "0.500 (95% 0.400 to 0.600)" in report.table([one])


def test_pass_at_1024() -> None:
    assert pass_at_k(1024, 1, 1024) == 1.0
    assert pass_at_k(1024, 0, 1024) == 0.0


def test_the_model_does_not_touch_the_global_stream() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    small_model.build_model(small_model.WarmUp(steps=1, sharpness=0.5, hidden=16))
    assert torch.equal(torch.rand(1), expected)
