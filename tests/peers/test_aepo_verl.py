"""AEPO's term in a policy loss of verl's registry, with the real registry and verl's own loss.

verl's module of losses imports packages that it needs only elsewhere: empty ones stand for those.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import AepoConfig, Form
from aepo_fast.integrations import verl as ours
from aepo_fast.integrations.verl import MicroBatch, micro_batch, register

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl"),
]
UNUSED = ("ray", "tensordict", "tensordict.tensorclass", "omegaconf", "codetiming", "orjson")
PAGE = Path(__file__).parents[2] / "docs" / "aepo-in-trl.md"
T = 1.5


class Unused(ModuleType):
    """A package of which anything can be imported."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


@pytest.fixture(scope="module")
def core() -> Iterator[ModuleType]:
    """verl.trainer.ppo.core_algos."""
    before = dict(sys.modules)
    for name in UNUSED:
        if name.split(".")[0] not in before and importlib.util.find_spec(name) is None:
            sys.modules[name] = Unused(name)
    yield importlib.import_module("verl.trainer.ppo.core_algos")
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("verl", *UNUSED):
            del sys.modules[name]


class ActorConfig:
    """What verl's losses read of the actor's configuration."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, None, 0.3

    def __init__(self, **global_batch_info: Any) -> None:
        self.global_batch_info = global_batch_info

    def get(self, name: str, default: Any) -> Any:
        return default


class Batch:
    """3 samples of up to 5 tokens over 11 words, in float64: logits now and of the sampler."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape: dict[str, Any] = dict(generator=generator, dtype=torch.float64)
        self.logits = torch.randn(3, 5, 11, **shape).requires_grad_()
        self.old_logits = self.logits.detach() + 0.3 * torch.randn(3, 5, 11, **shape)
        self.ids = torch.randint(0, 11, (3, 5), generator=generator)
        self.mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
        self.advantages = torch.randn(3, 1, **shape).expand(3, 5) * self.mask
        self.positive = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
        self.sampler_weights = torch.rand(3, 5, **shape) + 0.5

    def logprob(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        all_words = torch.log_softmax(logits / temperature, -1)
        return all_words.gather(2, self.ids.unsqueeze(2)).squeeze(2)

    def loss(self, function: Any, mode: str, config: ActorConfig) -> tuple[Tensor, dict[str, Any]]:
        return function(
            old_log_prob=self.logprob(self.old_logits),
            log_prob=self.logprob(self.logits),
            advantages=self.advantages,
            response_mask=self.mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=self.sampler_weights,
        )

    @property
    def extra(self) -> MicroBatch:
        at_t, old_at_t = self.logprob(self.logits, T), self.logprob(self.old_logits, T)
        return MicroBatch(T, self.positive, at_t, old_at_t)


# Weights of the samples' tokens: the batch has 24 tokens and 6 samples in all, on 2 ranks.
MODES = {
    "token-mean": torch.full((3, 1), 2 / 24),
    "seq-mean-token-mean": torch.tensor([[2 / 6 / 5], [2 / 6 / 3], [2 / 6 / 4]]),
    "seq-mean-token-sum-norm": torch.full((3, 1), 2 / 6 / 5),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["lift", "one_pass", "expected"])
def test_loss_and_gradient_are_verl_s_plus_the_term(
    core: ModuleType, form: Form, mode: str
) -> None:
    register(AepoConfig(form=form, alpha=0.25), "aepo-test")
    batch = Batch()
    config = ActorConfig(dp_size=2, batch_num_tokens=24, global_batch_size=6)
    with micro_batch(batch.extra):
        loss, metrics = batch.loss(core.get_policy_loss_fn("aepo-test"), mode, config)
    (grad,) = torch.autograd.grad(loss, batch.logits)

    plain, plain_metrics = batch.loss(core.get_policy_loss_fn("vanilla"), mode, config)
    logprob, old = batch.logprob(batch.logits), batch.logprob(batch.old_logits)
    ratio, positive = (logprob - old).exp(), batch.positive.unsqueeze(1)
    if form in ("lift", "one_pass"):
        rho = (batch.logprob(batch.old_logits, T) - old).exp().clamp(1 / 3, 3)
        weight = (rho - 1).clamp(min=0) if form == "lift" else rho
        term = -positive * torch.minimum(ratio, ratio.clamp(0.8, 1.3)) * weight
        mean = (rho * batch.mask).sum().item() / 12
        assert metrics.pop("aepo/rho_mean") == pytest.approx(mean)
    else:
        f_t = logprob - T * batch.logprob(batch.logits, T)
        term = -positive * ratio.detach().clamp(0.8, 1.3) * f_t
    expected = plain + 0.25 * (MODES[mode] * batch.sampler_weights * batch.mask * term).sum()
    (expected_grad,) = torch.autograd.grad(expected, batch.logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (grad - expected_grad).abs().max() < 1e-7
    assert metrics == plain_metrics


def test_the_page_s_module_registers_the_loss(core: ModuleType) -> None:
    (text,) = re.findall(
        r"^```python needs aepo_verl\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S
    )
    exec(compile(text, str(PAGE), "exec"), {})
    batch = Batch()
    with micro_batch(batch.extra):
        loss, _ = batch.loss(core.get_policy_loss_fn("aepo"), "token-mean", ActorConfig())
    assert loss.isfinite()


def test_without_what_verl_does_not_give_it_raises(core: ModuleType) -> None:
    register(AepoConfig(form="one_pass"), "aepo-test")
    batch = Batch()
    with pytest.raises(RuntimeError, match="log-probs at T"):
        batch.loss(core.get_policy_loss_fn("aepo-test"), "token-mean", ActorConfig())


def test_what_does_not_fit_is_refused_by_name(
    core: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="aepo.form = 'dcpo'"):
        register(AepoConfig(form="dcpo"))
    monkeypatch.setattr(core, "agg_loss", lambda loss_mat, mask: None)
    with pytest.raises(RuntimeError, match=r"core_algos.agg_loss takes \(loss_mat, mask\)"):
        register(AepoConfig())
    assert ours._current.get() is None
