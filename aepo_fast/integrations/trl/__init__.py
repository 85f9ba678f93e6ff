"""AEPO inside TRL's GRPOTrainer (TRL 1.15 and 1.16): `AEPOTrainer` and its `AEPOConfig`."""

from __future__ import annotations

from aepo_fast.integrations.trl.config import AEPOConfig
from aepo_fast.integrations.trl.trainer import AEPOTrainer

__all__ = ["AEPOConfig", "AEPOTrainer"]
