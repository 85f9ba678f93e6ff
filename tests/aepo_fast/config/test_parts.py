"""Processes that split layers or hold replicas: what is refused before any weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.over_ranks import check_parts
from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import LoraConfig
from aepo_fast.model import tensor_parallel
from aepo_fast.model.tensor_parallel import check_tensor_parallel
from tests.aepo_fast.world.runs import run_config
from tests.tiny_run import tiny_config


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (3, {"tensor_parallel": 2}, r"tensor_parallel = 2: 3 processes are no multiple of 2\. "),
        (3, {"replicas": 2}, "replicas = 2: 3 processes are no multiple of 2"),
        (2, {"tensor_parallel": 2, "replicas": 2}, "multiple of 4, with trainer.tensor_parallel"),
        (4, {"tensor_parallel": 2, "offload": "all"}, "offload = 'all': does not go together with"),
    ],
)
def test_numbers_that_do_not_fit(size: int, changes: dict[str, Any], message: str) -> None:
    cfg = run_config(Path("some/model"), Path("out"), {"trainer": changes})
    with pytest.raises(ConfigError, match=message):
        check_parts(cfg, size, "chunked")


@pytest.mark.parametrize("changes", [{"tensor_parallel": 2}, {"replicas": 2}])
def test_one_process_has_no_parts(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cfg = run_config(Path("some/model"), Path("out"), {"trainer": changes})
    with pytest.raises(ConfigError, match="= 2: 1 processes are no multiple of 2"):
        resolve_machine(cfg)


def test_what_parts_cannot_have() -> None:
    changes: dict[str, Any] = {"trainer": {"tensor_parallel": 2}}
    lora = run_config(Path("m"), Path("out"), {**changes, "model": {"lora": LoraConfig(rank=4)}})
    with pytest.raises(ConfigError, match="model.lora.rank = 4: does not go together with"):
        check_parts(lora, 2, "chunked")
    cfg = run_config(Path("m"), Path("out"), changes)
    for backend in ("fused", "reference"):
        with pytest.raises(ConfigError, match=f"head_backend = '{backend}': .*Use \"chunked\""):
            check_parts(cfg, 2, backend)
    check_parts(cfg, 2, "chunked")
    check_parts(tiny_config(Path("m"), Path("out")), 3, "fused")


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (GPT2Config(), 2, "transformers has no plan to split 'gpt2'"),
        (Qwen3MoeConfig(), 2, "the plan of 'qwen3_moe' has '.*', which is not supported"),
        (LlamaConfig(), 3, "does not divide the model's 32 num_attention_heads"),
        (Qwen3Config(num_key_value_heads=2), 4, "divide the model's 2 num_key_value_heads. Use 1"),
    ],
)
def test_models_that_cannot_be_split(config: PretrainedConfig, size: int, message: str) -> None:
    check_tensor_parallel(1, config)
    with pytest.raises(ConfigError, match=f"trainer.tensor_parallel = {size}: .*{message}"):
        check_tensor_parallel(size, config)


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tensor_parallel(2, LlamaConfig())
    monkeypatch.setattr(tensor_parallel, "_apply", lambda: None)
    with pytest.raises(ConfigError, match="cannot split a model that it has built"):
        check_tensor_parallel(2, LlamaConfig())
