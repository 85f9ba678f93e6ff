"""The README and the pages of docs: links that lead somewhere, code and TOML that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.main import get_group

from aepo_fast.cli.app import app
from aepo_fast.config.shipped import shipped_configs
from aepo_fast.config.toml import load_config
from aepo_kernels.integrations import open_instruct, prime_rl
from tests.kernels.integrations.test_unpublished import put_open_instruct, put_prime_rl
from tests.page_names import blocks, names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def snippets(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language; "" for those without one."""
    return [block.text for block in blocks(page) if block.language == language]


def anchors(page: Path) -> set[str]:
    """What a link to a headline of the page ends with."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT).as_posix()}" in README, page.name


def test_the_readme_s_configuration_loads(tmp_path: Path) -> None:
    (text,) = snippets(README, "toml")
    assert len(text.splitlines()) == 12
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    cfg = load_config(str(tmp_path / "mine.toml"))
    assert cfg.output_dir == "runs/mine" and cfg.reward.function == "math_verify"


def test_the_readme_s_commands_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    commands = "".join(snippets(README, "")).splitlines()
    for command in filter(None, commands):
        words = command.split("#")[0].split()
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "aepo-fast":
            parameters = get_group(app).commands[words[1]].params
            options = {name for parameter in parameters for name in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, command
            assert words[1] != "train" or words[2] in shipped_configs(), command
        else:
            assert words[:2] == ["pip", "install"], command


def test_the_readme_s_code_gives_the_same_before_and_after() -> None:
    define, before, after = snippets(README, "python")
    found = []
    for snippet in (before, after):
        generator = torch.Generator().manual_seed(0)
        values: dict[str, torch.Tensor] = {
            "hidden": torch.randn(6, 8, generator=generator).requires_grad_(),
            "weight": torch.randn(50, 8, generator=generator).requires_grad_(),
            "targets": torch.randint(50, (6,), generator=generator),
            "advantage": torch.randn(6, generator=generator),
            "old_logprob": -torch.rand(6, generator=generator) - 3,
        }
        scope: dict = dict(values)
        exec(define + snippet, scope)
        loss = scope["out"].loss if "out" in scope else scope["loss"]
        found.append((loss.detach(), values["hidden"].grad, values["weight"].grad))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


STAND_INS = {"prime_rl": put_prime_rl, "open_instruct": put_open_instruct}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need a published peer run in tests/peers."""
    scope = names()
    try:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.language == "python" and (not block.needs or block.needs in STAND_INS):
                if block.needs:
                    STAND_INS[block.needs](monkeypatch)
                exec(block.text, {"__name__": "page", **scope} if block.needs else scope)
    finally:
        prime_rl.uninstall()
        open_instruct.uninstall()


def test_a_model_gives_the_same_before_and_after() -> None:
    page = (ROOT / "docs" / "in-your-trainer.md").read_text(encoding="utf-8")
    before, after = snippets(page, "python")[:2]
    scope = names()
    losses = []
    for text in (before, after):
        exec(text, scope)
        losses.append(scope["loss"])
    torch.testing.assert_close(losses[1], losses[0])


def test_every_block_s_peer_is_known() -> None:
    needs = {block.needs for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))}
    # Of tests/peers, kernels/head/test_distributed and aepo_fast/test_api.
    own = {"aepo_trl", "aepo_verl", "ranks", "aepo_run"}
    assert needs == {"", "trl", "verl", "openrlhf", *own, *STAND_INS}
