# vLLM is installed by choice:
# pyright: reportMissingImports=false, reportCallIssue=false, reportAttributeAccessIssue=false
"""What vLLM's weight-transfer interface asks for, within one process; see `vllm.VllmRollout`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from aepo_fast.rollout import weight_sharing

BACKEND = "aepo_fast"  # the engine's name in vLLM's factory


def register() -> None:
    """Make vLLM know the engine."""
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, SameProcessEngine)
    except ValueError:  # by an earlier one of this process
        pass


@dataclass
class _InitInfo(WeightTransferInitInfo):
    """The trainer's parameters, by the names of the checkpoint format; on_gpu: where vLLM runs.

    weights: None where the checkpoint's are not these very tensors.
    """

    weights: list[tuple[str, nn.Parameter]] | None = None
    share: bool = False
    on_gpu: bool = False


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):
    """What they are now, by the same names; `report` is told the bytes written."""

    weights: Iterable[tuple[str, torch.Tensor]] = ()
    report: dict[str, int] = field(default_factory=dict)


class SameProcessEngine(WeightTransferEngine[_InitInfo, _UpdateInfo]):
    """Brings vLLM's weights up to date with parameters of the same process.

    Where vLLM holds them as its loader wrote them, by one batched copy, of nothing at all where
    they are shared; where it has packed them, by loading them anew as a checkpoint.
    """

    init_info_cls = _InitInfo
    update_info_cls = _UpdateInfo
    copies: list[weight_sharing.Placement] | None = None  # None: load anew
    on_gpu = False

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        """Find out which of the ways it is; shares what can be shared where `share` says so."""
        self.copies, self.on_gpu = None, init_info.on_gpu
        if init_info.weights is None or any(
            parameter.numel() == 0 for parameter in self.model.parameters()
        ):
            return  # packed for a CPU, where loading without a reload raises
        model: Any = self.model
        places = weight_sharing.find_placements(model.load_weights, init_info.weights)
        if places is None:
            return
        if init_info.share:
            self.copies = weight_sharing.share(init_info.weights, places)
        else:
            self.copies = [place for found in places.values() for place in found]

    def start_weight_update(self) -> None:
        """Make the layers ready to be loaded again, packed ones included."""
        if self.copies is None:
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        """Take the weights over, cast to vLLM's dtypes and fused as its layers are."""
        if self.copies is None:
            update_info.report["bytes"] = 0
            self.model.load_weights(self._counted(update_info))
        else:
            weight_sharing.copy(self.copies)
            update_info.report["bytes"] = sum(place.num_bytes for place in self.copies)

    def _counted(self, update_info: _UpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in update_info.weights:
            update_info.report["bytes"] += self.model_config.dtype.itemsize * weight.numel()
            yield name, weight.detach()

    def finish_weight_update(self) -> None:
        """Pack what was loaded."""
        if self.copies is not None:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        if tied and head is not None and not self.on_gpu:
            # The head shares the embedding's weight, but holds a packed copy of its own, which
            # reloading the embedding leaves as it was.
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def shutdown(self) -> None:
        """Do nothing: there is no connection to close."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Refuse: abstract in vLLM 0.26, gone in 0.28, and of no use in one process."""
        raise NotImplementedError
