"""Weights as their checkpoint has them, which is what vLLM's loader reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aepo_fast.config.sections import ModelConfig
from aepo_fast.model.load import load_model
from aepo_fast.rollout.weight_names import as_in_checkpoint, differs_from_checkpoint
from tests.tiny_architectures import architecture
from tests.tiny_run import a_machine


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "granitemoe", "gemma3", "llama"])
def test_names_and_values_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    folder = architecture(kind).build(tmp_path / kind)
    model = load_model(ModelConfig(path=str(folder)), folder, a_machine())
    assert differs_from_checkpoint(model) == (kind != "llama")
    found = list(as_in_checkpoint(model, model.named_parameters()))
    written = load_file(folder / "model.safetensors")
    assert len(found) == len(dict(found)) and dict(found).keys() == written.keys()
    assert all(torch.equal(value, written[name]) for name, value in found)
    assert any("experts.3.w" in name or "experts.3.up" in name for name in written) == (
        kind in ("qwen3_moe", "mixtral")
    )


def test_no_more_than_a_layer_is_converted_at_once(tmp_path: Path) -> None:
    folder = architecture("qwen3_moe").build(tmp_path)
    model = load_model(ModelConfig(path=str(folder)), folder, a_machine())
    left = iter(model.named_parameters())
    for name, _ in as_in_checkpoint(model, left):
        if name.startswith("model.layers.0."):
            break
    names = [name for name, _ in left]
    assert sum("layers.1." in name for name in names) > 5 and "lm_head.weight" in names
