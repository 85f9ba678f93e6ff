"""How `aepo-fast eval` samples, on what, compared with what, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from aepo_fast.cli.app import app
from aepo_fast.cli.eval_options import Sampling, read_ks
from aepo_fast.cli.evaluate import _configuration, evaluate_model
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import CheckpointConfig, EvalConfig, RolloutConfig
from aepo_fast.config.toml import dump_config
from aepo_fast.data.benchmarks import BENCHMARKS, INSTRUCTION
from aepo_fast.training.run import train
from bench.common.environment import ROOT
from tests.tiny_run import tiny_config, with_trainer

SHORT = ["rollout.max_new_tokens=4", "trainer.device=cpu", "rollout.dtype=float32"]
GSM8K = [
    {"question": "What is 3 + 4?", "answer": "It is <<3+4=7>>7\n#### 7"},
    {"question": "What is 9 - 4?", "answer": "#### 5"},
    {"question": "What is 1,000 + 1?", "answer": "#### 1,001"},
]


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    return str(path)


def on_gsm8k(model: Path, problems: str, **options: Any) -> Any:
    given = {"benchmark": "gsm8k", "data": problems, "backend": "hf", "overrides": SHORT}
    return evaluate_model(str(model), **{**given, **options})


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"samples": 0}, "--samples"),
        ({"k": (1, 8)}, "--k"),
        ({"k": (0,)}, "--k"),
        ({"samples": 8, "k": (9,)}, "--k"),
        ({"greedy": True, "temperature": 0.7}, "--temperature"),
        ({"greedy": True, "top_p": 0.9}, "--top-p"),
        ({"greedy": True, "top_k": 9}, "--top-k"),
        ({"top_k": 0}, "--top-k"),
        ({"greedy": True, "samples": 2}, "--samples"),
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.5}, "--top-p"),
        ({"top_p": float("nan")}, "--top-p"),
    ],
)
def test_samplings_that_mean_nothing_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling.of(**options)
    assert caught.value.key == key


def test_what_is_left_out_of_a_sampling() -> None:
    assert Sampling.of() == Sampling(4, 1.0, 1.0, ())
    assert Sampling.of(greedy=True) == Sampling(1, 0.0, 1.0, ())
    assert Sampling.of(8, k=read_ks("8,1"), temperature=0.6, top_p=0.95).ks == (1, 8)
    with pytest.raises(ConfigError, match="--k"):
        read_ks("1,x")


def test_a_benchmark_brings_its_dataset_prompt_verifier_and_length() -> None:
    assert list(BENCHMARKS) == ["gsm8k", "math500", "aime24", "aime25", "amc23"]
    for name, benchmark in BENCHMARKS.items():
        cfg, path = _configuration("some/model", None, None, [], benchmark=name, backend="hf")
        (source,) = cfg.data.sources
        assert (source.kind, source.name, source.split) == ("hub", benchmark.hub, benchmark.split)
        assert source.prompt_column in ("problem", "question") and source.answer_column == "answer"
        assert cfg.reward.function == "math_verify" and cfg.data.instruction == INSTRUCTION
        assert cfg.rollout.max_new_tokens == benchmark.max_new_tokens and path == "some/model"
    settings = ["rollout.max_new_tokens=64", "data.instruction="]
    cfg, _ = _configuration("m", None, None, settings, benchmark="aime25", backend="hf")
    assert cfg.rollout.max_new_tokens == 64 and not cfg.data.instruction


def test_the_page_s_table_is_that_of_the_benchmarks() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, one in BENCHMARKS.items():
        hub = f"{one.hub}, {one.subset}" if one.subset else one.hub
        columns = f"`{one.question}`, `{one.answer}`"
        row = [f"`{name}`", hub, one.split, columns, f"{one.max_new_tokens:,}"]
        assert f"| {' | '.join(row)} |\n" in page
    assert INSTRUCTION in page


def test_the_engine_without_a_configuration_is_vllm_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for installed, backend in ((object(), "vllm"), (None, "hf")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
        cfg, _ = _configuration("m", None, "products", [])
        assert cfg.rollout.backend == backend
        cfg, _ = _configuration("m", None, None, [], benchmark="gsm8k")
        assert cfg.rollout.backend == backend


def test_another_engine_leaves_what_only_the_configured_one_reads(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    own = RolloutConfig("vllm", max_new_tokens=6, enforce_eager=True, gpu_memory_utilization=0.5)
    path = tmp_path / "run.toml"
    path.write_text(dump_config(tiny_config(tiny_model_dir, tmp_path / "run", rollout=own)))
    cfg, _ = _configuration("m", str(path), None, ["rollout.batch_rows=8"], backend="hf")
    assert cfg.rollout == RolloutConfig("hf", max_new_tokens=6, batch_rows=8)
    cfg, _ = _configuration("m", str(path), None, ["rollout.dtype=float32"], backend="vllm")
    assert cfg.rollout == replace(own, dtype="float32")


def test_a_run_with_a_best_checkpoint_is_evaluated_on_other_data(tmp_path: Path) -> None:
    cfg = tiny_config(
        Path("m"),
        tmp_path / "run",
        eval=EvalConfig(every=1),
        checkpoint=CheckpointConfig(keep_best="eval/avg@k"),
    )
    path = tmp_path / "run.toml"
    path.write_text(dump_config(cfg))
    for options in ({"task": "chain_sum"}, {"task": None, "benchmark": "gsm8k"}):
        task = options.pop("task")
        found, _ = _configuration("m", str(path), task, [], **options)
        assert found.checkpoint == CheckpointConfig() and found.eval.seed == cfg.eval.seed


def test_a_benchmark_from_a_file_and_its_result(
    tiny_model_dir: Path, gsm8k: str, tmp_path: Path
) -> None:
    output = tmp_path / "sampled.json"
    sampled = on_gsm8k(
        tiny_model_dir,
        gsm8k,
        samples=4,
        k=(1, 3),
        temperature=0.9,
        top_p=0.8,
        top_k=5,
        output=output,
    )
    assert list(sampled.pass_at_k) == [1, 3] and sampled.num_prompts == 3
    assert [one.samples for one in sampled.problems] == [4, 4, 4]
    written = json.loads(output.read_text())
    assert written["settings"]["temperature"] == 0.9 and written["settings"]["top_p"] == 0.8
    assert written["settings"].pop("top_k") == 5  # older files do not say it
    assert written["settings"]["sources"][0]["name"] == gsm8k
    assert [one["samples"] for one in written["problems"]] == [4, 4, 4]
    assert written["pass_at_k"] == {"1": sampled.pass_at_k[1], "3": sampled.pass_at_k[3]}

    # Of the same problems; the instruction is not part of one.
    options = {"overrides": [*SHORT, "data.instruction="], "compare": str(output)}
    greedy = on_gsm8k(tiny_model_dir, gsm8k, greedy=True, **options)
    assert greedy.num_samples == 1 and greedy.settings["temperature"] == 0.0
    found = greedy.comparison
    assert found.num_prompts == 3 and list(found.pass_at_k) == [1]
    assert found.difference == pytest.approx(greedy.avg_at_k - sampled.avg_at_k)
    for name in ("temperature", "samples", "instruction", "top_k"):
        assert any(f"not the same in both: {name} " in note for note in found.notes)

    # Stop strings of the configuration end these samples, too; older files do not name any.
    assert written["settings"].pop("stop") == [] and greedy.settings["stop"] == []
    assert not any("stop" in note for note in found.notes)
    output.write_text(json.dumps(written))
    letters = json.dumps([chr(code) for code in range(1, 127)])
    for stop in ("[]", letters):
        options["overrides"] = [*SHORT, f"rollout.stop={stop}"]
        ended = on_gsm8k(tiny_model_dir, gsm8k, greedy=True, **options)
        noted = [note for note in ended.comparison.notes if "not the same in both: stop " in note]
        assert len(noted) == (stop == letters)
    assert ended.mean_length < greedy.mean_length and ended.truncated < greedy.truncated

    # Greedy answers do not depend on the draw.
    again = on_gsm8k(tiny_model_dir, gsm8k, greedy=True, overrides=[*SHORT, "eval.seed=9"])
    assert again.problems == on_gsm8k(tiny_model_dir, gsm8k, greedy=True).problems


def test_two_models_and_a_run_are_compared(
    tiny_model_dir: Path, tmp_path: Path, gsm8k: str
) -> None:
    cfg = tiny_config(tiny_model_dir, tmp_path / "run")
    train(with_trainer(cfg, steps=1))
    command = ["eval", cfg.output_dir, "--samples", "2", "--prompts", "3"]
    output = tmp_path / "result.json"
    done = CliRunner().invoke(
        app, [*command, "--compare", str(tiny_model_dir), "--output", str(output), "--k", "2"]
    )
    assert done.exit_code == 0, done.exception
    assert f"difference to {tiny_model_dir}, paired over 3 prompts: avg@k" in done.output
    written = json.loads(output.read_text())
    assert written["comparison"]["num_prompts"] == 3 and not written["comparison"]["notes"]
    assert written["settings"]["model"].endswith("step_1")
    # The other way round, the run is the second: with its own model section, and nobody else's.
    back = evaluate_model(
        str(tiny_model_dir),
        config=str(tmp_path / "run" / "config.toml"),
        samples=2,
        prompts=3,
        k=(2,),
        compare=cfg.output_dir,
    )
    assert back.comparison is not None
    assert back.comparison.difference == pytest.approx(-written["comparison"]["difference"])


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where transformers loads a model."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "gsm9k"}, "--benchmark = 'gsm9k': is no benchmark.*gsm8k"),
        ({"data": "no-such.jsonl"}, "--data = 'no-such.jsonl': there is no such file"),
        ({"benchmark": None}, "--data = .*none is named"),
        ({"task": "products"}, "--task = 'products'.*Give one of the two"),
        ({"benchmark": "math500"}, "data.sources.prompt_column = 'problem'.*no column 'problem'"),
        ({"backend": "sglang"}, "--backend = 'sglang'"),
        ({"prompts": 0}, "--prompts = 0"),
        ({"samples": 2, "k": (4,)}, "--k = 4"),
        ({"greedy": True, "samples": 4}, "--samples = 4"),
        ({"output": Path("no-such-folder/x.json")}, "--output = .*does not exist"),
        ({"output": Path(__file__)}, "--output = .*there already"),
        ({"compare": "no-such.json"}, "--compare = 'no-such.json'"),
        ({"compare": __file__}, "--compare = .*no result of an evaluation"),
        ({"overrides": ["rollout.max_new_tokens=99999"]}, "rollout.max_new_tokens = 99999"),
        ({"overrides": [*SHORT, "rollout.max_prompt_tokens=9"]}, "rollout.max_prompt_tokens = 9"),
    ],
)
def test_bad_input_is_refused_before_a_model_loads(
    tiny_model_dir: Path, gsm8k: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        on_gsm8k(tiny_model_dir, gsm8k, **options)


@pytest.mark.usefixtures("no_model")
def test_an_evaluation_of_other_problems_is_refused(
    tiny_model_dir: Path, gsm8k: str, tmp_path: Path
) -> None:
    one = {"id": "0" * 16, "samples": 4, "correct": 1, "reward": 0.25}
    values = {"format": "aepo_fast.evaluation.1", "settings": {}, "problems": [one]}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="holds 1 problems, 0 of the 3 that are evaluated"):
        on_gsm8k(tiny_model_dir, gsm8k, compare=str(other))
    for damaged in (
        {"problems": [one, one]},
        {"problems": [{**one, "correct": 5}]},
        {"problems": [{"id": "x"}]},
        {"format": "another"},
    ):
        other.write_text(json.dumps({**values, **damaged}))
        with pytest.raises(ConfigError, match="--compare.*no result of an evaluation"):
            on_gsm8k(tiny_model_dir, gsm8k, compare=str(other))
    for name in ("no/such-model", str(shutil.copytree(tiny_model_dir, tmp_path / "copy"))):
        (tmp_path / "copy" / "tokenizer.json").unlink(missing_ok=True)
        with pytest.raises(ConfigError):  # the second model is checked before the first one loads
            on_gsm8k(tiny_model_dir, gsm8k, compare=name)
