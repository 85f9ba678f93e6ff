"""linear_logprob at the edges: nothing to do, masked columns, odd memory, extreme rows."""

from __future__ import annotations

import math

import pytest
import torch

from aepo_kernels import linear_logprob
from aepo_kernels.head.accumulators import Gradients
from tests.kernels.oracle import IGNORED, Case, make_case, materialised, output_weights
from tests.kernels.oracle import weighted_gradients as gradients

BACKENDS = ["reference", "chunked"]


def run(case: Case, backend: str = "chunked") -> list:
    output = linear_logprob(
        case.hidden,
        case.weight,
        case.targets,
        **case.keywords(),
        backend=backend,
        chunk_tokens=16,
    )
    assert output.backend == backend
    return list(output[:4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_nothing_to_score_gives_zeros_connected_to_every_input(
    num_tokens: int, backend: str
) -> None:
    leaves = make_case(num_tokens, 8, 30, option="all").fresh()
    leaves.targets.fill_(IGNORED)
    outputs = run(leaves, backend)
    for output in outputs:
        assert torch.equal(output, torch.zeros(num_tokens))
    grads = gradients(leaves, outputs, output_weights(num_tokens))
    for grad, tensor in zip(grads, leaves.tensors(), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_tokens_score_zero_whatever_their_hidden_state(backend: str) -> None:
    leaves = make_case(40, 16, 100, option="ignored").fresh()
    ignored = leaves.targets == IGNORED
    assert 0 < ignored.sum() < 40
    with torch.no_grad():
        leaves.hidden[ignored] = torch.nan
    outputs = run(leaves, backend)
    for output in outputs[:3]:
        assert output.isfinite().all() and (output[ignored] == 0).all()
    grad_hidden, grad_weight = gradients(leaves, outputs, output_weights(40))
    assert (grad_hidden[ignored] == 0).all() and grad_weight.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_index_may_be_a_token(backend: str) -> None:
    case = make_case(40, 16, 10)
    renamed = torch.where(case.targets == 3, IGNORED, case.targets)
    expected = run(Case(case.hidden, case.weight, renamed), backend)
    actual = run(Case(case.hidden, case.weight, case.targets, None, {"ignore_index": 3}), backend)
    assert (case.targets == 3).any()
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_columns_weigh_nothing(backend: str) -> None:
    # A padded vocabulary masked by a bias of -inf equals the vocabulary without the padding.
    case = make_case(50, 16, 90, option="bias")
    assert case.bias is not None
    bias = case.bias
    case = Case(case.hidden, case.weight, case.targets, bias, {"second_temperature": 1.5})
    padded = Case(
        case.hidden,
        torch.cat([case.weight, torch.randn(10, 16)]),
        case.targets,
        torch.cat([bias, torch.full((10,), -math.inf)]),
        case.options,
    ).fresh()
    short = case.fresh()
    ours, expected = run(padded, backend), run(short, backend)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    ours, expected = (
        gradients(c, o, output_weights(50)) for c, o in ((padded, ours), (short, expected))
    )
    torch.testing.assert_close(ours[0], expected[0])
    for a, b in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(a[:90], b)
        assert torch.equal(a[90:], torch.zeros_like(a[90:]))


def test_a_masked_target_has_log_prob_minus_infinity() -> None:
    case = make_case(3, 16, 90, option="bias")
    assert case.bias is not None
    case.bias[int(case.targets[1])] = -math.inf
    logprob, entropy, *_ = run(case)
    assert logprob[1] == -math.inf and logprob[[0, 2]].isfinite().all()
    assert entropy.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_and_one_hot_rows(backend: str) -> None:
    vocab = 1000
    hidden = torch.tensor([[0.0, 0.0], [300.0, 0.0]], requires_grad=True)
    weight = torch.zeros(vocab, 2)
    weight[7, 0] = 1.0
    targets = torch.tensor([4, 7])
    leaves = Case(hidden, weight.requires_grad_(), targets)
    logprob, entropy, lse, _ = outputs = run(leaves, backend)
    expected = torch.tensor([-math.log(vocab), 0.0])
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(entropy, -expected)
    torch.testing.assert_close(lse, torch.tensor([math.log(vocab), 300.0]))
    assert all(g.isfinite().all() for g in gradients(leaves, outputs, output_weights(2)))


def test_non_contiguous_inputs() -> None:
    case = make_case(60, 32, 200, option="all")
    assert case.bias is not None
    wide = torch.zeros(60, 2, 32)
    wide[:, 1] = case.hidden
    spaced_bias = torch.zeros(200, 2)
    spaced_bias[:, 1] = case.bias
    odd = Case(
        wide[:, 1].requires_grad_(),
        case.weight.T.contiguous().T.requires_grad_(),
        case.targets.repeat_interleave(2)[::2],
        spaced_bias[:, 1].requires_grad_(),
        case.options,
    )
    assert not any(x.is_contiguous() for x in odd.tensors())
    even = case.fresh()
    pairs = [(c, run(c)) for c in (odd, even)]
    ours, expected = ([*o, *gradients(c, o, output_weights(60))] for c, o in pairs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_reads_no_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(60, 32, 200, option="all")
    leaves = case.fresh()
    outputs = run(leaves)
    expected = [*outputs, *gradients(leaves, outputs, output_weights(60))]

    def poisoned(original):
        def make(*args, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert torch.empty(3).isnan().all()
    leaves = case.fresh()
    outputs = run(leaves)
    actual = [*outputs, *gradients(leaves, outputs, output_weights(60))]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_rows_without_upstream_gradient_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Gradients.add

    def counting(self, dlogits, *others):
        seen.append(len(dlogits))
        original(self, dlogits, *others)

    monkeypatch.setattr(Gradients, "add", counting)
    leaves = make_case(40, 16, 100).fresh()
    upstream = torch.zeros(40)
    upstream[[3, 20, 39]] = torch.tensor([1.0, -2.0, 0.5])
    run(leaves)[0].backward(upstream)
    assert sum(seen) == 3
    truth = leaves.fresh(torch.float64)
    expected = gradients(truth, materialised(truth), [upstream, None, None, None])[0]
    assert leaves.hidden.grad is not None
    torch.testing.assert_close(leaves.hidden.grad, expected.float())
    assert (leaves.hidden.grad[upstream == 0] == 0).all()


def test_changing_the_weight_before_backward_is_an_error() -> None:
    leaves = make_case(10, 8, 20).fresh()
    total = run(leaves)[0].sum()
    with torch.no_grad():
        leaves.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_what_is_written_to_results_changes_no_gradient() -> None:
    grads = []
    for edit in (False, True):
        case = make_case(20, 8, 30, option="second").fresh()
        outputs = run(case)
        for output in outputs:
            output.detach().mul_(0.0 if edit else 1.0)
        grads.append(gradients(case, outputs, output_weights(20)))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
