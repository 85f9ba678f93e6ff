"""Whole runs that train an adapter: what moves, what resumes, and what the KL term refers to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aepo_fast.cli.evaluate import evaluate_model
from aepo_fast.cli.export import export_run
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import LossConfig
from aepo_fast.config.sections import Config, LoraConfig
from aepo_fast.model.folder import check_folder
from aepo_fast.model.load import load_model
from aepo_fast.model.lora import ADAPTER_WEIGHTS
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.samples import Request
from aepo_fast.training.run import train
from tests.aepo_fast.training.test_run import metrics_of
from tests.tiny_run import a_machine, copy_until, tiny_config, with_trainer


def lora_config(model: Path, output: Path, dtype: str = "float32") -> Config:
    cfg = tiny_config(model, output)
    lora = LoraConfig(rank=4, targets=("q_proj", "down_proj", "lm_head"))
    own: Any = {"dtype": dtype, "compute_dtype": dtype}
    return replace(
        cfg,
        model=replace(cfg.model, lora=lora, **own),
        rollout=replace(cfg.rollout, dtype=own["dtype"]),
        checkpoint=replace(cfg.checkpoint, keep=9),
    )


def adapter_of(cfg: Config, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(cfg.output_dir) / "checkpoints" / f"step_{step}" / ADAPTER_WEIGHTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_the_adapter_and_resumes_bitwise(
    tiny_model_dir: Path, tmp_path: Path, dtype: str
) -> None:
    cfg = lora_config(tiny_model_dir, tmp_path / "whole", dtype)
    assert train(cfg) == 0
    folder = tmp_path / "whole" / "checkpoints" / "step_4"
    assert not (folder / "model.safetensors").exists() and (folder / "config.json").exists()
    first, last = adapter_of(cfg, 1), adapter_of(cfg, 4)
    assert not any(torch.equal(first[name], last[name]) for name in first)
    # The sampler has the adapter: its log-probs are the trainer's, but for rounding.
    limit = 1e-5 if dtype == "float32" else 0.05
    for line in metrics_of(cfg)[1:]:
        assert line["sampling/logp_difference/mean"] < limit

    again = replace(cfg, output_dir=str(tmp_path / "again"))
    copy_until(2, cfg, again)
    assert train(again, resume=True) == 0
    for name, tensor in adapter_of(cfg, 4).items():
        assert torch.equal(tensor, adapter_of(again, 4)[name]), name
    assert metrics_of(cfg) == metrics_of(again)


def test_the_kl_reference_is_the_model_without_its_adapter(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = with_trainer(lora_config(tiny_model_dir, tmp_path / "run"), minibatches=1)
    cfg = replace(cfg, loss=LossConfig(kl_coef=0.1))
    assert train(cfg) == 0
    kl = [line["kl"] for line in metrics_of(cfg) if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4


def test_a_run_goes_on_with_the_settings_that_it_began_with(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cfg = with_trainer(lora_config(tiny_model_dir, tmp_path / "run"), steps=1)
    assert train(cfg) == 0
    for lora in (LoraConfig(rank=8), LoraConfig()):
        with pytest.raises(ConfigError, match=r"model\.lora\.rank"):
            train(replace(cfg, model=replace(cfg.model, lora=lora)), resume=True)


def test_a_run_is_evaluated_and_exported(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = lora_config(tiny_model_dir, tmp_path / "run")
    assert train(cfg) == 0
    result = evaluate_model(
        cfg.output_dir, config=None, task=None, samples=2, prompts=3, overrides=[]
    )
    assert result.num_prompts == 3 and result.errors == 0

    export_run(tmp_path / "run", tmp_path / "merged", merge=True)
    export_run(tmp_path / "run", tmp_path / "adapter", merge=False)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    # As peft itself reads the adapter.
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    machine = a_machine()
    trained = load_model(
        cfg.model, tiny_model_dir, machine, adapter=Path(cfg.output_dir) / "checkpoints/step_4"
    )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        truth = trained(input_ids=ids).logits
        for other in (merged, adapted):
            torch.testing.assert_close(other(input_ids=ids).logits, truth, rtol=1e-4, atol=1e-5)
        # Greedy outputs are the run's own.
        engine = HfRollout(trained, machine, eos_ids=(), batch_rows=8)
        (found,) = engine.generate([Request((5, 6, 7), 1, 1e-4, 0)], max_new_tokens=12)
    greedy = merged.generate(
        torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    assert tuple(greedy[0, 3:].tolist()) == found[0].completion_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template

    with pytest.raises(ConfigError, match=r"FOLDER = .*merged': is not an empty folder"):
        export_run(tmp_path / "run", tmp_path / "merged", merge=True)
    with pytest.raises(ConfigError, match=r"model\.path = .*adapter without the model.*--merge"):
        check_folder(tmp_path / "adapter", "adapter")


def test_a_run_of_whole_weights_is_exported(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = with_trainer(tiny_config(tiny_model_dir, tmp_path / "run"), steps=1)
    assert train(cfg) == 0
    with pytest.raises(ConfigError, match="--merge = True: .* holds whole weights and no adapter"):
        export_run(tmp_path / "run", tmp_path / "model", merge=True)
    export_run(tmp_path / "run", tmp_path / "model", merge=False)
    written = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written
    assert not written & {"optimizer.pt", "state.pt"}
    with pytest.raises(ConfigError, match=r"RUN = .*empty': has no complete checkpoint"):
        export_run(tmp_path / "empty", tmp_path / "other", merge=False)
