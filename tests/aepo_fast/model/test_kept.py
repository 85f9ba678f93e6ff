"""The tokens that a sampler keeps, and the same ones in log-probs, losses and gradients."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import ModelConfig, TrainerConfig
from aepo_fast.method.objective import Objective, build_objective
from aepo_fast.method.tokens import StepContext
from aepo_fast.model.kept import keep_most_likely, kept_ids, padded, room
from aepo_fast.model.load import load_model
from aepo_fast.model.policy import Policy
from aepo_fast.rollout.canary import Canary
from aepo_fast.rollout.hf import HfRollout, sample_kept
from aepo_fast.rollout.vllm_output import completions
from aepo_fast.samples import Completion, Request, Rollout, Sample, sampler_logprobs
from aepo_fast.training.update import update
from tests.tiny_run import a_machine, tiny_config

PROMPTS = [(5, 6, 7), (9,), (11, 12, 13, 14)]
KEPT: dict[str, Any] = {"top_k": 12, "top_p": 0.8, "with_kept": True}


def by_definition(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> set[int]:
    """Temperature, the top_k largest with all ties of the last, then top_p of these."""
    logits = logits.double() / temperature
    last = logits.sort(descending=True).values[top_k - 1]
    among = [token for token in range(len(logits)) if logits[token] >= last]
    probs, found = torch.softmax(logits[among], 0), list[int]()
    for place in probs.argsort(descending=True, stable=True).tolist():
        if top_p == 1 or probs[found].sum() < top_p:
            found.append(place)
    return {among[place] for place in found}


@pytest.mark.parametrize("top_k", [2, 9, 40])
def test_the_kept_tokens_are_those_of_the_definition(top_k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 40, generator=generator) * 2
    logits[3:] = (logits[3:] * 2).round() / 2  # many ties
    points = (torch.arange(400) + 0.5) / 400
    for top_p, temperature in ((1.0, 1.0), (0.5, 1.3), (0.9, 0.7), (1e-9, 1.0)):
        for row in logits:
            wanted = by_definition(row, temperature, top_k, top_p)
            ids, logprobs, found = sample_kept(
                row.expand(400, -1),
                torch.full((400,), temperature),
                points,
                torch.full((400,), top_k),
                torch.full((400,), top_p) if top_p < 1 else None,
            )
            some = sorted(token for token in found[0].tolist() if token >= 0)
            # Top-p may leave out either of two equal ones.
            assert torch.equal(row[some].sort().values, row[list(wanted)].sort().values)
            assert set(some) == wanted or top_p < 1
            law = torch.zeros(40, dtype=torch.float64)
            law[some] = torch.softmax(row[some].double() / temperature, 0)
            shares = torch.bincount(ids, minlength=40) / 400
            assert (shares - law).abs().max() <= 2 / 400
            torch.testing.assert_close(logprobs.double(), law[ids].log(), atol=2e-6, rtol=0)


def test_ties_are_kept_as_far_as_there_is_room() -> None:
    logits = torch.zeros(1, 500)
    tempered, ids = keep_most_likely(logits, torch.ones(1), torch.tensor([8]), None)
    assert tempered.shape == ids.shape == (1, room(8)) == (1, 8 + 2 + 16)
    assert ids.unique().numel() == room(8)  # the very ones that are drawn from
    assert room(1024) == 1296 and room(1024, 300) == 300


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    """A tiny model whose distributions are far from even."""
    cfg = ModelConfig(path=str(tiny_model_dir), compute_dtype="float32")
    model = load_model(cfg, tiny_model_dir, a_machine())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(12 if name == "model.norm.weight" else 8 if "proj" in name else 1)
    return model


def sample(model: PreTrainedModel, temperatures: tuple[float, ...], **kept: Any) -> list[Sample]:
    engine = HfRollout(model, a_machine(), eos_ids=(2,), batch_rows=5)
    requests = [
        Request(PROMPTS[index], 3, temperature, index, **kept)
        for index, temperature in enumerate(temperatures)
    ]
    groups = engine.generate(requests, max_new_tokens=7)
    return [
        Sample(one, group, temperatures[group] != 1, float(place % 2))
        for group, ones in enumerate(groups)
        for place, one in enumerate(ones)
    ]


def without_kept(samples: list[Sample]) -> list[Sample]:
    return [replace(one, completion=replace(one.completion, kept_ids=None)) for one in samples]


def lone_logits(model: PreTrainedModel, one: Completion) -> torch.Tensor:
    """Of each completion token, [N, V]."""
    ids = torch.tensor([one.prompt_ids + one.completion_ids])
    return model(ids).logits[0, len(one.prompt_ids) - 1 : -1]


def test_samples_carry_what_was_kept_and_its_logprobs(model: PreTrainedModel) -> None:
    samples = sample(model, (1.0, 1.4, 0.7), **KEPT)
    sizes = set()
    for one in (sample.completion for sample in samples):
        assert one.kept_ids is not None and one.kept_ids.dtype == np.int32
        assert len(one.kept_ids) == len(one.completion_ids)
        with torch.no_grad():
            logits = lone_logits(model, one).double()
        each = zip(logits, one.kept_ids, one.completion_ids, one.logprobs, strict=True)
        for row, ids, token, logprob in each:
            kept = ids[ids >= 0].tolist()
            assert set(kept) == by_definition(row, one.temperature, 12, 0.8)
            law = torch.log_softmax(row[kept] / one.temperature, 0)
            assert logprob == pytest.approx(law[kept.index(token)].item(), abs=2e-5)
            sizes.add(len(kept))
    assert len(sizes) > 3 and max(sizes) <= 12
    for other in sample(model, (1.0,)):
        assert other.completion.kept_ids is None
    assert kept_ids(sample(model, (1.0,), top_k=5), [0, 1]) is None


@pytest.mark.parametrize("layout", ["shared", "padded", "packed"])
def test_the_policy_replays_what_was_kept(model: PreTrainedModel, layout: Any) -> None:
    samples = sample(model, (1.0, 1.0, 1.4), **KEPT)
    trainer = TrainerConfig(layout=layout, tokens_per_microbatch=24)
    policy = Policy(model, a_machine(), trainer)
    everyone = range(len(samples))
    assert len(policy.microbatches(samples, everyone)) > 1
    values = policy.token_values(samples, everyone, second_temperature=1.4)
    at_one = torch.tensor([not one.is_aux for one in samples for _ in range(one.length)])
    assert values.second_logprob is not None
    sampled = sampler_logprobs(samples)
    found = torch.where(at_one, values.logprob, values.second_logprob)
    torch.testing.assert_close(found, sampled, atol=2e-5, rtol=0)  # ratios of 1
    whole = policy.token_values(without_kept(samples), everyone)
    assert (whole.logprob - sampled)[at_one].abs().mean() > 0.1
    assert (values.entropy < whole.entropy).all()


def test_the_canary_sees_a_set_that_is_not_replayed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HfRollout(model, a_machine(compute=torch.bfloat16), eos_ids=(), batch_rows=8)
    policy = Policy(model, a_machine(), TrainerConfig())
    assert Canary(engine, policy, PROMPTS, kept=KEPT).fresh < 0.05
    monkeypatch.setattr("aepo_fast.model.batch.kept_ids", lambda samples, indices: None)
    assert Canary(engine, policy, PROMPTS, kept=KEPT).fresh > 0.1


def test_what_vllm_reports_is_read() -> None:
    """Of each token itself and the three most likely ones: ids, and log-probs of the kept ones."""
    out = -math.inf
    found = SimpleNamespace(
        start_indices=[0, 4],
        end_indices=[4, 8],
        token_ids=[7, 7, 3, 9, 5, 8, 6, 4],
        logprobs=[-0.2, -0.2, -1.7, out, -2.0, -0.6, -1.2, -2.0],  # 5 is as likely as 4
    )
    sample = SimpleNamespace(index=0, finish_reason="stop", token_ids=[7, 5], logprobs=found)
    request = Request((1,), 1, 1.0, 0, 0.9, 3, with_kept=True)
    (one,) = completions(request, SimpleNamespace(outputs=[sample]), 4)
    assert one.logprobs == (-0.2, -2.0) and one.weights_version == 4
    assert one.kept_ids is not None
    assert one.kept_ids.tolist() == [[7, 3, -1, -1], [5, 8, 6, 4]]
    sample.token_ids = [7]
    with pytest.raises(ValueError, match="shorter"):
        completions(request, SimpleNamespace(outputs=[sample]), 4)


def test_kept_ids_pass_through_a_checkpoint() -> None:
    array = padded([[3, 1], [2], [5, 6, 7]])
    assert array.tolist() == [[3, 1, -1], [2, -1, -1], [5, 6, 7]] and array.dtype == np.int32
    one = Completion((1,), (3, 2, 7), (-1.0,) * 3, "stop", 1.0, 0, array)
    given = [Sample(one, 0, False, 1.0), Sample(replace(one, kept_ids=None), 0, False, 0.0)]
    state = Rollout(given, [], ["", ""], 1, 0, 0.0).state_dict()
    back = Rollout.from_state(state, [])
    assert back.samples[1].completion.kept_ids is None
    found = back.samples[0].completion.kept_ids
    assert found is not None and found.dtype == np.int32 and found.tolist() == array.tolist()
    del state["rows"][0]["completion"]["kept_ids"]  # as an older one has it
    assert Rollout.from_state(state, []).samples[0].completion.kept_ids is None


def masked_values(
    model: PreTrainedModel, samples: list[Sample], second_temperature: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probs, entropies and second log-probs of softmax over the kept ids, materialised."""
    rows = torch.cat([lone_logits(model, one.completion) for one in samples])  # [N, V]
    outside = torch.ones_like(rows, dtype=torch.bool)
    ids = kept_ids(samples, range(len(samples)))
    assert ids is not None
    for place, kept in enumerate(ids.tolist()):
        outside[place, [token for token in kept if token >= 0]] = False
    targets = torch.tensor([token for one in samples for token in one.completion.completion_ids])

    def law(temperature: float) -> torch.Tensor:
        return torch.log_softmax((rows / temperature).masked_fill(outside, -torch.inf), 1)

    def chosen(logp: torch.Tensor) -> torch.Tensor:
        return logp.gather(1, targets[:, None])[:, 0]

    logp = law(1.0)
    finite = logp.masked_fill(outside, 0.0)
    entropy = -(finite.exp().masked_fill(outside, 0.0) * finite).sum(1)
    second = None if second_temperature is None else chosen(law(second_temperature))
    return chosen(logp), entropy, second


def objective_of(
    folder: Path, samples: list[Sample], loss: LossConfig, aepo: AepoConfig, policy: Policy
) -> Objective:
    cfg = replace(tiny_config(Path("m"), folder), loss=loss, aepo=aepo)
    everyone = range(len(samples))
    old = policy.token_values(samples, everyone, second_temperature=1.2)
    # A policy that has moved since, as after an update: not all ratios are 1.
    shift = torch.linspace(-0.3, 0.3, len(old.logprob))
    return build_objective(
        cfg,
        samples,
        torch.linspace(-1, 1, len(samples)),
        everyone,
        StepContext(1.2, 0.0, 0.0, 3, 1, 1),
        old=replace(old, logprob=old.logprob + shift),
        reference=replace(old, logprob=old.logprob - shift) if loss.kl_coef else None,
        generator=torch.Generator(),
    )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("loss", "form"),
    [
        (LossConfig(kl_coef=0.1), "resample"),
        (LossConfig(), "expected"),
        (LossConfig(entropy_method="bonus"), "resample"),
        (LossConfig(policy="gspo"), "resample"),
    ],
    ids=["kl", "expected", "bonus", "gspo"],
)
def test_loss_and_gradients_are_those_of_a_masked_softmax(
    model: PreTrainedModel,
    tiny_model_dir: Path,
    tmp_path: Path,
    loss: LossConfig,
    form: Any,
    backend: str,
) -> None:
    samples = sample(model, (1.0, 1.0, 1.4 if form == "resample" else 1.0), **KEPT)
    machine: Machine = replace(a_machine(), head_backend=backend)
    policy = Policy(copy.deepcopy(model), machine, TrainerConfig(tokens_per_microbatch=24))
    aepo = AepoConfig(form=form, alpha=0.5)
    objective = objective_of(tmp_path, samples, loss, aepo, policy)

    # transformers' own, in float64.
    truth = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    truth.load_state_dict(model.state_dict())
    values = masked_values(truth, samples, objective.second_temperature)
    if objective.sequence_loss is None:
        columns = {name: column.double() for name, column in objective.columns.items()}
        expected, _ = objective.token_loss(*values, columns)
    else:
        lengths = torch.tensor([one.length for one in samples])
        logprob, entropy, _ = (None if x is None else x.float() for x in values)
        given = logprob, entropy, None, torch.repeat_interleave(lengths), objective.columns
        expected, _ = objective.sequence_loss(*given)  # type: ignore[arg-type]
    expected.backward()

    before = [weight.detach().clone() for weight in policy.model.parameters()]
    optimizer = torch.optim.SGD(
        policy.model.parameters(), lr=1000.0
    )  # large steps: a small one would be rounded away
    done = update(
        policy,
        optimizer,
        samples,
        range(len(samples)),
        objective,
        max_grad_norm=1e9,
        check=lambda: None,
    )
    assert done.loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert done.grad_norm > 0.1
    for was, now, true in zip(before, policy.model.parameters(), truth.parameters(), strict=True):
        assert true.grad is not None
        scale = true.grad.abs().max().item()
        found = (was - now).double() / 1000
        torch.testing.assert_close(found, true.grad, rtol=0, atol=2e-5 * scale)
