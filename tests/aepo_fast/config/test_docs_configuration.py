"""docs/configuration.md against the classes of the configuration."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.sections import Config, ModelConfig

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "docs" / "write_configuration.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_configuration", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def settings_of(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Table and key of every setting, from a built configuration."""
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        nested = inner[0] if isinstance(inner, tuple) and inner else inner
        if dataclasses.is_dataclass(nested):
            yield from settings_of(nested, f"{name}.{item.name}" if name else item.name)
        else:
            yield name, item.name


def test_the_page_is_what_the_generator_gives_now(generator: ModuleType) -> None:
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), (
        "docs/configuration.md is older than the classes: python docs/write_configuration.py"
    )


def test_every_setting_has_a_row(generator: ModuleType) -> None:
    data = DataConfig(sources=(SourceConfig(name="prompts.jsonl"),))
    built = set(settings_of(Config(model=ModelConfig(path="somewhere"), data=data)))
    shown = set()
    for part in generator.page().split("\n## ")[1:]:
        title, *lines = part.splitlines()
        name = "" if title == "Top level" else title.strip("`[]")
        shown |= {(name, line.split("`")[1]) for line in lines if line.startswith("| `")}
    assert shown == built and len(shown) > 100


def test_every_setting_has_a_meaning(generator: ModuleType) -> None:
    for section in generator.sections():
        for key, meaning in generator.meanings(section).items():
            assert len(meaning.split()) > 2, f"[{section.name}] {key} has no comment"


def test_a_default_that_another_setting_chooses_names_it(generator: ModuleType) -> None:
    page = generator.page()
    assert (
        "| by `policy`: `0.2` (grpo, dr_grpo, sapo), `0.28` (dapo, cispo), `0.0004` (gspo) |"
        in page
    )
    assert "| by `controller`: `0.05` (pi) |" in page
    assert "| by `correction`: `0.0` (sequence_mask), `0.5` (icepop) |" in page


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    copy = tmp_path / "docs" / SCRIPT.name
    copy.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, copy], check=True, capture_output=True)
    written = (tmp_path / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
