"""Prompts: rendered once, and split into those to train on and those that are held out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, tzinfo
from itertools import zip_longest
from typing import Any

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.data.columns import UnusableRow, check_text, find_columns
from aepo_fast.data.sources import read_rows
from aepo_fast.data.tasks import task_key
from aepo_fast.samples import Prompt

_TOKENIZED_TOGETHER = 1024
# What every template is rendered with: the chat, its end and functions of transformers.
_RENDERED_WITH = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
_REPLYING = ("assistant", "model", "gpt")  # roles
_IMAGES = ("image", "images", "decoded_image", "video", "videos", "audio", "audios")  # columns
_IMAGE_MARK = re.compile(r"<image[ _]?\d*>|<\|(?:image|vision)[^|>]*\|>")


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on and held-out ones, disjoint by key; no question occurs twice.

    Held-out ones of the sources take turns, so that the first few of them are of every source.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    rendered: str  # text of the first training prompt
    num_duplicates: int  # dropped
    notes: tuple[str, ...] = ()  # which columns were found, and what else was dropped

    def preview(self) -> str:
        """What was read and dropped, and the first training prompt with its ids."""
        ids = self.train[0].token_ids
        notes = "".join(f"{note}\n" for note in self.notes)
        return (
            f"{notes}{len(self.train)} training prompts, {len(self.heldout)} held out, "
            f"{self.num_duplicates} duplicates dropped\n"
            f"First prompt ({len(ids)} tokens):\n{self.rendered}\nids: {list(ids)}"
        )


@dataclass(frozen=True)
class _Question:
    """A row that is used, before it is rendered."""

    source: int
    key: str
    messages: tuple[dict[str, str], ...]
    columns: dict[str, Any]


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
    or columns, empty sources, and for rows that cannot be used and prompts of more than
    `max_prompt_tokens` tokens where the configuration does not drop them.
    """
    rendered_at = rendered_at or datetime.now()
    check_template_kwargs(cfg, tokenizer)
    found: list[_Question] = []
    seen: set[bytes] = set()
    num_duplicates, notes = 0, []
    for index in range(len(cfg.sources)):
        for question in _questions(cfg, index, required_columns, unusable, notes):
            if question is None:
                num_duplicates += 1
                continue
            asked = json.dumps(question.messages, default=str).encode()
            mark = hashlib.blake2b(asked, digest_size=16).digest()
            if mark in seen:
                num_duplicates += 1
            else:
                seen.add(mark)
                found.append(question)
    prompts = list(_tokenized(found, tokenizer, cfg, rendered_at))
    prompts = _without_long(cfg, prompts, max_prompt_tokens, notes)
    held = holdout_keys(prompts, cfg)
    train = [prompt for prompt in prompts if prompt.key not in held]
    _check_split(cfg, train)
    return PromptSet(
        train=train,
        heldout=_in_turn([prompt for prompt in prompts if prompt.key in held]),
        rendered=render([train[0].messages], tokenizer, cfg, rendered_at)[0],
        num_duplicates=num_duplicates,
        notes=tuple(notes),
    )


def _questions(
    cfg: DataConfig,
    index: int,
    required_columns: Sequence[str],
    unusable: Callable[[Any], str | None] | None,
    notes: list[str],
) -> Iterator[_Question | None]:
    """The questions of a source, None for one that repeats another.

    Adds to `notes` what a user should know of them.
    """
    source, columns = cfg.sources[index], None
    dropped, first, number = 0, "", -1
    stop = cfg.unusable_rows == "stop"  # else a row may be dropped, and its repeat be used
    for number, row in enumerate(read_rows(source, cfg.seed + index, skip_repeats=stop)):
        if row is None:
            yield None
            continue
        if columns is None:
            columns = find_columns(source, cfg, required_columns, row)
            notes += filter(None, [columns.note(source, cfg)])
        try:
            used = columns.read(row)
            messages = to_messages(used["prompt"], cfg)
            check_images(used, messages)
            if columns.answer and unusable is not None and (reason := unusable(used["answer"])):
                answer = f"{used['answer']!r:.80}"
                raise UnusableRow(f"has the answer {answer}, which cannot be understood: {reason}")
        except UnusableRow as problem:
            said = f"row {number} (from 0) of {source.name!r} {problem}"
            if stop:
                fix = 'Correct or drop the row, or set data.unusable_rows = "drop"'
                raise ConfigError("data.sources.name", source.name, said, fix) from problem
            dropped, first = dropped + 1, first or said
            continue
        yield _Question(index, question_key(source, used), messages, used)
    if number < 0:
        raise ConfigError("data.sources.name", source.name, "has no rows", "Name another source")
    if dropped:
        notes.append(f"{dropped} of {number + 1} rows dropped: {first}")
    if dropped == number + 1:
        reason = f"no row can be used: {first}"
        raise ConfigError("data.sources.name", source.name, reason, "Name another source")


def _tokenized(
    questions: Sequence[_Question],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    rendered_at: datetime,
) -> Iterator[Prompt]:
    """The prompts of questions, some at a time: what a tokenizer returns takes much memory."""
    known: dict[int, int] = {}  # equal ids are one object
    for start in range(0, len(questions), _TOKENIZED_TOGETHER):
        some = questions[start : start + _TOKENIZED_TOGETHER]
        texts = render([question.messages for question in some], tokenizer, cfg, rendered_at)
        token_ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        for one, ids in zip(some, token_ids["input_ids"], strict=True):  # type: ignore[arg-type]
            shared = tuple(known.setdefault(token, token) for token in ids)
            yield Prompt(one.key, one.messages, one.columns, one.source, shared)


def to_messages(prompt: str | list[dict[str, str]], cfg: DataConfig) -> tuple[dict[str, str], ...]:
    """The chat of a question, which is a string or already a list of messages.

    Raises UnusableRow for anything else, and for a chat in which nothing is asked.
    """
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        messages = [dict(message) for message in prompt]
    else:
        raise UnusableRow(
            "has a prompt that is neither a string nor messages with role and content, both "
            f"strings: {prompt!r:.80}"
        )
    if messages[-1]["role"] in _REPLYING:
        raise UnusableRow("ends with the assistant's reply, which a model would only go on with")
    if not messages[-1]["content"].strip():
        raise UnusableRow("has an empty prompt")
    for message in messages:
        check_text(message["content"], "its prompt")
    if cfg.instruction:
        messages[-1]["content"] += " " + cfg.instruction
    if cfg.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": cfg.system_prompt})
    return tuple(messages)


def check_images(columns: dict[str, Any], messages: Sequence[dict[str, str]]) -> None:
    """Raise UnusableRow for a question about an image, which a language model does not see."""
    for name in _IMAGES:
        if columns.get(name):
            raise UnusableRow(f"has an image in column {name!r}, which the model does not see")
    for message in messages:
        if "<" in message["content"] and (mark := _IMAGE_MARK.search(message["content"])):
            raise UnusableRow(f"has {mark[0]} in its prompt, an image that the model does not see")


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
                    list(chat),
                    tokenize=False,
                    add_generation_prompt=True,
                    **cfg.chat_template_kwargs,
                )
                for chat in chats
            ]  # type: ignore[return-value]
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = f"the model's chat template refuses a prompt: {error}"
        fix = "Drop the system prompt if the model knows none, or correct the messages"
        raise ConfigError("data.system_prompt", cfg.system_prompt, reason, fix) from error


def check_template_kwargs(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError for one of data.chat_template_kwargs that the chat template does not read.

    Also for those that the rendering itself decides.
    """
    if not cfg.chat_template_kwargs:
        return
    source: Any = tokenizer.get_chat_template()
    parser: Any = chat_template_utils._compile_jinja_template(source)  # knows transformers' tags
    read = find_undeclared_variables(parser.environment.parse(source))
    free = read - _RENDERED_WITH - set(tokenizer.special_tokens_map)
    for name in cfg.chat_template_kwargs:
        if name not in free:
            reason = f"the model's chat template does not read {name!r}"
            if name in read:
                reason = f"{name!r} is not free: the rendering itself gives it to the chat template"
            fix = f"Leave it out; it reads: {', '.join(sorted(free)) or 'none'}"
            value = cfg.chat_template_kwargs
            raise ConfigError("data.chat_template_kwargs", value, reason, fix)


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


def _without_long(
    cfg: DataConfig, prompts: list[Prompt], limit: int, notes: list[str]
) -> list[Prompt]:
    """The prompts of at most `limit` tokens; adds how many others there were to `notes`."""
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    count = len(prompts) - len(kept)
    if not count:
        return kept
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length, name = len(longest.token_ids), cfg.sources[longest.source].name
    reason = f"{count} prompts are longer, the longest, of {name!r}, has {length} tokens"
    empty = {prompt.source for prompt in prompts} - {prompt.source for prompt in kept}
    if empty:
        reason = (
            f"all prompts of {cfg.sources[min(empty)].name!r} are longer, up to {length} tokens"
        )
    if cfg.long_prompts == "stop" or empty:
        fix = f"Set it to {length} or drop those prompts"
        raise ConfigError("rollout.max_prompt_tokens", limit, reason, fix)
    notes.append(
        f"{count} of {len(prompts)} prompts dropped: longer than rollout.max_prompt_tokens = "
        f"{limit}, the longest, of {name!r}, has {length} tokens"
    )
    return kept


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
