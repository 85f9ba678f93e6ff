"""Twelve tiny models, one for each kind of head that transformers' language models have."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 131  # divides nothing
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "tie_word_embeddings": True}
# name: (model_type, what differs from the sizes above)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}),
    "gemma3": ("gemma3_text", {"final_logit_softcapping": 2.0, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, **_EXPERTS}),
    "gpt2": ("gpt2", _GPT2),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "cohere": ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "phi": ("phi", {}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.5}),
}


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A randomly initialised model of MODELS in eval mode, with logits of a spread near 2.

    Its head has weights, and where it has one a bias, that differ from zero.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, changes = MODELS[name]
    known = CONFIG_MAPPING[kind]().to_dict()
    settings = {key: value for key, value in {**_SIZES, **changes}.items() if key in known}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[kind](**settings)
        plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_config(config, **plain).eval()
        head = model.get_output_embeddings()
        torch.nn.init.normal_(head.weight, std=0.35)
        if head.bias is not None:
            torch.nn.init.normal_(head.bias)
    return model.to(dtype)
