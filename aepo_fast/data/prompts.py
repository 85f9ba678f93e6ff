"""Prompts: rendered once, and split into those to train on and those that are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, tzinfo
from itertools import zip_longest
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import DataConfig, SourceConfig
from aepo_fast.data.sources import read_source
from aepo_fast.data.tasks import task_key
from aepo_fast.samples import Prompt


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
    unusable: Callable[[Any], str | None] | None = None,
    rendered_at: datetime | None = None,
) -> PromptSet:
    """Read every source, apply the chat template once, drop duplicates and split.

    `required_columns` are what the reward reads; `unusable` says why it could not score with a
    row's "answer" (of files and the hub), None where it can. rendered_at: what a chat template that
    prints the date takes for now; None is now. Raises ConfigError for unknown tasks, missing files
    or columns, unusable answers, empty sources and prompts of more than `max_prompt_tokens` tokens.
    """
    rows: list[tuple[int, str, tuple[dict[str, str], ...], dict[str, Any]]] = []
    seen: set[str] = set()
    num_read = 0
    for index, source in enumerate(cfg.sources):
        found = read_source(source, cfg.seed + index, required_columns)
        num_read += len(found)
        if unusable is not None and source.kind != "reasoning_gym":
            _check_answers(source, found, unusable)
        for columns in found:
            messages = to_messages(columns["prompt"], source, cfg)
            question = json.dumps(messages)
            if question not in seen:
                seen.add(question)
                rows.append((index, question_key(source, columns), messages, columns))
    chats = [messages for _, _, messages, _ in rows]
    texts = render(chats, tokenizer, cfg, rendered_at or datetime.now())
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


def _check_answers(
    source: SourceConfig, rows: list[dict[str, Any]], unusable: Callable[[Any], str | None]
) -> None:
    reasons = {
        row: reason for row, columns in enumerate(rows) if (reason := unusable(columns["answer"]))
    }
    if reasons:
        row, reason = next(iter(reasons.items()))
        answer = rows[row]["answer"]
        raise ConfigError(
            "reward.function",
            "math_verify",
            f"the right answer in row {row} (from 0) of {source.name!r}, {answer!r:.80}, cannot be "
            f"understood: {reason}" + (f"; so in {len(reasons)} rows" if len(reasons) > 1 else ""),
            "Correct or drop such rows, or name a reward of your own",
        )


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
    chats: Sequence[Sequence[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    rendered_at: datetime,
) -> list[str]:
    """Apply the chat template, up to the start of the assistant's turn."""
    clock = _stopped_clock(rendered_at) if prints_date(tokenizer) else nullcontext()
    try:
        with clock:
            return [
                tokenizer.apply_chat_template(
                    list(chat), tokenize=False, add_generation_prompt=True
                )
                for chat in chats
            ]  # type: ignore[return-value]
    except TemplateError as error:
        reason = f"the model's chat template refuses a prompt: {error}"
        fix = "Drop the system prompt if the model knows none, or correct the messages"
        raise ConfigError("data.system_prompt", cfg.system_prompt, reason, fix) from error


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the date or time, as those of Llama 3.2 do."""
    return "strftime_now" in str(tokenizer.chat_template)


@contextmanager
def _stopped_clock(moment: datetime) -> Iterator[None]:
    """Let chat templates read one time. They take no clock as an argument."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return moment

    module: Any = chat_template_utils
    running = module.datetime
    module.datetime = Stopped
    try:
        yield
    finally:
        module.datetime = running


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
        held.update(sorted(keys, key=lambda key: digest(f"{cfg.seed} {key}"))[:count])
    return held


def _in_turn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One prompt of each source after the other; those of a source keep their order."""
    by_source: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    turns = zip_longest(*by_source.values())
    return [prompt for turn in turns for prompt in turn if prompt is not None]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_split(cfg: DataConfig, train: list[Prompt]) -> None:
    left = {prompt.source for prompt in train}
    for index, source in enumerate(cfg.sources):
        if index not in left:
            reason = f"leaves no training prompt of {source.name!r}"
            fix = "Lower it, or give the source more distinct questions"
            raise ConfigError("data.holdout_fraction", cfg.holdout_fraction, reason, fix)
