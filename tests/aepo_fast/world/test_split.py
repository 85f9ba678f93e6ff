"""Runs whose processes split layers and vocabulary, or hold replicas, end as the run of one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import Config
from tests.aepo_fast.world.ranks import run_ranks
from tests.aepo_fast.world.runs import (
    Job,
    run_config,
    train_each,
    weights_of,
    with_output,
)
from tests.aepo_fast.world.test_runs import compare
from tests.tiny_run import with_trainer

VOCAB = 301  # of two processes, one has a row more than the other
SPLIT, REPLICAS = {"trainer": {"tensor_parallel": 2}}, {"trainer": {"replicas": 2}}
KEPT: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 9}}
# Settings of both runs, and of the one of four processes.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shards of parts": (KEPT, SPLIT),
    "shards of parts, untied": (
        {
            "aepo": AepoConfig(form="split", entropy_target=5.65),
            "loss": LossConfig(kl_coef=0.1),
            "model": {"gradient_checkpointing": "full"},
        },
        SPLIT,
    ),
    "replicas of shards": ({"loss": LossConfig(policy="gspo")}, REPLICAS),
}


def ragged(model: Path, folder: Path) -> Path:
    """A copy of a model with a vocabulary of `VOCAB` tokens."""
    shutil.copytree(model, folder)
    made = AutoModelForCausalLM.from_pretrained(model)
    made.resize_token_embeddings(VOCAB)
    made.save_pretrained(folder)
    return folder


def qwen(model: Path, folder: Path) -> Path:
    """A model with norms over heads, biases and a head of its own, with a model's tokenizer."""
    shutil.copytree(model, folder)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Config, Config]]:
    """Each run as one process and as four did it, or as they did who went on from the others."""
    folder = tmp_path_factory.mktemp("split")
    tied = ragged(tiny_model_dir, folder / "tied model")
    models = {False: tied, True: qwen(tiny_model_dir, folder / "untied model")}
    found = {}
    for name, (both, four_only) in RUNS.items():
        model = models["untied" in name]
        one = run_config(model, folder / f"{name} one", both)
        found[name] = one, run_config(model, folder / f"{name} four", both | four_only)
    one, four = found["shards of parts"]
    found["4-4"] = one, with_output(four, folder / "4-4")
    # As two replicas, of two processes that split layers.
    as_replicas = with_trainer(with_output(four, folder / "1-4"), replicas=2)
    found["1-4"] = one, as_replicas
    found["4-1"] = one, with_output(one, folder / "4-1")
    train_each([Job(found[name][0]) for name in RUNS])
    jobs = [Job(found[name][1]) for name in RUNS]
    resumed = [(found["4-4"][1], four), (as_replicas, one)]
    jobs += [Job(cfg, copied, saves_anew=True) for cfg, copied in resumed]
    do = "tests.aepo_fast.world.runs:train_each"
    run_ranks(do, 4, folder / "ranks", jobs, timeout_s=560)
    train_each([Job(found["4-1"][1], four)])
    return found


@pytest.mark.parametrize("name", [*RUNS, "4-4", "1-4", "4-1"])
def test_four_processes_end_as_one(runs: dict[str, tuple[Config, Config]], name: str) -> None:
    one, four = runs[name]
    compare(name, one, four)
    if name == "4-4":
        ours, theirs = weights_of(runs["shards of parts"][1]), weights_of(four)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_checkpoint_is_that_of_one_process(runs: dict[str, tuple[Config, Config]]) -> None:
    for one, four in (runs[name] for name in RUNS):
        ours, theirs = (
            Path(cfg.output_dir) / "checkpoints" / f"step_{cfg.trainer.steps}"
            for cfg in (one, four)
        )
        written = [{path.name for path in folder.iterdir()} for folder in (ours, theirs)]
        assert written[0] - {"optimizer.pt"} == written[1] - {"optimizer"}
        for name in ("config.json", "generation_config.json"):
            assert (ours / name).read_text() == (theirs / name).read_text()
        assert (
            load_file(theirs / "model.safetensors").keys()
            == load_file(ours / "model.safetensors").keys()
        )
