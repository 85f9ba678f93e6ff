"""Whether samples that share a forward pass leave each other alone.

Layouts that put several samples into one row rely on the model's code to keep them apart: by
positions that start anew, or by a mask. Not all of it does: a mask may be made without positions,
and a state runs on from sample to sample.
"""

from __future__ import annotations

import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.model.batch import make_microbatches
from aepo_fast.model.policy import Policy
from aepo_fast.model.sharded import inside_forward, is_sharded
from aepo_fast.samples import Completion, Sample

# Relative change of a sample's hidden states where only the other sample of its row changes, of the
# token in the middle: routers may send single tokens elsewhere after any rounding. It was 0 in tiny
# models of 20 architectures, and 0.2 or more in those that mix samples.
_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.02}
_PROMPT, _FIRST, _SECOND = 12, 9, 6  # tokens


@torch.no_grad()
def check_isolation(policy: Policy, requested: str) -> None:
    """Raise ConfigError where two samples in one row of the policy's layout see each other.

    requested: trainer.layout.
    """
    if policy.layout == "padded":
        return
    with policy.same_weights():
        one, other = (_second_states(policy, start) for start in (0, _FIRST + 1))
    change = ((one - other).norm(dim=1) / one.norm(dim=1)).median().item()
    if not change < _LIMIT[policy.machine.compute_dtype]:
        reason = (
            f"{type(policy.model).__name__} lets samples of one row see each other: in the layout "
            f"{policy.layout!r} its hidden states changed by {change:.2g} with those of another"
        )
        raise ConfigError("trainer.layout", requested, reason, 'Use "padded"')


def _second_states(policy: Policy, start: int) -> torch.Tensor:
    """Hidden states of a sample behind another one, whose completion begins with id `start`."""
    vocab = policy.model.config.get_text_config().vocab_size

    def sample(start: int, length: int) -> Sample:
        prompt, ids = (
            tuple(token % vocab for token in range(first, first + count))
            for first, count in ((0, _PROMPT), (start, length))
        )
        return Sample(Completion(prompt, ids, (0.0,) * length, "length", 1.0, 0), 0, False, None)

    samples = [sample(start, _FIRST), sample(0, _SECOND)]  # the longer one comes first
    (batch,) = make_microbatches(samples, (0, 1), layout=policy.layout, max_tokens=2 * _PROMPT + 32)

    def run() -> torch.Tensor:
        return policy.hidden(batch)

    hidden = inside_forward(policy.model, run) if is_sharded(policy.model) else run()
    return hidden[batch.sample_of_token == 1].float()
