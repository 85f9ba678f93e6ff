"""AEPOTrainer's controller with the real TRL: what it is told, what it does, and resuming."""

from __future__ import annotations

import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs TRL", allow_module_level=True)

from trl import GRPOTrainer

from aepo_fast.integrations.trl import AEPOConfig, AEPOTrainer
from aepo_fast.integrations.trl.term import loss_mask
from aepo_fast.samples import token_mean
from tests.peers.aepo_trl_runs import (
    HALVES,
    MINIBATCHES,
    PASSES,
    PROMPTS,
    TARGET,
    TWO_ROLLOUTS,
    WHOLE,
    RecordingTrainer,
    Truth,
    config,
    even_start,
    logged,
    run,
    samples_of,
    sharp_model,
)

pytestmark = [pytest.mark.peers, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharp_model(tiny_model_dir, tmp_path_factory.mktemp("sharp") / "model")


@pytest.mark.parametrize("split", [WHOLE, MINIBATCHES, PASSES, TWO_ROLLOUTS])
def test_the_controller_is_told_the_entropy_of_the_policy_that_sampled(
    model: Path, tmp_path: Path, split: dict[str, int]
) -> None:
    trainer = run(model, tmp_path, aepo_form="one_pass", aepo_alpha=0.5, **split)
    args = trainer.args
    # Micro-batches between two steps of the controller, and those with each sample once.
    span = max(args.steps_per_rollout, args.gradient_accumulation_steps)
    once = span // args.num_iterations
    rollouts = [trainer.micro_batches[i : i + once] for i in range(0, 4 * span, span)]
    rollouts = [batches for batches in rollouts if batches]
    assert len(logged(trainer, "aepo/entropy")) == len(rollouts)
    for index, batches in enumerate(rollouts):
        truth, samples, values = Truth(model, batches[0].weights), [], []
        for batch in batches:
            with torch.no_grad():
                _, entropy = truth(batch.inputs)
            samples += samples_of(batch)
            values.append(entropy[loss_mask(batch.inputs).bool()])
        entropies = torch.cat(values)
        mean, stderr = token_mean(entropies, samples, range(len(samples)))
        assert logged(trainer, "aepo/entropy")[index] == pytest.approx(mean, rel=1e-6)
        assert logged(trainer, "entropy_stderr")[index] == pytest.approx(stderr, rel=1e-3)
        right = [i for i, sample in enumerate(samples) if sample.task_reward]
        of_right, _ = token_mean(entropies, samples, right)
        assert logged(trainer, "entropy/correct")[index] == pytest.approx(of_right, rel=1e-6)
        # Prompts are counted on through an update's rollouts; each has 4 samples.
        prompts = torch.tensor([sample.group for sample in samples])
        assert prompts.bincount().tolist() == [4] * (len(samples) // 4)


def test_t_follows_the_controller(model: Path, tmp_path: Path) -> None:
    settings = dict(aepo_gain=0.2, aepo_integral_gain=0.02, max_steps=6)
    trainer = run(model, tmp_path, first_entropy=None, **HALVES, **settings)
    used, entropies = logged(trainer, "aepo/temperature"), logged(trainer, "aepo/entropy")
    total, expected = 0.0, [1.0]
    for entropy in entropies[:-1]:
        total += TARGET - entropy
        expected.append(min(max(1 + 0.2 * (TARGET - entropy) + 0.02 * total, 1.0), 2.0))
    assert used == pytest.approx(expected, rel=1e-12)
    assert used == [b.temperature for b in trainer.micro_batches[::2]]
    assert logged(trainer, "aepo/entropy_target") == [TARGET] * 6


def test_the_entropy_is_held_where_grpo_collapses(model: Path, tmp_path: Path) -> None:
    def mean_of_last_40(trainer: AEPOTrainer, name: str) -> float:
        return statistics.fmean(logged(trainer, name)[-40:])

    trained = []
    for enabled in (True, False):
        args = config(
            tmp_path,
            max_steps=200,
            learning_rate=2e-3,
            aepo_enabled=enabled,
            aepo_controller="observer",
            aepo_entropy_target=2.5,
            # Solved above the target, where GRPO has nothing to learn: only T < 1 leads down.
            aepo_temperature_min=0.9,
        )
        trained.append(AEPOTrainer(str(model), even_start, args, train_dataset=PROMPTS))
        trained[-1].train()
    aepo, grpo = trained
    assert mean_of_last_40(grpo, "aepo/entropy") < 0.2
    assert mean_of_last_40(aepo, "aepo/entropy") == pytest.approx(2.5, rel=0.05)
    assert mean_of_last_40(aepo, "reward") > 0.95


@pytest.mark.parametrize("controller", ["published", "switch", "pi", "observer"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    model: Path, tmp_path: Path, controller: str
) -> None:
    settings: dict[str, Any] = dict(
        aepo_controller=controller, aepo_form="expected", save_strategy="steps", save_steps=3
    )
    whole = RecordingTrainer(
        str(model),
        even_start,
        config(tmp_path, max_steps=6, **HALVES, **settings),
        train_dataset=PROMPTS,
    )
    whole.train()
    resumed = RecordingTrainer(
        str(model),
        even_start,
        config(tmp_path, max_steps=6, **HALVES, **settings),
        train_dataset=PROMPTS,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(set(logged(whole, "aepo/temperature"))) > 1
    for name in ("aepo/temperature", "aepo/entropy", "entropy_smoothed"):
        assert logged(resumed, name)[-3:] == logged(whole, name)[-3:]
    assert [b.loss for b in resumed.micro_batches] == [b.loss for b in whole.micro_batches[6:]]


def test_a_run_resumed_within_a_rollout_has_its_t(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(save_strategy="steps", save_steps=3, **PASSES)
    whole = run(model, tmp_path, first_entropy=None, **settings)
    resumed = RecordingTrainer(
        str(model), even_start, config(tmp_path, **settings), train_dataset=PROMPTS
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.micro_batches[0].temperature == whole.micro_batches[6].temperature > 1


def test_a_checkpoint_of_grpo_begins_with_t_1(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(save_strategy="steps", save_steps=2)
    run(model, tmp_path, **settings)
    (tmp_path / "checkpoint-2" / "aepo_state.json").unlink()
    resumed = RecordingTrainer(
        str(model), even_start, config(tmp_path, **settings), train_dataset=PROMPTS
    )
    with pytest.warns(UserWarning, match="aepo_state.json does not exist"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.micro_batches[0].temperature == 1


def test_a_sample_without_a_reward_is_not_correct(model: Path, tmp_path: Path) -> None:
    def sometimes(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if ids[0] % 2 else 1.0 for ids in completion_ids]

    def shape(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if ids[0] % 2 else float(ids[0] % 4 == 0) for ids in completion_ids]

    given = config(tmp_path, reward_weights=[0.9, 0.1], max_steps=2)
    trainer = RecordingTrainer(str(model), [sometimes, shape], given, train_dataset=PROMPTS)
    trainer.train()
    for batch, share in zip(
        trainer.micro_batches, logged(trainer, "aepo/positive_fraction"), strict=True
    ):
        first = batch.inputs["completion_ids"][:, 0]
        assert torch.equal(batch.inputs["aepo_positive"], (first % 4 == 0).float())
        assert share == pytest.approx(((first % 4 == 0).sum() / (first % 2 == 0).sum()).item())


def test_without_aepo_it_is_grpo(model: Path, tmp_path: Path) -> None:
    trainer = run(model, tmp_path, aepo_enabled=False, loss_type="bnpo")
    plain = GRPOTrainer(
        str(model),
        even_start,
        config(tmp_path / "plain", loss_type="bnpo", aepo_enabled=False),
        train_dataset=PROMPTS,
    )
    plain.train()
    for name in ("loss", "grad_norm", "entropy"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-4, abs=1e-6)
    assert logged(trainer, "aepo/temperature") == [1.0] * 4


def test_it_trains_as_trl_is_set_up_by_default(model: Path, tmp_path: Path) -> None:
    """bfloat16 autocast, gradient checkpointing and dapo, all settings of AEPO left out."""
    args = AEPOConfig(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        max_completion_length=6,
        disable_tqdm=True,
    )
    trainer = AEPOTrainer(str(model), even_start, args, train_dataset=PROMPTS)
    trainer.train()
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    assert len(logged(trainer, "aepo/entropy")) == 4
