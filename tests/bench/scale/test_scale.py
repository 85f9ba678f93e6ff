"""The scale benchmark: what it measures over two processes, and the simulation's arithmetic."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench.sampling.engines import SHAPES, parameters_of
from bench.scale.simulate import Network, Step, expected, exposed_collectives
from bench.scale.worker import covered

STEP = Step(
    prompts=4,
    rollout_s=2.0,
    train_s=1.2,
    sync_s=0.1,
    microbatches=2,
    layers=3,
    parameters=3_000_000_000,
    compute_bytes=6_000_000_000,
    rollout_bytes=6_000_000_000,
    completion_tokens=1000,
)
NETWORK = Network(devices_per_node=2, node_gb_s=100, network_gb_s=10, latency_us=1000)


def test_a_collective_takes_its_bytes_and_its_latency() -> None:
    assert NETWORK.seconds(1e9, 1) == 0
    assert NETWORK.seconds(1e9, 2) == pytest.approx(0.5 / 100 + 1e-3 * 2)
    assert NETWORK.seconds(1e9, 4) == pytest.approx(0.75 / 10 + 1e-3 * 3)


def test_collectives_are_seen_where_a_layer_s_work_does_not_hide_them() -> None:
    # A layer's work is 0.2 s: a third of it forward. It has 2 GB of weights, 4 GB of gradients.
    gather, scatter = 2 * 0.75 / 10 + 3e-3, 4 * 0.75 / 10 + 3e-3
    forward = gather + 2 * (gather - 0.2 / 3)
    backward = scatter + 2 * (gather + scatter - 0.4 / 3)
    assert exposed_collectives(STEP, NETWORK, 4) == pytest.approx(2 * (forward + backward))
    fast = dataclasses.replace(NETWORK, network_gb_s=1e9)
    assert exposed_collectives(STEP, fast, 4) == pytest.approx(2 * 2 * 3e-3)
    assert exposed_collectives(STEP, NETWORK, 1) == 0


def test_one_device_takes_what_was_measured_and_many_wait_for_the_longest() -> None:
    alone = expected(STEP, NETWORK, 1)
    assert alone.seconds == pytest.approx(3.3, rel=0.2)  # a draw of lengths may be a long one
    assert (alone.work, alone.waiting, alone.collectives, alone.sync) == (1.2, 0, 0, 0.1)
    many = expected(STEP, NETWORK, 64)
    assert many.rollout > alone.rollout and many.waiting > 0
    even = dataclasses.replace(NETWORK, length_sigma=0.0)
    assert expected(STEP, even, 64).waiting == pytest.approx(0)
    assert expected(STEP, even, 64).rollout == pytest.approx(2.0)


def test_the_union_of_intervals() -> None:
    assert covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4
    assert covered([]) == 0


def test_parameters_of_a_shape() -> None:
    assert parameters_of(SHAPES["qwen2.5-1.5b"]) == 1_543_714_304


@pytest.mark.soak
def test_one_and_two_processes_are_measured_and_simulated(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["scale", "--model", str(tiny_model_dir), "--prompts", "2", "--samples", "4"]
    words += ["--tokens", "6", "--rounds", "1", "--nodes", "2", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    bench.main()
    (path,) = tmp_path.rglob("scale-*.json")
    record = json.loads(path.read_text())
    one, two = record["measured"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["collective_share"] == one["idle_share"] == 0
    assert 0 < two["collective_share"] < 1
    assert two["steps"][0]["samples"] == 2 * one["steps"][0]["samples"] == 16
    assert [step["devices"] for step in record["simulation"]["expected"]] == [1, 2, 4, 8, 16]
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "| 2 |" in capsys.readouterr().out


def test_the_simulation_needs_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "scale", "--ranks", "2"])
    with pytest.raises(SystemExit, match=r"--ranks \[2\]: the simulation needs the step of 1 rank"):
        bench.main()
