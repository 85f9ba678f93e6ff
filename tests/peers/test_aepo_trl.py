"""AEPOTrainer with the real TRL: its loss and gradient, its controller, its checkpoints."""

from __future__ import annotations

import importlib.util
import math
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs TRL", allow_module_level=True)

from transformers import LlamaForCausalLM
from trl import GRPOTrainer
from trl.trainer import utils

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import Config, ModelConfig, RolloutConfig
from aepo_fast.integrations.trl import AEPOConfig, AEPOTrainer
from aepo_fast.integrations.trl.seams import check_trl
from aepo_fast.integrations.trl.term import aepo_term, loss_mask
from aepo_fast.method.forms import make_form
from aepo_fast.method.objective import build_objective
from aepo_fast.method.tokens import StepContext
from aepo_fast.samples import Completion, Sample, TokenValues, token_mean
from tests.peers.aepo_trl_runs import (
    PROMPTS,
    TARGET,
    MicroBatch,
    RecordingTrainer,
    config,
    even_start,
    logged,
    run,
)

pytestmark = [pytest.mark.peers, pytest.mark.slow]

# Rollouts of 16 samples: one update, two micro-batches an update, two updates, two passes of each,
# two rollouts an update.
WHOLE = dict(per_device_train_batch_size=16)
HALVES = dict(per_device_train_batch_size=8, gradient_accumulation_steps=2)
MINIBATCHES = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
MINIBATCHES |= dict(steps_per_generation=4)
PASSES = HALVES | dict(num_iterations=2)
TWO_ROLLOUTS = dict(per_device_train_batch_size=16, gradient_accumulation_steps=2)
TWO_ROLLOUTS |= dict(steps_per_generation=1)
CASES = [
    ("expected", "grpo", WHOLE),
    ("one_pass", "dapo", WHOLE),
    ("expected", "dapo", HALVES),
    ("one_pass", "dr_grpo", HALVES),
    ("expected", "dr_grpo", MINIBATCHES),
    ("one_pass", "grpo", MINIBATCHES),
    ("expected", "dapo", PASSES),
    ("one_pass", "grpo", PASSES),
    ("expected", "grpo", TWO_ROLLOUTS),
]
IDS = [f"{form}-{loss}-{len(split)}-{i}" for i, (form, loss, split) in enumerate(CASES)]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger logits: its entropies are about 4 nats, of 5.7 at most."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    shutil.copytree(tiny_model_dir, folder)
    tiny = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        tiny.model.embed_tokens.weight.mul_(4)
    tiny.save_pretrained(folder)
    return folder


class Truth:
    """The policy of some weights in float64: log-probs of sampled tokens at any temperature."""

    def __init__(self, model: Path, weights: dict[str, Tensor]) -> None:
        self.model = LlamaForCausalLM.from_pretrained(model).double()
        self.model.load_state_dict({name: value.double() for name, value in weights.items()})

    def __call__(self, inputs: dict[str, Any], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, [B, C]."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].size(1)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
        logprob = torch.log_softmax(logits / temperature, -1)
        entropy = -(logprob.exp() * logprob).sum(-1)
        return logprob.gather(2, inputs["completion_ids"].unsqueeze(2)).squeeze(2), entropy


def policy_loss(batch: MicroBatch, logprob: Tensor, old: Tensor, term: Tensor, kind: str) -> Tensor:
    """TRL's loss of a micro-batch with AEPO's term per token, as their definitions have it."""
    ratio, advantage = (logprob - old).exp(), batch.inputs["advantages"].double().unsqueeze(1)
    per_token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + term
    mask = loss_mask(batch.inputs).double()
    if kind == "grpo":
        return ((per_token * mask).sum(1) / mask.sum(1)).mean() / batch.accumulated
    if kind == "dr_grpo":
        return (per_token * mask).sum() / (len(mask) * 6) / batch.accumulated
    assert kind == "dapo"
    raise AssertionError("the tokens of an update are known only with all its micro-batches")


@pytest.mark.parametrize(
    ("form", "kind", "split"),
    [case for case in CASES if case[1] != "dapo"],
    ids=[name for name, case in zip(IDS, CASES, strict=True) if case[1] != "dapo"],
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
            term = -positive * torch.minimum(ratio * rho, ratio.clamp(0.8, 1.2) * rho)
        loss = policy_loss(batch, logprob, old, 0.5 * term, kind)
        assert batch.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        loss.backward()
        for name, parameter in policy.model.named_parameters():
            found, true = batch.grads[name].double(), parameter.grad
            assert true is not None
            assert (found - true).norm() <= 2e-5 * true.norm() + 1e-9, name


def our_objective(
    trainer: RecordingTrainer, batches: list[MicroBatch], old: list[TokenValues] | None
) -> tuple[Any, Any, list[Tensor]]:
    """Our trainer's objective of an update with AEPO and without, and the masks of its samples."""
    args = trainer.args
    source = SourceConfig("reasoning_gym", "products", {}, size=4)
    cfgs = []
    for aepo in (args.aepo, AepoConfig(enabled=False)):
        cfgs.append(
            Config(
                model=ModelConfig(path="none"),
                data=DataConfig(sources=(source,)),
                rollout=RolloutConfig(max_new_tokens=args.max_completion_length),
                loss=LossConfig(policy=args.loss_type, advantage="group_norm", clip_high=0.2)
                if args.loss_type != "grpo"
                else LossConfig(),
                aepo=aepo,
            )
        )
    samples, advantages, masks = [], [], []
    for batch in batches:
        mask = loss_mask(batch.inputs).bool()
        masks.append(mask)
        rows = zip(batch.inputs["completion_ids"], mask, batch.inputs["aepo_prompt"], strict=True)
        for ids, learns, prompt in rows:
            kept = tuple(ids[learns].tolist())
            completion = Completion((1,), kept, (0.0,) * len(kept), "stop", 1.0, 0)
            samples.append(Sample(completion, int(prompt), False, float(kept[0] % 2 == 0)))
        advantages.append(batch.inputs["advantages"])
    context = StepContext(batches[0].temperature, 0.0, 0.0, 0, 0, 1)
    values = None
    if old is not None:
        second = [part.second_logprob for part in old if part.second_logprob is not None]
        values = TokenValues(
            torch.cat([part.logprob for part in old]),
            torch.cat([part.entropy for part in old]),
            torch.cat(second) if second else None,
        )
    both = [
        build_objective(
            cfg,
            samples,
            torch.cat(advantages),
            range(len(samples)),
            context,
            old=values,
            reference=None,
            generator=torch.Generator(),
        )
        for cfg in cfgs
    ]
    return both[0], both[1], masks


@pytest.mark.parametrize(("form", "kind", "split"), CASES, ids=IDS)
def test_the_term_of_an_update_is_that_of_our_trainer(
    model: Path, tmp_path: Path, form: str, kind: str, split: dict[str, int]
) -> None:
    settings = split | dict(aepo_form=form, loss_type=kind, aepo_alpha=0.5)
    trainer = run(model, tmp_path, **settings)
    args, sampled_by = trainer.args, {}
    for update in range(args.max_steps):
        batches = [batch for batch in trainer.micro_batches if batch.update == update]
        assert len(batches) == args.gradient_accumulation_steps
        if batches[0].step % args.steps_per_rollout == 0:
            sampled_by = batches[0].weights
        several = args.updates_per_rollout > 1
        policy = Truth(model, batches[0].weights)
        sampler = Truth(model, sampled_by)
        now, before = [], []
        for batch in batches:
            learns, t = loss_mask(batch.inputs).bool(), batch.temperature
            for truth, kept in ((policy, now), (sampler, before)):
                with torch.no_grad():
                    logprob, entropy = truth(batch.inputs)
                    second, _ = truth(batch.inputs, t)
                kept.append(TokenValues(logprob[learns], entropy[learns], second[learns]))
        with_aepo, without, _ = our_objective(trainer, batches, before if several else None)
        column = with_aepo.columns
        values = [torch.cat([getattr(p, n) for p in now]) for n in ("logprob", "entropy")]
        second = torch.cat([part.second_logprob for part in now])
        ours = with_aepo.token_loss(*values, second, column)[0]
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


@pytest.mark.parametrize("split", [WHOLE, MINIBATCHES, PASSES, TWO_ROLLOUTS])
def test_the_controller_is_told_the_entropy_of_the_policy_that_sampled(
    model: Path, tmp_path: Path, split: dict[str, int]
) -> None:
    trainer = run(model, tmp_path, aepo_form="one_pass", aepo_alpha=0.5, **split)
    args, rollouts = trainer.args, trainer.args.max_steps // trainer.args.updates_per_rollout
    span = max(args.steps_per_rollout, args.gradient_accumulation_steps)
    assert len(logged(trainer, "aepo/entropy")) == rollouts
    for index in range(rollouts):
        batches = [b for b in trainer.micro_batches if index * span <= b.step < (index + 1) * span]
        samples, values, correct = [], [], []
        truth = Truth(model, batches[0].weights)
        # Each sample once, of as many passes as there are.
        for batch in batches[: args.steps_per_generation * (span // args.steps_per_rollout)]:
            with torch.no_grad():
                _, entropy = truth(batch.inputs)
            learns = loss_mask(batch.inputs).bool()
            for row, prompt in enumerate(batch.inputs["aepo_prompt"].tolist()):
                ids = tuple(batch.inputs["completion_ids"][row][learns[row]].tolist())
                completion = Completion((1,), ids, (0.0,) * len(ids), "stop", 1.0, 0)
                samples.append(Sample(completion, prompt, False, float(ids[0] % 2 == 0)))
                values.append(entropy[row][learns[row]])
                correct.append(ids[0] % 2 == 0)
        mean, stderr = token_mean(torch.cat(values), samples, range(len(samples)))
        assert logged(trainer, "aepo/entropy")[index] == pytest.approx(mean, rel=1e-6)
        assert logged(trainer, "entropy_stderr")[index] == pytest.approx(stderr, rel=1e-3)
        right = [i for i, is_correct in enumerate(correct) if is_correct]
        of_right = token_mean(torch.cat(values), samples, right)[0]
        assert logged(trainer, "entropy/correct")[index] == pytest.approx(of_right, rel=1e-6)
        # Prompts are counted on through an update's rollouts, 4 of each, with 4 samples.
        prompts = torch.tensor([sample.group for sample in samples])
        assert prompts.bincount().tolist() == [4] * (len(samples) // 4)
    share = logged(trainer, "aepo/positive_fraction")
    assert all(0 < value < 1 for value in share)


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


def test_the_term_raises_the_entropy(model: Path, tmp_path: Path) -> None:
    """Against GRPO with the same seed, from a policy that is not uniform."""
    settings: dict[str, Any] = dict(max_steps=12, aepo_controller="switch", aepo_form="expected")
    settings |= dict(aepo_alpha=1.0, aepo_temperature_max=1.5, learning_rate=3e-3)
    entropies = {}
    for enabled in (True, False):
        trainer = run(
            model, tmp_path / str(enabled), first_entropy=1.0, aepo_enabled=enabled, **settings
        )
        entropies[enabled] = logged(trainer, "aepo/entropy")
    assert entropies[True][0] == pytest.approx(entropies[False][0], rel=1e-6)
    assert entropies[True][-1] > entropies[False][-1] + 0.1


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


def test_trl_s_head_is_its_own_outside_of_the_forward_pass(model: Path, tmp_path: Path) -> None:
    before = utils._ChunkedLogProbFunction
    run(model, tmp_path, max_steps=1, beta=0.1)
    assert utils._ChunkedLogProbFunction is before


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("aepo_form", dict(aepo_form="split")),
        ("aepo_form", dict(aepo_controller="published")),
        ("aepo_alpha", dict(aepo_alpha=0.0)),
        ("aepo_baseline", dict(aepo_baseline=True)),
        ("aepo_normalizer", dict(aepo_normalizer="positives")),
        ("aepo_temperature_min/max", dict(aepo_temperature_min=1.1)),
        ("temperature", dict(temperature=0.9)),
        ("loss_type", dict(loss_type="bnpo")),
        ("loss_type", dict(loss_type="luspo")),
        ("loss_type", dict(loss_type="vespo")),
        ("epsilon_high", dict(loss_type="cispo", epsilon_high=0.28)),
        ("torch_compile", dict(torch_compile=True)),
        (
            "importance_sampling_level",
            dict(aepo_form="one_pass", importance_sampling_level="sequence"),
        ),
        (
            "gradient_accumulation_steps",
            dict(gradient_accumulation_steps=3, steps_per_generation=2),
        ),
    ],
)
def test_what_cannot_run_together_is_refused(
    tmp_path: Path, key: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as error:
        config(tmp_path, **settings)
    assert error.value.key == key
    assert "aepo." not in str(error.value)


def test_each_setting_is_one_of_aepo_with_its_default(tmp_path: Path) -> None:
    names = {item.name for item in fields(AEPOConfig) if item.name.startswith("aepo_")}
    assert names == {f"aepo_{item.name}" for item in fields(AepoConfig)}
    assert AEPOConfig(str(tmp_path), use_cpu=True).aepo == AepoConfig()
    given = config(tmp_path, aepo_controller="switch", aepo_form="one_pass", aepo_baseline=True)
    expected = AepoConfig(
        controller="switch", form="one_pass", baseline=True, entropy_target=TARGET
    )
    assert given.aepo == expected


def test_settings_are_read_from_a_command_line(tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    words = ["--output_dir", str(tmp_path), "--use_cpu", "--aepo_form", "one_pass"]
    words += ["--aepo_alpha", "0.25", "--aepo_baseline", "true"]
    (args,) = HfArgumentParser(AEPOConfig).parse_args_into_dataclasses(words)
    assert args.aepo == AepoConfig(form="one_pass", alpha=0.25, baseline=True)


def test_another_trl_is_refused_by_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trl()
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs, items: None)
        with pytest.raises(RuntimeError, match=r"GRPOTrainer._compute_loss takes .*items"):
            check_trl()
    with monkeypatch.context() as patch:
        patch.delattr(utils, "_ChunkedLogProbFunction")
        with pytest.raises(RuntimeError, match="_ChunkedLogProbFunction is missing"):
            check_trl()


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
