"""The rival entropy methods against their formulas, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import AepoConfig, EntropyMethod, LossConfig
from aepo_fast.method import rivals
from aepo_fast.method.controllers import RivalController
from aepo_fast.method.credit import group_advantages
from aepo_fast.method.objective import Objective, build_objective, needs_old_logprobs
from aepo_fast.method.token_objective import taking_slices
from aepo_fast.method.tokens import StepContext, Tokens
from aepo_fast.samples import Completion, Sample, TokenValues
from aepo_kernels import linear_token_loss
from tests.tiny_run import tiny_config

RIVALS: tuple[EntropyMethod, ...] = ("entropic", "repo_r", "era", "ucpo", "ds_grpo")
LENGTHS = [3, 5, 1, 12, 2, 4, 6, 2]
# A mixed group, an all-correct one, an all-wrong one.
GROUPS = [0, 0, 0, 0, 1, 1, 2, 2]
REWARDS = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def some_rows() -> list[Sample]:
    return [
        Sample(
            Completion((1, 2), (3,) * length, (0.0,) * length, "stop", 1.0, 0), group, False, reward
        )
        for length, group, reward in zip(LENGTHS, GROUPS, REWARDS, strict=True)
    ]


def some_scores(seed: int = 0) -> TokenValues:
    """Log-probs near and far from 0, entropies, and log-probs at another temperature; float64."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    logprob = -3 * torch.rand(total, generator=generator, dtype=torch.float64).square()
    entropy = 2 * torch.rand(total, generator=generator, dtype=torch.float64)
    return TokenValues(logprob, entropy, 1.7 * logprob)


def advantages() -> torch.Tensor:
    return group_advantages(torch.tensor(REWARDS), torch.tensor(GROUPS), "group_norm")


def objective_of(
    output: Path, loss: LossConfig, scores: TokenValues, lever: float = 0.0
) -> Objective:
    cfg = replace(tiny_config(output, output), loss=loss, aepo=AepoConfig(enabled=False))
    rows = some_rows()
    return build_objective(
        cfg,
        rows,
        advantages(),
        range(len(rows)),
        StepContext(1.0, 0.0, 0.0, 0, 0, 1, lever),
        old=scores if needs_old_logprobs(loss, 1) else None,
        reference=None,
        generator=torch.Generator(),
    )


def gradient_of(
    objective: Objective, scores: TokenValues, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients by the two log-probs of the tokens `keep`, at the policy that sampled."""
    logprob = scores.logprob[keep].clone().requires_grad_()
    assert scores.second_logprob is not None
    second = scores.second_logprob[keep].clone().requires_grad_()
    columns = {name: values[keep] for name, values in objective.columns.items()}
    use_second = second if objective.second_temperature else None
    total, _ = objective.token_loss(logprob, scores.entropy[keep], use_second, columns)
    found = torch.autograd.grad(total, [logprob, second], allow_unused=True)
    zeros = torch.zeros_like(logprob)
    return (zeros if found[0] is None else found[0], zeros if found[1] is None else found[1])


def by_hand(loss: LossConfig, scores: TokenValues, lever: float) -> list[float]:
    """Each token's advantage as the papers have it, row by row, at ratio 1."""
    logprobs = [part.tolist() for part in scores.logprob.split(LENGTHS)]
    means = [sum(part) / len(part) for part in logprobs]
    expected = []
    for row, advantage in enumerate(advantages().tolist()):
        correct = REWARDS[row] == 1.0
        if loss.entropy_method == "ucpo" and correct:
            others = [m for m, g, r in zip(means, GROUPS, REWARDS, strict=True) if (g, r) == (0, 1)]
            if GROUPS[row] == 0:  # in the other groups the advantage is 0
                inverse = sum(math.exp(-mean) for mean in others)
                share = math.exp(-means[row]) / inverse
                advantage *= len(others) * ((1 - loss.ucpo_tau) / len(others) + 0.2 * share)
        if loss.entropy_method == "ds_grpo":
            advantage += (-1 if correct else 1) * loss.ds_grpo_gamma * sum(logprobs[row])
        for logprob in logprobs[row]:
            value = advantage
            if loss.entropy_method == "entropic" and math.exp(logprob) > 0.95:
                value = advantage * (1 + lever if advantage > 0 else 1 - lever)
            if loss.entropy_method == "repo_r" and advantage > 0:
                value = max(0.0, advantage * (1 - lever * logprob))
            if loss.entropy_method == "repo_r" and advantage < 0:
                value = min(0.0, advantage * (1 + lever * logprob))
            expected.append(value)
    return expected


@pytest.mark.parametrize("policy", ["grpo", "dapo", "cispo"])
@pytest.mark.parametrize(
    ("method", "lever"),
    [
        ("entropic", 0.4),
        ("entropic", -1.0),
        ("repo_r", 0.05),
        ("repo_r", -0.9),
        ("ucpo", 0.0),
        ("ds_grpo", 0.0),
    ],
)
def test_gradients_are_those_of_the_formula_and_add_up_over_chunks(
    tmp_path: Path, method: EntropyMethod, lever: float, policy: Any
) -> None:
    loss = LossConfig(policy=policy, entropy_method=method)
    scores = some_scores()
    assert (scores.logprob.exp() > 0.95).any() and (scores.logprob < -1.5).any()
    objective = objective_of(tmp_path, loss, scores, lever)
    total = sum(LENGTHS)
    found, _ = gradient_of(objective, scores, torch.arange(total))
    weight = objective.columns["weight"].double()
    expected = -weight * torch.tensor(by_hand(loss, scores, lever), dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    chunks = [gradient_of(objective, scores, part)[0] for part in torch.arange(total).split(7)]
    torch.testing.assert_close(torch.cat(chunks), found)
    # Rows called passive have no gradient, the others do.
    silent = {row for row, part in enumerate(found.split(LENGTHS)) if part.abs().sum() == 0}
    assert objective.passive_samples <= silent
    equal_groups = set() if method == "ds_grpo" else {4, 5, 6, 7}
    assert objective.passive_samples == equal_groups


def test_era_scores_correct_rows_of_low_entropy_at_scaled_logits(tmp_path: Path) -> None:
    loss = LossConfig(entropy_method="era", era_entropy_low=1.9)
    scores = some_scores()
    objective = objective_of(tmp_path, loss, scores)
    assert objective.second_temperature == 0.5
    first, second = gradient_of(objective, scores, torch.arange(sum(LENGTHS)))
    tokens = zip(
        advantages().tolist(),
        scores.entropy.split(LENGTHS),
        objective.columns["weight"].split(LENGTHS),
        first.split(LENGTHS),
        second.split(LENGTHS),
        strict=True,
    )
    kinds = set()
    for advantage, entropy, weight, by_first, by_second in tokens:
        highest = sorted(entropy.tolist(), reverse=True)[: max(1, int(0.2 * len(entropy)))]
        scaled = advantage > 0 and sum(highest) / len(highest) < 1.9
        kinds.add((scaled, advantage > 0))
        expected = -weight.double() * advantage
        zeros = torch.zeros_like(expected)
        torch.testing.assert_close(by_first, zeros if scaled else expected, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(by_second, expected if scaled else zeros, atol=1e-7, rtol=1e-5)
    assert kinds == {(True, True), (False, True), (False, False)}
    assert objective.passive_samples == {4, 5, 6, 7}


def test_era_takes_its_ratio_at_the_scaled_logits(tmp_path: Path) -> None:
    loss = LossConfig(entropy_method="era", era_entropy_low=9.0)
    scores = some_scores()
    objective = objective_of(tmp_path, loss, scores)
    second = scores.second_logprob
    assert second is not None

    def total(shift: float, at_k: float) -> float:
        moved = scores.logprob + shift, scores.entropy, second + at_k
        return objective.token_loss(*moved, objective.columns)[0].item()

    # A logit step moves the scaled law k times as far; only that enters for the correct rows.
    slope = (total(0.0, 1e-6) - total(0.0, -1e-6)) / 2e-6
    weight, advantage = objective.columns["weight"].double(), objective.columns["advantage"]
    positive = objective.columns["scaled"] > 0
    assert slope == pytest.approx(-(weight * advantage)[positive].sum().item(), rel=1e-4)
    assert total(0.1, 0.3) == pytest.approx(  # beyond the clip at 1.2 there
        -1.2 * (weight * advantage)[positive].sum().item()
        - math.exp(0.1) * (weight * advantage)[~positive].sum().item(),
        rel=1e-5,
    )


def test_era_has_the_gradient_of_scaled_logits_through_the_head(tmp_path: Path) -> None:
    loss = LossConfig(entropy_method="era", era_entropy_low=1.9, era_scale=3.0)
    generator = torch.Generator().manual_seed(1)
    total, hidden_size, vocabulary = sum(LENGTHS), 8, 11
    hidden = torch.randn(total, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator)
    targets = torch.randint(vocabulary, (total,), generator=generator)
    hidden.requires_grad_()
    logits = hidden.double() @ weight.double().T

    def at(scale: float) -> torch.Tensor:
        return (scale * logits).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    first, second = at(1.0), at(3.0)
    scores = TokenValues(
        first.detach().float(), some_scores().entropy.float(), second.detach().float()
    )
    objective = objective_of(tmp_path, loss, scores)
    column = objective.columns
    chosen = torch.where(column["scaled"] > 0, second, first)
    assert 0 < column["scaled"].sum() < total
    expected = torch.autograd.grad(-(column["weight"] * column["advantage"] * chosen).sum(), hidden)
    result = linear_token_loss(
        hidden,
        weight,
        targets,
        taking_slices(objective.token_loss, list(column)),
        *column.values(),
        second_temperature=objective.second_temperature,
        ignore_index=None,
    )
    found = torch.autograd.grad(result.loss, hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def entropy_of(logits: torch.Tensor) -> float:
    law = logits.log_softmax(-1)
    return -(law.exp() * law).sum().item()


def entropy_after(
    loss: LossConfig, lever: float = 0.0, *, correct: tuple[int, ...] = (0, 1), scaled: bool = False
) -> float:
    """Entropy of one state after a small expected policy-gradient step under a method."""
    method = rivals.make_regulariser(loss)
    logits = torch.tensor([2.0, 0.5, 0.0, -0.5], dtype=torch.float64, requires_grad=True)
    law = logits.log_softmax(-1)
    probability = law.detach().exp()
    positive = torch.zeros(4, dtype=torch.bool)
    positive[list(correct)] = True
    reward = positive.double()
    advantage = reward - (probability * reward).sum()
    if loss.entropy_method == "ucpo":
        weights = rivals.ucpo_weights(law.detach()[positive], loss.ucpo_tau)
        # The factors have mean 1 over samples, which come by the policy's law.
        share = probability[positive] / probability[positive].sum()
        advantage[positive] = advantage[positive] * weights / (share * weights).sum()
    if loss.entropy_method == "ds_grpo":
        main = torch.ones(4, dtype=torch.bool)
        advantage = rivals.ds_grpo_advantage(
            advantage, law.detach(), main, positive, loss.ds_grpo_gamma
        )
    advantage = method.scale_advantage(advantage, law, lever)
    second = (logits * loss.era_scale).log_softmax(-1) if loss.entropy_method == "era" else None
    column = {
        "scaled": (positive & (advantage > 0)).double() * float(scaled),
        "old_second_logprob": torch.zeros(4),
    }
    logprob, _ = method.ratio_logprobs(Tokens(law, law.detach(), law, second, column))
    (gradient,) = torch.autograd.grad((probability * advantage * logprob).sum(), logits)
    return entropy_of(logits.detach() + 1e-3 * gradient)


def test_each_lever_moves_the_entropy_the_way_it_is_meant_to() -> None:
    plain = entropy_after(LossConfig())
    # EntroPIC: a < 0, below the target, weakens likely positives and so raises entropy.
    entropic = LossConfig(entropy_method="entropic", entropic_min_prob=0.5)
    assert entropy_after(entropic, -0.5) > plain > entropy_after(entropic, 0.5)
    # The same with a likely action that is wrong: a < 0 pushes it down harder.
    wrong = entropy_after(LossConfig(), correct=(2,))
    assert entropy_after(entropic, -0.5, correct=(2,)) > wrong
    assert wrong > entropy_after(entropic, 0.5, correct=(2,))
    for correct in ((0, 1), (2,)):
        repo = LossConfig(entropy_method="repo_r")
        around = entropy_after(LossConfig(), correct=correct)
        assert entropy_after(repo, 0.05, correct=correct) > around
        assert entropy_after(repo, -0.05, correct=correct) < around
    # UCPO: nothing to act on where all are correct, rarer correct actions first elsewhere.
    start = entropy_of(torch.tensor([2.0, 0.5, 0.0, -0.5], dtype=torch.float64))
    ucpo = LossConfig(entropy_method="ucpo")
    assert entropy_after(ucpo, correct=(0, 1, 2, 3)) == pytest.approx(start, abs=1e-12)
    assert entropy_after(ucpo) > plain
    # DS-GRPO: raised within the correct actions; where all are wrong it sharpens.
    smooth = LossConfig(entropy_method="ds_grpo", ds_grpo_gamma=0.1)
    assert entropy_after(smooth, correct=(0, 1, 2, 3)) > start
    assert entropy_after(smooth, correct=()) < start
    # ERA: a law sharper than the policy is what the likely positives are fitted with.
    era = LossConfig(entropy_method="era")
    assert entropy_after(era, scaled=True, correct=(0,)) > entropy_after(era, correct=(0,))


def test_entropic_is_a_clipped_pi_controller_whose_sign_weakens_positives_below_target() -> None:
    cfg = LossConfig(entropy_method="entropic", adaptive_target=0.5)
    controller = RivalController(cfg)
    assert controller.value == 0.0
    integral = 0.0
    for entropy in (0.4, 0.3, math.nan, 0.55, 0.2):
        controller.update(entropy)
        if math.isfinite(entropy):
            assert controller.value == pytest.approx(entropy - 0.5 + 0.01 * integral)
            integral += entropy - 0.5
    assert controller.value < 0
    controller.update(9.0)
    assert controller.value == 1.0
    low = RivalController(replace(cfg, entropic_kp=10.0))
    low.update(0.1)
    assert low.value == -1.0


def test_repo_r_doubles_halves_and_changes_sign_within_its_bounds() -> None:
    controller = RivalController(LossConfig(entropy_method="repo_r", adaptive_target=0.5))
    assert controller.value == 1e-3
    found = []
    for entropy in [0.4] * 7 + [math.inf] + [0.6] * 12 + [0.4] * 3:
        controller.update(entropy)
        found.append(controller.value)
    up = [2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 0.05, 0.05, 0.05]
    down = [0.05 / 2**n for n in range(1, 9)] + [-1e-4, -2e-4, -4e-4, -8e-4]
    assert found == pytest.approx([*up, *down, -4e-4, -2e-4, -1e-4])
    controller.update(0.4)
    assert controller.value == pytest.approx(1e-4)


@pytest.mark.parametrize("method", RIVALS)
def test_controllers_go_on_from_their_own_state_only(method: EntropyMethod) -> None:
    aim = {"adaptive_target": 0.5} if method in ("entropic", "repo_r") else {}
    cfg = LossConfig(entropy_method=method, **aim)
    saved, straight = RivalController(cfg), RivalController(cfg)
    for entropy in (0.3, 0.2, 0.9):
        saved.update(entropy)
        straight.update(entropy)
    again = RivalController(cfg)
    again.load_state_dict(saved.state_dict())
    for entropy in (0.7, 0.1):
        again.update(entropy)
        straight.update(entropy)
    assert again.state_dict() == straight.state_dict()
    other = RivalController(LossConfig())
    other.load_state_dict(saved.state_dict())
    assert other.value == 0.0 and other.integral == 0.0


def test_ucpo_keeps_the_mass_and_prefers_the_rare() -> None:
    mean_logprob = torch.tensor([-0.1, -1.0, -4.0], dtype=torch.float64)
    weights = rivals.ucpo_weights(mean_logprob, 0.2)
    assert weights.mean().item() == pytest.approx(1.0)
    assert weights.tolist() == sorted(weights.tolist()) and weights[0] > 0.8
    assert rivals.ucpo_weights(mean_logprob[:1], 0.2).tolist() == [1.0]
    far = rivals.ucpo_weights(torch.tensor([0.0, -900.0]), 1.0)
    assert far.isfinite().all() and far[1].item() == pytest.approx(2 / (1 + 1e-6), rel=1e-7)


def test_response_entropy_is_of_the_highest_fifth() -> None:
    lengths = torch.tensor([4, 0, 10])
    entropy = torch.arange(14.0)
    found = rivals.response_entropy(entropy, lengths)
    assert found.tolist() == [3.0, 0.0, 12.5]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"entropic_kp": -1.0}, "loss.entropic_kp"),
        ({"entropic_ki": -1.0}, "loss.entropic_ki"),
        ({"entropic_min_prob": 1.0}, "loss.entropic_min_prob"),
        ({"repo_r_zeta": 0.1}, "loss.repo_r_zeta"),
        ({"repo_r_zeta_min": 0.0}, "loss.repo_r_zeta_min"),
        ({"repo_r_zeta_max": 1e-5}, "loss.repo_r_zeta"),
        ({"era_scale": 1.0}, "loss.era_scale"),
        ({"era_entropy_low": 0.0}, "loss.era_entropy_low"),
        ({"ucpo_tau": 1.5}, "loss.ucpo_tau"),
        ({"ds_grpo_gamma": 0.0}, "loss.ds_grpo_gamma"),
        ({"policy": "gspo", "entropy_method": "entropic"}, "loss.entropy_method"),
        ({"policy": "gspo", "entropy_method": "repo_r"}, "loss.entropy_method"),
        ({"policy": "gspo", "entropy_method": "era"}, "loss.entropy_method"),
    ],
)
def test_what_cannot_run_is_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LossConfig(**settings)
    assert caught.value.key == key


def test_era_and_aepo_cannot_share_the_second_temperature(tmp_path: Path) -> None:
    loss = LossConfig(entropy_method="era")
    cfg = tiny_config(tmp_path, tmp_path, loss=loss)  # resample
    with pytest.raises(ConfigError, match="second temperature"):
        replace(cfg, aepo=AepoConfig(form="one_pass"))
    replace(cfg, aepo=AepoConfig(form="one_pass", enabled=False))
