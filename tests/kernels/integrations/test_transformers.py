"""`fuse_head`: loss, log-probs and entropies of transformers models, beside the models' own."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from aepo_kernels.integrations.tiny_models import MODELS, VOCAB, tiny_model
from aepo_kernels.integrations.transformers import (
    FusedLogprobOutput,
    fuse_head,
    is_fused,
    unfuse_head,
)


def batch() -> dict[str, torch.Tensor]:
    """Two sequences of 9 tokens, the first padded; prompts and padding are unlabelled."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def expected(model: Any, inputs: dict[str, torch.Tensor], temperature: float = 1.0) -> list:
    """Log-probs and entropies of labelled tokens from the model's own logits, 0 elsewhere."""
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    logprobs = torch.log_softmax(model(**plain).logits[:, :-1] / temperature, -1)
    labels = inputs["labels"][:, 1:]
    logprob = logprobs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return [value.masked_fill(labels == -100, 0) for value in (logprob, entropy)]


@pytest.mark.parametrize("name", MODELS)
def test_loss_logprobs_and_entropy_are_the_model_s_own(name: str) -> None:
    model, inputs = tiny_model(name, dtype=torch.float64), batch()
    logprobs, entropy = expected(model, inputs)
    loss = model(**inputs).loss
    truth = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert fuse_head(model) is model
    out = model(**inputs, fused_logprobs=True)
    assert isinstance(out, FusedLogprobOutput) and out.logprobs.shape == (2, 8)
    torch.testing.assert_close(out.logprobs, logprobs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-9, atol=1e-9)
    # The models compute their own loss in float32.
    torch.testing.assert_close(out.loss, loss.double(), rtol=1e-6, atol=0)
    grads = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
    for left, right in zip(grads, truth, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_num_items_in_batch_divides_the_loss_as_trainer_wants_it() -> None:
    model, inputs = fuse_head(tiny_model("llama")), batch()
    for count in (3, torch.tensor(7)):
        own = model(**inputs, num_items_in_batch=count).loss
        out = model(**inputs, num_items_in_batch=count, fused_logprobs=True)
        torch.testing.assert_close(out.loss, own)


def test_temperatures_of_the_model_of_the_call_and_of_tokens() -> None:
    model, inputs = tiny_model("gemma2", dtype=torch.float64), batch()
    truth = expected(model, inputs, 0.7)[0]
    fuse_head(model, temperature=0.7)
    torch.testing.assert_close(model(**inputs, fused_logprobs=True).logprobs, truth)
    each = torch.full((2, 9), 0.7)
    each[:, -1] = 99.0  # the last token predicts nothing
    fuse_head(model)
    for temperature in (0.7, torch.tensor(0.7).double(), each.double(), each[:, :1].double()):
        out = model(**inputs, fused_logprobs=True, temperature=temperature)
        torch.testing.assert_close(out.logprobs, truth)


def test_labels_that_are_shifted_already() -> None:
    model, inputs = fuse_head(tiny_model("gpt2")), batch()
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    out = model(**inputs, fused_logprobs=True)
    other = model(
        inputs["input_ids"],
        None,
        inputs["attention_mask"],
        shift_labels=shifted,
        fused_logprobs=True,
    )
    assert other.logprobs.shape == (2, 9)
    torch.testing.assert_close(other.logprobs[:, :-1], out.logprobs)
    torch.testing.assert_close(other.loss, out.loss)


def test_no_labels_and_nothing_labelled() -> None:
    model, inputs = fuse_head(tiny_model("llama")), batch()
    with pytest.raises(ValueError, match="labels = None: there is nothing to score"):
        model(inputs["input_ids"], fused_logprobs=True)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    out = model(**inputs, fused_logprobs=True)
    out.loss.backward()
    assert out.loss == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_a_mixture_of_experts_adds_its_balance_loss() -> None:
    model, inputs = tiny_model("qwen3_moe"), batch()
    model.config.output_router_logits = True
    own = model(**inputs)
    out = fuse_head(model)(**inputs, fused_logprobs=True)
    torch.testing.assert_close(out.loss, own.loss)
    torch.testing.assert_close(out.aux_loss, own.aux_loss)
    assert out.aux_loss > 0
    without = model(**inputs, fused_logprobs=True, output_router_logits=False)
    assert without.aux_loss is None and without.loss < out.loss


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_runs_its_own_weights(copied: Any) -> None:
    model, inputs = fuse_head(tiny_model("cohere"), temperature=0.5), batch()
    before = model(**inputs, fused_logprobs=True).logprobs.detach()
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert is_fused(twin) and type(twin) is type(model)
    torch.testing.assert_close(twin(**inputs, fused_logprobs=True).logprobs, before)
    assert twin(**inputs).logits.abs().max() > 0 == model(**inputs).logits.abs().max()


def test_everything_else_stays_and_unfuse_puts_it_back(tmp_path: Any) -> None:
    model, inputs = tiny_model("qwen2"), batch()
    kind, signature = type(model), inspect.signature(model.forward)
    logits = model(**inputs).logits
    generated = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    fuse_head(model)
    fuse_head(model)
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(**inputs).logits, logits)
    again = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert torch.equal(again, generated)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is kind and not is_fused(loaded)
    unfuse_head(unfuse_head(model))
    assert type(model) is kind and not is_fused(model)


def test_the_check_finds_a_setting_that_nobody_knows() -> None:
    model = tiny_model("cohere").train()
    model.config.logit_scale = None
    with pytest.raises(ValueError, match="CohereForCausalLM: its logits are not those of its head"):
        fuse_head(model)
    assert not is_fused(model) and model.training
    assert is_fused(fuse_head(model, check=False))


def test_the_check_ignores_dropout_and_allows_for_half_precision() -> None:
    model = tiny_model("gpt2").train()
    assert model.config.resid_pdrop > 0
    assert fuse_head(model).training
    assert is_fused(fuse_head(tiny_model("granite", dtype=torch.bfloat16)))


def test_autocast_multiplies_in_its_dtype() -> None:
    model, inputs = fuse_head(tiny_model("llama")), batch()
    plain = model(**inputs, fused_logprobs=True).logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**inputs, fused_logprobs=True).logprobs
    assert out.dtype == torch.float32 and 1e-4 < (out - plain).abs().max() < 0.2


def test_what_cannot_be_fused_is_named() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder"):
        fuse_head(T5ForConditionalGeneration(T5Config(vocab_size=16, **sizes)))
    model = tiny_model("llama")
    model.forward = model.forward
    with pytest.raises(ValueError, match="LlamaForCausalLM has a forward of its own"):
        fuse_head(model)
    with pytest.raises(ValueError, match="logits_to_keep: there are no logits"):
        fuse_head(tiny_model("phi"))(**batch(), logits_to_keep=1, fused_logprobs=True)
