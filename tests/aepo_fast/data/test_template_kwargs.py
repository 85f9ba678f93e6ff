"""data.chat_template_kwargs: variables that a chat template reads, as a switch for thinking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.data.prompts import load_prompts
from tests.tiny_model import CHAT_TEMPLATE, build_tiny_tokenizer

# As Qwen3's: an empty thought where thinking is off.
THINKING = (
    CHAT_TEMPLATE + "{%- if add_generation_prompt and enable_thinking is defined and "
    "enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    "{%- if budget is not defined %}{% set budget = 3 %}{% endif %}"
    "{% generation %}{% for i in range(budget) %}{{ bos_token if loop.last and i > 5 }}{% endfor %}"
    "{% endgeneration %}"
)


def rendered(tmp_path: Path, template: str, **settings: Any) -> str:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "2 + 3 = ?", "answer": "5"}))
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = template
    source = SourceConfig("file", str(tmp_path / "rows.jsonl"))
    cfg = DataConfig(sources=(source,), holdout_fraction=0.0, chat_template_kwargs=settings)
    return load_prompts(cfg, tokenizer, max_prompt_tokens=200, required_columns=()).rendered


def test_a_switch_changes_what_is_rendered(tmp_path: Path) -> None:
    plain = rendered(tmp_path, THINKING)
    assert rendered(tmp_path, THINKING, enable_thinking=True) == plain
    assert rendered(tmp_path, THINKING, enable_thinking=False) == plain + "<think></think>"
    assert rendered(tmp_path, THINKING, budget=7) == plain + "<|im_start|>"


@pytest.mark.parametrize(
    ("settings", "reason", "fix"),
    [
        ({"thinking": False}, "does not read 'thinking'", "reads: budget, enable_thinking"),
        ({"tokenize": True}, "does not read 'tokenize'", "reads: budget, enable_thinking"),
        ({"messages": []}, "'messages' is not free", "Leave it out"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is not free", "Leave it out"),
        ({"bos_token": "x"}, "'bos_token' is not free", "Leave it out"),
    ],
)
def test_what_the_template_does_not_read_is_refused(
    tmp_path: Path, settings: dict[str, Any], reason: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(tmp_path, THINKING, **settings)
    assert caught.value.key == "data.chat_template_kwargs" and caught.value.value == settings
    assert reason in caught.value.reason and fix in caught.value.fix
    with pytest.raises(ConfigError, match="it reads: none"):
        rendered(tmp_path, CHAT_TEMPLATE, enable_thinking=False)
