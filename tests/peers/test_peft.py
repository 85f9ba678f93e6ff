"""Heads under peft and transformers' Trainer, with the real peft and accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_kernels import linear_logprob
from aepo_kernels.integrations import backbone_of, head_arguments
from aepo_kernels.integrations.heads import compare_logits, relative_error
from aepo_kernels.integrations.tiny_models import tiny_model
from aepo_kernels.integrations.transformers import fuse_head
from tests.kernels.gemm_units import counted
from tests.peers.heads import token_ids

pytestmark = pytest.mark.peers


def adapted(name: str = "qwen2", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A tiny model with a random LoRA on its head and its queries, in eval mode."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"], **settings}
    model = get_peft_model(tiny_model(name), LoraConfig(**settings))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "granite", "phi"])
def test_a_lora_on_the_head_in_float64(name: str) -> None:
    target = "self_attn.dense" if name == "phi" else "o_proj"
    model, ids = adapted(name, torch.float64, target_modules=["lm_head", target]), token_ids()
    logprobs = torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
    truth = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    weight, arguments = head_arguments(model)
    assert arguments["lora_a"].shape[0] == 4 and arguments["lora_scale"] == 2.0
    hidden = backbone_of(model)(input_ids=ids).last_hidden_state[:, :-1]
    found = linear_logprob(hidden.flatten(0, 1), weight, ids[:, 1:].flatten(), **arguments)
    torch.testing.assert_close(found.logprob.view_as(truth), truth, rtol=1e-9, atol=1e-9)
    base = {key: value for key, value in arguments.items() if "lora" not in key}
    without = linear_logprob(hidden.flatten(0, 1), weight, ids[:, 1:].flatten(), **base)
    assert (without.logprob.view_as(truth) - truth).abs().max() > 0.1
    adapters = [p for n, p in model.named_parameters() if "lora" in n]
    grads = [
        torch.autograd.grad(value.sin().sum(), adapters)
        for value in (found.logprob.view_as(truth), truth)
    ]
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


def test_an_adapter_that_is_off_or_merged() -> None:
    model = adapted(use_rslora=True)
    assert head_arguments(model)[1]["lora_scale"] == 4.0
    with model.disable_adapter():
        assert "lora_a" not in head_arguments(model)[1]
        assert relative_error(*compare_logits(model)) < 1e-6
    model.merge_adapter()
    assert "lora_a" not in head_arguments(model)[1]
    assert relative_error(*compare_logits(model)) < 1e-6
    with model.disable_adapter(), pytest.raises(ValueError, match="off but still merged"):
        head_arguments(model)


def test_a_head_that_is_trained_whole() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model("llama"), config).eval()
    copy = model.get_output_embeddings().modules_to_save["default"]
    torch.nn.init.normal_(copy.weight)
    assert head_arguments(model)[0] is copy.weight
    assert relative_error(*compare_logits(model)) < 1e-6
    with model.disable_adapter():
        assert head_arguments(model)[0] is not copy.weight
        assert relative_error(*compare_logits(model)) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"Linear 'default': DoRA is no plain low-rank sum; train lm_head"),
        ({"lora_dropout": 0.1}, r"Linear 'default': lora_dropout 0.1 would be left out"),
        ({"lora_bias": True}, r"Linear 'default': its lora_B has a bias; set lora_bias=False"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_named(settings: dict, message: str) -> None:
    model = adapted(**settings).train()
    with pytest.raises(ValueError, match=message):
        head_arguments(model)
    if "lora_dropout" in settings:
        assert "lora_a" in head_arguments(model.eval())[1]


def test_several_adapters_and_other_methods_are_named() -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"Linear \['default', 'other'\]: .*activate one"):
        head_arguments(model)
    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    model = get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match="has no linear head but peft.tuners.ia3.layer.Linear"):
        head_arguments(model)


def test_a_head_without_an_adapter_is_frozen_and_takes_two_gemms() -> None:
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(tiny_model("gemma2"), LoraConfig(r=4, target_modules=["q_proj"]))
    adapter = [p for p in plain.parameters() if p.requires_grad]
    torch.nn.init.normal_(adapter[1])
    ids = token_ids()
    logprobs = torch.log_softmax(plain(input_ids=ids).logits[:, :-1], -1)
    wanted = logprobs.gather(2, ids[:, 1:, None])[..., 0].sin().sum()
    expected = torch.autograd.grad(wanted, adapter)
    fuse_head(plain)
    weight = head_arguments(plain)[0]
    with counted(ids[:, 1:].numel(), weight.shape[1], weight.shape[0]) as units:
        out = plain(input_ids=ids, labels=ids, fused_logprobs=True)
        found = torch.autograd.grad(out.logprobs.sin().sum(), adapter)
    assert not weight.requires_grad and units.total == pytest.approx(2)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_a_fused_model_under_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model, ids = fuse_head(tiny_model("gemma2")), token_ids()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    torch.nn.init.normal_(model.get_output_embeddings().lora_B["default"].weight)
    out = model(input_ids=ids, labels=ids, fused_logprobs=True)
    own = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.loss, own.loss)


def train(model: Any, folder: Path, fused: bool) -> list[tuple[float, float]]:
    """Losses and gradient norms of 3 steps of Trainer, each of two batches of unequal lengths."""
    from transformers import Trainer, TrainingArguments

    class FusedTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, num_items_in_batch: Any) -> Any:  # type: ignore[override]
            more = {"fused_logprobs": True} if fused else {}
            return model(**inputs, num_items_in_batch=num_items_in_batch, **more).loss

    rows = []
    for number in range(12):
        ids = token_ids(12)[number]
        rows.append({"input_ids": ids, "labels": ids.masked_fill(ids % (2 + number) == 0, -100)})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = FusedTrainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [(entry["loss"], entry["grad_norm"]) for entry in logs]


def test_trainer_s_loss_is_scaled_as_its_own(tmp_path: Path) -> None:
    own = train(tiny_model("granite"), tmp_path, fused=False)
    found = train(fuse_head(tiny_model("granite")), tmp_path, fused=True)
    assert len(found) == 3
    for left, right in zip(found, own, strict=True):
        assert left == pytest.approx(right, rel=1e-5)
