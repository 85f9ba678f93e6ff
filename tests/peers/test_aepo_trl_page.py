"""The example of docs/aepo-in-trl.md, run with a tiny model and fewer steps."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs TRL", allow_module_level=True)

from aepo_fast.integrations.trl import AEPOTrainer

pytestmark = [pytest.mark.peers, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "aepo-in-trl.md"


def test_the_example_trains(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = re.findall(
        r"^```python needs aepo_trl\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S
    )
    assert len([line for line in text.splitlines() if line]) <= 30
    for old, new in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model_dir)),
        ("max_steps=40", "max_steps=4"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    trained: list[AEPOTrainer] = []
    train = AEPOTrainer.train

    def kept(self: AEPOTrainer, *given: Any, **named: Any) -> Any:
        trained.append(self)
        return train(self, *given, **named)

    monkeypatch.setattr(AEPOTrainer, "train", kept)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, str(PAGE), "exec"), {"__name__": "example"})
    (trainer,) = trained
    lines = [line for line in trainer.state.log_history if "aepo/entropy" in line]
    assert len(lines) == 4 and lines[0]["aepo/entropy_target"] == 0.5
