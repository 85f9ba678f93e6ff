"""What a step samples: its prompts, the auxiliary ones among them, and one request for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aepo_fast.config.sections import Config
from aepo_fast.data.sampler import PromptSampler
from aepo_fast.method.entropy_control import aepo_draws
from aepo_fast.method.forms import make_form
from aepo_fast.samples import Prompt, Request, RolloutPlan, seed_of


def plan_rollout(
    cfg: Config, step: int, sampler: PromptSampler, *, temperature: float, target: float
) -> RolloutPlan:
    """Draw the prompts of a step and plan its samples.

    temperature: AEPO's T. target: the entropy aimed at, nats.
    """
    before = sampler.state_dict()
    prompts = sampler.next(cfg.trainer.prompts_per_step)
    aux_prompts = _auxiliary_prompts(cfg, step, prompts)
    temperatures = [1.0] * len(prompts) + [temperature] * len(aux_prompts)
    step_seed = seed_of(cfg.trainer.seed, step)
    samples, kept = cfg.trainer.group_size, cfg.rollout.kept
    requests = [
        Request(prompt.token_ids, samples, temperatures[i], seed_of(step_seed, i), **kept)
        for i, prompt in enumerate([*prompts, *aux_prompts])
    ]
    return RolloutPlan(step, prompts, aux_prompts, temperature, target, requests, before)


def _auxiliary_prompts(cfg: Config, step: int, prompts: Sequence[Prompt]) -> list[Prompt]:
    if not make_form(cfg.aepo).draws_auxiliary:
        return []
    # A stream of its own: drawing auxiliary prompts leaves the minibatches as GRPO has them.
    rng = np.random.default_rng([cfg.trainer.seed, step, 1])
    count = aepo_draws(len(prompts), cfg.aepo.alpha)
    return [prompts[index] for index in rng.choice(len(prompts), count, replace=False)]
