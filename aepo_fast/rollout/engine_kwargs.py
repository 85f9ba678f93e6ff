"""Checks `rollout.engine_kwargs`, further arguments for vLLM, before any weights load."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from aepo_fast.config.errors import ConfigError

# vLLM's names for what settings of ours decide.
_OURS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "revision": "model.revision",
    "code_revision": "model.revision",
    "tokenizer_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "quantization": "model.quantization",
    "load_format": "model.quantization",
    "enable_lora": "model.lora.rank",
    "max_lora_rank": "model.lora.rank",
    "max_loras": "model.lora.rank",
    "seed": "trainer.seed",
    "dtype": "rollout.dtype",
    "max_model_len": "rollout.max_prompt_tokens and rollout.max_new_tokens",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "enforce_eager": "rollout.enforce_eager",
    "enable_sleep_mode": "rollout.sleep",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "skip_tokenizer_init": "rollout.stop",
    "max_logprobs": "rollout.top_k",
}
_ONE_PROCESS = "vLLM runs in the trainer's own processes"
_SAMPLING = "each request says how it is sampled, and the loss takes the same distribution"
# What no setting may change.
_FIXED = {
    "logprobs_mode": "the loss needs log-probs after temperature",
    "weight_transfer_config": "weights come from the trainer by reference",
    "disable_log_stats": "the trainer logs figures of its own",
    "pipeline_parallel_size": _ONE_PROCESS,
    "data_parallel_size": _ONE_PROCESS,
    "distributed_executor_backend": _ONE_PROCESS,
    "worker_cls": _ONE_PROCESS,
    "generation_config": _SAMPLING,
    "override_generation_config": _SAMPLING,
    "logits_processors": _SAMPLING,
}


def check_engine_kwargs(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that is ours, or that the installed vLLM does not take.

    Imports vLLM where there is an argument to check.
    """
    for name, value in given.items():
        key = f"rollout.engine_kwargs.{name}"
        if name in _OURS:
            reason = f"is set by {_OURS[name]}"
            raise ConfigError(key, value, reason, f"Leave it out, and set {_OURS[name]}")
        if name in _FIXED:
            raise ConfigError(key, value, _FIXED[name], "Leave it out")
    if not given:
        return
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]

    kinds = {item.name: item.type for item in dataclasses.fields(EngineArgs)}
    for name, value in given.items():
        key = f"rollout.engine_kwargs.{name}"
        if name not in kinds:
            near = difflib.get_close_matches(name, [one for one in kinds if one not in _OURS])
            fix = f"Did you mean {' or '.join(near)}" if near else "See vllm serve --help"
            raise ConfigError(key, value, "is no argument of the installed vLLM", fix)
        fault = _fault(kinds[name], value)
        if fault is not None:
            raise ConfigError(key, value, f"vLLM does not take it: {fault}", "Correct it")


def _fault(kind: Any, value: Any) -> str | None:
    """What vLLM's own type of an argument says against a value; None where it says nothing."""
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    members = [one for one in (kind, *typing.get_args(kind)) if isinstance(one, type)]
    # vLLM reads names of enumerations on its own.
    if isinstance(value, str) and any(issubclass(one, Enum) for one in members):
        return None
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        return error.errors()[0]["msg"]
    except PydanticUserError:  # no type that it knows
        return None
    return None
