"""What a step reports: its metrics, under TRL's names."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from aepo_fast.method.entropy_control import Measurement
from aepo_fast.method.metric_sums import MetricSum
from aepo_fast.model.kept import kept_metrics
from aepo_fast.samples import Rollout, RolloutPlan, Sample, TokenValues, token_index, token_offsets
from aepo_fast.training.entropy_metrics import entropy_metrics
from aepo_fast.training.update import UpdateResult


@dataclass(frozen=True)
class StepResult:
    """What a step did, for the log.

    advantages: [R] of the rollout's samples. main: indices of the main samples it learned from.
    before: log-probs and entropies of the policy that sampled. measured: their mean entropy over
    `main`, as the controller was told. entropy_smoothed: its moving mean, nats.
    canary_difference: nats, None without a canary.
    """

    plan: RolloutPlan
    rollout: Rollout
    advantages: torch.Tensor
    main: list[int]
    before: TokenValues
    updates: list[UpdateResult]
    measured: Measurement
    entropy_smoothed: float
    canary_difference: float | None
    times: StepTimes


def step_metrics(
    step: StepResult,
    *,
    controller: dict[str, float],
    engine: dict[str, float],
    learning_rate: float,
    weights_version: int,
    threshold: float,
    decode: Callable[[Sequence[int]], str],
) -> dict[str, float]:
    """All metrics of a step, in the order of metrics.jsonl.

    controller, engine: metrics of their own. weights_version: after the updates. threshold: the
    task reward from which a sample is correct.
    """
    rollout, main, before, measured = step.rollout, step.main, step.before, step.measured
    version = weights_version - measured.updates
    metrics = update_metrics(step.updates)
    metrics |= sampling_metrics(before.logprob, rollout.samples, main, version)
    metrics |= kept_metrics(rollout.samples, main)
    # Of the policy that sampled, where update_metrics takes that before each update.
    metrics |= {"entropy": measured.entropy, "entropy_stderr": measured.stderr}
    metrics |= entropy_metrics(rollout, before.entropy, main, threshold, decode)
    metrics |= {
        "entropy_smoothed": step.entropy_smoothed,
        "aepo/entropy_target": step.plan.target,
        "aepo/temperature": step.plan.temperature,
        **controller,
        "learning_rate": learning_rate,
        "weights_version": weights_version,
    }
    if step.canary_difference is not None:
        metrics["sampling/canary_difference"] = step.canary_difference
    metrics |= rollout_metrics(rollout, threshold) | engine | step.times.memory
    return metrics | step.times.metrics() | perf_metrics(rollout, step.updates, step.times)


def rollout_metrics(rollout: Rollout, threshold: float) -> dict[str, float]:
    """Rewards and lengths of the main samples, positives of the auxiliary ones; lengths in tokens.

    threshold: the task reward from which a sample is correct.
    """
    main = [sample for sample in rollout.samples if not sample.is_aux]
    aux = [sample for sample in rollout.samples if sample.is_aux]
    groups: dict[int, list[float]] = {}
    correct: dict[int, set[str]] = {}
    for sample, text in zip(rollout.samples, rollout.texts, strict=True):
        if not sample.is_aux and sample.task_reward is not None:
            groups.setdefault(sample.group, []).append(sample.task_reward)
            if sample.task_reward >= threshold:
                correct.setdefault(sample.group, set()).add(text.strip())
    rewards = [value for group in groups.values() for value in group]
    spreads = [statistics.pstdev(group) for group in groups.values()]
    metrics = {
        "reward": statistics.fmean(rewards) if rewards else float("nan"),
        "reward_std": statistics.fmean(spreads) if spreads else float("nan"),
        "frac_reward_zero_std": _share([spread == 0 for spread in spreads]),
        "reward_errors": rollout.reward_errors,
        "completions/mean_length": statistics.fmean(sample.length for sample in main),
        "completions/min_length": min(sample.length for sample in main),
        "completions/max_length": max(sample.length for sample in main),
        "completions/clipped_ratio": _share(
            [sample.completion.finish_reason == "length" for sample in main]
        ),
        "completions/distinct_correct": statistics.fmean(map(len, correct.values()))
        if correct
        else float("nan"),
    }
    if not aux:
        metrics["aepo/positive_fraction"] = _share([value >= threshold for value in rewards])
    else:
        values = [sample.reward for sample in aux if sample.reward is not None]
        metrics["aepo/positive_fraction"] = _share([value >= threshold for value in values])
        metrics["aepo/tokens"] = sum(sample.length for sample in aux)
    return metrics


def update_metrics(results: Sequence[UpdateResult]) -> dict[str, float]:
    """Losses and token means over all optimizer steps of a step."""
    sums: dict[MetricSum, float] = defaultdict(float)
    for result in results:  # one of a minibatch without samples has none
        for name, value in result.sums.items():
            sums[name] += value
    main = max(sums[MetricSum.MAIN_TOKENS], 1.0)
    metrics = {
        "loss": statistics.fmean(result.loss for result in results),
        "grad_norm": statistics.fmean(result.grad_norm for result in results),
        "entropy": sums[MetricSum.ENTROPY] / main,
        "clip_ratio/low_mean": sums[MetricSum.CLIP_LOW] / main,
        "clip_ratio/high_mean": sums[MetricSum.CLIP_HIGH] / main,
        "clip_ratio/region_mean": (sums[MetricSum.CLIP_LOW] + sums[MetricSum.CLIP_HIGH]) / main,
        "aepo/clip_ratio": sums[MetricSum.AUX_CLIP] / max(sums[MetricSum.AUX_TOKENS], 1.0),
        "policy_kl": sums[MetricSum.POLICY_KL] / main,
        "skipped_updates": sum(not result.taken for result in results),
        "kernel/active_token_share": sum(r.active_tokens for r in results)
        / max(sums[MetricSum.MAIN_TOKENS] + sums[MetricSum.AUX_TOKENS], 1.0),
    }
    if MetricSum.KL in sums:
        metrics["kl"] = sums[MetricSum.KL] / main
    if MetricSum.CORRECTION in sums:
        metrics["sampling/importance_sampling_ratio/mean"] = sums[MetricSum.CORRECTION] / main
        metrics["sampling/importance_sampling_clipped_ratio"] = (
            sums[MetricSum.CORRECTION_CUT] / main
        )
    if MetricSum.RHO in sums:
        metrics["aepo/rho_mean"] = sums[MetricSum.RHO] / main
    return metrics


def sampling_metrics(
    logprob: torch.Tensor, samples: Sequence[Sample], indices: Sequence[int], version: int
) -> dict[str, float]:
    """How far the sampler's log-probs lie from the trainer's, over the tokens of samples[indices].

    logprob: the trainer's before this step's updates, of all samples' tokens. mismatch_kl is the
    mean of r - 1 - log r, where r = pi_trainer / pi_sampler, an unbiased estimate of
    KL(sampler || trainer). version: of the trainer's weights; version_lag is how many updates older
    the sampler's were at most.
    """
    sampled = torch.tensor([x for index in indices for x in samples[index].completion.logprobs])
    if not len(sampled):
        return {}
    log_ratio = logprob[token_index(token_offsets(samples), indices)] - sampled
    return {
        "sampling/logp_difference/mean": log_ratio.abs().mean().item(),
        "sampling/logp_difference/max": log_ratio.abs().max().item(),
        "sampling/mismatch_kl": (torch.expm1(log_ratio) - log_ratio).mean().item(),
        "sampling/version_lag": version
        - min(samples[i].completion.weights_version for i in indices),
    }


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")


_MEMORY_AROUND = {
    "sample": ("memory/sample_before_gib", "memory/sample_after_gib"),
    "train": ("memory/train_before_gib", "memory/train_after_gib"),
}


class StepTimes:
    """Seconds per phase of a step, and the memory in use around some of them."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Charge the time since the last lap to a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    @contextmanager
    def memory_around(self, phase: str) -> Iterator[None]:
        """Keep the memory in use before and after a phase, GiB."""
        before, after = _MEMORY_AROUND[phase]
        self.memory[before] = used_memory_gib()
        yield
        self.memory[after] = used_memory_gib()

    def metrics(self) -> dict[str, float]:
        """Each phase and the whole step, in seconds."""
        named = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        return named | {"time/step": self.last - self.started}


def perf_metrics(
    rollout: Rollout, results: Sequence[UpdateResult], times: StepTimes
) -> dict[str, float]:
    """Throughput in sampled tokens and completion tokens trained on, padding excluded; memory."""
    names = MetricSum.MAIN_TOKENS, MetricSum.AUX_TOKENS
    trained = sum(r.sums.get(name, 0.0) for r in results for name in names)
    train_s = times.seconds["train"] + times.seconds["score"]
    return {
        "perf/rollout_tokens_per_s": rollout.num_tokens / max(rollout.sampling_s, 1e-9),
        "perf/train_tokens_per_s": trained / max(train_s, 1e-9),
        "perf/model_tokens": sum(r.model_tokens for r in results),
        "perf/peak_memory_gib": peak_memory_gib(),
    }


def used_memory_gib() -> float:
    """Memory in use now: of the GPU where one is used, by whomever, else of this process.

    NaN where the system does not say.
    """
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return float("nan")
    return pages * resource.getpagesize() / 2**30


def peak_memory_gib() -> float:
    """Peak memory so far: of the GPU where one is used, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)
