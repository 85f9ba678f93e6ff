"""Writes docs/configuration.md from the configuration's own classes.

`python docs/write_configuration.py`; a test says when the page is older than the classes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from aepo_fast.config.conditions import Needs, conditions_of
from aepo_fast.config.sections import Config
from aepo_fast.method.policy_losses import POLICY_LOSSES

PAGE = Path(__file__).parent / "configuration.md"
_HEAD = """# Configuration

These are all settings of a run, by section of its TOML file. `aepo-fast configs` lists the shipped
files. `--set section.key=value` overrides a setting on the command line.

- **default** is the value of a setting that is left out. Where another setting chooses the
  default, the column names that setting and each of its choices. *required* has no default.
- **acts with** names what a setting needs to have an effect. A setting that would do nothing is
  refused, and the error names what it needs.

*Main samples* are drawn in every step, at temperature 1. *Auxiliary samples* are drawn at AEPO's
temperature T, with `aepo.form = "resample"` only.

[Holding entropy](entropy.md) explains `[aepo]` and the entropy methods of `[loss]`.

This page is generated: `python docs/write_configuration.py`.
"""
_REQUIRED = ("model.path", "data.sources.name")


@dataclasses.dataclass(frozen=True)
class Section:
    """A table of the TOML file: its dotted name, its class and whether it may be repeated."""

    name: str
    kind: type
    repeated: bool = False

    @property
    def title(self) -> str:
        """The headline, as the file writes it."""
        if not self.name:
            return "Top level"
        return f"`[[{self.name}]]`" if self.repeated else f"`[{self.name}]`"


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for section in sections():
        parts.append(f"## {section.title}\n")
        if section.name:
            parts.append(_first_paragraph(section.kind) + "\n")
        else:
            parts.append("These keys stand above all tables.\n")
        parts.append(_table(section))
    return "\n".join(parts)


def sections(top: Section | None = None) -> Iterator[Section]:
    """The top level and all tables, in the order of their classes."""
    section = top or Section("", Config)
    yield section
    for item, hint in _fields(section.kind):
        inner, repeated = _inner(hint)
        if inner is not None:
            name = f"{section.name}.{item.name}" if section.name else item.name
            yield from sections(Section(name, inner, repeated))


def meanings(section: Section) -> dict[str, str]:
    """What the comments say of each setting of a section."""
    comments = _comments(section.kind)
    return {item.name: comments[item.name] for item, _ in _settings(section)}


def _fields(kind: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(kind)
    return [(item, hints[item.name]) for item in dataclasses.fields(kind)]


def _settings(section: Section) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a section that are no sections themselves."""
    return [(item, hint) for item, hint in _fields(section.kind) if _inner(hint)[0] is None]


def _inner(hint: Any) -> tuple[type | None, bool]:
    """The class of a field that is a table, and whether the field is a list of tables."""
    repeated = get_origin(hint) is tuple
    for one in get_args(hint) if repeated else (hint,):
        if dataclasses.is_dataclass(one) and isinstance(one, type):
            return one, repeated
    return None, False


def _first_paragraph(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def _table(section: Section) -> str:
    lines = ["| key | values | default | acts with | meaning |", "|---|---|---|---|---|"]
    meaning = meanings(section)
    for item, hint in _settings(section):
        needs = "; ".join(_condition(one, section.name) for one in conditions_of(item))
        cells = [f"`{item.name}`", _values(hint), _default(section, item), needs]
        cells.append(re.sub(r"docs/(\w+\.md)", r"[\1](\1)", meaning[item.name]))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _condition(needs: Needs, name: str) -> str:
    keys = [f"`{key}`" if "." in key else f"`{name}.{key}`" for key in needs.keys]
    words = needs.fix.format(*keys).removeprefix("set ").split("'")
    # Quoted values become code, as a TOML file has them.
    return "".join(f'`"{word}"`' if index % 2 else word for index, word in enumerate(words))


def _values(hint: Any) -> str:
    """What a setting may be: its choices, or its type."""
    members = [one for one in get_args(hint) if one is not NoneType]
    if get_origin(hint) is Literal:
        return ", ".join(_toml(one) for one in members)
    if get_origin(hint) in (Union, UnionType):
        return ", ".join(map(_values, members))
    if get_origin(hint) is dict:
        return "table"
    if get_origin(hint) is tuple:
        return "list of texts"
    return {str: "text", bool: "`true`, `false`", int: "integer", float: "number"}[hint]


def _default(section: Section, item: dataclasses.Field[Any]) -> str:
    if f"{section.name}.{item.name}" in _REQUIRED:
        return "*required*"
    if item.metadata.get("chosen"):
        return _chosen_default(section, item)
    default = item.default
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    return "see meaning" if default is None else _toml(default)


def _chosen_default(section: Section, item: dataclasses.Field[Any]) -> str:
    """The default for each choice of the setting that decides, where the default has an effect."""
    chosen = item.metadata["chosen"]
    read = _read_by(chosen)
    if read == "policy_loss":  # what `policy` names
        key, values = "policy", dict(POLICY_LOSSES)
    else:
        hint = get_type_hints(section.kind)[read]
        (literal,) = [one for one in (hint, *get_args(hint)) if get_origin(one) is Literal]
        key, values = read, {choice: choice for choice in get_args(literal)}
    needs = [one for one in conditions_of(item) if one.keys == (key,)]
    found: dict[str, list[str]] = {}
    for choice, value in values.items():
        default = chosen(SimpleNamespace(**{read: value}))
        if default is not None and all(one.holds(choice) for one in needs):
            found.setdefault(_toml(default), []).append(choice)
    texts = [f"{default} ({', '.join(choices)})" for default, choices in found.items()]
    return f"by `{key}`: {', '.join(texts)}"


def _read_by(chosen: Any) -> str:
    """The one setting that the choice of a default reads."""

    class Probe:
        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    try:
        chosen(Probe())
    except KeyError as error:
        return error.args[0]
    raise ValueError("the default is chosen by no setting")


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"`[{', '.join(_toml(one).strip('`') for one in value)}]`"
    return (
        f"`{tomli_w.dumps({'x': value}).removeprefix('x = ').strip()}`" if value != {} else "`{}`"
    )


def _comments(kind: type) -> dict[str, str]:
    """Field -> what the comments above and behind it say.

    A comment above a blank line belongs to no field.
    """
    source = inspect.getsource(kind)
    lines = source.splitlines()
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, said = node.lineno - 1, []
            while lines[first - 1].strip().startswith("#"):
                first -= 1
                said.insert(0, lines[first].strip().lstrip("# "))
            behind = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
            if "#" in behind:
                said.append(behind.split("#", 1)[1].strip())
            found[node.target.id] = _sentence(" ".join(said))
    return found


def _sentence(text: str) -> str:
    is_word = text.split(" ")[0].rstrip(",;:").replace("-", "").isalpha() and text[:2].islower()
    text = text[:1].upper() + text[1:] if is_word else text
    return text if not text or text.endswith(".") else f"{text}."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
