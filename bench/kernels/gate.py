"""The correctness gate: errors against float64, measured by those of plain same-dtype PyTorch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aepo_kernels import multiplies_bfloat16
from bench.kernels.inputs import CHUNK_ELEMENTS
from bench.peers import materialised
from bench.peers.peer import Inputs, Mode, Outputs, Peer, loss_of

# A candidate is incorrect if an error is more than this many times the baseline's ...
LIMIT = 8.0
# ... and also more than this many epsilons of the input dtype: rounding a result to the dtype of
# the inputs is imprecise, not incorrect.
EPSILONS = 1.0

Values = dict[str, Tensor]


def compute(peer: Peer, inputs: Inputs, mode: Mode) -> Values:
    """Run a candidate once: its per-token values and gradients by name, for those it has."""
    clear_gradients(inputs)
    with torch.set_grad_enabled(mode.training):
        outputs = peer.run(inputs, mode)
    if outputs.loss is not None:
        outputs.loss.backward()
    values = named(outputs, mode)
    if mode.training:
        assert inputs.hidden.grad is not None
        values["dhidden"] = inputs.hidden.grad
        if inputs.weight.requires_grad:
            assert inputs.weight.grad is not None
            values["dweight"] = inputs.weight.grad
        clear_gradients(inputs)
    return values


def named(outputs: Outputs, mode: Mode) -> Values:
    """The per-token results that a mode asks for."""
    found = {"logprob": outputs.logprob, "entropy": outputs.entropy}
    if mode.second:
        found["second_logprob"] = outputs.second_logprob
    if mode.loss == "ce":
        del found["entropy"]
    return {name: value.detach() for name, value in found.items() if value is not None}


def clear_gradients(inputs: Inputs) -> None:
    """Drop the gradients of hidden and weight."""
    inputs.hidden.grad = inputs.weight.grad = None


def truth(inputs: Inputs, mode: Mode, loss: str | None) -> Values:
    """All values in float64, a chunk of tokens at a time."""
    parts: dict[str, list[Tensor]] = {}
    dweight = None
    if loss and inputs.weight.requires_grad:
        dweight = torch.zeros_like(inputs.weight, dtype=torch.float64)
    with torch.no_grad():
        weight = inputs.weight.double()
        for rows in _chunks(inputs):
            hidden = inputs.hidden[rows].double()
            products = hidden @ weight.T
            law = torch.log_softmax(products / inputs.temperature, -1)
            target = inputs.targets[rows][:, None]
            values = {
                "logprob": law.gather(1, target)[:, 0],
                "entropy": -(law.exp() * law).sum(-1),
            }
            if mode.second:
                second = torch.log_softmax(products / inputs.second_temperature, -1)
                values["second_logprob"] = second.gather(1, target)[:, 0]
            if loss:
                slope = _slope(inputs, rows, loss, values["logprob"])[:, None]
                gradient = law.exp_().mul_(-slope)
                gradient.scatter_add_(1, target, slope)
                gradient /= inputs.temperature
                values["dhidden"] = gradient @ weight
                if dweight is not None:
                    dweight.addmm_(gradient.T, hidden)
            for name, value in values.items():
                parts.setdefault(name, []).append(value)
    joined = {name: torch.cat(part) for name, part in parts.items()}
    return joined if dweight is None else {**joined, "dweight": dweight}


class WideProducts(TorchDispatchMode):
    """bfloat16 GEMMs by float32 ones, rounded once: what instructions for them would give."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.bfloat16:
            return torch.mm(args[0].float(), args[1].float()).bfloat16()
        return func(*args, **(kwargs or {}))


def baseline(inputs: Inputs, mode: Mode, loss: str | None) -> Values:
    """The materialised path in the dtype of the inputs, a chunk of tokens at a time.

    Where one chunk holds all tokens this is the candidate "torch eager"; otherwise the weight's
    gradient is summed over chunks in float32. A CPU without bfloat16 instructions, which would take
    minutes, rounds float32 products instead.
    """
    with nullcontext() if multiplies_bfloat16(inputs.hidden.device.type) else WideProducts():
        return _baseline(inputs, mode, loss)


def _baseline(inputs: Inputs, mode: Mode, loss: str | None) -> Values:
    parts: dict[str, list[Tensor]] = {}
    dweight = None
    if loss and inputs.weight.requires_grad:
        dweight = torch.zeros_like(inputs.weight, dtype=torch.float32)
    second = inputs.second_temperature if mode.second else None
    for rows in _chunks(inputs):
        hidden = inputs.hidden[rows].detach().requires_grad_()
        weight = inputs.weight.detach().requires_grad_(inputs.weight.requires_grad)
        with torch.set_grad_enabled(mode.training):
            scores = materialised.scores(
                hidden, weight, inputs.targets[rows], inputs.temperature, second, True
            )
        values = named(Outputs(*scores), mode)
        if loss:
            slices = [x[rows] for x in (inputs.old_logprob, inputs.advantage, inputs.aux_weight)]
            total = loss_of(loss, scores[0], *slices)
            assert total is not None
            leaves = (hidden, weight) if dweight is not None else (hidden,)
            values["dhidden"], *product = torch.autograd.grad(total, leaves)
            if dweight is not None:
                dweight += product[0]
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    joined = {name: torch.cat(part) for name, part in parts.items()}
    return joined if dweight is None else {**joined, "dweight": dweight.to(inputs.weight.dtype)}


def errors_of(values: Values, exact: Values) -> dict[str, dict[str, float]]:
    """Root mean square and largest absolute error of each value, and the same of the truth."""
    found = {}
    for name, value in values.items():
        square, largest, truth_square, truth_largest, finite = 0.0, 0.0, 0.0, 0.0, True
        for got, want in zip(value.split(8192), exact[name].split(8192), strict=True):
            difference = got.double() - want
            square += float(difference.square().sum())
            largest = max(largest, float(difference.abs().max()))
            truth_square += float(want.square().sum())
            truth_largest = max(truth_largest, float(want.abs().max()))
            finite &= bool(difference.isfinite().all())
        count = value.numel()
        found[name] = {
            "rms": (square / count) ** 0.5 if finite else float("inf"),
            "max": largest if finite else float("inf"),
            "truth_rms": (truth_square / count) ** 0.5,
            "truth_max": truth_largest,
        }
    return found


def judge(
    errors: dict[str, dict[str, float]], reference: dict[str, dict[str, float]], epsilon: float
) -> tuple[dict[str, dict[str, float | None]], list[str]]:
    """Each error as a multiple of the baseline's, and what makes the candidate incorrect."""
    ratios: dict[str, dict[str, float | None]] = {}
    wrong = []
    for name, error in errors.items():
        ratios[name] = {}
        for kind in ("rms", "max"):
            base = reference[name][kind]
            ratio = error[kind] / base if base > 0 else None
            ratios[name][kind] = ratio
            allowed = max(LIMIT * base, EPSILONS * epsilon * error[f"truth_{kind}"])
            # Not "error > allowed": a comparison with nan must not pass.
            if not error[kind] <= allowed:
                size = error[kind] / max(error[f"truth_{kind}"], 1e-300)
                wrong.append(f"{name}: {kind} error {size:.2g} of its {kind}")
    return ratios, wrong


def check(values: Values, exact: Values, reference: Any, epsilon: float) -> dict[str, Any]:
    """The gate's part of a candidate's record: status, errors and their ratios.

    epsilon: of the dtype of the inputs.
    """
    errors = errors_of(values, exact)
    ratios, wrong = judge(errors, reference, epsilon)
    return {
        "status": "incorrect" if wrong else "ok",
        "message": "; ".join(wrong),
        "errors": errors,
        "error_ratios": ratios,
    }


def _slope(inputs: Inputs, rows: slice, loss: str | None, logprob: Tensor) -> Tensor:
    """The loss's derivative by each log-prob of a chunk, [C] float64."""
    leaf = logprob.detach().requires_grad_()
    slices = [x[rows].double() for x in (inputs.old_logprob, inputs.advantage, inputs.aux_weight)]
    with torch.enable_grad():
        total = loss_of(loss, leaf, *slices)
    assert total is not None
    return torch.autograd.grad(total, leaf)[0]


def _chunks(inputs: Inputs) -> list[slice]:
    num_tokens = len(inputs.targets)
    step = max(1, CHUNK_ELEMENTS // len(inputs.weight))
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]
