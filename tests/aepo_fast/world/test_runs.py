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
    in_blocks,
    lines_of,
    loss_terms_of,
    run_config,
    train_each,
    untied,
    weights_of,
    with_output,
)
from tests.aepo_fast.world.shards import check, look
from tests.aepo_fast.world.talk import check_what_was_heard, talk
from tests.tiny_run import with_trainer

Changes = dict[str, dict[str, Any]]
LORA = LoraConfig(rank=4, targets=("q_proj", "down_proj", "lm_head"))


def form(name: Any) -> AepoConfig:
    return AepoConfig(form=name, entropy_target=5.65)


# AEPO as published ("resample"), whose passive samples are measured last, unless said otherwise:
# no backward pass follows them that would free the head that was whole for them. Where embedding
# and head are one matrix, a single process adds up its gradient row by row, several must not.
RUNS: dict[str, Changes] = {
    "published": {"checkpoint": {"every": 1, "keep": 9}},
    "kl, padded": {"loss": LossConfig(kl_coef=0.1), "trainer": {"layout": "padded"}},
    "bonus": {"loss": LossConfig(entropy_method="bonus")},
    "expected, recomputed": {
        "aepo": form("expected"),
        "model": {"gradient_checkpointing": "full"},
    },
    "one_pass, one update": {"aepo": form("one_pass"), "trainer": {"minibatches": 1}},
    "dcpo": {"aepo": form("dcpo")},
    "gspo, untied": {"loss": LossConfig(policy="gspo")},
    # The adapter is there before the shards: one that came later would get wrong gradients.
    "lora, kl": {"model": {"lora": LORA}, "loss": LossConfig(kl_coef=0.1)},
    "8 bit": {"trainer": {"optimizer": "adamw_8bit"}, "checkpoint": {"every": 1, "keep": 9}},
    "ahead": {"rollout": {"steps_ahead": 1, "dtype": "bfloat16"}, "loss": LossConfig()},
    "top_k": {"rollout": {"top_k": 9, "top_p": 0.9}},
    # A sample a micro-batch: of an update, 3 ranks have 3, 3 and 2 at most.
    "uneven": {"trainer": {"tokens_per_microbatch": 64}},
    # AdamW divides a gradient by its own size, and one of 93,248 is 7e-10, smaller than what the
    # order of float32's additions leaves of it: its weight alone would end 1.15e-5 apart. With this
    # eps, such gradients do not decide a step.
    "uneven parts of layers": {"trainer": {"tokens_per_microbatch": 64, "eps": 1e-6}},
}
OF_THREE = ("uneven",)
SPLIT = "parts of layers"  # of two processes alone
SAME = ("reward", "completions/mean_length", "aepo/temperature", "skipped_updates")


@pytest.mark.slow
def test_several_processes_end_as_one_and_go_on_from_each_others_checkpoints(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    # One test: starting processes takes longest.
    models = {
        "gspo, untied": untied(tiny_model_dir, tmp_path / "untied model"),
        "8 bit": in_blocks(tiny_model_dir, tmp_path / "wider model"),
    }
    ones, many = (
        {
            name: run_config(models.get(name, tiny_model_dir), tmp_path / f"{name} {who}", changes)
            for name, changes in RUNS.items()
        }
        for who in ("one", "several")
    )
    many[SPLIT] = with_output(ones["published"], tmp_path / SPLIT)
    for name in (SPLIT, f"uneven {SPLIT}"):
        many[name] = with_trainer(many[name], tensor_parallel=2)
    one, two, in_8_bits = ones["published"], many["published"], many["8 bit"]
    again = {name: with_output(two, tmp_path / name) for name in ("2-2", "2-1", "1-2", "2-3")}
    again["8 bit 2-2"] = with_output(in_8_bits, tmp_path / "8 bit 2-2")
    of_two = [Job(cfg) for name, cfg in many.items() if name not in OF_THREE]
    of_two += [Job(again["2-2"], two), Job(again["1-2"], one), Job(again["8 bit 2-2"], in_8_bits)]
    of_three = [*(Job(many[name]) for name in OF_THREE), Job(again["2-3"], two)]
    train_each([Job(cfg) for cfg in ones.values()])
    ones[SPLIT] = one
    ranks_do = "tests.aepo_fast.world.test_runs:ranks_do"
    heard, seen = zip(
        *run_ranks(ranks_do, 2, tmp_path / "ranks of two", of_two, tiny_model_dir, timeout_s=480),
        strict=True,
    )
    check_what_was_heard(list(heard))
    for one_rank in seen:
        check(one_rank)
    run_ranks(ranks_do, 3, tmp_path / "ranks of three", of_three, tiny_model_dir)
    train_each([Job(again["2-1"], two)])

    for name in ones:
        # A number between two of 8 bits takes either of them: rounding decides, here and there.
        compare(name, ones[name], many[name], weights=1e-4 if name == "8 bit" else 1e-5)
    ours, theirs = weights_of(ones["8 bit"]), weights_of(in_8_bits)
    far = torch.cat([((ours[key] - theirs[key]).abs() > 1e-6).flatten() for key in ours])
    assert far.float().mean() < 0.01
    for name in ("2-1", "1-2", "2-3"):
        compare(name, one, again[name])
    for name, source in {"2-2": two, "8 bit 2-2": in_8_bits}.items():
        ours, theirs = weights_of(source), weights_of(again[name])
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name

    other = with_output(in_8_bits, tmp_path / "8 bit 2-1")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 1: .*as many processes as it had"):
        train_each([Job(other, in_8_bits)])


def ranks_do(jobs: list[Job], model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a rank does."""
    world = join(on_gpu=False, timeout_s=120)
    heard, seen = talk(world), look(world, model) if world.size == 2 else {}
    train_each(jobs)
    return heard, seen


def compare(
    run: str, one: Config, other: Config, *, weights: float = 1e-5, cancelling: bool = False
) -> None:
    """Assert that a run ended as that of one process, its weights to so much.

    A loss may differ by 1e-6 of the sum of its terms' magnitudes, which are of both signs.
    cancelling: each log-prob may be rounded differently, as where a vocabulary is split, and a term
    that is a difference of two counts as both.
    The norm of gradients shows that they are added up, where torch's default is their mean, and
    rewards that each prompt has a seed of its own: ranks of one seed would draw alike.
    """
    terms, nats = loss_terms_of(one, cancelling=cancelling), 5e-7
    for ours, theirs, size in zip(lines_of(one), lines_of(other), terms, strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-6 * size, (run, ours["step"])
        # Means of differences of log-probs, which are about 5 nats: they may be rounding alone.
        limits = {"grad_norm": 0.0, "entropy": 0.0, "kl": nats, "policy_kl": nats}
        limits |= {name: 0.0 for name in SAME}
        for name in limits.keys() & ours.keys():
            close = pytest.approx(theirs[name], rel=1e-6, abs=limits[name])
            assert ours[name] == close, (run, name, ours["step"])
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=weights, msg=f"{run}: {name}"
        )
