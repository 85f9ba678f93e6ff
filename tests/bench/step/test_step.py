"""The step benchmark: its rows, its gate and the command at a tiny size."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aepo_fast.model.batch import MicroBatch
from aepo_fast.model.policy import Policy
from bench import tables
from bench.__main__ import main
from bench.common import environment
from bench.peers import materialised
from bench.sampling.engines import model_folder
from bench.step import candidates, gate
from bench.step.candidates import Candidate, Problem
from bench.step.run import table, time_candidates


@pytest.fixture(scope="module")
def problem() -> Problem:
    return candidates.load_problem(
        model_folder("random:tiny"),
        prompts=3,
        samples=3,
        prompt_tokens=12,
        tokens=8,
        tokens_per_microbatch=64,
        seed=0,
    )


def scaled(factor: float, policy: Policy, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Materialised logits with wrong log-probs, hence a loss whose gradient is wrong."""
    scores = materialised.scores_of_logits
    logprob, entropy = candidates.logits_materialised(scores, policy, batch)
    return factor * logprob, entropy


def test_rows_share_prompts_and_one_group_in_three_has_no_advantage() -> None:
    rows, advantages = candidates.make_rows(6, 4, 10, 9, 50, seed=1)
    assert len(rows) == len(advantages) == 24
    assert len({row.completion.prompt_ids for row in rows}) == 6
    assert all(4 <= row.length <= 9 and len(row.completion.prompt_ids) == 10 for row in rows)
    assert not advantages[:8].any() and advantages[8:].all()
    again, _ = candidates.make_rows(6, 4, 10, 9, 50, seed=1)
    assert again == rows


def test_candidates_take_the_same_step(problem: Problem) -> None:
    before = [weight.clone() for weight in problem.ours.model.parameters()]
    every = candidates.all_candidates(problem)
    assert len({one.name for one in every}) == len(every) == 5
    # Compiling takes longer than everything else here.
    reference, found = gate.gated(problem, [one for one in every if "compiled" not in one.name])
    for name, one in found.items():
        assert one["status"] in ("ok", "not available"), (name, one["message"])
    assert found["ours"]["status"] == found["logits materialised"]["status"] == "ok"
    assert found["ours"]["layout"] != "padded" == found["ours, padded"]["layout"]
    assert found["ours"]["model_tokens"] < found["ours, padded"]["model_tokens"]
    # In float32 the reference is the truth once more, equal but for what undoing steps rounds.
    assert (reference["gradient"] > 1e-5) == (problem.plain.machine.compute_dtype != torch.float32)
    after = list(problem.ours.model.parameters())
    for was, now in zip(before, after, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=1e-10)
    assert all(weight.grad is None for weight in after)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_gate_refuses_a_wrong_loss(problem: Problem, factor: float) -> None:
    wrong = candidates.plain_candidate(problem, "wrong", functools.partial(scaled, factor))
    _, found = gate.gated(problem, [wrong])
    assert found["wrong"]["status"] == ("incorrect" if factor > 1 else "failed")
    assert ("grad_norm" if factor > 1 else "nan") in found["wrong"]["message"]


def test_gate_compares_every_value() -> None:
    exact = {"loss": [torch.tensor(2.0)], "gradient": [torch.ones(3), torch.ones(1)]}
    got = {"loss": [torch.tensor(3.0)], "gradient": [torch.ones(3), torch.tensor([2.0])]}
    assert gate.errors_of(got, exact) == {"loss": 0.5, "gradient": 0.5}


def test_what_fails_is_listed_and_the_others_are_timed(problem: Problem) -> None:
    def fails() -> None:
        raise RuntimeError("no such kernel\nmore")

    broken = Candidate("broken", problem.plain, fails)  # type: ignore[arg-type]
    missing = dataclasses.replace(broken, name="missing", unavailable_reason="not installed")
    _, found = gate.gated(problem, [broken, missing])
    assert found["broken"] == {"status": "failed", "message": "RuntimeError: no such kernel"}
    assert found["missing"] == {"status": "not available", "message": "not installed"}
    steps = {"ours": lambda: None, "late": fails}
    record = {name: {"status": "ok", "message": "", "model_tokens": 7} for name in steps}
    time_candidates(
        steps, record, lambda: None, num_tokens=5, device=torch.device("cpu"), rounds=2, seed=0
    )
    assert record["late"]["status"] == "failed" and "median_ms" not in record["late"]
    assert len(record["ours"]["times_ms"]) == 2 and record["ours"]["ratio_to_ours"] == 1.0
    text = table({**found, **record})
    assert "| missing | not available | - | - | - | - | - | not installed |" in text
    assert "| late | failed |" in text and "| ours | " in text


def test_command_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--quick", "--prompts", "1", "--samples", "2", "--rounds", "1", "--lora", "4"]
    chosen = ["--skip", "compiled", "--model", "random:tiny", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", "step", *sizes, *chosen])
    main()
    output = capsys.readouterr().out
    assert "| ours | " in output and "compiled" not in output
    (path,) = tmp_path.glob("*/step-*.json")
    record = json.loads(path.read_text())
    assert record["settings"]["prompts"] == 1 and record["settings"]["tokens"] == 12
    assert record["learning_rate"] == candidates.LEARNING_RATE
    assert record["gate"]["limit"] == gate.LIMIT
    for name in ("ours", "ours, padded", "logits materialised"):
        one = record["candidates"][name]
        assert one["status"] == "ok" and len(one["times_ms"]) == 1
        assert one["ratio_to_ours"] > 0 and one["model_tokens"] > 0 and one["tokens_per_s"] > 0
        assert set(one["errors"]) == {"loss", "grad_norm", "entropy", "logprob", "gradient"}
    lora = record["candidates"]["ours, LoRA rank 4"]
    assert lora["status"] == "ok" and set(lora["errors"]) == set(record["gate"]["lora_errors"])
    # Two moments in float32 of each of its parameters, and a step count.
    assert 0 < lora["optimizer_bytes"] < record["candidates"]["ours"]["optimizer_bytes"] / 2
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    block = tables.step(on_cpu=record["environment"]["device"] == "cpu")
    assert "1 prompts of 40 tokens, 2 samples each" in block and "| ours | " in block


def test_too_few_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "step", "--tokens", "2"])
    with pytest.raises(SystemExit, match="must be 4 at least"):
        main()


def test_a_record_has_its_command_but_not_where_it_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [
        "bench",
        "kernels",
        "--results",
        "/some/where",
        "--only",
        "ours (chunked)",
        "--runs=/x",
    ]
    monkeypatch.setattr(environment.sys, "argv", words)
    assert environment.command_line() == "python -m bench kernels --only 'ours (chunked)'"
