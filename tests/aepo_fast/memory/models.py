"""Settings of models that the tests plan, without any weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, Qwen2Config

# Of Qwen2.5-1.5B.
QWEN = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}


def qwen(**changes: Any) -> PretrainedConfig:
    """The settings of Qwen2.5-1.5B."""
    return Qwen2Config(**{**QWEN, **changes})


def small(**changes: Any) -> PretrainedConfig:
    """The settings of a model of six layers."""
    return Qwen2Config(**{**SMALL, **changes})


def write_config(folder: Path, settings: dict[str, Any]) -> Path:
    """A folder that holds a config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **settings}
    (folder / "config.json").write_text(json.dumps(content))
    return folder
