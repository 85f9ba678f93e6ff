"""Weights are written file by file, and what is read again is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from transformers import AutoModelForCausalLM

from aepo_fast.training.write_weights import write_weights, writes_by_files
from aepo_fast.world import ALONE


@pytest.mark.parametrize("largest", [10**9, 80_000])
def test_it_is_read_as_the_same_model(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    written: list[int] = []
    plain = safetensors.save_file

    def counted(held: dict[str, torch.Tensor], *args: Any, **options: Any) -> None:
        written.append(sum(one.numel() * 4 for one in held.values()))
        plain(held, *args, **options)

    monkeypatch.setattr(safetensors, "save_file", counted)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert not writes_by_files(model, ALONE)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    write_weights(model, ours, ALONE, largest=largest)
    assert max(written) <= largest and (len(written) > 1) == (largest < 10**9)
    assert sum(written) == sum(one.numel() * 4 for one in model.parameters())

    loaded: Any = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    again, loading = loaded
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in again.state_dict().items())
    model.save_pretrained(theirs, max_shard_size=largest)
    names = [{path.name for path in folder.iterdir()} for folder in (ours, theirs)]
    assert names[0] == names[1]
    for name in ("config.json", "generation_config.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()
