"""The two public functions: both check their arguments and hand a `Problem` to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from aepo_kernels import reference
from aepo_kernels.backends import DEVICES, resolve_backend
from aepo_kernels.checks import (
    check_active,
    check_grad_of,
    check_problem,
    check_row_sampling,
    check_token_tensors,
)
from aepo_kernels.head.kept_ids import logprob as kept_logprob
from aepo_kernels.head.kept_ids import token_loss as kept_token_loss
from aepo_kernels.head.logprob import logprob as chunked_logprob
from aepo_kernels.head.plan import direction_of
from aepo_kernels.head.token_loss import token_loss as chunked_token_loss
from aepo_kernels.problem import (
    OUTPUTS,
    LogprobOutput,
    Problem,
    RowSampling,
    TokenLoss,
    TokenLossOutput,
    VocabShard,
)
from aepo_kernels.tensors import breaks_graph, check_readable, is_traced
from aepo_kernels.traced_loss import traced_token_loss


@breaks_graph(
    "shard", "weight_grad", "weight_slice", "sum_squares", "mean_logits", "is_top1", "kept_ids"
)
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    second_temperature: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    kept_ids: Tensor | None = None,
    shard: VocabShard | None = None,
    weight_grad: Tensor | None = None,
    weight_slice: int | None = None,
    sum_squares: bool = False,
    mean_logits: bool = False,
    is_top1: bool = False,
    grad_of: Sequence[str] | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    chunk_tokens: int | None = None,
) -> LogprobOutput:
    """Log-probs of target tokens and entropies under a language-model head, differentiable.

    The logits are softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), [N, V]. The
    results, in nats, are those of softmax(logits / temperature): `lse` is logsumexp(logits /
    temperature), and `second_logprob` is the log-prob under softmax(logits / second_temperature).

    The head:
    hidden: [N, H] float32, bfloat16, float16 or float64. weight: [V, H], any of these dtypes; GEMMs
    run in hidden's dtype. Under autocast a float32 hidden is cast as nn.Linear casts it; not for
    "reference", and not with logits_dtype=torch.float32. targets: [N] int64. bias: [V].
    temperature, second_temperature: a positive float or [N]. lora_a [R, H] and lora_b [V, R] stand
    for a weight of weight + lora_scale * lora_b @ lora_a, which never exists. ignore_index: the
    target of tokens to leave out; their outputs are 0. None says that there are no such tokens, and
    then nothing waits for a GPU. kept_ids: [N, K] int64, the ids that a sampler has kept of each
    row (top-k, top-p), padded with -1. The results are those of softmax over these ids alone, in
    float32. An id that stands twice counts once. The target must be kept: a CPU raises ValueError
    where it is not, and a GPU, which would wait for the look, gives NaN. It takes N K H multiply-
    adds instead of GEMMs, and no shard, weight_grad, weight_slice, sum_squares or "fused".

    Memory and gradients:
    shard: this rank's part of a vocabulary that is split over ranks. weight, bias, lora_b and
    weight_grad then hold this rank's rows, and the results are those of the whole vocabulary.
    weight_grad: [V, H] float32 (float64 for float64 hidden). The weight's gradient is added to it,
    and autograd gets none. weight_slice: rows of weight whose logits the gradient pass recomputes
    at once, for all tokens. The weight's gradient is then written once, in its own dtype, and no
    float32 copy of it exists (4 GEMMs in all); not of float16. chunk_tokens: tokens whose
    logits exist at once; None derives the number from a memory budget.

    A frozen head, where hidden alone needs a gradient:
    The forward pass also writes the derivative of logprob by each row of hidden, and backward only
    multiplies the rows: 2 GEMMs in all. It takes 4 N H bytes (2 N H where a CPU's GEMMs round to
    bfloat16, 8 N H in float64), and nothing under torch.no_grad. A gradient by another output makes
    the logits again, with a warning: 4 GEMMs. grad_of: the names of the outputs whose gradients are
    taken, such as ("logprob",); all others are detached. With one name it is this output's
    derivative that is written, and hidden is not kept for backward. With several it takes 3 GEMMs
    and no derivative is written, as with a second temperature where grad_of is None, with
    weight_slice, and with "fused".

    Other options:
    sum_squares: give the sum of squared probabilities, too. mean_logits: give the mean over the
    vocabulary of logits / temperature. is_top1: tell whether the target is the first of the tokens
    with the largest logit. None of the three has a gradient. logits_dtype: dtype of the first
    GEMM's output. None is hidden's; float32 costs memory and time on a GPU and rounds less.
    backend: "auto" is the environment variable AEPO_KERNELS_BACKEND, or else "chunked".
    "fused" never has logits in its forward pass and takes 4 GEMMs with gradient.

    Returns [N] tensors in float32 (float64 for float64 hidden). Each output's gradient reaches
    hidden, weight and bias. "chunked" recomputes the logits for it (4 GEMMs in all), and skips what
    needs no gradient. Raises ValueError for bad arguments. torch.compile takes the function whole
    (fullgraph) unless there is a shard, weight_grad, weight_slice, sum_squares, mean_logits,
    is_top1 or kept_ids.
    """
    chosen = None if grad_of is None else tuple(grad_of)
    if is_traced(hidden, weight, targets):
        from aepo_kernels import torch_op  # registering operators imports much of torch

        hidden = _follow_autocast(hidden, backend, logits_dtype)
        names = torch_op.backend_names(backend, hidden.device.type, hidden.dtype)
        known = Problem(
            hidden,
            weight,
            targets,
            second_temperature=second_temperature,
            bias=bias,
            backend=names[0],
            lora_a=lora_a,
            lora_b=lora_b,
            grad_of=chosen,
        )
        check_grad_of(known)
        per_token, number = _split(temperature)
        second_per_token, second_number = _split(second_temperature)
        results = torch_op.linear_logprob(
            hidden,
            weight,
            bias,
            lora_a,
            lora_b,
            targets,
            per_token,
            1.0 if number is None else number,
            second_per_token,
            second_number,
            softcap,
            logit_scale,
            lora_scale,
            ignore_index,
            logits_dtype,
            backend,
            chunk_tokens,
            direction_of(known),
        )
        second = None if second_temperature is None else results[3]
        values = results[0], results[1], results[2], second
        return _with_gradients_of(chosen, LogprobOutput(*values, None, *names))
    check_readable(
        hidden=hidden,
        weight=weight,
        targets=targets,
        temperature=_tensor(temperature),
        second_temperature=_tensor(second_temperature),
        bias=bias,
        lora_a=lora_a,
        lora_b=lora_b,
        weight_grad=weight_grad,
        kept_ids=kept_ids,
    )
    backend = resolve_backend(backend, hidden.device.type, hidden.dtype)
    problem = Problem(
        _follow_autocast(hidden, backend, logits_dtype) if kept_ids is None else hidden,
        weight,
        targets,
        temperature=temperature,
        second_temperature=second_temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        backend=backend,
        lora_a=lora_a,
        lora_b=lora_b,
        lora_scale=lora_scale,
        kept_ids=kept_ids,
        shard=shard,
        weight_grad=weight_grad,
        weight_slice=weight_slice,
        sum_squares=sum_squares,
        mean_logits=mean_logits,
        is_top1=is_top1,
        logits_dtype=logits_dtype,
        grad_of=chosen,
    )
    check_problem(problem)
    check_grad_of(problem)
    run = chunked_logprob if kept_ids is None else kept_logprob
    run = reference.logprob if problem.features.autograd else run
    return _with_gradients_of(chosen, run(problem))


@breaks_graph(traced=partial(traced_token_loss, linear_logprob))
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    *token_tensors: Tensor,
    temperature: float | Tensor = 1.0,
    second_temperature: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    kept_ids: Tensor | None = None,
    shard: VocabShard | None = None,
    weight_grad: Tensor | None = None,
    weight_slice: int | None = None,
    active: Tensor | None = None,
    row_sampling: RowSampling | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    chunk_tokens: int | None = None,
    check_loss: bool = True,
) -> TokenLossOutput:
    """A loss of per-token log-probs and entropies, and its gradients, in three GEMMs.

    token_loss(logprob [C], entropy [C], second_logprob [C] or None, *slices [C, ...]) is called on
    one chunk of tokens after the other. Ignored tokens are in no chunk. The function returns the
    chunk's summed loss, or (loss, {name: summed metric}): the batch's loss must be the sum of the
    losses of its chunks. The loss may use the gradient of all three vectors. check_loss: compare
    the first chunk with its two halves, once in a process for a function's code, and raise
    ValueError where their losses or derivatives do not add up. This calls the loss four more times
    and waits for a GPU. A loss that records what it is called with needs check_loss=False.

    token_tensors: [N, ...]; a chunk's slices are rows of these tensors. Neither the tensors nor
    anything else that the loss reads get a gradient; where the loss reads a tensor that requires
    one, ValueError is raised. active: [A] int64, the positions of tokens at which the loss may have
    a gradient; the loss's gradient is ignored at all other tokens. On a CPU, tokens that get no
    gradient are left out of the gradient GEMMs without `active`. On a GPU, finding those tokens
    would wait for the device. row_sampling: leave out rows at random and without bias. It adds two
    metrics, row_sampling/rows and row_sampling/variance, the variance that sampling adds to the
    logits' gradient, and waits for a GPU. weight_grad: the gradient is added during this call, so
    the loss's own backward must come with a factor of 1. Other arguments: see `linear_logprob`.

    Returns the loss, detached metrics, and detached log-probs and entropies [N]. The loss's
    backward only scales gradients that are computed here. A second backward raises RuntimeError
    with "chunked" and "fused". Under torch.no_grad only the first GEMM runs. `metrics` is empty if
    every token is ignored. Raises ValueError for bad arguments. torch.compile breaks the graph
    here. With fullgraph=True, and in torch.export, the loss becomes a part of the graph: then it
    takes four GEMMs and ignore_index=None, is not checked, and may not have the arguments that
    break the graph of `linear_logprob`, nor row_sampling.
    """
    check_readable(
        hidden=hidden,
        weight=weight,
        targets=targets,
        temperature=_tensor(temperature),
        second_temperature=_tensor(second_temperature),
        bias=bias,
        lora_a=lora_a,
        lora_b=lora_b,
        weight_grad=weight_grad,
        active=active,
        kept_ids=kept_ids,
        **{f"token_tensors[{i}]": tensor for i, tensor in enumerate(token_tensors)},
    )
    backend = resolve_backend(backend, hidden.device.type, hidden.dtype)
    problem = Problem(
        _follow_autocast(hidden, backend, logits_dtype) if kept_ids is None else hidden,
        weight,
        targets,
        temperature=temperature,
        second_temperature=second_temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        backend=backend,
        lora_a=lora_a,
        lora_b=lora_b,
        lora_scale=lora_scale,
        kept_ids=kept_ids,
        shard=shard,
        weight_grad=weight_grad,
        weight_slice=weight_slice,
        logits_dtype=logits_dtype,
        active=active,
        row_sampling=row_sampling,
        check_loss=check_loss,
    )
    check_problem(problem)
    check_active(problem)
    check_row_sampling(problem)
    check_token_tensors(problem, token_tensors)
    given = problem, token_loss, token_tensors
    if problem.features.autograd:
        return reference.token_loss(*given)
    return chunked_token_loss(*given) if kept_ids is None else kept_token_loss(*given)


def _follow_autocast(hidden: Tensor, backend: str, logits_dtype: torch.dtype | None) -> Tensor:
    """Hidden, [N, H], in the dtype of autocast where its GEMMs should run in that one."""
    device = hidden.device.type
    own = hidden.dtype != torch.float32 or logits_dtype == torch.float32 or backend == "reference"
    if own or device not in DEVICES or not torch.is_autocast_enabled(device):
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


def _with_gradients_of(names: tuple[str, ...] | None, output: LogprobOutput) -> LogprobOutput:
    """The output with all its differentiable tensors detached but the named ones."""
    if names is None:
        return output
    found = {name: getattr(output, name) for name in OUTPUTS if name not in names}
    return output._replace(**{name: x if x is None else x.detach() for name, x in found.items()})


def _tensor(temperature: float | Tensor | None) -> Tensor | None:
    return temperature if isinstance(temperature, Tensor) else None


def _split(temperature: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    return (temperature, None) if isinstance(temperature, Tensor) else (None, temperature)
