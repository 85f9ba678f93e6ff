"""GGUF files of Qwen2 and Gemma 3: the model that transformers reads from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quantize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GgufConfig,
    PreTrainedModel,
    Qwen2Config,
)

from aepo_fast.model.gguf import convert_gguf

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# By the names of llama.cpp's converter.
NAMES = {
    "qwen2": {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
}
NAMES["gemma3"] = NAMES["qwen2"] | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "a", "b", "c", "ab", "▁a", "▁ab"]


def tiny(architecture: str, *, tied: bool = True) -> PreTrainedModel:
    if architecture == "qwen2":
        rope = {"rope_type": "default", "rope_theta": 1e6}
        own = {"tie_word_embeddings": tied, "rope_parameters": rope}
        config: Any = Qwen2Config(vocab_size=300, **own, **SIZES)
    else:
        own = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
        config = Gemma3TextConfig(vocab_size=4 + 256 + len(WORDS), **own, **SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, one in model.named_parameters():
            if one.ndim == 1:  # norms and biases, which begin as 0 or 1
                torch.nn.init.normal_(one, mean=float("norm" in name), std=0.2)
            one.data = one.data.bfloat16().float()
    return model


def gguf_name(architecture: str, name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, index, own = module.split(".", 3)
    return f"blk.{index}.{NAMES[architecture][own]}.{kind}"


def write(path: Path, architecture: str, model: PreTrainedModel, tokenizer: Path) -> None:
    """A GGUF file of float32 tensors; of a tied Qwen2 also the head, in more bits than the rest."""
    config: Any = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *WORDS]
        kinds = [TokenType.CONTROL] * 4 + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(WORDS)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
        ends = {"bos": 2, "eos": 1, "pad": 0}
    else:
        saved = json.loads((tokenizer / "tokenizer.json").read_text())
        tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
        special = {token["content"] for token in saved["added_tokens"]}
        kinds = [TokenType.CONTROL if one in special else TokenType.NORMAL for one in tokens]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges([" ".join(merge) for merge in saved["model"]["merges"]])
        writer.add_chat_template((tokenizer / "chat_template.jinja").read_text())
        ends = {"bos": 1, "eos": 2, "pad": 0}
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(3 if architecture == "gemma3" else 0)
    for name, one in ends.items():
        getattr(writer, f"add_{name}_token_id")(one)
    embedding = None
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy()
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        if name == "model.embed_tokens.weight" and architecture == "qwen2":
            embedding = values
            packed = quantize(values, GGMLQuantizationType.Q4_0)
            writer.add_tensor("token_embd.weight", packed, raw_dtype=GGMLQuantizationType.Q4_0)
            continue
        writer.add_tensor(gguf_name(architecture, name), values)
    if embedding is not None and config.tie_word_embeddings:
        packed = quantize(embedding, GGMLQuantizationType.Q8_0)
        writer.add_tensor("output.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def through(values: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """What a file of few bits holds of a matrix, in bfloat16."""
    return torch.from_numpy(dequantize(quantize(values.numpy(), kind), kind)).bfloat16().float()


@pytest.mark.parametrize(
    ("architecture", "tied"), [("qwen2", True), ("qwen2", False), ("gemma3", True)]
)
def test_converted_models_are_the_originals_and_what_transformers_reads(
    tiny_model_dir: Path, tmp_path: Path, architecture: str, tied: bool
) -> None:
    model = tiny(architecture, tied=tied)
    write(tmp_path / "tiny.gguf", architecture, model, tiny_model_dir)
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(ours) is type(model)
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
    expected = model.state_dict()
    if architecture == "qwen2":
        kind = GGMLQuantizationType.Q8_0 if tied else GGMLQuantizationType.Q4_0
        expected["model.embed_tokens.weight"] = through(expected["model.embed_tokens.weight"], kind)
        if tied:
            expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="tiny.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    if tied and architecture == "qwen2":  # it takes the embedding of fewer bits
        theirs.get_input_embeddings().weight = ours.get_input_embeddings().weight
        theirs.get_output_embeddings().weight = ours.get_input_embeddings().weight
    if architecture == "gemma3":  # it scales attention as the released sizes do
        for layer in theirs.model.layers:
            layer.self_attn.scaling = 16**-0.5
    ids = torch.arange(5, 45)[None]  # beyond the window
    model.load_state_dict(expected)
    with torch.no_grad():
        found, truth, original = (one(input_ids=ids).logits for one in (ours, theirs, model))
    torch.testing.assert_close(found, original, rtol=1e-5, atol=1e-5)
    bound = 1e-5 if architecture == "gemma3" or tied else 0.05  # bfloat16 of what has 4 bits
    assert (found - truth).abs().max() < bound * truth.abs().max()
    assert ours.config.eos_token_id == {"gemma3": 1, "qwen2": 2}[architecture]


def test_converted_tokenizers_pad_on_the_left_and_keep_the_template(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    for architecture, text, length in (("qwen2", "What is 12?", None), ("gemma3", "ab ab", 2)):
        folder = tmp_path / architecture
        folder.mkdir()
        write(tmp_path / "tiny.gguf", architecture, tiny(architecture), tiny_model_dir)
        convert_gguf(tmp_path / "tiny.gguf", folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) == (length or len(ids))
        assert tokenizer.padding_side == "left"
        assert bool(tokenizer.chat_template) == (architecture == "qwen2")
