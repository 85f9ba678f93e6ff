"""Samples in one row that see each other are found before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import ModelConfig, TrainerConfig
from aepo_fast.model import policy as policies
from aepo_fast.model.isolation import check_isolation
from aepo_fast.model.load import load_model
from aepo_fast.model.policy import Policy
from tests.tiny_architectures import architecture
from tests.tiny_run import a_machine


def a_policy(kind: str, folder: Path, layout: Any, compute: torch.dtype = torch.float32) -> Policy:
    architecture(kind).build(folder)
    machine = a_machine(compute=compute)
    model = load_model(ModelConfig(path=str(folder)), folder, machine)
    # Too few tokens for two samples: what is tried is the layout, not a batch of the run.
    return Policy(model, machine, TrainerConfig(layout=layout, tokens_per_microbatch=8))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_layouts_that_keep_samples_apart_pass(
    tmp_path: Path, kind: str, layout: Any, compute: torch.dtype
) -> None:
    before = torch.get_rng_state()
    policy = a_policy(kind, tmp_path, layout, compute)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_isolation(policy, layout)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in policy.model.parameters())


def test_a_vocabulary_of_few_tokens_is_enough(tmp_path: Path) -> None:
    policy = a_policy("qwen3", tmp_path, "shared")
    policy.model.resize_token_embeddings(11)
    check_isolation(policy, "shared")


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_mask_without_positions_is_refused(tmp_path: Path, compute: torch.dtype) -> None:
    # transformers makes the masks of gpt-oss without them.
    policy = a_policy("gpt_oss", tmp_path, "packed", compute)
    reason = "GptOssForCausalLM lets samples of one row see each other: in the layout 'packed'"
    with pytest.raises(ConfigError, match=f"trainer.layout = 'packed': {reason}") as caught:
        check_isolation(policy, "packed")
    assert caught.value.fix == 'Use "padded"'


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("kind", ["lfm2", "qwen3_5_text"])
def test_a_state_that_runs_on_is_refused(
    tmp_path: Path, kind: str, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if config.json did not say which layers have one.
    monkeypatch.setattr(policies, "recurrent_layers", lambda config: [])
    monkeypatch.setattr(policies, "has_windows", lambda config: False)
    policy = a_policy(kind, tmp_path, layout)
    assert policy.layout == layout
    with pytest.raises(ConfigError, match="lets samples of one row see each other"):
        check_isolation(policy, "auto")
