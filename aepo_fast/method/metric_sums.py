"""Names of the sums that the loss makes of its tokens: `update` adds them up, `report` divides."""

from __future__ import annotations

from enum import StrEnum


class MetricSum(StrEnum):
    """A sum over the main samples' tokens, or over the auxiliary ones' where its name says aux.

    Nats for ENTROPY, POLICY_KL and KL, ratios for CORRECTION and RHO; the others count tokens.
    """

    MAIN_TOKENS = "main_tokens"
    ENTROPY = "entropy"
    CLIP_LOW = "clip_low"
    CLIP_HIGH = "clip_high"
    POLICY_KL = "policy_kl"
    KL = "kl"  # to the reference
    CORRECTION = "correction"
    CORRECTION_CUT = "correction_cut"  # where the correction is at its bound or zero
    RHO = "rho"
    AUX_TOKENS = "aux_tokens"
    AUX_CLIP = "aux_clip"
