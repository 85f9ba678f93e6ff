"""Fixtures shared by the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import build_tiny_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tokenizer in the Hugging Face layout."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny_model"))
