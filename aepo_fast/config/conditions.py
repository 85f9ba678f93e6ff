"""When settings act: each says so where it is defined, and one rule refuses what does nothing.

The rule: a setting that differs from its default, while a condition that it needs does not hold,
is a ConfigError. Never refused are

- a value equal to the default, so that the resolved config.toml of a run loads again. A default
  that another setting chooses is the one of this configuration;
- settings of [aepo] with aepo.enabled = false, a switch that turns the section off whole: the same
  file is then run with and without the method;
- what does nothing only on some machine, model or data, which a configuration does not know.

So a shipped config leaves out what only one choice of a documented override reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from aepo_fast.config.errors import require


@dataclass(frozen=True)
class Needs:
    """A condition for a setting to act.

    keys: those that decide, of the setting's own section, or all of them as section.key. holds:
    takes their values. fix: the next step, a format string that takes the full keys. without: what
    is said of a condition that does not hold, another such; empty names the keys and values.
    """

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    fix: str
    without: str = ""

    @property
    def is_local(self) -> bool:
        """Whether the section alone decides."""
        return all("." not in key for key in self.keys)

    def reason(self, full_keys: list[str], values: list[Any]) -> str:
        """Why the setting does nothing."""
        pairs = zip(full_keys, values, strict=True)
        named = " and ".join(f"{key} = {value!r}" for key, value in pairs)
        return f"does nothing with {self.without.format(*full_keys) or named}"


def one_of(key: str, *values: object) -> Needs:
    """The condition that `key` has one of `values`."""
    fix = f"set {{}} = {' or '.join(map(repr, values))}"
    return Needs((key,), lambda value: value in values, fix)


def above_zero(key: str) -> Needs:
    """The condition that `key` is above 0."""
    return Needs((key,), lambda value: value > 0, "set {} above 0")


def setting(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    needs: Needs | tuple[Needs, ...] = (),
    chosen: Callable[[Any], Any] | None = None,
    older: dict[bool, Any] | None = None,
) -> Any:
    """The field of a setting that acts only while all of `needs` hold.

    chosen: gives the default that other settings of the section choose, from the section; the
    field's own is None then, and its type that of the value once it is settled. older: what the
    booleans that it had in earlier versions, and in their runs, mean today.
    """
    conditions = (needs,) if isinstance(needs, Needs) else needs
    metadata = {"needs": conditions, "chosen": chosen, "older": older}
    if default_factory is not dataclasses.MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def conditions_of(item: dataclasses.Field[Any]) -> tuple[Needs, ...]:
    """The conditions of a field, empty where it always acts."""
    return item.metadata.get("needs", ())


def settle_defaults(section: Any) -> None:
    """Give what was left out of a section the default that its other settings choose."""
    for item in fields(section):
        if item.metadata.get("chosen") and getattr(section, item.name) is None:
            settle(section, item.name, _default_of(section, item))


def settle_older(section: Any) -> None:
    """Give what has a boolean of an earlier version the value that it means today."""
    for item in fields(section):
        value = getattr(section, item.name)
        if was_boolean(item) and isinstance(value, bool):
            settle(section, item.name, item.metadata["older"][value])


def was_boolean(item: dataclasses.Field[Any]) -> bool:
    """Whether a field had booleans in earlier versions, which `settle_older` understands."""
    return bool(item.metadata.get("older"))


def settle(section: Any, name: str, value: Any) -> None:
    """Set a field of a frozen section that is being built, which nobody else has seen yet."""
    object.__setattr__(section, name, value)


def refuse_what_does_nothing(name: str, section: Any, whole: Any = None) -> None:
    """Raise ConfigError for a setting of a section that can have no effect.

    whole: the Config, for conditions on other sections; without it, those on this one are judged.
    What is not decided before a Config is built, and is None, is judged when it is.
    """
    for item in fields(section):
        value = getattr(section, item.name)
        if value == _default_of(section, item):
            continue
        for needs in conditions_of(item):
            if needs.is_local != (whole is None):
                continue
            full_keys = [key if "." in key else f"{name}.{key}" for key in needs.keys]
            values = [_value(section if whole is None else whole, key) for key in needs.keys]
            require(
                None in values or needs.holds(*values),
                f"{name}.{item.name}",
                value,
                needs.reason(full_keys, values),
                f"Leave it out, or {needs.fix.format(*full_keys)}",
            )


def refuse_across_sections(cfg: Any) -> None:
    """The same for all sections of a Config, by their conditions on each other."""
    for name, section in _sections("", cfg):
        refuse_what_does_nothing(name, section, cfg)


def _sections(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for item in value:
            yield from _sections(name, item)
    elif dataclasses.is_dataclass(value):
        yield name, value
        for item in fields(value):
            inner = f"{name}.{item.name}" if name else item.name
            yield from _sections(inner, getattr(value, item.name))


def _default_of(section: Any, item: dataclasses.Field[Any]) -> Any:
    chosen = item.metadata.get("chosen")
    if chosen is not None:
        return chosen(section)
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _value(of: Any, key: str) -> Any:
    for part in key.split("."):
        of = getattr(of, part)
    return of
