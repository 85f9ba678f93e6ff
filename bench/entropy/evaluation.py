"""What a policy can do: accuracy, pass@k, greedy accuracy, distinct right answers, entropy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config
from aepo_fast.rewards.reward import Reward
from aepo_fast.rollout.load import check_rollout_backend, load_engine
from aepo_fast.samples import Completion, Prompt, Request
from aepo_fast.training.assemble import read_inputs
from aepo_fast.training.checkpoint import complete_checkpoints
from aepo_fast.training.evaluate import evaluate

DISTINCT_DRAWS = 256
# Apart from eval.seed: no sample is one that the run itself was judged by.
EVAL_SEED = 4321
# As good as the most likely token, and a temperature that samplers take.
GREEDY_TEMPERATURE = 1e-3


def trained_model(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return complete_checkpoints(folder / "checkpoints")[-1]


def evaluate_run(model: str, cfg: Config, *, prompts: int, samples: int) -> dict[str, Any]:
    """Evaluate a model on a run's held-out prompts, or on those of training where it holds none.

    distinct_right: a prompt's different right answers among the first `distinct_draws` draws, mean
    over prompts. entropy: nats a token, mean of -log p over the tokens drawn at temperature 1.
    """
    machine = resolve_machine(cfg, trains=False)
    cfg = machine.settled(cfg)
    check_rollout_backend(cfg)
    inputs = read_inputs(cfg, model)
    reward, decode = inputs.reward, inputs.decode
    chosen = (inputs.prompts.heldout or inputs.prompts.train)[:prompts]
    limit = cfg.rollout.max_new_tokens
    requests = [Request(prompt.token_ids, 1, GREEDY_TEMPERATURE, EVAL_SEED) for prompt in chosen]
    sampled: dict[int, list[Completion]] = {}
    with closing(load_engine(cfg, machine, inputs.model_folder, inputs.tokenizer)) as engine:
        result = evaluate(
            engine,
            reward,
            chosen,
            decode,
            samples=samples,
            max_new_tokens=limit,
            seed=EVAL_SEED,
            overlap=cfg.reward.overlap,
            on_group=sampled.__setitem__,
        )
        greedy = [group[0] for group in engine.generate(requests, max_new_tokens=limit)]
    groups = [sampled[index] for index in range(len(chosen))]
    tokens = [-value for group in groups for row in group for value in row.logprobs]
    draws = min(samples, DISTINCT_DRAWS)
    distinct = distinct_right([group[:draws] for group in groups], chosen, reward, decode)
    texts = [decode(completion.completion_ids) for completion in greedy]
    rewards = reward.score(chosen, texts, [completion.completion_ids for completion in greedy])
    return {
        "prompts": len(chosen),
        "of": "held-out prompts" if inputs.prompts.heldout else "training prompts",
        "samples": samples,
        "accuracy": round(result.avg_at_k, 5),
        "ci95": [round(value, 5) for value in result.ci95],
        "pass_at_k": {str(k): round(value, 5) for k, value in result.pass_at_k.items()},
        "greedy_accuracy": round(statistics.fmean(value or 0.0 for value in rewards.rewards), 5),
        "distinct_right": round(statistics.fmean(distinct), 3),
        "distinct_draws": draws,
        "entropy": round(math.fsum(tokens) / len(tokens), 5),
        "mean_length": round(result.mean_length, 3),
        "clipped_ratio": round(result.truncated, 5),
    }


def distinct_right(
    groups: Sequence[Sequence[Completion]],
    prompts: Sequence[Prompt],
    reward: Reward,
    decode: Callable[[Sequence[int]], str],
) -> list[int]:
    """How many different texts with a reward of at least 1 each prompt has."""
    counts = []
    for prompt, group in zip(prompts, groups, strict=True):
        texts = list(dict.fromkeys(decode(row.completion_ids) for row in group))
        rewards = reward.score([prompt] * len(texts), texts, [()] * len(texts)).rewards
        counts.append(sum(value is not None and value >= 1 for value in rewards))
    return counts
