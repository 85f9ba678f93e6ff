"""Runs of several processes end as the run of one, and go on from each other's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import Config, LoraConfig
from tests.aepo_fast.world.ranks import run_ranks
from tests.aepo_fast.world.runs import (
    Job,
    assert_same,
    run_config,
    train_each,
    untied,
    weights_of,
    with_output,
)

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
    "lora, untied": {"model": {"lora": LORA}},
    "8 bit": {"trainer": {"optimizer": "adamw_8bit"}, "checkpoint": {"every": 1, "keep": 9}},
    "ahead": {"rollout": {"steps_ahead": 1, "dtype": "bfloat16"}, "loss": LossConfig()},
    # A sample a micro-batch: of an update, 3 ranks have 3, 3 and 2 at most.
    "uneven": {"trainer": {"tokens_per_microbatch": 64}},
}
OF_THREE = ("uneven",)


@pytest.fixture(scope="module")
def runs(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Config, Config]]:
    """Each run as one process and as several did it, and those that went on as other numbers."""
    folder = tmp_path_factory.mktemp("runs")
    two_weights = untied(tiny_model_dir, folder / "untied model")
    found = {}
    for name, changes in RUNS.items():
        model = two_weights if "untied" in name else tiny_model_dir
        outputs = (folder / f"{name} {who}" for who in ("one", "several"))
        one, several = (run_config(model, output, changes) for output in outputs)
        found[name] = one, several
    one, two = found["published"]
    again = {name: with_output(two, folder / name) for name in ("2-2", "2-1", "1-2", "2-3")}
    for source, target in again.items():
        found[source] = one if source[0] == "1" else two, target
    in_8_bits = found["8 bit"][1]
    found["2-2 of 8 bits"] = in_8_bits, with_output(in_8_bits, folder / "2-2 of 8 bits")
    of_two = [Job(pair[1]) for name, pair in found.items() if name in RUNS and name not in OF_THREE]
    of_two += [Job(again["2-2"], two), Job(again["1-2"], one)]
    of_two += [Job(found["2-2 of 8 bits"][1], in_8_bits)]
    of_three = [*(Job(found[name][1]) for name in OF_THREE), Job(again["2-3"], two)]
    train_each([Job(found[name][0]) for name in RUNS])
    run_ranks("tests.aepo_fast.world.runs:train_each", 2, folder / "ranks of two", of_two)
    run_ranks("tests.aepo_fast.world.runs:train_each", 3, folder / "ranks of three", of_three)
    train_each([Job(again["2-1"], two)])
    return found


@pytest.mark.parametrize("name", list(RUNS))
def test_several_processes_end_as_one(runs: dict[str, tuple[Config, Config]], name: str) -> None:
    one, several = runs[name]
    # The numbers of 8 bits of a shard are in blocks of its own, or too few for them.
    assert_same(one, several, rel=1e-2 if name == "8 bit" else 1e-6)


def test_8_bits_need_as_many_processes(runs: dict[str, tuple[Config, Config]]) -> None:
    _, two = runs["8 bit"]
    one = with_output(two, Path(two.output_dir).with_name("8 bits 2-1"))
    with pytest.raises(ConfigError, match="WORLD_SIZE = 1: .*as many processes as it had"):
        train_each([Job(one, two)])


@pytest.mark.parametrize("name", ["2-2", "2-2 of 8 bits", "2-1", "1-2", "2-3"])
def test_a_checkpoint_goes_on_with_another_number_of_processes(
    runs: dict[str, tuple[Config, Config]], name: str
) -> None:
    before, after = runs[name]
    assert_same(before, after)
    if name.startswith("2-2"):
        ours, theirs = weights_of(before), weights_of(after)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
