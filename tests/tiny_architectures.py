"""Models of two layers and some ten thousand weights of every architecture in docs/models.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_model import build_tiny_tokenizer

VOCAB = 301  # ragged: no tile of a kernel divides it
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.15,  # logits of a spread, so that a wrong scale or cap is seen
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
# Multi-head latent attention: keys and values are made of 16 numbers a token.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}


@dataclass(frozen=True)
class Architecture:
    """A row of the table: what people call it, transformers' model_type, and its own settings."""

    name: str
    kind: str
    settings: dict[str, Any]
    vllm_dtype: Literal["float32", "bfloat16"] = "float32"

    def build(self, folder: Path, seed: int = 0) -> Path:
        """Write random weights and the tiny tokenizer to a folder; returns it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config())
            with torch.no_grad():
                # What starts as all zeros or ones, as norms, biases and attention sinks, could be
                # left out without a difference.
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape)
        model.save_pretrained(folder)
        build_tiny_tokenizer().save_pretrained(folder)
        return folder

    def config(self) -> Any:
        """transformers' configuration, of those settings that this architecture has."""
        kind = CONFIG_MAPPING[self.kind]
        known = kind().to_dict().keys() | self.settings.keys()
        return kind(
            **{key: value for key, value in {**_COMMON, **self.settings}.items() if key in known}
        )


ARCHITECTURES = (
    Architecture("Llama 2, 3", "llama", {"attention_bias": False}),
    Architecture("Mistral", "mistral", {"sliding_window": 8}),
    Architecture("Mixtral", "mixtral", {**_EXPERTS, "sliding_window": None}),
    Architecture("Qwen2.5", "qwen2", {"tie_word_embeddings": True}),
    Architecture("Qwen3", "qwen3", {"tie_word_embeddings": True}),
    Architecture("Qwen3-MoE", "qwen3_moe", _EXPERTS),
    Architecture(
        "Qwen3-Next",
        "qwen3_next",
        {**_EXPERTS, **_DELTA_NET, "shared_expert_intermediate_size": 32},
        "bfloat16",
    ),
    Architecture("Qwen3.5", "qwen3_5_text", _DELTA_NET),
    Architecture("Gemma 2", "gemma2", {**_ALTERNATING, "query_pre_attn_scalar": 32}),
    Architecture("Gemma 3", "gemma3_text", {**_ALTERNATING, "query_pre_attn_scalar": 32}),
    Architecture(
        "Gemma 3 with vision",
        "gemma3",
        {
            "text_config": {**_COMMON, **_ALTERNATING, "query_pre_attn_scalar": 32},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
    Architecture(
        "Gemma 4",
        "gemma4_text",
        {
            **_ALTERNATING,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "final_logit_softcapping": 30.0,
        },
    ),
    Architecture(
        "Phi-2",
        "phi",
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 2, "intermediate_size": 256},
    ),
    Architecture(
        "Phi-3, Phi-4", "phi3", {"sliding_window": 8, "original_max_position_embeddings": 256}
    ),
    Architecture(
        "Granite",
        "granite",
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
    Architecture(
        "Granite-MoE",
        "granitemoe",
        {**_EXPERTS, "logits_scaling": 4.0, "attention_multiplier": 0.1},
    ),
    Architecture(
        "Granite 4 hybrid",
        "granitemoehybrid",
        {
            **_EXPERTS,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "logits_scaling": 4.0,
            "attention_multiplier": 0.1,
        },
    ),
    Architecture("Command R", "cohere", {"logit_scale": 0.25}),
    Architecture("Command R7B", "cohere2", {**_ALTERNATING, "logit_scale": 0.25}),
    Architecture("GPT-2", "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    Architecture("GLM-4", "glm4", {}),
    Architecture(
        "GLM-4.5",
        "glm4_moe",
        {
            **_EXPERTS,
            "head_dim": 32,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
            "partial_rotary_factor": 0.5,
        },
    ),
    Architecture("gpt-oss", "gpt_oss", {**_EXPERTS, **_ALTERNATING}),
    Architecture("DeepSeek-V2", "deepseek_v2", {**_EXPERTS, **_LATENT}),
    Architecture("DeepSeek-V3", "deepseek_v3", {**_EXPERTS, **_LATENT, "num_mtp_layers": 0}),
    Architecture("OLMo", "olmo", {}),
    Architecture("OLMo 2", "olmo2", {}),
    Architecture("OLMo 3", "olmo3", _ALTERNATING),
    Architecture("OLMoE", "olmoe", _EXPERTS),
    Architecture("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"]}),
    Architecture(
        "Falcon-H1",
        "falcon_h1",
        {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 16},
    ),
    Architecture("SmolLM3", "smollm3", {}),
)


def architecture(kind: str) -> Architecture:
    """The one of a model_type."""
    return next(one for one in ARCHITECTURES if one.kind == kind)
