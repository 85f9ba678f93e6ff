"""Counts the work of GEMMs: one unit is hidden @ weight.T of all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from aepo_kernels.gemm import Gemms


class Units:
    """The units so far; a GEMM of low rank is a small part of one."""

    def __init__(self, tokens: int, hidden_size: int, vocab: int) -> None:
        self.one, self.total, self.depth = tokens * hidden_size * vocab, 0.0, 0

    @property
    def whole(self) -> int:
        """The units, rounded down."""
        return int(self.total + 1e-9)


@contextmanager
def counted(tokens: int, hidden_size: int, vocab: int) -> Iterator[Units]:
    """A context in which the GEMMs of our functions are counted, those of "reference" excepted."""
    units = Units(tokens, hidden_size, vocab)

    def watched(original: Any, first: int) -> Any:
        def call(self: Gemms, *arguments: Any, **keywords: Any) -> Any:
            left: Tensor = arguments[first]
            right: Tensor = arguments[first + 1]
            if not units.depth:  # `product` may call `matmul`
                units.total += len(left) * left.shape[1] * right.shape[1] / units.one
            units.depth += 1
            try:
                return original(self, *arguments, **keywords)
            finally:
                units.depth -= 1

        return call

    with (
        patch.object(Gemms, "matmul", watched(Gemms.matmul, 0)),
        patch.object(Gemms, "product", watched(Gemms.product, 0)),
        patch.object(Gemms, "add_product", watched(Gemms.add_product, 1)),
    ):
        yield units
