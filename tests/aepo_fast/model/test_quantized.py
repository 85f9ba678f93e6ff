"""Weights of 4 bits: computed with, trained over, sampled from, merged, and refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import LoraConfig, ModelConfig, TrainerConfig
from aepo_fast.model.cpu_layers import fused_kinds
from aepo_fast.model.load import load_model
from aepo_fast.model.lora import merge_adapter
from aepo_fast.model.policy import Policy
from aepo_fast.model.quantized import check_layers, check_quantization, dequantized, linears_4bit
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.samples import Completion, Request, Sample
from tests.tiny_run import a_machine

PROMPT, ANSWER = (1, 2, 3), (4, 5, 6, 7)
SAMPLES = [Sample(Completion(PROMPT, ANSWER, (0.0,) * 4, "stop", 1.0, 0), 0, False, 1.0)]
IDS = torch.tensor([PROMPT + ANSWER])


def settings(folder: Path, **changes: Any) -> ModelConfig:
    own: dict[str, Any] = {"gradient_checkpointing": False, "quantization": "nf4", **changes}
    targets = own.pop("targets", ("all-linear",))
    return ModelConfig(path=str(folder), lora=LoraConfig(rank=4, targets=targets), **own)


def quantized(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """The tiny model with 4-bit weights and an adapter that does something."""
    machine = a_machine(weights=dtype, compute=dtype)
    model = load_model(settings(folder, **changes), folder, machine, seed=3)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def truth_of(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A float32 model with the weights that 4-bit ones stand for, adapters beside them as leaves.

    What stands for 4 bits is read from their codes here, by the table of NF4 (arXiv 2305.14314).
    """
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    leaves: dict[str, Any] = {}
    wrapped = dict(model.named_modules())
    for name, layer in linears_4bit(model):
        own = name.removesuffix(".base_layer")
        with torch.no_grad():
            plain.get_submodule(own).weight.copy_(nf4(layer))
        if own == name:
            continue
        pair = [wrapped[f"{own}.lora_{one}.default"].weight.detach().clone() for one in "AB"]
        leaves[own] = [one.requires_grad_() for one in pair]
    return plain, leaves


# Appendix E of the paper.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023
1.0"""


def nf4(layer: Any) -> torch.Tensor:
    """[out, in]: codes of 4 bits, the first in the high ones, times the scale of their 64."""
    state, table = layer.weight.quant_state, torch.tensor([float(one) for one in NF4.split()])
    packed = layer.weight.data.flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1, 64)
    inner = state.state2  # scales in 8 bits, 256 of them with a scale of their own
    bytes_ = state.absmax.flatten().long()
    scales = inner.code[bytes_] * inner.absmax.repeat_interleave(256)[: len(bytes_)] + state.offset
    return (table[codes] * scales[:, None]).view(layer.out_features, layer.in_features)


def plain_logits(model: PreTrainedModel, leaves: dict[str, Any]) -> torch.Tensor:
    moved: dict[str, Any] = {
        f"{name}.weight": model.get_submodule(name).weight.detach() + 32 / 4 * b @ a
        for name, (a, b) in leaves.items()
    }
    output = torch.func.functional_call(model, moved, kwargs={"input_ids": IDS}, tie_weights=False)
    return output.logits


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "lm_head")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logprobs_and_gradients_are_those_of_what_the_bits_stand_for(
    tiny_model_dir: Path, targets: tuple[str, ...], checkpointing: bool
) -> None:
    model = quantized(tiny_model_dir, targets=targets, gradient_checkpointing=checkpointing)
    policy = Policy(model, a_machine(), TrainerConfig())
    (batch,) = policy.microbatches(SAMPLES, [0])
    output = policy.logprobs(batch)
    (output.logprob.sum() + output.entropy.sum()).backward()

    plain, leaves = truth_of(model, tiny_model_dir)
    if "lm_head" in targets:
        head: Any = model.lm_head
        pair = [getattr(head, f"lora_{one}")["default"].weight.detach().clone() for one in "AB"]
        leaves["lm_head"] = [one.requires_grad_() for one in pair]
    logp = plain_logits(plain, leaves)[0, 2:-1].log_softmax(-1)
    chosen = logp[torch.arange(4), torch.tensor(ANSWER)]
    (chosen.sum() - (logp.exp() * logp).sum()).backward()
    torch.testing.assert_close(output.logprob, chosen, rtol=1e-5, atol=1e-5)
    modules = dict(model.named_modules())
    for name, pair in leaves.items():
        for letter, leaf in zip("AB", pair, strict=True):
            found = modules[f"{name}.lora_{letter}.default"].weight.grad
            torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-5)
    assert all(one.grad is None for name, one in model.named_parameters() if "lora" not in name)


def test_head_and_embedding_stay_whole_and_nothing_but_the_adapter_is_trained(
    tiny_model_dir: Path,
) -> None:
    model = quantized(tiny_model_dir, torch.bfloat16)
    kinds = {name.rpartition(".")[0]: one for name, one in model.named_parameters()}
    assert len(list(linears_4bit(model))) == 14
    assert kinds["model.embed_tokens"].dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(one.requires_grad == ("lora_" in name) for name, one in model.named_parameters())
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    assert fused_kinds(model) == fused_kinds(load_plain(tiny_model_dir))


def load_plain(folder: Path) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(folder)), folder, a_machine())


def test_sampling_leaves_the_trainer_s_weights_as_they_lie(tiny_model_dir: Path) -> None:
    """On a CPU with bfloat16 bitsandbytes would lay them out anew, and no gradient would come."""
    model = quantized(tiny_model_dir, torch.bfloat16)
    machine = a_machine(weights=torch.bfloat16, compute=torch.bfloat16)
    before = [layer.weight.data.clone() for _, layer in linears_4bit(model)]
    engine = HfRollout(model, machine, eos_ids=(), batch_rows=4, pack=False)
    assert engine.model is model
    engine.generate([Request(PROMPT, 2, 1.0, 0)], max_new_tokens=4)
    for (_, layer), weight in zip(linears_4bit(model), before, strict=True):
        assert torch.equal(layer.weight.data, weight)
    policy = Policy(model, machine, TrainerConfig())
    (batch,) = policy.microbatches(SAMPLES, [0])
    policy.logprobs(batch).logprob.sum().backward()
    grads = [one.grad for name, one in model.named_parameters() if "lora_A" in name]
    assert len(grads) == 14 and all(one is not None and one.any() for one in grads)


def test_a_copy_that_samples_in_another_dtype_shares_the_4_bit_weights(
    tiny_model_dir: Path,
) -> None:
    model = quantized(tiny_model_dir)
    engine = HfRollout(
        model, a_machine(compute=torch.bfloat16), eos_ids=(), batch_rows=4, pack=False
    )
    assert not engine.shared
    for (_, own), (_, other) in zip(linears_4bit(model), linears_4bit(engine.model), strict=True):
        assert own is not other and own.weight is other.weight
    (found,) = engine.generate([Request(PROMPT, 8, 1.0, 0)], max_new_tokens=4)
    samples = [Sample(one, 0, False, 1.0) for one in found]
    values = Policy(model, a_machine(), TrainerConfig()).token_values(samples, range(8))
    sampled = torch.tensor([value for one in found for value in one.logprobs])
    assert (values.logprob - sampled).abs().mean() < 0.02
    # Only while it samples are they computed with in its dtype.
    assert {layer.compute_dtype for _, layer in linears_4bit(model)} == {torch.float32}


def test_merged_weights_are_those_that_were_computed_with(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = quantized(tiny_model_dir, targets=("q_proj", "down_proj", "lm_head"))
    codes = {name: nf4(layer) for name, layer in linears_4bit(model)}
    for name, layer in linears_4bit(model):
        torch.testing.assert_close(dequantized(layer).weight, codes[name], rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        truth = model(input_ids=IDS).logits
    merge_adapter(model)
    model.save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not list(linears_4bit(merged)) and not hasattr(merged.config, "quantization_config")
    for one in (model, merged):
        with torch.no_grad():
            torch.testing.assert_close(one(input_ids=IDS).logits, truth, rtol=1e-4, atol=1e-5)


def test_without_bitsandbytes_the_extra_is_named(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_quantization(ModelConfig(path="m"))
    said = r"'nf4': bitsandbytes is not installed\. pip install 'aepo-fast\[qlora\]'"
    with pytest.raises(ConfigError, match=said):
        load_model(settings(tiny_model_dir), tiny_model_dir, a_machine())


def test_a_device_without_bitsandbytes_is_refused(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the library has no such function\nmore")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # not reached
    with pytest.raises(ConfigError, match="does not run on cpu: the library has no such function"):
        load_model(settings(tiny_model_dir), tiny_model_dir, a_machine())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64),
            r"GPT2LMHeadModel holds 100% .* outside of linear layers, e\.g\. transformer\.h\.0",
        ),
        (
            Qwen2MoeConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_experts=8
            ),
            r"Qwen2MoeForCausalLM holds \d\d% .*experts",
        ),
    ],
)
def test_layers_that_would_silently_stay_whole_are_refused(config: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_layers(settings(Path("m")), config)


def test_a_model_that_is_quantised_already_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = quantized(tiny_model_dir)
    plain = load_plain(tiny_model_dir)
    plain.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path = .*quantised already \(bitsandbytes\)"):
        load_model(settings(tmp_path), tmp_path, a_machine())


def test_hub_code_is_not_fetched_when_bitsandbytes_is_imported() -> None:
    from aepo_fast.model import quantized as module

    before = sys.modules.get("kernels")
    module.import_bitsandbytes()
    assert sys.modules.get("kernels") is before
