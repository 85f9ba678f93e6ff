"""What a checkpoint says of random generators, the best step and its model, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import CheckpointConfig, EvalConfig, ModelConfig
from aepo_fast.training.best import BestCheckpoint
from aepo_fast.training.checkpoint import (
    check_same_model,
    complete_checkpoints,
    load_state,
    rng_state,
    set_rng_state,
)
from aepo_fast.training.evaluate import EvalResult
from aepo_fast.training.run import train
from tests.tiny_run import tiny_config, with_trainer


@pytest.mark.parametrize("more", [1, 2])
def test_a_run_goes_on_where_there_are_fewer_gpus(more: int) -> None:
    state = rng_state(with_gpu=torch.cuda.is_available())
    expected = torch.rand(3)
    one = torch.get_rng_state() if not torch.cuda.is_available() else torch.cuda.get_rng_state()
    set_rng_state({**state, "cuda": [*state.get("cuda", []), *[one] * more]})
    assert torch.equal(torch.rand(3), expected)


def best_of(metric: str, **state: Any) -> dict[str, Any]:
    return {"best": {"metric": metric, **state}}


def test_the_best_checkpoint_is_the_first_of_equals_and_zero_counts(tmp_path: Path) -> None:
    best = BestCheckpoint("eval/avg@k", None, tmp_path)
    assert best.state_dict() == {}
    taken = [best.update(step, {"eval/avg@k": at}) for step, at in enumerate((0.0, 0.0, 0.5, 0.5))]
    assert taken == [True, False, True, False]
    assert best.state_dict() == best_of("eval/avg@k", value=0.5, step=2)
    assert not BestCheckpoint("", None, tmp_path).update(1, {"eval/avg@k": 1.0})


def test_a_best_checkpoint_that_is_gone_or_of_another_metric_is_forgotten_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = best_of("eval/avg@k", value=0.5, step=2)
    assert BestCheckpoint("eval/avg@k", state, tmp_path).step is None
    assert "step_2, is not there any more" in capsys.readouterr().err
    (tmp_path / "step_2").mkdir()
    assert BestCheckpoint("eval/avg@k", state, tmp_path).value == 0.5
    assert BestCheckpoint("eval/pass@k", state, tmp_path).step is None
    assert "is of 'eval/avg@k'" in capsys.readouterr().err
    assert BestCheckpoint("", state, tmp_path).state_dict() == {}


def test_a_run_keeps_its_best_checkpoint_and_resumes_with_it(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best is written at its evaluation, though checkpoints come every two steps."""
    figures = {1: 0.1, 2: 0.3, 3: 0.9, 4: 0.2, 5: 0.2, 6: 0.4, 7: 0.95}
    scored: list[float] = []

    def evaluated(*_: Any, **__: Any) -> EvalResult:
        value = [0.0, *figures.values()][len(scored)]
        scored.append(value)
        return EvalResult(value, (0.0, 1.0), {1: value}, 1, 1, 1.0, 0.0, 0)

    monkeypatch.setattr("aepo_fast.training.run.evaluate", evaluated)
    cfg = tiny_config(
        tiny_model_dir,
        tmp_path / "run",
        eval=EvalConfig(every=1, prompts=2),
        checkpoint=CheckpointConfig(every=2, keep=1, keep_best="eval/avg@k"),
    )
    folder = tmp_path / "run" / "checkpoints"

    def kept() -> list[str]:
        return [path.name for path in complete_checkpoints(folder)]

    assert train(with_trainer(cfg, steps=5)) == 0
    assert kept() == ["step_3", "step_5"]
    for name in kept():
        assert load_state(folder / name)["best"] == {
            "metric": "eval/avg@k",
            "value": 0.9,
            "step": 3,
        }
    assert train(with_trainer(cfg, steps=6), resume=True) == 0
    assert kept() == ["step_3", "step_6"]
    assert train(with_trainer(cfg, steps=7), resume=True) == 0
    assert kept() == ["step_7"]  # the newest and the best


def test_another_revision_is_another_model(tmp_path: Path) -> None:
    state = {"model_path": ModelConfig(path="some/model", revision="v1").origin}
    check_same_model(state, "some/model@v1", tmp_path)
    for other in ("some/model", "some/model@v2"):
        with pytest.raises(ConfigError, match="was made from 'some/model@v1'"):
            check_same_model(state, other, tmp_path)
    assert ModelConfig(path="some/model").origin == "some/model"  # as earlier checkpoints have it
