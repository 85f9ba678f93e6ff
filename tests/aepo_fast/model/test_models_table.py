"""docs/models.md against its checks: a few of its rows here, all of them by make test-models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.model_checks import CHECKS, VLLM
from tests.tiny_architectures import ARCHITECTURES, architecture

ROOT = Path(__file__).parents[3]
# Linear attention; sinks and windows; latent attention and experts; a softcap; a scale of logits.
KINDS = ("qwen3_5_text", "gpt_oss", "deepseek_v3", "gemma2", "granite")
# Steps of training take seconds: test_architectures has them.
COLUMNS = tuple(name for name in CHECKS if name != "hf rollouts, resume")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_models", ROOT / "docs" / "write_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_was_found(generator: ModuleType) -> None:
    record = generator.read_record()
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(record), (
        "docs/models.md is older than docs/models.json: python docs/write_models.py"
    )
    assert list(record["found"]) == [one.kind for one in ARCHITECTURES]
    for found in record["found"].values():
        assert set(CHECKS) <= set(found) <= {*CHECKS, VLLM}
        assert not found["padded"] and not found["saved"] and not found["bfloat16"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_says_what_its_checks_find(kind: str, generator: ModuleType, tmp_path: Path) -> None:
    one = architecture(kind)
    folder = one.build(tmp_path / kind)
    found = {name: generator.plain(CHECKS[name](one, folder)) for name in COLUMNS}
    recorded = generator.read_record()["found"][kind]
    assert found == {name: recorded[name] for name in COLUMNS}
