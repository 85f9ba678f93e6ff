"""A trainer for Arbitrary Entropy Policy Optimization (AEPO) on top of `aepo_kernels`.

`from aepo_fast import Config, train, evaluate` runs from Python what the commands do.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__: str

_PUBLIC = {
    "__version__": ("aepo_kernels", "__version__"),
    "Config": ("aepo_fast.config.sections", "Config"),
    "ConfigError": ("aepo_fast.config.errors", "ConfigError"),
    "load_config": ("aepo_fast.config.toml", "load_config"),
    "train": ("aepo_fast.api", "train"),
    "evaluate": ("aepo_fast.cli.evaluate", "evaluate_model"),
}


def __getattr__(name: str) -> Any:
    # Not at import: with these comes torch, which a verifier and --help do without.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("aepo_fast", "aepo_kernels")):
            raise
        missing = f"aepo_fast.{name}: {error.name} is not installed; the kernels work without. "
        raise ImportError(missing + "Run: pip install 'aepo-fast[train]'") from error
