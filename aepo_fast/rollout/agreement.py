"""Whether a model gives the same log-probs when it samples, with a cache, as when it trains.

Some architectures do not: their routing is drawn by chance in training, or their state is of
another form. Then every ratio of the loss would be wrong, said by nobody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.model.policy import Policy
from aepo_fast.model.quantized import computing_in
from aepo_fast.rollout.hf import HfRollout
from aepo_fast.samples import Request, Sample, sampler_logprobs

# What rounding explains: nats on average, and a share of the log-probs' spread. In float32 it was
# 1e-8 to 3e-7 in tiny models of 40 architectures with a spread of 0.1, and 7e-5 or more in those
# that differ.
_ROUNDING = {torch.float32: (2e-5, 1e-4), torch.bfloat16: (0.3, 0.0)}
_LENGTHS = 64, 32  # of prompts; two, so that one of them is padded
_SAMPLES, _TOKENS = 2, 8
_FIX = "Use another architecture: what this one samples cannot be weighed"
_NEEDS_BFLOAT16 = ("flash_attention_2", "varlen")


def check_agreement(
    cfg: Config, machine: Machine, model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]
) -> None:
    """Sample a few tokens from a model as `HfRollout` does, and score them as the trainer does.

    Both in float32 where the weights are, since rounding hides small differences. Raises
    ConfigError where the log-probs differ by more than rounding, or where either cannot be done.
    """
    name, attention = type(model).__name__, model.config._attn_implementation
    exact = machine
    if machine.weights_dtype == torch.float32 and attention not in _NEEDS_BFLOAT16:
        exact = dataclasses.replace(machine, compute_dtype=torch.float32, head_backend="reference")
    some = [ids[-length:] for ids, length in zip(prompts, _LENGTHS, strict=False)]
    try:
        policy = Policy(model, exact, cfg.trainer)
        own = dataclasses.replace(exact, rollout_dtype=model.dtype)
        engine = HfRollout(model, own, eos_ids=(), batch_rows=8, pack=False)
        chance = _random_state(machine)
        with exact.autocast(), computing_in(model, exact.compute_dtype):
            found, spread = _difference(engine, policy, some)
    except (torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:  # of the model's own code
        first = (str(error).splitlines() or [""])[0]
        reason = f"{name} cannot be sampled from and trained: {type(error).__name__}: {first:.200}"
        fix = 'Try trainer.layout = "padded" or model.attention = "eager", or use another model'
        raise ConfigError("model.path", cfg.model.path, reason, fix) from error
    if not torch.equal(_random_state(machine), chance):
        reason = f"{name} draws random numbers when it trains, and none when it samples"
        raise ConfigError("model.path", cfg.model.path, reason, _FIX)
    least, share = _ROUNDING[exact.compute_dtype]
    limit = least + share * spread
    if not found <= limit:
        reason = (
            f"{name} gives other log-probs when it samples than when it trains, by {found:.2g} "
            f"nats on average, where rounding explains {limit:.2g}"
        )
        raise ConfigError("model.path", cfg.model.path, reason, _FIX)


def _random_state(machine: Machine) -> torch.Tensor:
    return torch.cuda.get_rng_state() if machine.is_gpu else torch.get_rng_state()


def _difference(
    engine: HfRollout, policy: Policy, prompts: Sequence[tuple[int, ...]]
) -> tuple[float, float]:
    """Mean |sampler's log-prob - trainer's| over a few tokens, and the trainer's spread, nats."""
    requests = [Request(prompt, _SAMPLES, 1.0, index) for index, prompt in enumerate(prompts)]
    groups = engine.generate(requests, max_new_tokens=_TOKENS)
    flat = [completion for group in groups for completion in group]
    samples = [Sample(completion, index, False, None) for index, completion in enumerate(flat)]
    scored = policy.token_values(samples, range(len(samples))).logprob
    difference = (scored - sampler_logprobs(samples)).abs().mean()
    return difference.item(), scored.std().item()
