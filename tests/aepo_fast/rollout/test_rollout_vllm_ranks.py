"""The real vLLM over two ranks: an engine in each of them, and one that both have together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.config.method import LossConfig
from aepo_fast.config.sections import Config, LoggingConfig, LoraConfig, RolloutConfig
from aepo_fast.rollout.vllm_ranks import SHARED_MEMORY
from tests.aepo_fast.rollout.test_rollout_vllm import pytestmark as vllm_marks
from tests.aepo_fast.rollout.vllm_ranks import Seen
from tests.aepo_fast.world.ranks import run_ranks
from tests.aepo_fast.world.runs import lines_of, run_config
from tests.tiny_model import build_tiny_model

pytestmark = vllm_marks
STEPS = 3


def rollout(**changes: Any) -> RolloutConfig:
    return RolloutConfig(
        "vllm",
        max_new_tokens=6,
        max_prompt_tokens=100,
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.05,  # on a CPU, a share of its memory that must be free
        **changes,
    )


@contextmanager
def left_behind() -> Iterator[None]:
    """Shared memory with vLLM's names for two ranks, as runs that were killed leave it."""
    names = [f"-tp:{group}-[0-1]-cpushm_{rank}" for group in range(3) for rank in range(2)]
    made = [path for path in map(SHARED_MEMORY.joinpath, names) if not path.exists()]
    try:
        for path in made:
            path.touch()
        yield
    finally:
        for path in made:
            path.unlink()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, list[Seen]]]:
    """Each run, and what both ranks have seen of it."""
    folder = tmp_path_factory.mktemp("vllm over ranks")
    model = build_tiny_model(folder / "model", heads=2)  # vLLM has none of 16 numbers for a CPU
    each = {"rollout": rollout(), "loss": LossConfig(correction="token_truncate")}
    each |= {"logging": LoggingConfig(rollouts_per_step=-1, plot=False)}
    each |= {"trainer": {"steps": STEPS}}
    changes = {
        "one each": each,
        "ahead": each | {"rollout": rollout(steps_ahead=1), "model": {"lora": LoraConfig(rank=4)}},
        "together": each | {"rollout": rollout(tensor_parallel=2)},
    }
    cfgs = {name: run_config(model, folder / name, change) for name, change in changes.items()}
    work = "tests.aepo_fast.rollout.vllm_ranks:train_with_vllm"
    wrong, stopped = cfgs["one each"].output_dir, cfgs["together"].output_dir
    everything = list(cfgs.values()), wrong, stopped
    with left_behind():
        by_rank = run_ranks(work, 2, folder / "ranks", *everything, timeout_s=800)
    return {
        name: (cfg, [seen[number] for seen in by_rank])
        for number, (name, cfg) in enumerate(cfgs.items())
    }


def rollouts_of(cfg: Config, step: int) -> list[dict[str, Any]]:
    lines = map(json.loads, (Path(cfg.output_dir) / "rollouts.jsonl").read_text().splitlines())
    return [line for line in lines if line["step"] == step]


@pytest.mark.parametrize("name", ["one each", "ahead", "together"])
def test_the_canary_agrees_after_each_step(
    runs: dict[str, tuple[Config, list[Seen]]], name: str
) -> None:
    lines = lines_of(runs[name][0])
    assert len(lines) == (STEPS if name == "ahead" else STEPS - 1)
    assert all(line["sampling/canary_difference"] < 1e-5 for line in lines)
    assert all(line["weights_version"] == 2 * line["step"] for line in lines)
    if name == "ahead":
        assert lines[-1]["sampling/version_lag"] == 2
        assert {x.exit_code for x in runs[name][1]} == {0}


def test_engines_share_the_requests_and_give_what_one_engine_gives(
    runs: dict[str, tuple[Config, list[Seen]]],
) -> None:
    (each, seen_each), (together, seen_together) = runs["one each"], runs["together"]
    for step in range(STEPS - 1):
        parts = [one.sampled[step] for one in seen_each]
        assert all(parts)
        shared = {sample for part in parts for group in part for sample in group}
        ours, theirs = (one.sampled[step] for one in seen_together)
        assert ours == theirs  # ids and log-probs, bit for bit
        assert {x.completion_ids for x in shared} == {
            x.completion_ids for group in ours for x in group
        }
        assert rollouts_of(each, step + 1) == rollouts_of(together, step + 1)
    for one, other in zip(lines_of(each), lines_of(together), strict=True):
        for name in ("loss", "entropy", "reward"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), (name, one["step"])


def test_other_weights_in_the_engine_of_one_rank_stop_all(
    runs: dict[str, tuple[Config, list[Seen]]],
) -> None:
    ours, theirs = (one.error for one in runs["one each"][1])
    assert ours.startswith(f"StaleWeightsError: rollouts of weights version {2 * STEPS}")
    assert ours == theirs


def test_a_signal_to_one_rank_stops_all_that_sample_together(
    runs: dict[str, tuple[Config, list[Seen]]],
) -> None:
    cfg, seen = runs["together"]
    assert [one.exit_code for one in seen] == [143, 143]
    assert (Path(cfg.output_dir) / "checkpoints" / f"step_{STEPS - 1}").is_dir()


def test_an_engine_shares_no_memory_with_other_runs_and_leaves_none(
    runs: dict[str, tuple[Config, list[Seen]]],
) -> None:
    ours, theirs = (one.shared_memory for one in runs["together"][1])
    assert len(ours) == 2 and ours == theirs
    assert all(f"{SHARED_MEMORY}/aepo-fast-" in name for name in ours)
    assert all(name.endswith("(deleted)") for name in ours)
