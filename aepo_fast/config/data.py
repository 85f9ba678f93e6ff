"""The sections of prompts: [data] and its [[data.sources]]. Without torch, as verifiers read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from aepo_fast.config.conditions import Needs, one_of, refuse_what_does_nothing, setting
from aepo_fast.config.errors import require, require_positive

_SEVERAL_SOURCES = Needs(
    ("data.sources",),
    lambda sources: len(sources) > 1,
    "add another one to {}",
    "a single source in {}",
)


@dataclass(frozen=True)
class SourceConfig:
    """One source of prompts: a reasoning-gym task, JSONL or parquet files, or a hub dataset."""

    # A task of reasoning-gym, .jsonl, .json or .parquet files, or a dataset of the hub.
    kind: Literal["reasoning_gym", "file", "hub"] = "file"
    # Task name, hub id, or the path of a file, of a folder of shards or of a pattern such as
    # "data/train-*.parquet".
    name: str = ""
    # Parameters of the reasoning-gym task.
    params: dict[str, Any] = setting(default_factory=dict, needs=one_of("kind", "reasoning_gym"))
    # Questions drawn from the task before duplicates are dropped.
    size: int = setting(512, needs=one_of("kind", "reasoning_gym"))
    split: str = setting("train", needs=one_of("kind", "hub"))  # split of the dataset
    subset: str = setting("", needs=one_of("kind", "hub"))  # subset of the dataset; empty: none
    # Column that holds the question, nested by dots. Where there is no column "prompt", "problem",
    # "question" or "query" is taken, and said.
    prompt_column: str = setting("prompt", needs=one_of("kind", "file", "hub"))
    # Column that holds the right answer; empty: data.answer_column.
    answer_column: str = setting("", needs=one_of("kind", "file", "hub"))
    weight: float = setting(1.0, needs=_SEVERAL_SOURCES)  # share of the prompts drawn from it

    def __post_init__(self) -> None:
        require(
            bool(self.name),
            "data.sources.name",
            self.name,
            "the source has no name",
            "Name a reasoning-gym task, a file or a hub dataset",
        )
        require_positive("data.sources", self, "size", "weight")
        refuse_what_does_nothing("data.sources", self)


_DRAWN_OR_HELD_OUT = Needs(
    ("sources", "holdout_fraction"),
    lambda sources, held: held > 0 or any(one.kind == "reasoning_gym" for one in sources),
    "set {1} above 0",
    "{1} = 0.0 and no source of kind 'reasoning_gym' in {0}",
)


_FILE_OR_HUB = Needs(
    ("sources",),
    lambda sources: any(one.kind != "reasoning_gym" for one in sources),
    "add one of kind 'file' or 'hub' to {}",
    "no source of kind 'file' or 'hub' in {}",
)


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from and how they are rendered."""

    sources: tuple[SourceConfig, ...] = ()
    # Column that holds the right answer, nested by dots, e.g. "reward_model.ground_truth"; of a
    # text with a \boxed{...} the last one. Rewards get it as `answer`. Where there is no column
    # "answer", the usual others are looked for, what is found is said, and two that disagree are
    # refused.
    answer_column: str = setting("answer", needs=_FILE_OR_HUB)
    # A row without a question or an answer, one that ends with the assistant's reply, and one with
    # an image: "stop" ends the run before it starts, "drop" drops the row and counts it.
    unusable_rows: Literal["stop", "drop"] = "stop"
    # The same for prompts of more than rollout.max_prompt_tokens tokens.
    long_prompts: Literal["drop", "stop"] = "drop"
    system_prompt: str = ""  # system message; empty: the chat template's own default
    # Variables of the chat template, e.g. {enable_thinking = false}. One that it does not read is
    # refused.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    instruction: str = ""  # appended to each question after a space
    # Share of the distinct questions that is kept from training, for evaluation.
    holdout_fraction: float = 0.2
    # Seed of the hold-out, and of the questions of reasoning-gym sources, which read it as well.
    seed: int = setting(0, needs=_DRAWN_OR_HELD_OUT)

    def __post_init__(self) -> None:
        require(
            len(self.sources) > 0,
            "data.sources",
            self.sources,
            "there is nothing to train on",
            "Add a [[data.sources]] table",
        )
        require(
            0 <= self.holdout_fraction < 1,
            "data.holdout_fraction",
            self.holdout_fraction,
            "must lie in [0, 1)",
            "Set the share of questions to hold out, e.g. 0.2",
        )
        refuse_what_does_nothing("data", self)
