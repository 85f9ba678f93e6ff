"""OpenRLHF's actor with a fused head, with the real OpenRLHF and stand-ins for what it imports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from aepo_kernels.integrations import openrlhf as ours
from aepo_kernels.integrations import seams
from aepo_kernels.integrations.tiny_models import tiny_model
from tests.peers.heads import token_ids

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    ours.uninstall()


def an_actor(actor_class: Any, name: str = "gemma2", packing: bool = False) -> Any:
    actor = actor_class(tiny_model(name, dtype=torch.float64), temperature=0.7)
    actor.temperature, actor.packing_samples = 0.7, packing
    actor.model.config.use_cache = False  # as the actor sets it when it loads a model
    return actor


def inputs() -> dict[str, torch.Tensor]:
    """Three sequences, two of them padded on the right, and a mask of the last five tokens."""
    sequences = token_ids(3, 9)
    mask = torch.ones_like(sequences)
    mask[0, 7:], mask[2, 8:] = 0, 0
    return {"sequences": sequences, "attention_mask": mask, "action_mask": mask[:, -5:].bool()}


@pytest.mark.parametrize("packing", [False, True])
def test_logprobs_entropy_and_gradients_are_its_own(actor_class: Any, packing: bool) -> None:
    given = inputs()
    results = []
    for fused in (False, True):
        actor = an_actor(actor_class, "llama" if packing else "gemma2", packing)
        if fused:
            assert ours.install().startswith("openrlhf 0.11.2: openrlhf.models.actor.Actor.forward")
        logprobs, output = actor(**given, return_output=True, return_entropy=True)
        mask = given["action_mask"]
        entropy = output.entropy[:, -5:] * mask
        loss = (logprobs * torch.linspace(1, 2, 5)).sum() + entropy.sum()
        grads = torch.autograd.grad(loss, list(actor.model.parameters()))
        results.append((logprobs.detach(), entropy.detach(), *grads))
    # Their logits are rounded to float32.
    for own, found in zip(*results, strict=True):
        scale = own.abs().max().item()
        torch.testing.assert_close(found.double(), own.double(), rtol=1e-4, atol=1e-5 * scale)


def test_all_tokens_and_the_logits_themselves(actor_class: Any) -> None:
    given = inputs()
    given.pop("action_mask")
    actor = an_actor(actor_class)
    own = actor(**given, return_logprobs=True)
    logits = actor(**given, return_output=True)["logits"]
    ours.install()
    found = actor(**given, return_logprobs=True)
    torch.testing.assert_close(found.float(), own.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(actor(**given, return_output=True)["logits"], logits)


def test_install_and_uninstall(actor_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = actor_class.forward
    assert ours.install() == ours.install()
    assert actor_class.forward is not own
    ours.uninstall()
    assert actor_class.forward is own
    monkeypatch.setattr(actor_class, "forward", lambda self, sequences: None)
    with pytest.raises(ImportError, match=r"Actor.forward takes \(self, sequences\) and not"):
        ours.install()
    monkeypatch.setattr(seams.metadata, "version", lambda _: "0.9.0")
    with pytest.raises(ImportError, match="openrlhf 0.9.0 is older than 0.11"):
        ours.install()
