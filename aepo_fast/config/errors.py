"""Checks of settings: what fails says the key, the value, the reason and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot run: says the key, the value, the reason and the next step."""

    def __init__(self, key: str, value: object, reason: str, fix: str) -> None:
        self.key, self.value, self.reason, self.fix = key, value, reason, fix
        super().__init__(f"{key} = {value!r}: {reason}. {fix}.")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[object, ...]]:
        return ConfigError, (self.key, self.value, self.reason, self.fix)


def require(ok: bool, key: str, value: object, reason: str, fix: str) -> None:
    """Raise ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(key, value, reason, fix)


def require_positive(section: str, obj: object, *names: str) -> None:
    """Raise ConfigError unless the settings `names` of a section are above 0."""
    for name in names:
        value = getattr(obj, name)
        require(value > 0, f"{section}.{name}", value, "must be above 0", "Set a positive number")


def require_not_negative(section: str, obj: object, *names: str) -> None:
    """Raise ConfigError unless the settings `names` of a section are 0 or more."""
    for name in names:
        value = getattr(obj, name)
        require(value >= 0, f"{section}.{name}", value, "must not be negative", "Set 0 or more")


def suggest(name: object, known: Iterable[str]) -> str:
    """The next step after an unknown name: the nearest known one, or all of them."""
    names = [str(item) for item in known]
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}" if near else f"Known: {', '.join(sorted(names))}"
