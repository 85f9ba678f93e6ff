"""Whole runs that train an adapter over weights of 4 bits, on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aepo_fast.cli.evaluate import evaluate_model
from aepo_fast.cli.export import export_run
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import LossConfig
from aepo_fast.config.sections import Config, LoraConfig
from aepo_fast.model.load import load_model
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.samples import Request
from aepo_fast.training.run import train
from tests.aepo_fast.training.test_lora_runs import adapter_of
from tests.aepo_fast.training.test_run import metrics_of
from tests.tiny_run import a_machine, copy_until, tiny_config, with_trainer


def qlora_config(model: Path, output: Path, dtype: str = "float32") -> Config:
    cfg = with_trainer(tiny_config(model, output), steps=2)
    own: Any = {"dtype": dtype, "compute_dtype": dtype, "quantization": "nf4"}
    return replace(
        cfg,
        model=replace(cfg.model, lora=LoraConfig(rank=4), **own),
        rollout=replace(cfg.rollout, dtype=own["dtype"]),
        loss=LossConfig(kl_coef=0.01),
        checkpoint=replace(cfg.checkpoint, keep=9),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_resumes_bitwise_is_evaluated_and_merged(
    tiny_model_dir: Path, tmp_path: Path, dtype: str
) -> None:
    cfg = qlora_config(tiny_model_dir, tmp_path / "whole", dtype)
    assert train(cfg) == 0
    first, last = adapter_of(cfg, 1), adapter_of(cfg, 2)
    assert not any(torch.equal(first[name], last[name]) for name in first)
    # The sampler has the same 4-bit weights, and the reference is the model without its adapter.
    limit = 1e-5 if dtype == "float32" else 0.05
    for line in metrics_of(cfg)[1:]:
        assert line["sampling/logp_difference/mean"] < limit
    kl = [line["kl"] for line in metrics_of(cfg) if "kl" in line]
    assert kl[-1] > 1e-5

    again = replace(cfg, output_dir=str(tmp_path / "again"))
    copy_until(1, cfg, again)
    assert train(again, resume=True) == 0
    for name, tensor in adapter_of(cfg, 2).items():
        assert torch.equal(tensor, adapter_of(again, 2)[name]), name
    assert metrics_of(cfg) == metrics_of(again)

    result = evaluate_model(
        cfg.output_dir, config=None, task=None, samples=2, prompts=3, overrides=[]
    )
    assert result.num_prompts == 3 and result.errors == 0
    if dtype == "float32":
        check_merged(cfg, tmp_path / "merged")
    other = replace(again, model=replace(cfg.model, quantization="none"))
    with pytest.raises(ConfigError, match=r"quantization = 'none': .* was trained with 'nf4'"):
        train(other, resume=True)


def check_merged(cfg: Config, folder: Path) -> None:
    """The merged model is the run's, which has the weights that 4 bits stand for."""
    export_run(Path(cfg.output_dir), folder, merge=True)
    merged: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    checkpoint = Path(cfg.output_dir) / "checkpoints" / f"step_{cfg.trainer.steps}"
    trained = load_model(cfg.model, cfg.model.path, a_machine(), adapter=checkpoint)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        truth = trained(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, truth, rtol=1e-4, atol=1e-5)
    engine = HfRollout(trained, a_machine(), eos_ids=(), batch_rows=8)
    (found,) = engine.generate([Request((5, 6, 7), 1, 1e-6, 0)], max_new_tokens=12)
    greedy = merged.generate(
        torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    assert tuple(greedy[0, 3:].tolist()) == found[0].completion_ids


def test_whole_weights_of_4_bits_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = qlora_config(tiny_model_dir, tmp_path / "run")
    said = r"quantization = 'nf4': does nothing with model\.lora\.rank = 0: weights of 4 bits are"
    with pytest.raises(ConfigError, match=said):
        replace(cfg, model=replace(cfg.model, lora=LoraConfig()))
