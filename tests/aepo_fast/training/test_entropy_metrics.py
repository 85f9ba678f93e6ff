"""Where entropy lives, and its moving mean: against numbers computed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aepo_fast.config.method import LossConfig
from aepo_fast.config.sections import CheckpointConfig
from aepo_fast.report.logger import read_lines
from aepo_fast.report.moving_mean import MovingMean
from aepo_fast.report.plot import with_smoothed
from aepo_fast.samples import Completion, Prompt, Rollout, Sample
from aepo_fast.training.checkpoint import complete_checkpoints
from aepo_fast.training.entropy_metrics import entropy_metrics
from aepo_fast.training.run import train
from aepo_fast.training.step_metrics import rollout_metrics
from aepo_fast.training.trainer import Trainer
from tests.tiny_run import copy_until, tiny_config, with_trainer

END = 0


def decode(ids: Sequence[int]) -> str:
    """A token a character, and an end token without text."""
    return "".join(chr(token) for token in ids if token != END)


def rollout(*given: tuple[int, str, float | None], aux_from: int = 99) -> Rollout:
    """Samples from (prompt, text, task reward), each with an end token."""
    samples = []
    for group, text, reward in given:
        ids = (*map(ord, text), END)
        completion = Completion((5,), ids, (-1.0,) * len(ids), "stop", 1.0, 0)
        # A length penalty is no part of the answer's reward.
        samples.append(Sample(completion, group, group >= aux_from, reward, -0.5))
    return Rollout(
        samples=samples,
        prompts=[Prompt("", (), {}, 0, (5,))] * (1 + max(sample.group for sample in samples)),
        texts=[text for _, text, _ in given],
        num_main_groups=len({sample.group for sample in samples if not sample.is_aux}),
        reward_errors=0,
        sampling_s=1.0,
    )


def measured(made: Rollout, entropy: list[float]) -> dict[str, float]:
    main = [
        index
        for index, sample in enumerate(made.samples)
        if not sample.is_aux and sample.task_reward is not None
    ]
    return entropy_metrics(made, torch.tensor(entropy), main, 1.0, decode)


def test_entropy_is_split_by_reward_and_by_place() -> None:
    made = rollout(
        (0, "a\n12", 1.0),  # 4 characters and the end
        (0, "7", 0.99),
        (1, "", 0.0),
        (1, "xyz", None),  # its reward failed: trained on nothing, measured nowhere
        (2, "12", 1.0),  # auxiliary
        aux_from=2,
    )
    one, two, three = [1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0], [8.0]
    entropy = one + two + three + [100.0] * 4 + [200.0] * 3
    expected = {
        "entropy/correct": sum(one) / 5,
        "entropy/wrong": (6 + 7 + 8) / 3,
        "entropy/answer": (3 + 4 + 6) / 3,
        "entropy/rest": (1 + 2 + 5 + 7 + 8) / 5,
    }
    assert measured(made, entropy) == pytest.approx(expected, rel=1e-6)


def test_parts_without_tokens_are_not_a_number() -> None:
    right = measured(rollout((0, "12", 1.0)), [1.0, 2.0, 6.0])
    assert right["entropy/correct"] == 3 and math.isnan(right["entropy/wrong"])
    wrong = measured(rollout((0, "12", 0.0)), [1.0, 2.0, 6.0])
    assert wrong["entropy/wrong"] == 3 and math.isnan(wrong["entropy/correct"])
    silent = measured(rollout((0, "", 0.0)), [2.0])
    assert silent["entropy/rest"] == 2 and math.isnan(silent["entropy/answer"])


def test_distinct_correct_answers_are_counted_by_prompt() -> None:
    samples = [
        (0, "12", 1.0),
        (0, " 12\n", 1.0),
        (0, "so 12", 2.0),
        (0, "11", 0.0),
        (1, "12", 1.0),
        (1, "twelve", None),
        (2, "11", 0.0),  # no correct one: not in the mean
        (3, "12", 1.0),  # auxiliary
        (3, "13", 1.0),
    ]
    metrics = rollout_metrics(rollout(*samples, aux_from=3), 1.0)
    assert metrics["completions/distinct_correct"] == (2 + 1) / 2
    none = rollout_metrics(rollout((0, "11", 0.0)), 1.0)
    assert math.isnan(none["completions/distinct_correct"])


def test_the_moving_mean_is_of_the_last_five_finite_values() -> None:
    mean = MovingMean()
    assert math.isnan(mean.update(math.nan))
    values = [1.0, 2.0, math.nan, None, 6.0, math.inf, 7.0, 8.0, 9.0, 1.0]
    expected = [1, 1.5, 1.5, 1.5, 3, 3, 4, 4.8, 6.4, 6.2]
    assert [mean.update(value) for value in values] == expected
    again = MovingMean(mean.values())
    assert again.update(0.1) == mean.update(0.1)


@pytest.mark.parametrize(("policy", "minibatches"), [("grpo", 1), ("gspo", 1), ("grpo", 2)])
def test_the_parts_make_up_the_whole_in_a_run(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    minibatches: int,
) -> None:
    loss = LossConfig(policy=policy)
    cfg = tiny_config(tiny_model_dir, tmp_path / "run", loss=loss)
    shares = []
    plain = Trainer.step

    def step(self: Trainer, *args: object) -> object:
        result = plain(self, *args)
        lengths = [
            (sample.length, sample.task_reward >= 1)
            for sample in result.rollout.samples
            if not sample.is_aux and sample.task_reward is not None
        ]
        right = sum(length for length, good in lengths if good)
        shares.append(right / sum(length for length, _ in lengths))
        return result

    monkeypatch.setattr(Trainer, "step", step)
    train(with_trainer(cfg, steps=2, minibatches=minibatches))
    for line, share in zip(read_lines(tmp_path / "run" / "metrics.jsonl"), shares, strict=True):
        both = share * line["entropy/correct"] + (1 - share) * line["entropy/wrong"]
        assert both == pytest.approx(line["entropy"], rel=1e-5)
        low, high = sorted((line["entropy/answer"], line["entropy/rest"]))
        assert low <= line["entropy"] <= high


def test_smoothing_goes_on_after_a_resume(tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = tiny_config(tiny_model_dir, tmp_path / "run", checkpoint=CheckpointConfig(1, keep=9))
    cfg = with_trainer(cfg, steps=8, prompts_per_step=2)
    train(cfg)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    smoothed = [line["entropy_smoothed"] for line in lines]
    assert smoothed[7] == pytest.approx(sum(line["entropy"] for line in lines[3:]) / 5)
    for line in lines:
        del line["entropy_smoothed"]
    assert [line["entropy_smoothed"] for line in with_smoothed(lines)] == smoothed

    resumed = replace(cfg, output_dir=str(tmp_path / "resumed"))
    copy_until(6, cfg, resumed)
    train(resumed, resume=True)
    lines = read_lines(tmp_path / "resumed" / "metrics.jsonl")
    assert [line["entropy_smoothed"] for line in lines] == smoothed

    # A checkpoint of a version without smoothing loads; the mean starts anew.
    older = replace(cfg, output_dir=str(tmp_path / "older"))
    copy_until(6, cfg, older)
    path = complete_checkpoints(tmp_path / "older" / "checkpoints")[-1] / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["smoothed"]
    torch.save(state, path)
    train(older, resume=True)
    lines = read_lines(tmp_path / "older" / "metrics.jsonl")
    assert lines[6]["entropy_smoothed"] == lines[6]["entropy"]
