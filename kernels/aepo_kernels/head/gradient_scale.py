"""A power of two that lifts the logits' gradient before it is rounded to float16.

A probability of 1e-6 times a token's weight of 1e-4 is below float16's smallest number, 6e-8. So
the coefficients of a chunk are multiplied by one power of two, and what is added up in float32 is
divided by it. Products with a power of two round nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.head.projection import Head
from aepo_kernels.head.tokens import Tokens
from aepo_kernels.rows.interface import RowCoefs, RowStats

_LARGEST = 15  # float16's largest number is just below 2^16


def gradient_scale(head: Head, tokens: Tokens, stats: RowStats, coefs: RowCoefs) -> Tensor:
    """The largest power of two, [], by which no gradient of a chunk's logits can exceed 2^15.

    stats, coefs: [C] each. With p = softmax(z / T), |1{j=y} - p_j| <= 1 and p_j |log p_j + H| <=
    max(H, 1/e) bound a logit's gradient, and twice as much bounds the sum over a row, which passes
    through a LoRA's B. A row whose bound is not finite is not looked at: its gradient is not
    finite either. Nothing waits for a GPU.
    """
    bound = torch.zeros_like(stats.log_sum)
    for coef in (coefs.logprob, coefs.lse):
        bound += 0.0 if coef is None else coef.abs()
    if coefs.entropy is not None:
        bound += coefs.entropy.abs() * stats.entropy.clamp(min=1)
    bound *= tokens.inv_temperature
    if coefs.second_logprob is not None and tokens.second_inv_temperature is not None:
        bound += coefs.second_logprob.abs() * tokens.second_inv_temperature
    most = (bound * abs(head.logit_map.scale)).nan_to_num(0.0, posinf=0.0).max()
    if head.lora is not None:
        up = head.lora[1].abs().max().to(most.dtype) * abs(2 * head.lora_scale)
        most = most * up.clamp(min=1)
    exponent = torch.frexp(most).exponent  # most < 2^exponent
    return torch.exp2((_LARGEST - exponent).clamp(-100, 100).to(most.dtype))
