"""Runs of several processes end as the run of one, and go on from each other's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import Config, LoraConfig
from aepo_fast.world import join
from tests.aepo_fast.world.ranks import run_ranks
from tests.aepo_fast.world.runs import (
    Job,
    lines_of,
    run_config,
    train_each,
    untied,
    weights_of,
    with_output,
)
from tests.aepo_fast.world.talk import check_what_was_heard, talk
from tests.tiny_run import with_trainer

Changes = dict[str, dict[str, Any]]
LORA = LoraConfig(rank=4, targets=("q_proj", "down_proj", "lm_head"))


def form(name: Any) -> AepoConfig:
    return AepoConfig(form=name, entropy_target=5.65)


# AEPO as published ("resample"), whose passive samples are measured last, unless said otherwise.
RUNS: dict[str, Changes] = {
    "published": {"checkpoint": {"every": 1, "keep": 9}},
    "split, kl": {"aepo": form("split"), "loss": LossConfig(kl_coef=0.1)},
    "rescue, padded": {"aepo": form("rescue"), "trainer": {"layout": "padded"}},
    "expected, recomputed": {
        "aepo": form("expected"),
        "model": {"gradient_checkpointing": "full"},
    },
    "one_pass, one update": {"aepo": form("one_pass"), "trainer": {"minibatches": 1}},
    "dcpo": {"aepo": form("dcpo")},
    "gspo, untied": {"loss": LossConfig(policy="gspo")},
    "lora, kl": {"model": {"lora": LORA}, "loss": LossConfig(kl_coef=0.1)},
    "8 bit": {"trainer": {"optimizer": "adamw_8bit"}, "checkpoint": {"every": 1, "keep": 9}},
    "ahead": {"rollout": {"steps_ahead": 1, "dtype": "bfloat16"}, "loss": LossConfig()},
    "top_k": {"rollout": {"top_k": 9, "top_p": 0.9}},
    # A sample a micro-batch: of an update, 3 ranks have 3, 3 and 2 at most.
    "uneven": {"trainer": {"tokens_per_microbatch": 64}},
}
OF_THREE = ("uneven",)
SPLIT = "parts of layers"  # of two processes alone


def test_several_processes_end_as_one_and_go_on_from_each_others_checkpoints(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    # One test: starting processes takes longest.
    models = tiny_model_dir, untied(tiny_model_dir, tmp_path / "untied model")
    ones, many = (
        {
            name: run_config(models["untied" in name], tmp_path / f"{name} {who}", changes)
            for name, changes in RUNS.items()
        }
        for who in ("one", "several")
    )
    as_published = with_output(ones["published"], tmp_path / SPLIT)
    many[SPLIT] = with_trainer(as_published, tensor_parallel=2)
    one, two, in_8_bits = ones["published"], many["published"], many["8 bit"]
    again = {name: with_output(two, tmp_path / name) for name in ("2-2", "2-1", "1-2", "2-3")}
    again["8 bit 2-2"] = with_output(in_8_bits, tmp_path / "8 bit 2-2")
    of_two = [Job(cfg) for name, cfg in many.items() if name not in OF_THREE]
    of_two += [Job(again["2-2"], two), Job(again["1-2"], one), Job(again["8 bit 2-2"], in_8_bits)]
    of_three = [*(Job(many[name]) for name in OF_THREE), Job(again["2-3"], two)]
    train_each([Job(cfg) for cfg in ones.values()])
    ones[SPLIT] = one
    ranks_do = "tests.aepo_fast.world.test_runs:ranks_do"
    check_what_was_heard(run_ranks(ranks_do, 2, tmp_path / "ranks of two", of_two))
    run_ranks(ranks_do, 3, tmp_path / "ranks of three", of_three)
    train_each([Job(again["2-1"], two)])

    for name in ones:
        # The 8-bit numbers of a shard are in blocks of its own, or too few for them.
        compare(name, ones[name], many[name], rel=1e-2 if name == "8 bit" else 1e-6)
    for name, source in {"2-1": two, "1-2": one, "2-3": two}.items():
        compare(name, source, again[name])
    for name, source in {"2-2": two, "8 bit 2-2": in_8_bits}.items():
        ours, theirs = weights_of(source), weights_of(again[name])
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name

    other = with_output(in_8_bits, tmp_path / "8 bit 2-1")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 1: .*as many processes as it had"):
        train_each([Job(other, in_8_bits)])


def ranks_do(jobs: list[Job]) -> dict[str, Any]:
    """What a rank does."""
    heard = talk(join(on_gpu=False, timeout_s=120))
    train_each(jobs)
    return heard


def compare(run: str, one: Config, other: Config, *, rel: float = 1e-6) -> None:
    for ours, theirs in zip(lines_of(one), lines_of(other), strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl", "policy_kl"):
            if name in ours:
                # A loss is a sum of terms of both signs, each about 1.
                close = pytest.approx(theirs[name], rel=rel, abs=rel / 2)
                assert ours[name] == close, (run, name, ours["step"])
        for name in ("reward", "completions/mean_length", "aepo/temperature", "skipped_updates"):
            assert ours[name] == pytest.approx(theirs[name], rel=rel), (run, name, ours["step"])
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=10 * rel, msg=f"{run}: {name}"
        )
