"""Converts GGUF files of a few architectures to the Hugging Face layout, with `gguf`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, TokenType, dequantize
from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

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
_GEMMA3_TENSORS = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Of each architecture, the tokenizer that its files are known to have.
_TOKENIZERS = {"llama": "smollm", "qwen2": "qwen2", "gemma3": "default"}
_LOCAL_THETA = 10000.0  # of Gemma 3's layers with a window, which the files leave out
_LAYERS_PER_GLOBAL = 6  # one in so many of them has none


def convert_gguf(source: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of a GGUF file into an existing folder.

    Weights are stored as bfloat16: the models were released in it, its rounding (2^-9 relative) is
    far below the step of a 4-bit quantisation, and a bfloat16 copy for rollouts then starts out
    equal to the trained float32 weights. One tensor at a time is in memory. Raises ValueError for
    architectures or tokenizers that this function does not know.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture, splitter = fields["general.architecture"], fields["tokenizer.ggml.pre"]
    if _TOKENIZERS.get(architecture) != splitter:
        known = ", ".join(f"{one!r} with {other!r}" for one, other in _TOKENIZERS.items())
        raise ValueError(
            f"{source.name}: architecture {architecture!r} with tokenizer {splitter!r} cannot be "
            f"converted, only {known}. Convert it with transformers instead."
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    tied = is_tied(tensors)
    if tied and "output.weight" in tensors:  # in more bits
        tensors["token_embd.weight"] = tensors.pop("output.weight")
    config = model_config(fields, tied=tied)
    named = {hf_name(name, architecture): tensor for name, tensor in tensors.items()}
    write_weights(folder / "model.safetensors", named, config, f"Converting {source.name}")
    _write_json(folder / "config.json", config)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", generation)
    if architecture == "llama":
        tokenizer = smollm_tokenizer(fields)
    else:  # transformers' is right for these: the same ids as the released tokenizers give
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    write_tokenizer(tokenizer, fields, folder)


def is_tied(tensors: dict[str, ReaderTensor]) -> bool:
    """Whether head and embedding are one matrix: only one is there, or the same in other bits."""
    if "output.weight" not in tensors:
        return True
    pair = [tensors[name] for name in ("output.weight", "token_embd.weight")]
    head, embedding = (dequantize(tensor.data[:64], tensor.tensor_type) for tensor in pair)
    return bool(np.linalg.norm(head - embedding) < 0.3 * np.linalg.norm(head))


def model_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The config.json of a model from GGUF metadata."""
    architecture = fields["general.architecture"]
    own = {
        name.removeprefix(f"{architecture}."): value
        for name, value in fields.items()
        if name.startswith(f"{architecture}.")
    }
    theta = float(own["rope.freq_base"])
    eps = float(f"{own['attention.layer_norm_rms_epsilon']:.6g}")  # stored as float32
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "max_position_embeddings": own["context_length"],
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
    if architecture == "qwen2":
        del config["attention_bias"], config["mlp_bias"]  # its q, k and v always have one
        config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    elif architecture == "gemma3":
        del config["hidden_act"], config["mlp_bias"]
        kinds = "sliding_attention", "full_attention"
        layers = range(1, own["block_count"] + 1)
        config |= {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "head_dim": own["attention.key_length"],
            "query_pre_attn_scalar": own["attention.key_length"],
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": own["attention.sliding_window"],
            "layer_types": [kinds[number % _LAYERS_PER_GLOBAL == 0] for number in layers],
            "rope_local_base_freq": _LOCAL_THETA,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": one}
                for kind, one in zip(kinds, (_LOCAL_THETA, theta), strict=True)
            },
        }
    return config


def hf_name(name: str, architecture: str = "llama") -> str:
    """The Hugging Face name of a GGUF tensor, e.g. blk.3.attn_q.weight."""
    parts = name.split(".")
    if parts[0] == "blk":
        own = _GEMMA3_TENSORS if architecture == "gemma3" else {}
        return f"model.layers.{parts[1]}.{(_LAYER_TENSORS | own)[parts[2]]}.{parts[3]}"
    return f"{_TENSORS[parts[0]]}.{parts[1]}"


def write_weights(
    path: Path, tensors: dict[str, ReaderTensor], config: dict[str, Any], title: str
) -> None:
    """Write tensors, by their Hugging Face names, as a safetensors file of bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        shape = [int(size) for size in reversed(tensor.shape)]
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in _with_progress(tensors.values(), title):
            file.write(read_tensor(tensor, config).view(torch.uint8).numpy().data)


def read_tensor(tensor: ReaderTensor, config: dict[str, Any]) -> torch.Tensor:
    """Dequantise one tensor and undo what the file's writer did to it; returns bfloat16."""
    values = dequantize(tensor.data, tensor.tensor_type)
    kind = config["model_type"]
    if kind == "llama" and tensor.name.endswith("attn_q.weight"):
        values = split_halves(values, config["num_attention_heads"])
    elif kind == "llama" and tensor.name.endswith("attn_k.weight"):
        values = split_halves(values, config["num_key_value_heads"])
    elif kind == "gemma3_text" and tensor.name.endswith("norm.weight"):
        values = values - 1  # its norms multiply by 1 + weight
    return torch.from_numpy(np.array(values, order="C")).to(torch.bfloat16)


def split_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from rotary pairs (0, 1), (2, 3), ... to pairs (i, i + half).

    GGUF interleaves the two members of a rotary pair; Hugging Face keeps all first members before
    all second ones. weight: [num_heads * head_dim, in].
    """
    half = weight.shape[0] // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def smollm_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerBase:
    """SmolLM's byte-level BPE, in which every digit is a token of its own."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], folder: Path
) -> None:
    """Save a tokenizer with the file's chat template, where it has one; it pads on the left."""
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
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
