"""docs/entropy.md against the code: TOML that loads, settings that exist, current defaults."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from aepo_fast.config import sections
from aepo_fast.config.method import CONTROLLER_DEFAULTS, EntropyMethod, Form
from aepo_fast.config.toml import load_config

PAGE = (Path(__file__).parents[3] / "docs" / "entropy.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```toml\n(.*?)^```", PAGE, flags=re.M | re.S)
REST = """
[model]
path = "somewhere"
[[data.sources]]
name = "prompts.jsonl"
"""
SECTIONS = {
    "aepo": sections.AepoConfig,
    "loss": sections.LossConfig,
    "rollout": sections.RolloutConfig,
    "trainer": sections.TrainerConfig,
}


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}")[1].split("\n## ")[0]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_load(tmp_path: Path, snippet: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(snippet + REST)
    load_config(path, [])


def test_three_snippets_show_the_default_the_published_and_a_rival() -> None:
    assert len(SNIPPETS) == 3
    assert "observer" in SNIPPETS[0] and "published" in SNIPPETS[1] and "loss" in SNIPPETS[2]


def test_the_first_snippet_is_the_default(tmp_path: Path) -> None:
    paths = tmp_path / "snippet.toml", tmp_path / "default.toml"
    for path, text in zip(paths, (SNIPPETS[0], ""), strict=True):
        path.write_text(text + REST)
    assert load_config(paths[0], []) == load_config(paths[1], [])


def test_settings_named_exist() -> None:
    named = set(re.findall(r"`(aepo|loss|rollout|trainer)\.(\w+)", PAGE))
    assert named
    for part, name in named:
        assert name in {field.name for field in fields(SECTIONS[part])}, f"{part}.{name}"
    rivals = set(re.findall(r"`(\w+_\w+)`", section("Rivals")))
    known = {field.name for field in fields(sections.LossConfig)} | set(get_args(EntropyMethod))
    assert rivals - set(get_args(Form)) <= known


def test_all_forms_controllers_and_rivals_are_listed_with_their_defaults() -> None:
    for form in get_args(Form):
        assert re.search(rf"^\| `{form}`", section("The term"), flags=re.M), form
    for method in set(get_args(EntropyMethod)) - {"none"}:
        assert re.search(rf"^\| [^|]+ \| `{method}` \|", section("Rivals"), flags=re.M), method
    for name, defaults in CONTROLLER_DEFAULTS.items():
        (row,) = re.findall(rf"^\| `{name}`.*", section("The controllers"), flags=re.M)
        cells = [cell.strip(" `") for cell in row.strip("|").split("|")][2:]
        alpha = "1/64" if defaults["alpha"] == 1 / 64 else f"{defaults['alpha']:g}"
        low, high = defaults["temperature_min"], defaults["temperature_max"]
        gains = [str(defaults.get(key, "-")) for key in ("gain", "integral_gain")]
        assert cells == [defaults["form"], alpha, f"{low}, {high}", *gains], name
