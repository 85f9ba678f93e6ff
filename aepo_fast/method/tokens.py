"""What the loss is given: the tokens of a chunk, and the state of the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Columns = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepContext:
    """What the loss of a step depends on besides its samples.

    temperature: AEPO's T. bonus_coef: of the entropy bonus. dcpo_mix: share of AEPO's signal in
    DCPO's advantage. aux_draws, aux_positives: auxiliary samples of the step, and those with a
    gradient; its num_minibatches share them. lever: EntroPIC's a or REPO-R's zeta.
    """

    temperature: float
    bonus_coef: float
    dcpo_mix: float
    aux_draws: int
    aux_positives: int
    num_minibatches: int
    lever: float = 0.0


@dataclass(frozen=True)
class Tokens:
    """N tokens: logprob, entropy and second_logprob (or None) differentiable, old_logprob not.

    column: what `build_objective` knows of each token by name, [N] each, without gradient.
    """

    logprob: torch.Tensor
    old_logprob: torch.Tensor
    entropy: torch.Tensor
    second_logprob: torch.Tensor | None
    column: Columns
