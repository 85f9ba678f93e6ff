r"""Benchmarks by name: where each lies on the hub, its columns, its prompt and its verifier.

The answers are compared by "math_verify", which reads what follows the "####" of GSM8K, 025 as 25
and 27.0 as 27. The prompt is the question and the usual request for a \boxed answer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError, suggest
from aepo_fast.config.sections import CheckpointConfig, Config, EvalConfig, RewardConfig

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A dataset of the hub with its split, subset and columns, and how long answers may get."""

    hub: str
    split: str
    question: str
    max_new_tokens: int
    subset: str = ""
    answer: str = "answer"

    def source(self, data: str | None) -> SourceConfig:
        """The dataset, or a local file with its columns."""
        columns: Any = {"prompt_column": self.question, "answer_column": self.answer}
        if data is None:
            return SourceConfig("hub", self.hub, split=self.split, subset=self.subset, **columns)
        return SourceConfig("file", data, **columns)


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "test", "question", 1024, subset="main"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", 4096),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", 8192),
    "aime25": Benchmark("math-ai/aime25", "test", "problem", 8192),
    "amc23": Benchmark("math-ai/amc23", "test", "question", 4096),
}


def find_benchmark(name: str, data: str | None) -> Benchmark:
    """The benchmark of a name; raises ConfigError for an unknown one and for missing data."""
    if name not in BENCHMARKS:
        raise ConfigError("--benchmark", name, "is no benchmark here", suggest(name, BENCHMARKS))
    if data is not None and not Path(data).expanduser().exists():
        reason = "there is no such file"
        raise ConfigError("--data", data, reason, "Check the path, or leave it out for the hub")
    return BENCHMARKS[name]


def on_benchmark(cfg: Config, benchmark: Benchmark, data: str | None) -> Config:
    """The configuration with a benchmark's prompts, verifier and length, and no others.

    data: a local file in the dataset's place.
    """
    prompts = DataConfig(
        sources=(benchmark.source(data),),
        instruction=INSTRUCTION,
        long_prompts="stop",  # all of its problems count
        holdout_fraction=0.0,
    )
    rollout = dataclasses.replace(cfg.rollout, max_new_tokens=benchmark.max_new_tokens)
    reward = RewardConfig(function="math_verify")
    return dataclasses.replace(only_evaluated(cfg, prompts), rollout=rollout, reward=reward)


def only_evaluated(cfg: Config, data: DataConfig) -> Config:
    """The configuration with other prompts, without what a run does with those it holds out."""
    evaluations = EvalConfig(seed=cfg.eval.seed)
    return dataclasses.replace(cfg, data=data, eval=evaluations, checkpoint=CheckpointConfig())
