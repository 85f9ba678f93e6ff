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
# Else AdamW has rounding decide a step of one weight of 19,264, whose gradient is next to nothing.
STEADY = {"eps": 1e-6}
KEPT: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 9}}
# Settings of both runs, and of the one of four processes.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shards of parts": (KEPT, SPLIT),
    "shards of parts, untied": (
        {
            "aepo": AepoConfig(form="expected", entropy_target=5.65),
            "loss": LossConfig(kl_coef=0.1),
            "model": {"gradient_checkpointing": "full"},
            "trainer": STEADY,
        },
        {"trainer": {"tensor_parallel": 2, **STEADY}},
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


@pytest.mark.slow
def test_four_processes_end_as_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    # One test: starting processes takes longest. In pairs: as one process did it and as four, or as
    # those who went on from the other.
    tied = ragged(tiny_model_dir, tmp_path / "tied model")
    models = {False: tied, True: qwen(tiny_model_dir, tmp_path / "untied model")}
    found = {}
    for name, (both, four_only) in RUNS.items():
        model = models["untied" in name]
        one = run_config(model, tmp_path / f"{name} one", both)
        found[name] = one, run_config(model, tmp_path / f"{name} four", both | four_only)
    one, four = found["shards of parts"]
    found["4-4"] = one, with_output(four, tmp_path / "4-4")
    # As two replicas, of two processes that split layers.
    as_replicas = with_trainer(with_output(four, tmp_path / "1-4"), replicas=2)
    found["1-4"] = one, as_replicas
    found["4-1"] = one, with_output(one, tmp_path / "4-1")
    train_each([Job(found[name][0]) for name in RUNS])
    jobs = [Job(found[name][1]) for name in RUNS]
    resumed = [(found["4-4"][1], four), (as_replicas, one)]
    jobs += [Job(cfg, copied, saves_anew=True) for cfg, copied in resumed]
    do = "tests.aepo_fast.world.runs:train_each"
    run_ranks(do, 4, tmp_path / "ranks", jobs, timeout_s=560)
    train_each([Job(found["4-1"][1], four)])
    for name, (one, four) in found.items():
        compare(name, one, four, cancelling=True)
    first, again = (weights_of(found[name][1]) for name in ("shards of parts", "4-4"))
    assert all(torch.equal(first[key], again[key]) for key in again)
    for name in RUNS:
        check_same_files(*found[name])


def check_same_files(one: Config, four: Config) -> None:
    """The last checkpoint of several processes is that of one."""
    ours, theirs = (
        Path(cfg.output_dir) / "checkpoints" / f"step_{cfg.trainer.steps}" for cfg in (one, four)
    )
    written = [{path.name for path in folder.iterdir()} for folder in (ours, theirs)]
    assert written[0] - {"optimizer.pt"} == written[1] - {"optimizer"}
    for name in ("config.json", "generation_config.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    assert (
        load_file(theirs / "model.safetensors").keys()
        == load_file(ours / "model.safetensors").keys()
    )
