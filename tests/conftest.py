"""What all tests share: Triton's interpreter where there is no GPU, and a tiny model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton itself is imported, so it has to be there before whatever imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tokenizer in the Hugging Face layout."""
    from tests.tiny_model import build_tiny_model  # imports triton by way of transformers

    return build_tiny_model(tmp_path_factory.mktemp("tiny_model"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end, one process would do them while others wait."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
