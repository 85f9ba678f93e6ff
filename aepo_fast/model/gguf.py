"""Converts a Llama-architecture GGUF file to the Hugging Face layout, with the `gguf` library."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, TokenType, dequantize
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Part of the cache folder's name: raise it when the output of convert_gguf changes.
CONVERSION_VERSION = 1

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(source: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of a GGUF file into an existing folder.

    Weights are stored as bfloat16: the models were released in it, its rounding (2^-9 relative) is
    far below the step of a 4-bit quantisation, and a bfloat16 copy for rollouts then starts out
    equal to the trained float32 weights. Raises ValueError for architectures or tokenizers that
    this function does not know.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture, splitter = fields["general.architecture"], fields["tokenizer.ggml.pre"]
    if architecture != "llama" or splitter != "smollm":
        raise ValueError(
            f"{source.name}: architecture {architecture!r} with tokenizer {splitter!r} cannot be "
            "converted, only 'llama' with 'smollm'. Convert it with transformers instead."
        )
    names = {tensor.name for tensor in reader.tensors}
    config = llama_config(fields, tied="output.weight" not in names)
    weights = {}
    for tensor in _with_progress(reader.tensors, f"Converting {source.name}"):
        weights[hf_name(tensor.name)] = read_tensor(tensor, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", generation)
    write_tokenizer(fields, folder)


def llama_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The config.json of a Llama model from GGUF metadata."""
    theta = float(fields["llama.rope.freq_base"])
    eps = float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}")  # stored as float32
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": eps,
        # transformers 5 reads the first form, most other readers the second and otherwise assume
        # 10000 without a word.
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor, e.g. blk.3.attn_q.weight."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.{parts[3]}"
    return f"{_TENSORS[parts[0]]}.{parts[1]}"


def read_tensor(tensor: ReaderTensor, config: dict[str, Any]) -> torch.Tensor:
    """Dequantise one tensor and undo the file's rotary layout of q and k; returns bfloat16."""
    values = dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith("attn_q.weight"):
        values = split_halves(values, config["num_attention_heads"])
    elif tensor.name.endswith("attn_k.weight"):
        values = split_halves(values, config["num_key_value_heads"])
    return torch.from_numpy(np.array(values, order="C")).to(torch.bfloat16)


def split_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from rotary pairs (0, 1), (2, 3), ... to pairs (i, i + half).

    GGUF interleaves the two members of a rotary pair; Hugging Face keeps all first members before
    all second ones. weight: [num_heads * head_dim, in].
    """
    half = weight.shape[0] // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Rebuild SmolLM's byte-level BPE, in which every digit is a token of its own, and save it."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    bpe.decoder = decoders.ByteLevel()
    pairs = list(zip(tokens, kinds, strict=True))
    control = [token for token, kind in pairs if kind == TokenType.CONTROL]
    user = [token for token, kind in pairs if kind == TokenType.USER_DEFINED]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in user])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    tokenizer.save_pretrained(folder)
    saved = folder / "tokenizer_config.json"
    settings = json.loads(saved.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # "TokenizersBackend" is 5.x only
    settings["padding_side"] = "left"
    _write_json(saved, settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _with_progress(tensors: Iterable[ReaderTensor], title: str) -> Iterator[ReaderTensor]:
    console = Console(stderr=True)
    if not console.is_terminal:
        print(title, file=sys.stderr)
    yield from track(list(tensors), title, console=console, disable=not console.is_terminal)
