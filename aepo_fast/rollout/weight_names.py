"""A model's weights by the names of its checkpoint, which is what an inference engine loads.

transformers holds some models otherwise than their files do: the experts of a layer in one tensor,
a text model without the prefix of the larger one that it came with.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

_OF_A_LAYER = re.compile(r".*?\.\d+\.")


def differs_from_checkpoint(model: nn.Module) -> bool:
    """Whether the checkpoint of a model names or divides some of its weights otherwise."""
    return bool(getattr(model, "_weight_conversions", None))


def as_in_checkpoint(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Weights of `model`, by name, as its checkpoint has them.

    Those of a layer are converted together, and one layer after the other, since most of what was
    divided is a copy.
    """
    if not differs_from_checkpoint(model):
        yield from weights
        return
    loaded: Any = model
    for _, layer in itertools.groupby(weights, key=_layer):
        yield from revert_weight_conversion(loaded, dict(layer)).items()


def _layer(weight: tuple[str, Tensor]) -> str:
    found = _OF_A_LAYER.match(weight[0])
    return found[0] if found else ""
