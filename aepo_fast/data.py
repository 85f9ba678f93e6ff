"""Prompts: read from tasks, files and the hub, rendered once, split and sampled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aepo_fast.config import ConfigError, DataConfig, SourceConfig
from aepo_fast.tasks import load_task, nearest, task_key


@dataclass(frozen=True)
class Prompt:
    """One question as the model sees it.

    key: what it shares with questions that must fall on its side of the hold-out. messages: the
    chat. columns: its row, with the question as read under "prompt"; the reward's input. source:
    index into data.sources. token_ids: of the rendered chat, up to the assistant's turn.
    """

    key: str
    messages: tuple[dict[str, str], ...]
    columns: dict[str, Any]
    source: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on and held-out ones, disjoint by key; no question occurs twice.

    Held-out ones of the sources take turns, so that the first few of them are of every source.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    rendered: str  # text of the first training prompt
    num_duplicates: int  # dropped

    def preview(self) -> str:
        """The first training prompt with its ids, and how many prompts there are."""
        ids = self.train[0].token_ids
        return (
            f"{len(self.train)} training prompts, {len(self.heldout)} held out, "
            f"{self.num_duplicates} duplicates dropped\n"
            f"First prompt ({len(ids)} tokens):\n{self.rendered}\nids: {list(ids)}"
        )


def load_prompts(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    required_columns: Sequence[str],
) -> PromptSet:
    """Read every source, apply the chat template once, drop duplicates and split.

    `required_columns` are what the reward reads. Raises ConfigError for unknown tasks, missing
    files or columns, empty sources and prompts of more than `max_prompt_tokens` tokens.
    """
    rows: list[tuple[int, str, tuple[dict[str, str], ...], dict[str, Any]]] = []
    seen: set[str] = set()
    num_read = 0
    for index, source in enumerate(cfg.sources):
        found = read_source(source, cfg.seed + index, required_columns)
        num_read += len(found)
        for columns in found:
            messages = to_messages(columns["prompt"], source, cfg)
            question = json.dumps(messages)
            if question not in seen:
                seen.add(question)
                rows.append((index, question_key(source, columns), messages, columns))
    texts = render([messages for _, _, messages, _ in rows], tokenizer, cfg)
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert isinstance(token_ids, list)
    _check_lengths(cfg, [row[0] for row in rows], token_ids, max_prompt_tokens)
    prompts = [
        Prompt(key, messages, columns, index, tuple(ids))
        for (index, key, messages, columns), ids in zip(rows, token_ids, strict=True)
    ]
    held = holdout_keys(prompts, cfg)
    train = [prompt for prompt in prompts if prompt.key not in held]
    _check_split(cfg, train)
    return PromptSet(
        train=train,
        heldout=_in_turn([prompt for prompt in prompts if prompt.key in held]),
        rendered=texts[prompts.index(train[0])],
        num_duplicates=num_read - len(prompts),
    )


def read_source(
    source: SourceConfig, seed: int, required_columns: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of one source, each with a column "prompt"."""
    if source.kind == "reasoning_gym":
        rows, prompt_column = load_task(source, seed), "prompt"
    else:
        rows = read_file(source.name) if source.kind == "file" else read_hub(source)
        prompt_column = source.prompt_column
    if not rows:
        raise ConfigError("data.sources.name", source.name, "has no rows", "Name another source")
    for column in (prompt_column, *required_columns):
        missing = next((index for index, row in enumerate(rows) if row.get(column) is None), None)
        if missing is None:
            continue
        key = "data.sources.prompt_column" if column == prompt_column else "reward.function"
        reason = f"row {missing} (from 0) of {source.name!r} has no column {column!r}"
        fix = nearest(column, rows[missing])
        if column in rows[missing]:
            reason = f"row {missing} (from 0) of {source.name!r} holds nothing in column {column!r}"
            fix = "Drop such rows from the source, or name another column"
        raise ConfigError(key, column, reason, fix)
    if prompt_column != "prompt":
        rows = [{**row, "prompt": row[prompt_column]} for row in rows]
    return rows


def read_file(name: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .json or .parquet file."""
    key, path = "data.sources.name", Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(key, name, "there is no such file", "Check the path")
    if path.suffix == ".parquet":
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise ConfigError(key, name, f"is no parquet: {error}", "Write it anew") from error
    if path.suffix not in (".json", ".jsonl"):
        reason = f"files of type {path.suffix!r} are not read"
        raise ConfigError(key, name, reason, "Use .jsonl, .json or .parquet")
    # Not by `datasets`: its columns have one type, and answers are numbers here and LaTeX there.
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else _json_lines(text)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno} is not JSON: {error.msg}"
        raise ConfigError(key, name, reason, "Correct the file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(key, name, f"is not UTF-8: {error}", "Save it as UTF-8") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        reason = "does not hold one JSON object per row"
        raise ConfigError(key, name, reason, "Use a list of objects, or one object a line")
    return rows


def _json_lines(text: str) -> list[Any]:
    rows = []
    # Only "\n" ends a line here: strings may hold what splitlines() also takes for an end.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                error.lineno = number
                raise
    return rows


def read_hub(source: SourceConfig) -> list[dict[str, Any]]:
    """The rows of a dataset on the hub."""
    try:
        dataset = load_dataset(source.name, source.subset or None, split=source.split)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        reason = "the hub did not give this dataset: " + str(error).split("\n")[0]
        fix = "Check name, subset, split and the connection"
        raise ConfigError("data.sources.name", source.name, reason, fix) from error
    return [dict(row) for row in dataset]  # type: ignore[call-overload]


def to_messages(
    prompt: str | list[dict[str, str]], source: SourceConfig, cfg: DataConfig
) -> tuple[dict[str, str], ...]:
    """The chat of a question, which is a string or already a list of messages."""
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        messages = [dict(message) for message in prompt]
    else:
        reason = (
            f"a prompt of {source.name!r} is neither a string nor messages with role and content, "
            f"both strings: {prompt!r:.80}"
        )
        fix = "Name the column that holds the questions"
        raise ConfigError("data.sources.prompt_column", source.prompt_column, reason, fix)
    if cfg.instruction:
        messages[-1]["content"] += " " + cfg.instruction
    if cfg.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": cfg.system_prompt})
    return tuple(messages)


def _is_message(part: Any) -> bool:
    return isinstance(part, dict) and all(
        isinstance(part.get(name), str) for name in ("role", "content")
    )


def question_key(source: SourceConfig, columns: dict[str, Any]) -> str:
    """The hold-out key of a row: operands of an arithmetic task, else the question's words."""
    if source.kind == "reasoning_gym":
        return task_key(source.name, columns)
    prompt = columns["prompt"]
    text = prompt if isinstance(prompt, str) else " ".join(part["content"] for part in prompt)
    return " ".join(text.split())


def render(
    chats: Sequence[Sequence[dict[str, str]]], tokenizer: PreTrainedTokenizerBase, cfg: DataConfig
) -> list[str]:
    """Apply the chat template, up to the start of the assistant's turn."""
    try:
        return [
            tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]  # type: ignore[return-value]
    except TemplateError as error:
        reason = f"the model's chat template refuses a prompt: {error}"
        fix = "Drop the system prompt if the model knows none, or correct the messages"
        raise ConfigError("data.system_prompt", cfg.system_prompt, reason, fix) from error


def _check_lengths(
    cfg: DataConfig, sources: list[int], token_ids: list[list[int]], limit: int
) -> None:
    longest = max(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    length = len(token_ids[longest])
    if length > limit:
        count = sum(len(ids) > limit for ids in token_ids)
        name = cfg.sources[sources[longest]].name
        reason = f"{count} prompts are longer, the longest, of {name!r}, has {length} tokens"
        fix = f"Set it to {length} or drop those prompts"
        raise ConfigError("rollout.max_prompt_tokens", limit, reason, fix)


def holdout_keys(prompts: Sequence[Prompt], cfg: DataConfig) -> set[str]:
    """The keys held out: of each source the share `holdout_fraction`, at least one if above 0.

    Keys are ordered by a hash, so a key stays on its side when others come or go.
    """
    held: set[str] = set()
    for source in range(len(cfg.sources)):
        keys = {prompt.key for prompt in prompts if prompt.source == source}
        count = round(cfg.holdout_fraction * len(keys))
        if cfg.holdout_fraction > 0:
            count = max(1, count)
        held.update(sorted(keys, key=lambda key: _hash(f"{cfg.seed} {key}"))[:count])
    return held


def _in_turn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One prompt of each source after the other; those of a source keep their order."""
    by_source: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    turns = zip_longest(*by_source.values())
    return [prompt for turn in turns for prompt in turn if prompt is not None]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_split(cfg: DataConfig, train: list[Prompt]) -> None:
    left = {prompt.source for prompt in train}
    for index, source in enumerate(cfg.sources):
        if index not in left:
            reason = f"leaves no training prompt of {source.name!r}"
            fix = "Lower it, or give the source more distinct questions"
            raise ConfigError("data.holdout_fraction", cfg.holdout_fraction, reason, fix)


class PromptSampler:
    """An endless stream of prompts: sources interleaved by weight, each reshuffled every epoch."""

    def __init__(self, prompts: Sequence[Prompt], weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        self.weights = list(weights)
        self.by_source: list[list[Prompt]] = [[] for _ in weights]
        for prompt in prompts:
            self.by_source[prompt.source].append(prompt)
        assert all(self.by_source), "every source needs a prompt"
        self.fingerprint = _hash("\n".join(f"{p.source} {p.token_ids}" for p in prompts))
        self.drawn = [0] * len(self.weights)  # of each source

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        return [self._draw() for _ in range(count)]

    def _draw(self) -> Prompt:
        # The source that is furthest behind its share: every batch has the mix that was asked for.
        behind = [(drawn + 1) / w for drawn, w in zip(self.drawn, self.weights, strict=True)]
        source = behind.index(min(behind))
        prompts = self.by_source[source]
        epoch, position = divmod(self.drawn[source], len(prompts))
        self.drawn[source] += 1
        order = np.random.default_rng([self.seed, source, epoch]).permutation(len(prompts))
        return prompts[order[position]]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"drawn": list(self.drawn), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; raises ConfigError if the prompts are not the same."""
        if state["fingerprint"] != self.fingerprint:
            reason = "its prompts are not those of the checkpoint"
            fix = "Restore data and template, or start a new run"
            names = [len(prompts) for prompts in self.by_source]
            raise ConfigError("data.sources", f"{names} prompts", reason, fix)
        self.drawn = list(state["drawn"])
