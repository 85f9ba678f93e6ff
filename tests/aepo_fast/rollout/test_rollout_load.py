"""The ids that end a completion, found without a model, are those found with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from aepo_fast.rollout.load import eos_ids, generation_config


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 5}, [2, 7]),
        ({"eos_token_id": [7, 2, 9]}, {"eos_token_id": 5}, [2, 7, 9]),
        ({}, {"eos_token_id": 5}, [2]),  # the file counts alone where there is one
        (None, {"eos_token_id": 5}, [2, 5]),
        (None, {"eos_token_id": [5, 6]}, [2, 5, 6]),
        (None, {"eos_token_id": None}, [2]),  # the tokenizer's
        ("{", {"eos_token_id": 5}, [2, 5]),
    ],
)
def test_the_end_ids_of_a_folder_are_those_of_its_model(
    tiny_model_dir: Path,
    tmp_path: Path,
    generation: dict[str, Any] | str | None,
    config: dict[str, Any],
    expected: list[int],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    path = folder / "config.json"
    written = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    path = folder / "generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(generation if isinstance(generation, str) else json.dumps(generation))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = eos_ids(generation_config(folder), tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert found == eos_ids(loaded.generation_config, tokenizer) == expected
