"""The run's configuration: its sections, how TOML is read onto them, what "auto" becomes, and the
shipped presets.
"""

from __future__ import annotations

from typing import Any

_PUBLIC = ("Config", "ConfigError", "DataConfig", "ModelConfig", "RewardConfig", "SourceConfig")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:  # only then: it imports torch, which a verifier's process does without
        from aepo_fast.config import sections

        return getattr(sections, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
