"""verl's fused heads with ours in their place, with the real verl and none of its dependencies."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aepo_kernels.integrations import check, seams
from aepo_kernels.integrations import verl as ours
from aepo_kernels.integrations.tiny_models import VOCAB, tiny_model
from tests.kernels.fuzz.ranks import in_ranks
from tests.peers.heads import differentiate, errors, token_ids, truth

pytestmark = pytest.mark.peers
RANKS = ["first", "second"]


@pytest.fixture(autouse=True)
def _verl(verl_packages: None) -> Iterator[None]:
    yield
    ours.uninstall()


def scores_in_verl(name: str, temperature: float, backend: str = "torch") -> Any:
    """The scores of a tiny float32 model by the forward that verl gives it."""
    from verl.models.transformers import dense_common

    model, ids = tiny_model(name), token_ids()
    forward = getattr(dense_common, f"forward_with_{backend}_backend")
    model.forward = MethodType(forward, model)
    # Its labels are rolled, so that the last one is the first.
    out = model(input_ids=ids, temperature=temperature, return_dict=True)
    shape = ids.shape
    logprob, entropy = out.log_probs.view(shape)[:, :-1], out.entropy.view(shape)[:, :-1]
    return differentiate(model, logprob, entropy)


# Heads without a bias or settings, and those which verl's own head leaves out.
@pytest.mark.parametrize("name", ["qwen2", "llama tied", "gemma2", "granite", "phi"])
def test_fsdp_s_head_against_float64(name: str) -> None:
    expected = truth(name, token_ids(), 0.7)
    theirs = errors(scores_in_verl(name, 0.7), expected)
    ours.install()
    found = errors(scores_in_verl(name, 0.7), expected)
    assert max(found) < 2e-5
    plain = name in ("qwen2", "llama tied")
    assert max(theirs) < 1e-4 if plain else theirs[0] > 0.1, "verl reads the head's settings now"


def test_megatron_s_function_in_the_triton_forward() -> None:
    ours.install()
    found = errors(scores_in_verl("gemma2", 0.7, "triton"), truth("gemma2", token_ids(), 0.7))
    assert max(found) < 2e-5
    with pytest.raises(ValueError, match="reduction = 'mean': only log-probs of tokens"):
        ours.linear_cross_entropy(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1), 1.0, "mean")


def test_megatron_s_ranks_each_give_their_part_of_hidden_s_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(20, (6,), generator=generator)
    logprobs = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    expected = logprobs.gather(1, labels[:, None])[:, 0]
    (truth_grad,) = torch.autograd.grad(expected.sin().sum(), hidden)

    def one(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        states, rows = hidden.detach().clone().requires_grad_(), weight[10 * rank : 10 * rank + 10]
        found, _ = ours.linear_cross_entropy(states, rows, labels, 0.7, "none", RANKS[rank])
        return found.detach(), torch.autograd.grad(found.sin().sum(), states)[0]

    # A group stands for its rank here.
    monkeypatch.setattr(dist, "get_rank", RANKS.index)
    (first, left), (second, right) = in_ranks(2, one)
    torch.testing.assert_close(first, expected.detach())
    torch.testing.assert_close(second, expected.detach())
    torch.testing.assert_close(left + right, truth_grad)


def test_temperatures_of_rows_and_labels_to_leave_out() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[5, -100, 7], [1, 2, -100]])
    temperature = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    logprobs = torch.log_softmax(hidden @ weight.T / temperature[..., None], -1)
    expected = logprobs.gather(2, labels.clamp(min=0)[..., None])[..., 0].where(labels >= 0, 0)
    found, entropy = ours.fused_linear_for_ppo(hidden, weight, labels, temperature)
    torch.testing.assert_close(found, expected)
    assert entropy.shape == labels.shape and (entropy[labels < 0] == 0).all()


def test_install_and_uninstall() -> None:
    from verl.models.transformers import dense_common
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as kernel

    before = FusedLinearForPPO.forward, dense_common.forward_with_torch_backend
    function = kernel.linear_cross_entropy
    said = ours.install()
    assert said.startswith("verl 0.9.1: verl.utils.experimental.torch_functional.FusedLinearForPPO")
    assert ours.install() == said and kernel.linear_cross_entropy is ours.linear_cross_entropy
    names = inspect.signature(dense_common.forward_with_torch_backend).parameters
    assert "temperature" in names and "shift_labels" in names
    ours.uninstall()
    assert before == (FusedLinearForPPO.forward, dense_common.forward_with_torch_backend)
    assert kernel.linear_cross_entropy is function


def test_older_and_unknown_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    monkeypatch.setattr(FusedLinearForPPO, "forward", lambda self, hidden: None)
    with pytest.raises(ImportError, match=r"FusedLinearForPPO.forward takes \(self, hidden\) and"):
        ours.install()
    monkeypatch.setattr(seams.metadata, "version", lambda _: "0.8.0")
    with pytest.raises(ImportError, match="verl 0.8.0 is older than 0.9"):
        ours.install()


def test_the_check_shows_what_verl_s_own_head_leaves_out() -> None:
    found = {name: check.compare(name, torch.float32, 0.7) for name in ("llama", "gemma2")}
    for errors_of in found.values():
        assert not check.is_off(errors_of, torch.float32)
        assert isinstance(errors_of["verl"], check.Errors)
    assert found["llama"]["verl"].logprob < 1e-5 < 0.1 < found["gemma2"]["verl"].logprob  # type: ignore[union-attr]
