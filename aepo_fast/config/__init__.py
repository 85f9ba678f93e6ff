"""The run's configuration: its sections, how TOML is read onto them, what "auto" becomes, and the
shipped presets.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ConfigError": "errors",
    "DataConfig": "data",
    "SourceConfig": "data",
    "AepoConfig": "sections",
    "CheckpointConfig": "sections",
    "Config": "sections",
    "EvalConfig": "sections",
    "LoggingConfig": "sections",
    "LoraConfig": "sections",
    "LossConfig": "sections",
    "ModelConfig": "sections",
    "RewardConfig": "sections",
    "RolloutConfig": "sections",
    "TrainerConfig": "sections",
    "dump_config": "toml",
    "load_config": "toml",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:  # only then: sections import torch, which a verifier's process does without
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
