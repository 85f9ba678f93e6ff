"""Policy losses of the user's own: how they are found, what is refused, and two that train."""

from __future__ import annotations

import json
import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import AepoConfig, LossConfig
from aepo_fast.config.sections import Config
from aepo_fast.config.toml import dump_config, load_config
from aepo_fast.method.objective import Objective, build_objective
from aepo_fast.method.policy_losses import POLICY_LOSSES
from aepo_fast.method.tokens import StepContext
from aepo_fast.method.user_loss import _checked, find_policy_loss
from aepo_fast.samples import Completion, Sample, TokenValues
from aepo_fast.training.run import train
from tests.tiny_run import tiny_config, with_trainer

# SAPO, arXiv 2511.20347, and GMPO, arXiv 2507.20673, as a researcher would write them.
PAPERS = """
import torch

def sapo(logprob, old_logprob, advantage, *, tau_pos=1.0, tau_neg=1.05):
    ratio = (logprob - old_logprob).exp()
    tau = torch.where(advantage >= 0, tau_pos, tau_neg)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage

def gmpo(logprob, old_logprob, advantage, sample_of_token, *, width=0.4):
    rows = int(sample_of_token[-1]) + 1
    zeros = logprob.new_zeros(rows)
    counts = zeros.index_add(0, sample_of_token, torch.ones_like(logprob))
    log_ratio = logprob - old_logprob
    bounded = torch.where(advantage >= 0, log_ratio.clamp(max=width), log_ratio.clamp(min=-width))
    mean = zeros.index_add(0, sample_of_token, bounded) / counts
    return -mean.exp() * zeros.index_add(0, sample_of_token, advantage) / counts
"""
BAD = """
import torch
from aepo_fast.method.policy_losses import TokenTerms

value = 3

def plain(logprob, advantage): return -advantage * logprob
def misspelt(logprob, advantages): return -advantages * logprob
def missing(logprob, strength): return -strength * logprob
def wants(logprob, *, strength=1.0): return -strength * logprob
def variadic(logprob, **rest): return -logprob
def positional(logprob, /, advantage): return -logprob
def blind(old_logprob, advantage): return -advantage * old_logprob

def number(logprob): return 3.0
def pair(logprob): return -logprob, logprob
def summed(logprob, advantage): return -(advantage * logprob).sum()
def column(logprob): return -logprob[:, None]
def double(logprob): return -logprob.double()
def detached(logprob, advantage): return -advantage * logprob.detach()
def flags(logprob): return TokenTerms(-logprob, torch.zeros(1), torch.zeros(1))
def infinite(logprob, old_logprob): return ((logprob - old_logprob) * 1000).exp()

def centred(logprob, advantage): return -(advantage - advantage.mean()) * logprob
def mean_ratio(logprob, old_logprob, advantage):
    ratio = (logprob - old_logprob).exp()
    return -ratio * advantage / ratio.mean().detach()
def ordered(logprob): return -logprob * torch.arange(len(logprob))
def row_tokens(logprob, sample_of_token): return -logprob
def row_centred(logprob, advantage, sample_of_token):
    zeros = logprob.new_zeros(int(sample_of_token[-1]) + 1)
    return -zeros.index_add(0, sample_of_token, (advantage - advantage.mean()) * logprob)
"""
LENGTHS = [3, 5, 1, 4]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the two modules, outside the repository."""
    for name, text in (("losses_of_papers", PAPERS), ("bad_losses", BAD)):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def rows_and_scores(seed: int) -> tuple[list[Sample], TokenValues]:
    """Four rows of a group and log-probs of the policy that sampled, in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        Sample(Completion((1,), (2,) * n, (0.0,) * n, "stop", 1.0, 0), 0, False, float(i % 2))
        for i, n in enumerate(LENGTHS)
    ]
    logprob = -3 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)
    return rows, TokenValues(logprob, torch.ones_like(logprob), None)


ADVANTAGES = [1.5, -0.5, 0.25, -2.0]


def objective_of(out: Path, loss: LossConfig, rows: list[Sample], scores: TokenValues) -> Objective:
    return build_objective(
        replace(tiny_config(out, out), loss=loss, aepo=AepoConfig(enabled=False)),
        rows,
        torch.tensor(ADVANTAGES),
        range(len(rows)),
        StepContext(1.0, 0.0, 0.0, 0, 0, 1),
        old=scores,
        reference=None,
        generator=torch.Generator(),
    )


def by_hand(
    slope: Callable[[list[float], float], list[float]], loss: LossConfig, log_ratio: torch.Tensor
) -> torch.Tensor:
    """The gradient by the log-probs; slope: of a row's loss by its tokens, from their ratios."""
    parts = [part.tolist() for part in log_ratio.split(LENGTHS)]
    weight = {"token_mean": [1 / sum(LENGTHS)] * 4, "sequence_mean": [0.25 / n for n in LENGTHS]}
    return torch.tensor(
        [
            w * value
            for w, part, advantage in zip(weight[loss.aggregation], parts, ADVANTAGES, strict=True)
            for value in slope([math.exp(x) for x in part], advantage)
        ],
        dtype=torch.float64,
    )


def sapo_slope(ratios: list[float], advantage: float) -> list[float]:
    """d(-f A) / d log pi = -4 s (1 - s) r A, with s = sigmoid(tau (r - 1))."""
    tau = 1.0 if advantage >= 0 else 2.0
    sigmoids = [1 / (1 + math.exp(-tau * (r - 1))) for r in ratios]
    return [-4 * s * (1 - s) * r * advantage for s, r in zip(sigmoids, ratios, strict=True)]


def gmpo_slope(ratios: list[float], advantage: float) -> list[float]:
    """Of T tokens' weight each: d(-A exp(mean of bounded log r)) = -A G / T where not bounded."""
    low, high = (0.0, math.exp(0.2)) if advantage >= 0 else (math.exp(-0.2), math.inf)
    mean = math.prod(min(max(r, low), high) for r in ratios) ** (1 / len(ratios))
    return [-advantage * mean * (low < r < high) for r in ratios]


@pytest.mark.parametrize(
    ("loss_of", "slope"),
    [
        (("losses_of_papers:sapo", {"tau_neg": 2.0}, None), sapo_slope),
        (("losses_of_papers:sapo", {"tau_neg": 2}, "sequence_mean"), sapo_slope),
        (("losses_of_papers:gmpo", {"width": 0.2}, None), gmpo_slope),
        (("losses_of_papers:gmpo", {"width": 0.2}, "sequence_mean"), gmpo_slope),
    ],
)
def test_the_gradient_of_a_users_loss_is_that_of_its_formula(
    modules: Path, loss_of: Any, slope: Any
) -> None:
    policy, params, aggregation = loss_of
    loss = LossConfig(policy=policy, params=params, aggregation=aggregation)
    assert (loss.advantage, loss.clip_low, loss.clip_high) == ("group_norm", 0.2, 0.2)
    assert aggregation or loss.aggregation == "token_mean"
    rows, scores = rows_and_scores(0)
    noise = torch.linspace(-0.7, 0.6, sum(LENGTHS), dtype=torch.float64).flip(0)
    noise = noise[torch.randperm(len(noise), generator=torch.Generator().manual_seed(1))]
    logprob = (scores.logprob + noise).requires_grad_()
    objective = objective_of(modules, loss, rows, scores)
    entropy = scores.entropy
    columns = {name: values.double() for name, values in objective.columns.items()}
    if objective.sequence_loss is None:
        total, _ = objective.token_loss(logprob, entropy, None, columns)
    else:
        sample_of_token = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
        total, _ = objective.sequence_loss(logprob, entropy, None, sample_of_token, columns)
    (gradient,) = torch.autograd.grad(total, logprob)
    # Weights and advantages were float32.
    torch.testing.assert_close(gradient, by_hand(slope, loss, noise), rtol=1e-6, atol=1e-9)


def metrics_of(cfg: Config) -> list[dict[str, Any]]:
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    varying = ("time/", "perf/", "memory/")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(varying)} for line in lines
    ]


@pytest.mark.parametrize(
    ("policy", "params", "aepo"),
    [
        ("losses_of_papers:sapo", {"tau_neg": 1.1}, AepoConfig(form="one_pass")),
        ("losses_of_papers:gmpo", {"width": 0.3}, AepoConfig()),
    ],
)
def test_a_users_loss_trains_resumes_and_round_trips(
    modules: Path, tiny_model_dir: Path, policy: str, params: Any, aepo: AepoConfig
) -> None:
    loss = LossConfig(policy=policy, params=params)
    straight = tiny_config(tiny_model_dir, modules / "straight", loss=loss, aepo=aepo)
    straight = with_trainer(straight, steps=5, epochs=2)
    assert train(straight) == 0
    found = metrics_of(straight)
    assert len(found) == 5
    for line in found:
        assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
        assert line["entropy"] > 0
    assert any(line["grad_norm"] > 0 for line in found)
    assert load_config(str(modules / "straight" / "config.toml")).loss == straight.loss

    halves = replace(straight, output_dir=str(modules / "halves"))
    assert train(with_trainer(halves, steps=2)) == 0
    assert train(halves, resume=True) == 0
    assert metrics_of(halves) == found


@pytest.mark.parametrize(
    ("settings", "key", "parts"),
    [
        (["loss.policy=grpoo"], "loss.policy", "Did you mean grpo|my_module:my_loss"),
        (["loss.policy=nowhere:loss"], "loss.policy", "importing 'nowhere' failed|ModuleNotFound"),
        (["loss.policy=bad_losses:nothing"], "loss.policy", "no function 'nothing'"),
        (["loss.policy=bad_losses:value"], "loss.policy", "no function 'value'"),
        (["loss.policy=bad_losses:misspelt"], "loss.policy", "'advantages'|Did you mean advantage"),
        (["loss.policy=bad_losses:missing"], "loss.policy", "'strength'|Set loss.params.strength"),
        (["loss.policy=bad_losses:variadic"], "loss.policy", "'**rest'|by name"),
        (["loss.policy=bad_losses:positional"], "loss.policy", "'logprob'|by name"),
        (["loss.policy=bad_losses:blind"], "loss.policy", "takes no 'logprob'"),
        (
            ["loss.policy=bad_losses:wants", "loss.params={strenght=1.0}"],
            "loss.params.strenght",
            "no such argument|Did you mean strength",
        ),
        (
            ["loss.policy=bad_losses:wants", "loss.params={advantage=1.0}"],
            "loss.params.advantage",
            "given by the trainer|Leave it out",
        ),
        (
            ["loss.policy=bad_losses:plain", "loss.params={strength=1.0}"],
            "loss.params",
            "does nothing with loss.policy = 'bad_losses:plain'|arguments of its own",
        ),
        (
            ["loss.policy=sapo", "loss.params={tau_pos=0}"],
            "loss.params",
            "sapo gives a loss that is",
        ),
        (["loss.policy=sapo", "loss.params={tau_pos='a'}"], "loss.params", "sapo gives no loss"),
        (["loss.params={strength=1.0}"], "loss.params", "does nothing with loss.policy = 'grpo'"),
        (
            ["loss.policy=losses_of_papers:gmpo", "loss.entropy_method=clip_cov"],
            "loss.entropy_method",
            "losses_of_papers:gmpo weighs whole sequences",
        ),
        (
            ["loss.policy=losses_of_papers:gmpo", "loss.correction=icepop"],
            "loss.correction",
            "losses_of_papers:gmpo weighs whole sequences",
        ),
        (
            ["loss.policy=losses_of_papers:gmpo", "aepo.form=dcpo"],
            "aepo.form",
            "losses_of_papers:gmpo has one of whole sequences",
        ),
        (
            ["loss.policy=losses_of_papers:sapo", "loss.dual_clip=2.0"],
            "loss.dual_clip",
            "does nothing with loss.policy = 'losses_of_papers:sapo'",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_a_model_loads(
    modules: Path, settings: list[str], key: str, parts: str
) -> None:
    path = modules / "config.toml"
    path.write_text('[model]\npath = "some"\n[[data.sources]]\nname = "prompts.jsonl"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), settings)
    assert caught.value.key == key and caught.value.reason and caught.value.fix
    for part in parts.split("|"):
        assert part in str(caught.value)


def test_names_and_params_round_trip(modules: Path) -> None:
    path = modules / "config.toml"
    path.write_text(
        '[model]\npath = "some"\n[[data.sources]]\nname = "prompts.jsonl"\n'
        '[loss]\npolicy = "losses_of_papers:sapo"\n[loss.params]\ntau_pos = 0.5\n'
    )
    cfg = load_config(str(path))
    assert (cfg.loss.policy, cfg.loss.params) == ("losses_of_papers:sapo", {"tau_pos": 0.5})
    path.write_text(dump_config(cfg))
    assert load_config(str(path)) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def arguments_of(count: int, *, rows: bool) -> dict[str, Any]:
    """What the trainer gives at the first update, whose ratios and advantages are all alike."""
    logprob = torch.full((count,), -2.0, requires_grad=True)
    given = {
        "logprob": logprob,
        "old_logprob": logprob.detach(),
        "advantage": torch.ones(count),
        "entropy": torch.ones(count),
        "second_logprob": None,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "sample_of_token": torch.arange(count) // 2 if rows else None,
    }
    return given


@pytest.mark.parametrize(
    ("name", "reason", "fix"),
    [
        ("number", "a value of type float", "TokenTerms"),
        ("pair", "a value of type tuple", "TokenTerms"),
        ("summed", r"the shape \[\] where \[8\] is needed", "neither summed nor averaged"),
        ("column", r"the shape \[8, 1\] where \[8\]", "one value per token"),
        ("double", "torch.float64 where logprob is torch.float32", "dtype"),
        ("detached", "no gradient by logprob", "not detached"),
        ("flags", r"the shape \[1\] where \[8\]", "one value per token"),
        ("infinite", "not finite", "Bound"),
        ("centred", r"not additive over tokens: token \d of 8", "must take sample_of_token"),
        ("mean_ratio", r"not additive over tokens: token \d of 8", "must take sample_of_token"),
        ("ordered", "not additive over tokens", "must take sample_of_token"),
        ("row_tokens", r"the shape \[8\] where \[4\]", "one value per row"),
        ("row_centred", r"not additive over rows: row \d of 4", "nothing of other rows"),
    ],
)
def test_a_loss_that_is_none_is_refused_at_its_first_evaluation(
    modules: Path, name: str, reason: str, fix: str
) -> None:
    loss = find_policy_loss(f"bad_losses:{name}")
    with pytest.raises(ConfigError, match=reason) as caught:
        loss.terms(arguments_of(8, rows=loss.whole_sequences), {})
    assert caught.value.key == "loss.policy" and f"bad_losses:{name}" in str(caught.value)
    assert fix in caught.value.fix


def test_additivity_is_checked_once_and_as_soon_as_there_are_two_tokens(modules: Path) -> None:
    calls = []

    def centred(logprob: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        calls.append(len(logprob))
        return -(advantage - advantage.mean()) * logprob

    def plain(logprob: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        calls.append(len(logprob))
        return -advantage * logprob

    names = ("logprob", "advantage")
    one, eight = (arguments_of(count, rows=False) for count in (1, 8))
    first, later = ({name: given[name] for name in names} for given in (one, eight))
    checked = _checked("mine:centred", centred)
    checked(**first)
    with pytest.raises(ConfigError, match="not additive"):
        checked(**later)
    checked = _checked("mine:plain", plain)
    calls.clear()
    checked(**later)
    assert calls == [8, 4, 4, 8]
    checked(**later)
    assert calls[4:] == [8]
    with torch.no_grad():  # rows that are only measured may come first
        _checked("mine:plain", plain)(**later)


def test_losses_of_the_table_pass_the_check_of_a_users_own() -> None:
    for name, loss in POLICY_LOSSES.items():
        given = arguments_of(8, rows=loss.whole_sequences)
        arguments = {key: given[key] for key in loss.parameters if key in given}
        assert torch.is_tensor(loss.terms(given, {}).loss)
        _checked(name, loss.function)(**arguments)


def test_a_loss_that_needs_no_advantage_trains_rows_without_one(modules: Path) -> None:
    rows, scores = rows_and_scores(0)
    users = LossConfig(policy="bad_losses:wants")
    quiet = torch.zeros(4)
    for loss, passive in ((LossConfig(), {0, 1, 2, 3}), (users, set())):
        objective = build_objective(
            replace(tiny_config(modules, modules), loss=loss, aepo=AepoConfig(enabled=False)),
            rows,
            quiet,
            range(4),
            StepContext(1.0, 0.0, 0.0, 0, 0, 1),
            old=scores,
            reference=None,
            generator=torch.Generator(),
        )
        assert objective.passive_samples == passive
