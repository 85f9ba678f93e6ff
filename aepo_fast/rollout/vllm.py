# vLLM is installed by choice:
# pyright: reportMissingImports=false, reportCallIssue=false
"""Rollouts with vLLM in the trainer's own process, weights through its weight-transfer interface.

The only module that imports vLLM. `setup` imports it when a run asks for vLLM, not before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from aepo_fast.config import ConfigError, RolloutConfig
from aepo_fast.rollout.base import Completion, Request

_BACKEND = "aepo_fast"


@dataclass
class _InitInfo(WeightTransferInitInfo):
    """Nothing has to be set up between two halves of one process."""


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):
    """The trainer's tensors themselves, by the names of the checkpoint format."""

    weights: list[tuple[str, torch.Tensor]] = field(default_factory=list)


class _SameProcessEngine(WeightTransferEngine[_InitInfo, _UpdateInfo]):
    """Loads tensors of this process as vLLM would load a checkpoint."""

    init_info_cls = _InitInfo
    update_info_cls = _UpdateInfo

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        """Do nothing: there is no connection to open."""

    def start_weight_update(self) -> None:
        """Make the layers ready to be loaded again, packed ones included."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        """Load the tensors, cast to vLLM's dtypes and fused as its layers are."""
        self.model.load_weights(iter(update_info.weights))

    def finish_weight_update(self) -> None:
        """Pack what was loaded."""
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        if tied and head is not None and self.device.type == "cpu":
            # The head shares the embedding's weight, but holds a packed copy of its own, which
            # reloading the embedding leaves as it was.
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def shutdown(self) -> None:
        """Do nothing: there is no connection to close."""


class VllmRollout:
    """Samples with a vLLM engine in this process.

    folder: the model's, with its tokenizer. eos_ids: ids that end a completion. The completions'
    log-probs are those after temperature, of the very ids that were sampled. The same requests with
    the same seeds and weights give the same samples; one request alone may give others.
    """

    verify = True

    def __init__(
        self, folder: str, cfg: RolloutConfig, *, eos_ids: Sequence[int], seed: int
    ) -> None:
        self.eos_ids = list(eos_ids)
        self.weights_version = 0
        # The engine in this process, so that weights pass by reference.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        logging.getLogger("vllm").setLevel(logging.WARNING)
        # It warns of layers that hold no weights of their own; the canary tests the rest.
        reload = "vllm.model_executor.model_loader.reload.layerwise"
        logging.getLogger(reload).setLevel(logging.ERROR)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(cfg.cpu_kv_cache_gib))))
        try:
            WeightTransferEngineFactory.register_engine(_BACKEND, _SameProcessEngine)
        except ValueError:  # by an earlier engine of this process
            pass
        try:
            self.llm = LLM(
                model=folder,
                dtype=cfg.dtype,
                seed=seed,
                max_model_len=cfg.max_prompt_tokens + cfg.max_new_tokens,
                gpu_memory_utilization=cfg.gpu_memory_utilization,
                enforce_eager=cfg.enforce_eager,
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=_BACKEND),
                disable_log_stats=True,
                skip_tokenizer_init=True,  # ids go in and come out
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                "rollout.backend",
                "vllm",
                f"vLLM did not start: {error}",
                "Change rollout.gpu_memory_utilization, rollout.cpu_kv_cache_gib or the lengths, "
                'or set it to "hf"',
            ) from error

    @torch.no_grad()
    def sync_weights(self, model: nn.Module, version: int) -> None:
        """Load the trainer's weights and forget what was cached with the old ones."""
        weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        self.llm.start_weight_update()
        self.llm.update_weights(WeightTransferUpdateRequest(update_info={"weights": weights}))
        self.llm.finish_weight_update()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, which belongs to the old weights")
        self.weights_version = version

    def close(self) -> None:
        """Let the engine's memory go."""
        del self.llm

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample every request; see `RolloutEngine.generate`. Tokens are counted at the end."""
        params = [
            SamplingParams(
                n=request.num_samples,
                temperature=request.temperature,
                max_tokens=max_new_tokens,
                stop_token_ids=self.eos_ids,
                ignore_eos=True,  # the ids above are all that ends a completion
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        # One stream for the whole call: a seed per request would make vLLM draw row by row, which
        # took two fifths of its speed on a CPU, and breaks there when a prompt is split.
        seed = np.random.SeedSequence([request.seed for request in requests])
        with torch.random.fork_rng():
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        results = [
            [
                _completion(request, sample, self.weights_version)
                for sample in sorted(output.outputs, key=lambda sample: sample.index)
            ]
            for request, output in zip(requests, outputs, strict=True)
        ]
        for request, group in zip(requests, results, strict=True):
            if len(group) != request.num_samples:
                raise RuntimeError(f"vLLM returned {len(group)} of {request.num_samples} samples")
        if on_tokens is not None:
            on_tokens(sum(len(one.completion_ids) for group in results for one in group))
        return results


def _completion(request: Request, sample: Any, version: int) -> Completion:
    if sample.finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM ended a request with {sample.finish_reason!r}: it ran out of memory for its "
            "cache or was aborted; give it more, and go on with --resume"
        )
    ids = tuple(sample.token_ids)
    return Completion(
        prompt_ids=request.prompt_ids,
        completion_ids=ids,
        logprobs=tuple(at[token].logprob for at, token in zip(sample.logprobs, ids, strict=True)),
        finish_reason=sample.finish_reason,
        temperature=request.temperature,
        weights_version=version,
    )
