"""The second temperature in the head of TRL's models.

TRL gives a model a `forward` that takes `fused_lm_head=True` and returns log-probs and entropies.
`add_second_temperature` wraps that one: a call with `aepo_second_temperature` computes them with
`linear_logprob`, and the log-probs at the second temperature in the same pass.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer import utils
from trl.trainer.utils import FusedCausalLMOutput

from aepo_fast.integrations.trl.seams import HEAD_FUNCTION
from aepo_kernels import linear_logprob
from aepo_kernels.integrations.seams import refuse_zero3

_IGNORED = -100
_GIVEN_OUTPUTS = {"log_probs", "entropy"}


@dataclass
class SecondTemperatureOutput(FusedCausalLMOutput):
    """TRL's output of a fused head with `second_log_probs`, [B, S - 1] as its log_probs."""

    second_log_probs: Tensor | None = None


def add_second_temperature(model: nn.Module) -> None:
    """Let `model`, which has TRL's fused head, take `aepo_second_temperature` (a float or None)."""
    trl_forward = model.forward.__func__  # of the class, so that a copy runs its own weights

    @functools.wraps(trl_forward)  # `generate` asks for its signature
    def forward(self: nn.Module, *args: Any, **inputs: Any) -> Any:
        if "aepo_second_temperature" not in inputs:
            return trl_forward(self, *args, **inputs)
        second_temperature = inputs.pop("aepo_second_temperature")
        head = _Head(inputs["labels"][:, 1:] != _IGNORED, second_temperature)
        with _in_place_of_trl_s(head):
            output = trl_forward(self, *args, **inputs)
        known = {item.name: getattr(output, item.name) for item in fields(output)}
        return SecondTemperatureOutput(**known, second_log_probs=head.second_logprob)

    model.forward = types.MethodType(forward, model)


class _Head:
    """What TRL's fused head calls for its log-probs, for one forward pass.

    scored: bool [B, S - 1], the positions with a label.
    """

    def __init__(self, scored: Tensor, second_temperature: float | None) -> None:
        self.scored, self.second_temperature = scored, second_temperature
        self.second_logprob: Tensor | None = None

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """The five results of TRL's function; those that GRPO does not use are None."""
        if not set(outputs) <= _GIVEN_OUTPUTS:
            raise ValueError(f"outputs = {outputs}: AEPO's head gives {sorted(_GIVEN_OUTPUTS)}")
        refuse_zero3(weight)
        scored = self.scored.to(targets.device)
        # Without Triton, TRL asks for every position and drops what it does not want.
        everywhere = len(targets) == scored.numel()
        if everywhere:
            targets = targets.masked_fill(~scored.flatten(), _IGNORED)
        found = linear_logprob(
            hidden,
            weight,
            targets,
            temperature=temperature,
            second_temperature=self.second_temperature,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=_IGNORED if everywhere else None,
        )
        second = found.second_logprob
        if second is not None:
            empty = second.new_zeros(scored.shape)
            placed = second.view_as(empty) if everywhere else empty.masked_scatter(scored, second)
            self.second_logprob = placed
        return found.logprob, found.entropy, None, None, None


@contextmanager
def _in_place_of_trl_s(head: _Head) -> Iterator[None]:
    original = getattr(utils, HEAD_FUNCTION)
    setattr(utils, HEAD_FUNCTION, head)
    try:
        yield
    finally:
        setattr(utils, HEAD_FUNCTION, original)


class ScoringModel:
    """A model that TRL scores tokens with, called with a second temperature: keeps what it gives.

    TRL may call it in parts; all have the same width.
    """

    def __init__(self, model: Callable[..., Any], second_temperature: float | None) -> None:
        self.model, self.second_temperature = model, second_temperature
        self.outputs: list[SecondTemperatureOutput] = []

    def __call__(self, **inputs: Any) -> SecondTemperatureOutput:
        """The model's output, for TRL."""
        output = self.model(**inputs, aepo_second_temperature=self.second_temperature)
        self.outputs.append(output)
        return output

    def completions(self, name: str, length: int) -> Tensor | None:
        """The output `name` of the last `length` positions, [B, length]; None where not computed.

        Raises RuntimeError where TRL did not call the model, as a version that scores otherwise.
        """
        if not self.outputs:
            raise RuntimeError(
                "TRL did not score the completions with the model it was given, so AEPO has no "
                "log-probs. AEPO was tested with TRL 1.15 and 1.16"
            )
        parts = [getattr(output, name) for output in self.outputs]
        if any(part is None for part in parts):
            return None
        return torch.cat([part[:, -length:] for part in parts])
