"""Finds `rollout.stop` in completions as they grow, at the same token as vLLM does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RolloutConfig

Watch = Callable[[int], bool]  # takes each token of a completion, says whether it ends there
_INVALID_PREFIX = "Invalid prefix encountered"


def check_stop_strings(cfg: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError where hf cannot decode a completion token by token."""
    if cfg.stop and cfg.backend == "hf" and not tokenizer.is_fast:
        reason = f"hf cannot decode {type(tokenizer).__name__} token by token"
        fix = 'Leave it out, or set rollout.backend = "vllm"'
        raise ConfigError("rollout.stop", list(cfg.stop), reason, fix)


def watcher(
    stop: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Callable[[Sequence[int]], Watch] | None:
    """Makes, of a prompt's ids, what watches one completion of it; None without strings.

    A string counts wherever its text appears, also across tokens, inside one, and of special
    tokens. The prompt's own text does not count.
    """
    if not stop:
        return None
    backend: Any = tokenizer.backend_tokenizer
    kept = max(map(len, stop)) - 1  # characters that may begin a string

    def watch(prompt_ids: Sequence[int]) -> Watch:
        # As vLLM decodes: behind the prompt, and a character when its last byte is there.
        stream, tail = DecodeStream(ids=list(prompt_ids), skip_special_tokens=False), ""

        def ends(token: int) -> bool:
            nonlocal stream, tail
            try:
                new = stream.step(backend, token)
            except Exception as error:  # of bytes that no text begins with
                if not str(error).startswith(_INVALID_PREFIX):
                    raise
                stream = DecodeStream(skip_special_tokens=False)
                new = stream.step(backend, token)
            text = tail + (new or "")
            tail = text[len(text) - min(kept, len(text)) :]
            return any(one in text for one in stop)

        return ends

    return watch
