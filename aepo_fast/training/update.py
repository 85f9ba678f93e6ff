"""One optimizer step: gradients over token-budgeted micro-batches, then a guarded AdamW step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from aepo_fast.method.metric_sums import MetricSum
from aepo_fast.method.objective import Objective
from aepo_fast.method.token_objective import Metrics, taking_slices
from aepo_fast.model.batch import MicroBatch
from aepo_fast.model.policy import Policy
from aepo_fast.samples import Sample, TokenValues, token_index, token_offsets
from aepo_fast.training.optim import guarded_step


@dataclass(frozen=True)
class UpdateResult:
    """What an optimizer step did; `sums` are over its tokens, those that its loss makes.

    logprob, entropy: the model's before the step, of the tokens of all samples, 0 for those
    outside: [tokens].
    """

    loss: float
    grad_norm: float
    taken: bool
    sums: dict[MetricSum, float]
    model_tokens: int  # tokens the model processed, padding included
    active_tokens: int  # completion tokens with a gradient
    logprob: torch.Tensor
    entropy: torch.Tensor

    @property
    def before(self) -> TokenValues:
        """The model's log-probs and entropies before the step."""
        return TokenValues(self.logprob, self.entropy, None)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    indices: Sequence[int],
    objective: Objective,
    *,
    max_grad_norm: float,
    check: Callable[[], None],
) -> UpdateResult:
    """Accumulate the gradient of `objective` over samples[indices] and step.

    The objective's weights already hold the global denominators, so the micro-batches' losses
    simply add up. `check` is called before every micro-batch and may raise to abandon the step;
    the model is then unchanged.
    """
    offsets = token_offsets(samples)
    total = torch.zeros((), device=policy.device)
    sums: Metrics = {}
    logprob, entropy = torch.zeros(2, int(offsets[-1]))
    model_tokens = active_tokens = 0
    policy.model.train()
    active = [index for index in indices if index not in objective.passive_samples]
    passive = [index for index in indices if index in objective.passive_samples]
    batches = [(batch, True) for batch in policy.microbatches(samples, active)]
    batches += [(batch, False) for batch in policy.microbatches(samples, passive)]
    try:
        with policy.same_weights():
            for batch, with_gradient in batches:
                check()
                index = token_index(offsets, batch.samples)
                columns = {
                    name: values[index].to(policy.device)
                    for name, values in objective.columns.items()
                }
                # Samples without a gradient are only measured: they need no backward pass.
                with torch.set_grad_enabled(with_gradient):
                    loss = objective.times_zero() if batch.idle else objective
                    done = _forward_backward(policy, batch, loss, columns)
                if batch.idle:
                    continue
                total += done.loss
                for name, value in done.metrics.items():
                    sums[name] = sums.get(name, 0) + value
                logprob[index] = done.logprob.cpu()
                entropy[index] = done.entropy.cpu()
                model_tokens += batch.input_ids.numel()
                active_tokens += done.active_tokens
    except BaseException:
        optimizer.zero_grad(set_to_none=True)
        raise
    # Of all processes; gradients have been added up on their way.
    world = policy.machine.data
    world.add(logprob, entropy)
    counts = {"loss": total.item(), "model": model_tokens, "active": active_tokens}
    counts, metrics = world.sums(counts), world.sums({n: float(x) for n, x in sums.items()})
    norm, taken = guarded_step(optimizer, counts["loss"], max_grad_norm=max_grad_norm)
    return UpdateResult(
        loss=counts["loss"],
        grad_norm=norm,
        taken=taken,
        sums=metrics,
        model_tokens=int(counts["model"]),
        active_tokens=int(counts["active"]),
        logprob=logprob,
        entropy=entropy,
    )


class _Done(NamedTuple):
    loss: torch.Tensor
    metrics: Metrics
    logprob: torch.Tensor
    entropy: torch.Tensor
    active_tokens: int


def _forward_backward(
    policy: Policy, batch: MicroBatch, objective: Objective, columns: dict[str, torch.Tensor]
) -> _Done:
    if objective.sequence_loss is not None:
        # The ratio of a sequence is known only after its last token: recompute (4 GEMMs, or 2 with
        # a frozen head and no second temperature).
        output = policy.logprobs(
            batch,
            second_temperature=objective.second_temperature,
            with_entropy_gradient=objective.differentiates_entropy,
        )
        samples = batch.sample_of_token.to(policy.device)
        loss, metrics = objective.sequence_loss(
            output.logprob, output.entropy, output.second_logprob, samples, columns
        )
        if loss.requires_grad:
            loss.backward()
        active = batch.targets.numel() if loss.requires_grad else 0
        measured = output.logprob.detach(), output.entropy.detach()
        return _Done(loss.detach(), metrics, *measured, active)
    names = tuple(columns)
    result = policy.token_loss(
        batch,
        taking_slices(objective.token_loss, names),
        *(columns[name] for name in names),
        second_temperature=objective.second_temperature,
    )
    if result.loss.requires_grad:
        result.loss.backward()
    metrics = {MetricSum(name): value for name, value in result.metrics.items()}
    measured = result.logprob, result.entropy
    return _Done(result.loss.detach(), metrics, *measured, int(result.active_rows))
