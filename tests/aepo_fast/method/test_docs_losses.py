"""docs/losses.md against the code: its examples run as printed, its table is that of the code."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import Config
from aepo_fast.config.toml import load_config
from aepo_fast.method.policy_losses import GIVEN, POLICY_LOSSES
from aepo_fast.training.run import train

PAGE = (Path(__file__).parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(# (\w+)\.py\n.*?)^```\n\n```toml\n(.*?)^```", PAGE, re.M | re.S)
REST = """
[model]
path = "{model}"
compute_dtype = "float32"
gradient_checkpointing = false
[[data.sources]]
kind = "reasoning_gym"
name = "products"
params = {{min_terms = 2, max_terms = 2, max_digits = 1}}
size = 60
[reward]
function = "tests.tiny_rewards:even_start"
[rollout]
max_new_tokens = 6
dtype = "float32"
[aepo]
entropy_target = 5.6
[trainer]
steps = 2
prompts_per_step = 4
group_size = 4
minibatches = 2
lr = 1e-2
device = "cpu"
[eval]
prompts = 0
[logging]
plot = false
"""


def written(
    folder: Path, model: Path, patch: pytest.MonkeyPatch, text: str, module: str, toml: str
) -> Config:
    """The configuration of an example, its module in the working directory."""
    (folder / f"{module}.py").write_text(text)
    (folder / "run.toml").write_text(toml + REST.format(model=model))
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.delitem(sys.modules, module, raising=False)
    return load_config("run.toml", [f'output_dir="{folder / "run"}"'])


@pytest.mark.parametrize(("text", "module", "toml"), BLOCKS, ids=[name for _, name, _ in BLOCKS])
def test_an_example_trains_as_printed(
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    module: str,
    toml: str,
) -> None:
    cfg = written(tmp_path, tiny_model_dir, monkeypatch, text, module, toml)
    assert cfg.loss.policy.startswith(f"{module}:")
    assert train(cfg) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in map(json.loads, lines):
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0


def test_a_run_stops_at_a_loss_that_is_no_sum_over_tokens(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, module, toml = BLOCKS[0]
    centred = text.replace("-advantage *", "-(advantage - advantage.mean()) *")
    assert centred != text
    cfg = written(tmp_path, tiny_model_dir, monkeypatch, centred, module, toml)
    with pytest.raises(ConfigError, match=r"loss.policy = 'my_losses:smooth': is not additive"):
        train(cfg)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_there_are_two_examples_and_the_first_is_short() -> None:
    assert len(BLOCKS) == 2
    assert len(BLOCKS[0][0].splitlines()) + len(BLOCKS[0][2].splitlines()) <= 13


def test_the_tables_are_those_of_the_code() -> None:
    for name, loss in POLICY_LOSSES.items():
        (row,) = re.findall(rf"^\| `{name}` .*", PAGE, flags=re.M)
        cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
        clip = f"{loss.clip_low:.4g}, {loss.clip_high:.4g}" if loss.takes("clip_low") else "-"
        assert cells == [f"`{loss.advantage}`", f"`{loss.aggregation}`", clip], name
    rows = re.findall(r"^\| (`.*?) \|", PAGE.split("| Argument |")[1].split("###")[0], flags=re.M)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(GIVEN)
