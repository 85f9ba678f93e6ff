"""prime-rl and open-instruct, which no index has: stand-ins with their names and signatures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aepo_kernels.integrations import open_instruct, prime_rl
from aepo_kernels.integrations.tiny_models import VOCAB, tiny_model


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    prime_rl.uninstall()
    open_instruct.uninstall()


def put(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """A module of these members, and its packages, where import finds them."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    vars(sys.modules[name]).update(members)
    return sys.modules[name]


def materialised(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of labels and entropies."""
    logprobs = torch.log_softmax(logits, -1)
    chosen = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


class FusedOutputLinear(nn.Linear):
    def __init__(self, in_features: int, out_features: int, chunk_size: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, hidden_states: Any, labels: Any = None, temperature: Any = None) -> Any:
        return self.scores(hidden_states @ self.weight.T, labels, temperature)

    @staticmethod
    def scores(logits: Tensor, labels: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        logprob, entropy = materialised(logits / temperature[..., None], labels)
        return {"logprobs": logprob, "entropy": entropy}


class GemmaFusedOutputLinear(FusedOutputLinear):
    def __init__(self, inputs: int, outputs: int, chunk_size: int, softcap: float) -> None:
        super().__init__(inputs, outputs, chunk_size)
        self.softcap = softcap

    def forward(self, hidden_states: Any, labels: Any = None, temperature: Any = None) -> Any:
        logits = self.softcap * torch.tanh(hidden_states @ self.weight.T / self.softcap)
        return self.scores(logits, labels, temperature)


def inject_prime_lm_head(model: Any, chunk_size: int | None = None) -> None:
    weight = model.lm_head.weight
    model.lm_head = FusedOutputLinear(weight.shape[1], weight.shape[0], chunk_size or 512)
    model.lm_head.weight = weight


def put_prime_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    """prime-rl's modules of heads, as far as `prime_rl.install` looks at them."""
    base = "prime_rl.trainer.models.layers.lm_head"
    members = {"FusedOutputLinear": FusedOutputLinear, "inject_prime_lm_head": inject_prime_lm_head}
    put(monkeypatch, base, **members)
    gemma = ModuleType(base + "_gemma")
    vars(gemma).update(GemmaFusedOutputLinear=GemmaFusedOutputLinear)
    monkeypatch.setitem(sys.modules, gemma.__name__, gemma)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prime_rl_s_heads(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    put_prime_rl(monkeypatch)
    torch.manual_seed(0)
    head: Any = FusedOutputLinear(8, VOCAB, 512)
    if softcap is not None:
        head = GemmaFusedOutputLinear(8, VOCAB, 512, softcap)
    head.double()
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    labels, temperature = torch.randint(VOCAB, (2, 5)), torch.rand(2, 5, dtype=torch.float64) + 0.5
    owns = FusedOutputLinear.forward, GemmaFusedOutputLinear.forward
    results = []
    for installed in (False, True):
        if installed:
            said = prime_rl.install()
            assert (
                said == prime_rl.install() and "FusedOutputLinear.forward -> aepo_kernels" in said
            )
        out = head(hidden, labels, temperature=temperature)
        loss = (out["logprobs"] + 0.3 * out["entropy"]).sin().sum()
        grads = torch.autograd.grad(loss, [hidden, head.weight])
        results.append([out["logprobs"], out["entropy"], *grads])
    for own, found in zip(*results, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-9)
    labels[0, 0] = -100  # dropped by a mask; finite, as a mask multiplies
    assert head(hidden, labels, temperature=temperature)["logprobs"].isfinite().all()
    with pytest.raises(ValueError, match="labels, temperature: the fused head needs both"):
        head(hidden)
    prime_rl.uninstall()
    assert owns == (FusedOutputLinear.forward, GemmaFusedOutputLinear.forward)
    monkeypatch.setattr(FusedOutputLinear, "forward", lambda self, hidden: None)
    with pytest.raises(ImportError, match=r"FusedOutputLinear.forward takes \(self, hidden\)"):
        prime_rl.install()


def test_prime_rl_s_head_gets_the_model_s_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    put_prime_rl(monkeypatch)
    prime_rl.install()
    module = sys.modules["prime_rl.trainer.models.layers.lm_head"]
    model = tiny_model("cohere", dtype=torch.float64)
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    temperature = torch.full((2, 6), 0.7, dtype=torch.float64)
    expected, _ = materialised(model(input_ids=ids).logits / 0.7, ids)
    hidden = model.model(input_ids=ids).last_hidden_state
    module.inject_prime_lm_head(model, chunk_size=16)
    found = model.lm_head(hidden, ids, temperature=temperature)["logprobs"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    prime_rl.uninstall()
    assert module.inject_prime_lm_head is inject_prime_lm_head


def test_a_peer_that_is_missing_is_named() -> None:
    with pytest.raises(ImportError, match="prime_rl.* cannot be imported.*from its repository"):
        prime_rl.install()
    with pytest.raises(ImportError, match="open_instruct.grpo_utils cannot be imported"):
        open_instruct.install()


def forward_for_logprobs(
    model: Any,
    query_responses: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    pad_token_id: int,
    temperature: float,
    return_entropy: bool = False,
    cp_context: Any = None,
) -> tuple[Tensor, Tensor | None]:
    output = model(query_responses, attention_mask=attention_mask, position_ids=position_ids)
    labels = query_responses[:, 1:].masked_fill(query_responses[:, 1:] == pad_token_id, 0)
    logprob, entropy = materialised(output.logits[:, :-1] / temperature, labels)
    return logprob, entropy.detach() if return_entropy else None


def put_open_instruct(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """open-instruct's module with the function that `open_instruct.install` replaces."""
    name = "open_instruct.grpo_utils"
    return put(monkeypatch, name, forward_for_logprobs=forward_for_logprobs)


def test_open_instruct_s_function(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = put_open_instruct(monkeypatch)
    user = ModuleType("open_instruct.grpo_fast")
    vars(user).update(forward_for_logprobs=forward_for_logprobs)
    monkeypatch.setitem(sys.modules, user.__name__, user)
    model = tiny_model("granite", dtype=torch.float64)
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    ids[1, 5:] = 0
    mask, positions = (ids != 0).long(), torch.arange(7).expand(2, 7)
    given = (model, ids, mask, positions, 0, 0.7)
    own = utils.forward_for_logprobs(*given, return_entropy=True)
    said = open_instruct.install()
    assert said == open_instruct.install() and "open_instruct.grpo_fast.forward_for_logp" in said
    assert user.forward_for_logprobs is utils.forward_for_logprobs is not forward_for_logprobs
    found = user.forward_for_logprobs(*given, return_entropy=True, cp_context=None)
    torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-9)
    assert found[0].requires_grad and not found[1].requires_grad
    assert user.forward_for_logprobs(*given)[1] is None
    with pytest.raises(ValueError, match="cp_context: is not passed on to the fused model"):
        user.forward_for_logprobs(*given, cp_context=object())
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    plain = utils.forward_for_logprobs(model, ids, None, packed, 0, 0.7)[0]
    torch.testing.assert_close(
        utils.forward_for_logprobs(model, ids, mask, packed, 0, 0.7)[0], plain
    )
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"layers of \['linear_attention'\] keep a state"):
        user.forward_for_logprobs(model, ids, mask, packed, 0, 0.7)
    open_instruct.uninstall()
    assert user.forward_for_logprobs is utils.forward_for_logprobs is forward_for_logprobs


def test_open_instruct_with_another_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "open_instruct.grpo_utils", forward_for_logprobs=lambda model, batch: None)
    with pytest.raises(ImportError, match=r"forward_for_logprobs takes \(model, batch\) and not"):
        open_instruct.install()
