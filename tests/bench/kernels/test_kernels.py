"""The kernel benchmark: its problem, its gate, its tables and the command at tiny sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from aepo_fast.cli import app
from aepo_fast.cli.bench import run_bench
from aepo_kernels import backends
from bench import tables
from bench.__main__ import main
from bench.common.timing import Stopwatch, interleave
from bench.kernels import gate
from bench.kernels import run as kernels
from bench.kernels.candidates import Candidates
from bench.kernels.figure import draw
from bench.kernels.inputs import inputs_for, make_inputs
from bench.kernels.table import case_table, mode_table, shown_cases, summary
from bench.peers import all_peers
from bench.peers.peer import MODES, Inputs, Mode, Outputs, Peer, shared_loss

CPU = torch.device("cpu")
BY_NAME = {mode.name: mode for mode in MODES}


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bare GEMMs on all machines that run the tests."""
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: True)


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(64, 32, 301, torch.bfloat16, CPU, seed=1)


def setup_of(*peers: Peer) -> kernels.Setup:
    return kernels.Setup(
        list(peers), list(MODES), Stopwatch(CPU), torch.bfloat16, 2, 0, float("inf")
    )


def peer_named(name: str) -> Peer:
    return next(peer for peer in all_peers() if peer.name == name)


def wrong_peer(name: str, change: float) -> Peer:
    """The materialised path with its log-probs scaled by 1 + change."""
    good = peer_named("torch eager")

    def run(inputs: Inputs, mode: Mode) -> Outputs:
        found = good.run(inputs, mode)
        assert found.logprob is not None
        logprob = found.logprob * (1 + change)
        loss = shared_loss(inputs, mode, logprob)
        return dataclasses.replace(found, logprob=logprob, loss=loss)

    return Peer(name, run, lambda device, dtype: None, lambda: "1", temperatures=2)


def test_the_problem_has_certain_and_uncertain_tokens(inputs: Inputs) -> None:
    exact = gate.truth(inputs, BY_NAME["forward"], None)
    assert exact["entropy"].min() < 0.5 and exact["entropy"].max() > 2.0
    ratio = (exact["logprob"] - inputs.old_logprob).abs()
    assert not ((ratio > 0.15) & (ratio < 0.3)).any()  # nothing near the ends of the clip range
    again = make_inputs(64, 32, 301, torch.bfloat16, CPU, seed=1)
    assert torch.equal(again.targets, inputs.targets) and torch.equal(again.hidden, inputs.hidden)


def test_sparse_inputs_name_the_tokens_with_an_advantage(inputs: Inputs) -> None:
    sparse = inputs_for(inputs, BY_NAME["training_sparse"])
    assert sparse.active is not None and inputs.active is None
    assert 1 - len(sparse.active) / 64 == pytest.approx(0.4, abs=0.02)
    assert torch.equal(sparse.advantage.nonzero()[:, 0], sparse.active)
    left_out = torch.ones(64, dtype=torch.bool)
    left_out[sparse.active] = False
    assert not sparse.aux_weight[left_out].any()
    assert inputs_for(inputs, BY_NAME["training"]) is inputs
    assert not inputs_for(inputs, BY_NAME["frozen"]).weight.requires_grad


def test_truth_is_what_autograd_finds_in_float64(inputs: Inputs) -> None:
    mode = BY_NAME["training"]
    wide = dataclasses.replace(
        inputs,
        hidden=inputs.hidden.detach().double().requires_grad_(),
        weight=inputs.weight.detach().double().requires_grad_(),
    )
    law = torch.log_softmax(wide.hidden @ wide.weight.T, -1)
    logprob = law.gather(1, wide.targets[:, None])[:, 0]
    ratio = (logprob - wide.old_logprob).exp()
    surrogate = torch.minimum(ratio * wide.advantage, ratio.clamp(0.8, 1.2) * wide.advantage)
    (-surrogate - wide.aux_weight * logprob).sum().backward()
    exact = gate.truth(inputs, mode, "grpo_aepo")
    torch.testing.assert_close(exact["dhidden"], wide.hidden.grad)
    torch.testing.assert_close(exact["dweight"], wide.weight.grad)


@pytest.mark.parametrize("name", [mode.name for mode in MODES])
def test_gate_passes_the_right_and_flags_the_wrong(inputs: Inputs, name: str) -> None:
    peers = [peer_named("ours (chunked)"), peer_named("torch eager"), wrong_peer("wrong", 0.1)]
    mode, setup = BY_NAME[name], setup_of(*peers)
    given = inputs_for(inputs, mode)
    everyone = Candidates(peers, {}, given, mode, setup.stopwatch)
    found = kernels.gated(everyone, given, mode, setup)
    assert found["ours (chunked)"]["status"] == found["torch eager"]["status"] == "ok"
    assert found["wrong"]["status"] == "incorrect" and "logprob" in found["wrong"]["message"]
    assert found["wrong"]["error_ratios"]["logprob"]["max"] > gate.LIMIT


def test_gate_flags_one_bad_row_and_values_that_are_not_finite() -> None:
    exact = {"logprob": torch.linspace(-9, -1, 5000, dtype=torch.float64)}
    reference = gate.errors_of({"logprob": exact["logprob"].bfloat16()}, exact)
    for value in (-12.0, float("nan"), float("inf")):
        got = exact["logprob"].clone()
        got[7] = value
        _, wrong = gate.judge(gate.errors_of({"logprob": got}, exact), reference, 2**-8)
        assert wrong and "max" in wrong[-1]


def test_failures_and_wrong_results_are_recorded_and_the_others_timed(inputs: Inputs) -> None:
    def broken(inputs: Inputs, mode: Mode) -> Outputs:
        raise RuntimeError("no such kernel\nmore")

    fails = Peer("broken", broken, lambda device, dtype: None, lambda: None)
    no_temperature = dataclasses.replace(wrong_peer("cold", 0.0), temperatures=0)
    good = peer_named("ours (chunked)")
    setup = setup_of(good, fails, wrong_peer("wrong", 0.1), no_temperature)
    mode = kernels.run_mode(inputs, BY_NAME["two_temperatures"], setup)
    found = mode["candidates"]
    assert found["broken"]["message"] == "RuntimeError: no such kernel"
    assert found["wrong"]["status"] == "incorrect" and "median_ms" not in found["wrong"]
    assert found["cold"] == {"status": "excluded", "message": "no temperature"}
    timed = found["ours (chunked)"]
    assert timed["ratio_to_floor"] == timed["median_ms"] / mode["floor"]["median_ms"]
    assert len(timed["times_ms"]) == len(mode["floor"]["times_ms"]) == 2
    assert inputs.hidden.grad is None and inputs.weight.grad is None
    table = mode_table(mode)
    assert "| broken | failed |" in table and "| wrong | incorrect |" in table
    assert "no temperature" in table and "bare 1 GEMM" in table


def test_the_baseline_is_the_same_without_bfloat16_instructions(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for narrow in (True, False):
        monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda narrow=narrow: narrow)
        found[narrow] = gate.baseline(inputs, BY_NAME["training"], "grpo_aepo")
    assert found[True].keys() == found[False].keys() == {"logprob", "entropy", "dhidden", "dweight"}
    for name, value in found[False].items():
        assert (value - found[True][name]).norm() < 0.01 * value.norm()  # roundings to bfloat16


@pytest.mark.parametrize("narrow", [True, False])
def test_the_bare_gemms_are_the_fastest_that_the_processor_has(
    inputs: Inputs, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_cpu_multiplies_bfloat16", lambda: narrow)
    made: list[torch.Tensor] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, out: made.append(out) or mm(*a, out=out))
    for name, count in (("forward", 1), ("frozen", 2), ("training", 3)):
        kind = "" if narrow else "float32 "
        found, call = kernels.bare_gemms(inputs, BY_NAME[name])
        assert found == f"{count} {kind}GEMM{'s' * (count > 1)}"
        made.clear()
        call()
        assert {x.dtype for x in made} == {torch.bfloat16 if narrow else torch.float32}
        assert len(made) == count
    hidden, weight = (x.detach().double() for x in (inputs.hidden, inputs.weight))
    logits = hidden @ weight.T
    for got, want in zip(made, (logits, logits @ weight, logits.T @ hidden), strict=True):
        assert (got.double() - want).norm() < 0.02 * want.norm()


def test_a_call_that_fails_while_timed_drops_out() -> None:
    timers = {"good": lambda: 1.0, "bad": lambda: [][0]}
    times, failures = interleave(timers, CPU, rounds=3, seed=0, deadline=float("inf"))
    assert len(times["good"]) == 3 and failures == {"bad": "IndexError: list index out of range"}
    times, _ = interleave(timers, CPU, rounds=3, seed=0, deadline=0.0)
    assert len(times["good"]) == 1


def fake_record() -> dict:
    errors = {"logprob": {"rms": 1.0, "max": 1.5}, "dweight": {"rms": None, "max": 2.0}}
    ours = {"status": "ok", "message": "", "lacks": "", "error_ratios": errors}
    ours |= {"median_ms": 30.0, "p20_ms": 29.0, "p80_ms": 31.0, "ratio_to_floor": 1.5}
    ours |= {"ratio_to_ours": {"ours (chunked)": 1.0}, "peak_extra_bytes": 2**30}
    peer = ours | {"median_ms": 60.0, "ratio_to_floor": 3.0, "lacks": "no entropy"}
    peer |= {"ratio_to_ours": {"ours (chunked)": 2.0}, "peak_extra_bytes": None}
    bad = {"status": "incorrect", "message": "logprob: rms error", "lacks": ""}
    bad |= {"error_ratios": {"logprob": {"rms": 40.0, "max": 50.0}}}
    mode = {
        "title": "GRPO + AEPO loss",
        "floor": {"name": "3 GEMMs", "median_ms": 20.0, "p20_ms": 20.0, "p80_ms": 20.0},
        "candidates": {"ours (chunked)": ours, "peer": peer, "bad": bad},
    }
    cases = [
        {"hidden": 4096, "vocab": 128256, "tokens": tokens, "modes": {"training": mode}}
        for tokens in (4096, 8192, 16384)
    ]
    environment = {"cpu": "a CPU", "device": "a-gpu", "torch": "2", "triton": "3"}
    return {
        "environment": environment | {"commit": "0123456789+changes"},
        "versions": {
            "ours (chunked)": "0.1",
            "torch.compile": "2",
            "TRL chunked": "1.16",
            "no": None,
        },
        "settings": {"dtype": "bfloat16", "rounds": 20},
        "unavailable": {"QuACK": "needs CUDA"},
        "cases": cases,
    }


def test_tables_and_figure_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = fake_record()
    assert [case["tokens"] for case in shown_cases(record)] == [8192]
    text = case_table(record["cases"][0])
    assert "| ours (chunked) | 30 (29 to 31) | 1.50 | 1.00 | 1,024 MiB |" in text
    assert "| peer | 60 (29 to 31) | 3.00 | 2.00 | not measured |" in text
    assert "logprob 1.5, dweight 2 | no entropy |" in text and "| bad | incorrect |" in text
    short = summary(record)
    assert "| peer (no entropy) | 3.00 (60 ms) |" in short and "50 (logprob)" in short
    folder = tmp_path / "bench" / "results" / "a-gpu"
    folder.mkdir(parents=True)
    (folder / "kernels-20260101-000000.json").write_text(json.dumps(record))
    assert draw(record, folder / "kernels-20260101-000000.png").exists()
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    block = tables.kernels(on_cpu=False)
    assert short in block and "QuACK (needs CUDA)" in block
    assert "commit 0123456, torch 2, triton 3, TRL 1.16: time over" in block
    assert "bench/results/a-gpu/kernels-20260101-000000.png" in block
    assert tables.kernels(on_cpu=True) == ""
    first = tables.headline()
    assert "| ours (chunked) | 1.50 (30 ms) |" in first and "peer" not in first
    assert "bench/results/a-gpu/kernels-20260101-000000.json" in first
    for mode in (mode for case in record["cases"] for mode in case["modes"].values()):
        mode["candidates"] = {"ours (chunked)": mode["candidates"]["ours (chunked)"]}
    (folder / "kernels-20260102-000000.json").write_text(json.dumps(record))
    assert tables.kernels(on_cpu=False) == block


def test_quick_command_writes_a_record_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--shapes", "16x64", "--tokens", "32", "--rounds", "2"]
    # Compiling takes longer than everything else here.
    chosen = ["--only", "ours", "--only", "torch", "--skip", "compile", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", "kernels", "--quick", *sizes, *chosen])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it multiplies bfloat16 wrongly
    main()
    output = capsys.readouterr().out
    assert "- ours (fused): its kernels need a GPU" in output and "bare 3 GEMMs" in output
    (path,) = (tmp_path / "cpu").glob("kernels-*.json")
    assert path.with_suffix(".png").exists()
    record = json.loads(path.read_text())
    (case,) = record["cases"]
    assert list(case["modes"]) == list(BY_NAME)
    assert record["settings"]["gate_limit"] == gate.LIMIT
    for mode in case["modes"].values():
        statuses = {found["status"] for found in mode["candidates"].values()}
        assert statuses <= {"ok", "excluded"}


def test_a_time_limit_ends_the_run_after_one_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--shapes", "16x64", "16x65", "--tokens", "32", "64", "--limit-minutes", "0"]
    chosen = ["--only", "ours", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", "kernels", *sizes, *chosen])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main()
    assert "stopped" in capsys.readouterr().out
    (path,) = (tmp_path / "cpu").glob("kernels-*.json")
    (case,) = json.loads(path.read_text())["cases"]
    (mode,) = case["modes"].values()
    assert len(mode["floor"]["times_ms"]) == 1


def test_no_memory_for_the_gate_is_recorded(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gate, "truth", no_memory)
    case = {"tokens": 32, "hidden": 16, "vocab": 64}
    assert len(list(kernels.run_case(case, setup_of(peer_named("torch eager"))))) == len(MODES)
    assert case_table(case).count("out of memory") == len(MODES)


def test_every_peer_says_why_it_cannot_run() -> None:
    peers = all_peers()
    assert len({peer.name for peer in peers}) == len(peers) >= 11
    for peer in peers:
        reason = peer.unavailable_reason(CPU, torch.bfloat16)
        assert reason is None or len(reason) > 5
        assert all(isinstance(peer.lacks(mode), str) for mode in MODES)


def test_bench_without_the_repository_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("aepo_fast.cli.bench.ROOT", tmp_path)
    assert run_bench(["kernels"]) == 2
    assert "source repository" in capsys.readouterr().err


def test_the_command_line_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("aepo_fast.cli.bench.run_bench", lambda given: seen.append(given) or 3)
    given = ["kernels", "--quick", "--only", "ours", "--help"]
    assert CliRunner().invoke(app.app, ["bench", *given]).exit_code == 3
    assert seen == [given]
