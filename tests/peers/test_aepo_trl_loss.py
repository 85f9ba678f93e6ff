"""AEPOTrainer's loss and gradient with the real TRL, against float64 and our own trainer."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs TRL", allow_module_level=True)

from trl import GRPOTrainer

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import Config, ModelConfig, RolloutConfig
from aepo_fast.integrations.trl.term import Batching, aepo_term, loss_mask, token_weights
from aepo_fast.method import credit
from aepo_fast.method.credit import Aggregation
from aepo_fast.method.forms import make_form
from aepo_fast.method.objective import Objective, build_objective
from aepo_fast.method.tokens import StepContext
from aepo_fast.samples import TokenValues
from tests.peers.aepo_trl_runs import (
    HALVES,
    MINIBATCHES,
    PASSES,
    PROMPTS,
    TWO_ROLLOUTS,
    WHOLE,
    MicroBatch,
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

CASES = [
    ("expected", "grpo", WHOLE),
    ("lift", "dapo", WHOLE),
    ("expected", "dapo", HALVES),
    ("one_pass", "dr_grpo", HALVES),
    ("expected", "dr_grpo", MINIBATCHES),
    ("lift", "grpo", MINIBATCHES),
    ("expected", "dapo", PASSES),
    ("lift", "grpo", PASSES),
    ("expected", "grpo", TWO_ROLLOUTS),
    ("one_pass", "cispo", PASSES | dict(epsilon_high=1.28)),
    ("expected", "sapo", PASSES),
]
IDS = [f"{form}-{loss}-{len(split)}-{i}" for i, (form, loss, split) in enumerate(CASES)]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharp_model(tiny_model_dir, tmp_path_factory.mktemp("sharp") / "model")


def policy_loss(batch: MicroBatch, logprob: Tensor, old: Tensor, term: Tensor, kind: str) -> Tensor:
    """TRL's loss of a micro-batch with AEPO's term per token, as their definitions have it."""
    ratio, advantage = (logprob - old).exp(), batch.inputs["advantages"].double().unsqueeze(1)
    per_token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + term
    mask = loss_mask(batch.inputs).double()
    if kind == "grpo":
        return ((per_token * mask).sum(1) / mask.sum(1)).mean() / batch.accumulated
    assert kind == "dr_grpo"
    return (per_token * mask).sum() / (len(mask) * 6) / batch.accumulated


@pytest.mark.parametrize(
    ("form", "kind", "split"),
    [case for case in CASES if case[1] in ("grpo", "dr_grpo")],
)
def test_loss_and_gradient_are_those_of_float64(
    model: Path, tmp_path: Path, form: str, kind: str, split: dict[str, int]
) -> None:
    settings = split | dict(aepo_form=form, loss_type=kind, aepo_alpha=0.5)
    trainer = run(model, tmp_path, **settings)
    assert len(trainer.micro_batches) == 4 * trainer.args.gradient_accumulation_steps
    sampled_by: dict[str, Tensor] = {}
    for batch in trainer.micro_batches:
        if batch.step % trainer.args.steps_per_rollout == 0:
            sampled_by = batch.weights
        policy, sampler = Truth(model, batch.weights), Truth(model, sampled_by)
        inputs, t = batch.inputs, batch.temperature
        assert t > 1
        positive = torch.tensor([ids[0] % 2 == 0 for ids in inputs["completion_ids"].tolist()])
        positive = positive.double().unsqueeze(1)
        logprob, _ = policy(inputs)
        with torch.no_grad():
            old, _ = sampler(inputs)
            old_at_t, _ = sampler(inputs, t)
        ratio = (logprob - old).exp()
        if form == "expected":
            at_t, _ = policy(inputs, t)
            term = -positive * ratio.detach().clamp(0.8, 1.2) * (logprob - t * at_t)
        else:
            rho = (old_at_t - old).exp().clamp(1 / 3, 3)
            weight = (rho - 1).clamp(min=0) if form == "lift" else rho
            term = -positive * torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * weight
        loss = policy_loss(batch, logprob, old, 0.5 * term, kind)
        assert batch.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        loss.backward()
        for name, parameter in policy.model.named_parameters():
            found, true = batch.grads[name].double(), parameter.grad
            assert true is not None
            assert (found - true).norm() <= 2e-5 * true.norm() + 1e-9, name


def both_objectives(
    trainer: RecordingTrainer, batches: list[MicroBatch], old: TokenValues | None
) -> list[Objective]:
    """Our trainer's objective of an update, with AEPO and without."""
    args, source = trainer.args, SourceConfig("reasoning_gym", "products", {}, size=4)
    samples = [sample for batch in batches for sample in samples_of(batch)]
    # The two bounds of TRL's clip are the same by default; ours for dapo are not.
    clip = {"clip_high": 0.2} if args.loss_type == "dapo" else {}
    plain = Config(
        model=ModelConfig(path="none"),
        data=DataConfig(sources=(source,)),
        rollout=RolloutConfig(max_new_tokens=args.max_completion_length),
        loss=LossConfig(policy=args.loss_type, **clip),
        aepo=AepoConfig(enabled=False),
    )
    return [
        build_objective(
            cfg,
            samples,
            torch.cat([batch.inputs["advantages"] for batch in batches]),
            range(len(samples)),
            StepContext(batches[0].temperature, 0.0, 0.0, 0, 0, 1),
            old=old,
            reference=None,
            generator=torch.Generator(),
        )
        for cfg in (replace(plain, aepo=args.aepo), plain)
    ]


def token_values(truth: Truth, batches: list[MicroBatch]) -> TokenValues:
    """Of all tokens of an update, in float64."""
    parts = []
    for batch in batches:
        learns = loss_mask(batch.inputs).bool()
        with torch.no_grad():
            logprob, entropy = truth(batch.inputs)
            second, _ = truth(batch.inputs, batch.temperature)
        parts.append((logprob[learns], entropy[learns], second[learns]))
    return TokenValues(*(torch.cat(column) for column in zip(*parts, strict=True)))


@pytest.mark.parametrize(("form", "kind", "split"), CASES, ids=IDS)
def test_the_term_of_an_update_is_that_of_our_trainer(
    model: Path, tmp_path: Path, form: str, kind: str, split: dict[str, int]
) -> None:
    settings = split | dict(aepo_form=form, loss_type=kind, aepo_alpha=0.5)
    trainer = run(model, tmp_path, **settings)
    args, sampler = trainer.args, None
    for update in range(args.max_steps):
        batches = [batch for batch in trainer.micro_batches if batch.update == update]
        assert len(batches) == args.gradient_accumulation_steps
        policy = Truth(model, batches[0].weights)
        if batches[0].step % args.steps_per_rollout == 0:
            sampler = policy
        assert sampler is not None
        several = args.updates_per_rollout > 1
        old = token_values(sampler, batches) if several else None
        with_aepo, without = both_objectives(trainer, batches, old)
        now = token_values(policy, batches)
        values = now.logprob, now.entropy
        ours = with_aepo.token_loss(*values, now.second_logprob, with_aepo.columns)[0]
        plain = without.token_loss(*values, None, without.columns)[0]
        # Our policy loss may differ from TRL's (dual clip); AEPO's part has to be the same.
        found = sum(batch.loss for batch in batches) - trl_loss_alone(trainer, batches)
        assert found == pytest.approx((ours - plain).item(), rel=2e-4, abs=2e-6)


def trl_loss_alone(trainer: RecordingTrainer, batches: list[MicroBatch]) -> float:
    """What TRL's own GRPOTrainer makes of the micro-batches of an update."""
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(batches[0].weights)
    trainer.model.train()
    total = 0.0
    for batch in batches:
        trainer.current_gradient_accumulation_steps = batch.accumulated
        with torch.no_grad():
            total += GRPOTrainer._compute_loss(trainer, trainer.model, batch.inputs).item()
    trainer.model.load_state_dict(weights)
    return total


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant_length"])
def test_weights_of_two_ranks_and_three_micro_batches_are_those_of_the_whole(
    aggregation: Aggregation,
) -> None:
    """TRL adds up micro-batches, and takes the mean over ranks."""
    lengths = torch.tensor([3, 1, 5, 2, 4, 4, 1, 6, 2, 3, 5, 5])
    mask = (torch.arange(6) < lengths.unsqueeze(1)).long()
    batching = Batching(
        aggregation, max_length=6, accumulated=3, steps_per_generation=3, num_processes=2
    )
    parts = [
        token_weights({"completion_mask": part, "num_items_in_batch": lengths.sum()}, batching)
        for part in mask.split(2)
    ]
    whole = credit.token_weights(
        lengths,
        aggregation,
        max_length=6,
        num_samples_total=12,
        num_tokens_total=int(lengths.sum()),
    )
    assert torch.allclose(torch.cat(parts) / 2, mask * whole.unsqueeze(1))


def test_the_term_is_corrected_for_the_sampler_as_trl_s_loss_is() -> None:
    generator = torch.Generator().manual_seed(0)
    ratio = torch.rand(2, 3, generator=generator) + 0.5
    logprob, entropy, second = torch.randn(3, 2, 3, generator=generator)
    inputs = {
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1]]),
        "aepo_positive": torch.tensor([1.0, 1.0]),
        "importance_sampling_ratio": ratio,
    }
    aepo = AepoConfig(form="expected", alpha=0.5)
    weights = torch.rand(2, 3, generator=generator)
    term, _ = aepo_term(
        make_form(aepo),
        aepo,
        inputs,
        weights,
        logprob=logprob,
        entropy=entropy,
        second_logprob=second,
        temperature=1.5,
        clip=(0.2, 0.2),
    )
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    expected = -0.5 * (mask * weights * ratio * (logprob - 1.5 * second)).sum()
    assert term is not None and term.item() == pytest.approx(expected.item(), rel=1e-6)


def test_an_adapter_trains(model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    given = config(tmp_path, beta=0.1, num_iterations=2, aepo_form="one_pass")
    lora = LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=4, init_lora_weights=False)
    trainer = RecordingTrainer(
        str(model), even_start, given, train_dataset=PROMPTS, peft_config=lora
    )
    trainer.entropy_controller.entropy = 4.0
    trainer.train()
    assert logged(trainer, "aepo/temperature")[0] > 1 and len(logged(trainer, "kl")) == 4
    inputs = trainer.micro_batches[0].inputs
    # The reference is scored after the policy that sampled, and is another one.
    assert not torch.allclose(inputs["old_per_token_logps"], inputs["ref_per_token_logps"])
    with torch.no_grad():
        trainer.model.load_state_dict(trainer.micro_batches[0].weights)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -7:-1].double()
    at_t = torch.log_softmax(logits / trainer.micro_batches[0].temperature, -1)
    at_t = at_t.gather(2, inputs["completion_ids"].unsqueeze(2)).squeeze(2)
    learns = loss_mask(inputs).bool()
    assert (inputs["aepo_old_second_logps"] - at_t)[learns].abs().max() < 1e-5
