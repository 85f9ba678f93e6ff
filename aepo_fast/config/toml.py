"""Reads TOML onto the dataclasses of `config`, applies overrides and writes the result back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import tomli_w

from aepo_fast.config.conditions import was_boolean
from aepo_fast.config.errors import ConfigError, suggest
from aepo_fast.config.sections import Config
from aepo_fast.config.shipped import config_path


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a file or shipped name, with `section.key=value` overrides.

    Values of overrides are TOML; what is no TOML is taken as a string. Raises ConfigError for
    unknown keys (with the nearest name), wrong types and values that cannot run.
    """
    path = config_path(name_or_path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors may add a mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("CONFIG", str(path), f"is not TOML: {error}", "Correct it") from error
    return _overridden(data, overrides)


def with_overrides(cfg: Config, overrides: Sequence[str]) -> Config:
    """The configuration with `section.key=value` overrides, as `load_config` takes them."""
    return _overridden(_plain(dataclasses.asdict(cfg)), overrides)


def _overridden(data: dict[str, Any], overrides: Sequence[str]) -> Config:
    for override in overrides:
        _apply(data, override)
    return _build(Config, data, "")


def dump_config(cfg: Config) -> str:
    """The configuration as TOML that `load_config` reads back to an equal one."""
    return tomli_w.dumps(_plain(dataclasses.asdict(cfg)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        reason = "is not of the form section.key=value"
        raise ConfigError("--set", override, reason, "Write e.g. --set trainer.lr=1e-6")
    node: Any = data
    for part in parts[:-1]:
        if isinstance(node, list):
            node = _item(node, part, override)
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            reason = f"{part!r} is a value, not a section"
            raise ConfigError("--set", override, reason, "Name a key of a section")
    if isinstance(node, list):
        reason = "names an item of a list, not one of its keys"
        raise ConfigError("--set", override, reason, "Write e.g. data.sources.0.size=64")
    node[parts[-1]] = _value(text.strip())


def _item(items: list[Any], part: str, override: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        reason = f"{part!r} is no index into a list of {len(items)}"
        raise ConfigError("--set", override, reason, "Count from 0")
    return items[int(part)]


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: type[Any], data: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    older = {field.name for field in dataclasses.fields(cls) if was_boolean(field)}
    for key, value in data.items():
        if key not in hints:
            where = f"[{prefix.rstrip('.')}]" if prefix else "the configuration"
            reason = f"{where} has no such key"
            fix = _other_section(key, hints) or suggest(key, hints)
            if key == "min_p":  # of other trainers
                reason = "keeps any number of tokens, and the loss needs the ids of all of them"
                fix = "Use rollout.top_k, with rollout.top_p"
            raise ConfigError(prefix + key, value, reason, fix)
    for field in dataclasses.fields(cls):
        missing = (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in data and (field.default, field.default_factory) == missing:
            # A section without defaults: built empty, it says itself what it needs.
            data = {**data, field.name: {}}
    values = {
        key: value
        if key in older and isinstance(value, bool)
        else _convert(value, hints[key], prefix + key)
        for key, value in data.items()
    }
    return cls(**values)


def _other_section(key: str, hints: dict[str, Any]) -> str | None:
    """The advice for a key that stands in the wrong section, unless a near name is in this one."""
    if difflib.get_close_matches(key, hints, n=1):
        return None
    for section, cls in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(cls) and key in typing.get_type_hints(cls):
            return f"Did you mean {section}.{key}"
    return None


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`; integers are accepted where floats are meant, nothing else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(key, value, "is a section, not a value", f"Write [{key}]")
        return _build(typing.cast(type[Any], hint), value, key + ".")
    if origin is tuple:
        if not isinstance(value, list):
            tables = dataclasses.is_dataclass(arguments[0])
            kind, fix = (
                ("a list of tables", f"Write [[{key}]]")
                if tables
                else ("a list", f"Write [{value!r}]")
            )
            raise ConfigError(key, value, f"must be {kind}", fix)
        return tuple(
            _convert(item, arguments[0], f"{key}.{index}") for index, item in enumerate(value)
        )
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ConfigError(key, value, "is not one of its values", suggest(value, arguments))
        return value
    if origin in (types.UnionType, typing.Union):
        members = [argument for argument in arguments if argument is not type(None)]
        # Of choices or a number, whatever is no number is meant to be a choice.
        fits = [member for member in members if typing.get_origin(member) or type(value) is member]
        return _convert(value, fits[-1] if fits else members[0], key)
    if origin is dict:
        hint = dict
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(key, value, "is not a number", "Give it a number")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        reason = f"is of type {type(value).__name__}"
        raise ConfigError(key, value, reason, f"Give it a value of type {hint.__name__}")
    return value
