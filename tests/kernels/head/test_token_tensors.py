"""The caller's per-token tensors reach the loss chunk by chunk, as they were given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aepo_kernels import linear_token_loss
from tests.kernels.oracle import IGNORED, make_case, materialised


def test_token_tensors_may_have_more_dimensions_and_any_dtype() -> None:
    case = make_case(40, 8, 30, option="ignored")
    mask = torch.rand(40) < 0.5
    pairs = torch.randn(40, 2)

    def loss(logprob: Tensor, *rest: Any) -> Tensor:
        mask, pairs = rest[2:]
        assert mask.dtype == torch.bool and pairs.shape == (len(logprob), 2)
        return (logprob * pairs.sum(1))[mask].sum()

    keep = case.targets != IGNORED
    logprob = materialised(case)[0]
    assert logprob is not None
    expected = (logprob * pairs.sum(1))[mask & keep].sum()
    inputs = case.hidden, case.weight, case.targets
    output = linear_token_loss(*inputs, loss, mask, pairs, **case.keywords(), chunk_tokens=7)
    torch.testing.assert_close(output.loss, expected)
