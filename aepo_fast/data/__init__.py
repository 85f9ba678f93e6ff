"""From a source to rendered prompts, and the order in which a run draws them."""

from __future__ import annotations

from typing import Any

_PUBLIC = ("Prompt",)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:  # only then: it imports torch, which a verifier's process does without
        from aepo_fast import samples

        return getattr(samples, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
