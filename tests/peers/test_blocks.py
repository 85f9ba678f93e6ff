"""The python blocks of README and docs that need a published peer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aepo_kernels.integrations import openrlhf, trl, verl
from tests.page_names import Block, blocks, names

pytestmark = pytest.mark.peers
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]


def of(peer: str) -> list[Block]:
    """The blocks that need a peer; there is at least one."""
    found = [block for block in BLOCKS if block.needs == peer]
    assert found
    return found


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    for peer in (trl, verl, openrlhf):
        peer.uninstall()


@pytest.mark.parametrize("block", of("trl"))
def test_trl(
    block: Block, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl as real
    from datasets import Dataset

    def short(folder: str, **settings: Any) -> Any:
        small = {"max_steps": 2, "max_completion_length": 8, "use_cpu": True, "bf16": False}
        return real_config(folder, **{**settings, **small})

    real_config = real.GRPOConfig
    monkeypatch.setattr(real, "GRPOConfig", short)
    prompts = Dataset.from_list([{"prompt": f"what is {number}"} for number in range(16)])
    scope = {"folder": str(tmp_path), "model_path": str(tiny_model_dir), "prompts": prompts}
    scope |= names()
    exec(block.text, scope)
    assert scope["trainer"].state.global_step == 2


@pytest.mark.parametrize("block", of("verl"))
def test_verl(block: Block, verl_packages: None, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block.text, names())
    assert "linear_cross_entropy -> aepo_kernels" in capsys.readouterr().out


@pytest.mark.parametrize("block", of("openrlhf"))
def test_openrlhf(block: Block, actor_class: Any, capsys: pytest.CaptureFixture[str]) -> None:
    scope = names()
    exec(block.text, scope)
    scope["setup"]()
    assert "Actor.forward -> aepo_kernels" in capsys.readouterr().out
