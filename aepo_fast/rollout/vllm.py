# vLLM is installed by choice:
# pyright: reportMissingImports=false, reportCallIssue=false, reportAttributeAccessIssue=false
"""Rollouts with vLLM in the trainer's own process, weights through its weight-transfer interface.

The only module that imports vLLM. `load` imports it when a configuration asks for it, not before.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import vllm
from torch import nn
from vllm import LLM
from vllm.config import WeightTransferConfig
from vllm.device_allocator import get_mem_allocator_instance
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferInitRequest,
    WeightTransferUpdateInfo,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.sampling_params import RequestOutputKind, SamplingParams

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RolloutConfig
from aepo_fast.rollout import weight_sharing
from aepo_fast.rollout.engine import RolloutError
from aepo_fast.samples import Completion, Request

_BACKEND = "aepo_fast"


@dataclass
class _InitInfo(WeightTransferInitInfo):
    """The trainer's parameters, by the names of the checkpoint format; on_gpu: where vLLM runs."""

    weights: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    share: bool = False
    on_gpu: bool = False


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):
    """The same parameters as they are now; `report` is told the bytes written."""

    weights: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    report: dict[str, int] = field(default_factory=dict)


class _SameProcessEngine(WeightTransferEngine[_InitInfo, _UpdateInfo]):
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
        if any(parameter.numel() == 0 for parameter in self.model.parameters()):
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
            self.model.load_weights((name, w.detach()) for name, w in update_info.weights)
            size = self.model_config.dtype.itemsize
            update_info.report["bytes"] = sum(size * w.numel() for _, w in update_info.weights)
        else:
            weight_sharing.copy(self.copies)
            update_info.report["bytes"] = sum(place.num_bytes for place in self.copies)

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


class VllmRollout:
    """Samples with a vLLM engine in this process.

    folder: the model's, with its tokenizer. eos_ids: ids that end a completion. on_gpu: whether
    this vLLM runs on a GPU. The completions' log-probs are those after temperature, of the very ids
    that were sampled. The same requests with the same seeds and weights give the same samples; one
    request alone may give others.
    """

    verify = True

    def __init__(
        self, folder: str, cfg: RolloutConfig, *, eos_ids: Sequence[int], seed: int, on_gpu: bool
    ) -> None:
        self.cfg, self.eos_ids, self.on_gpu = cfg, list(eos_ids), on_gpu
        self.weights_version = 0
        self.metrics: dict[str, float] = {}
        self._numbers = itertools.count()
        self._connected: nn.Module | None = None
        self._asleep = False
        # The engine in this process, so that weights pass by reference.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        logging.getLogger("vllm").setLevel(logging.WARNING)
        # It warns of layers that hold no weights of their own; the canary tests the rest.
        reload = "vllm.model_executor.model_loader.reload.layerwise"
        logging.getLogger(reload).setLevel(logging.ERROR)
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(cfg.cpu_kv_cache_gib)))
        try:
            WeightTransferEngineFactory.register_engine(_BACKEND, _SameProcessEngine)
        except ValueError:  # by an earlier engine of this process
            pass
        self._sleeps = on_gpu and cfg.sleep and not cfg.steps_ahead
        try:
            self.llm = LLM(
                model=folder,
                dtype=cfg.dtype,
                seed=seed,
                max_model_len=cfg.max_prompt_tokens + cfg.max_new_tokens,
                gpu_memory_utilization=cfg.gpu_memory_utilization,
                enforce_eager=cfg.enforce_eager,
                enable_sleep_mode=self._sleeps,
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=_BACKEND),
                disable_log_stats=True,
                skip_tokenizer_init=True,  # ids go in and come out
                **({} if on_gpu else _cache_blocks()),
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
        """Hand over the trainer's weights and forget what was cached with the old ones.

        The first call for a model finds out how; then its parameters may become views of vLLM's.
        """
        weights = list(model.named_parameters())
        if model is not self._connected:
            share = self.cfg.share_weights and not self.cfg.steps_ahead
            info = {"weights": weights, "share": share, "on_gpu": self.on_gpu}
            self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
            self._connected = model
        self.llm.start_weight_update()
        report: dict[str, int] = {}
        update = {"weights": weights, "report": report}
        self.llm.update_weights(WeightTransferUpdateRequest(update_info=update))
        self.llm.finish_weight_update()
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM kept its prefix cache, which belongs to the old weights")
        self.metrics["sync/bytes_copied"] = report["bytes"]
        self.weights_version = version

    def sleep(self) -> None:
        """Free the GPU memory of the key-value cache, and of nothing else."""
        if not self._sleeps or self._asleep:
            return
        torch.cuda.synchronize()
        self.metrics["memory/rollout_awake_gib"] = _used_gib()
        # Not LLM.sleep, which moves the weights to the CPU, where trained parameters may be views.
        self.llm.reset_prefix_cache()
        _discard("kv_cache")
        torch.cuda.empty_cache()
        self.metrics["memory/rollout_asleep_gib"] = _used_gib()
        self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()
            # Through the worker, which also makes anew what its runner keeps in that memory.
            self.llm.collective_rpc("wake_up", args=(["kv_cache"],))
            self._asleep = False

    def close(self) -> None:
        """Let the engine's memory go."""
        self._connected = None
        self.__dict__.pop("llm", None)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        on_tokens: Callable[[int], None] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample every request; see `RolloutEngine.generate`. Tokens count when a group is done."""
        self._check_lengths(requests, max_new_tokens)
        self._wake()
        results: dict[int, list[Completion]] = {}
        # One stream for the whole call: a seed per request would make vLLM draw row by row, which
        # took two fifths of its speed on a CPU, and breaks there when a prompt is split.
        seed = np.random.SeedSequence([request.seed for request in requests])
        numbers = {str(next(self._numbers)): index for index in range(len(requests))}
        engine = self.llm.llm_engine
        numpy_state = np.random.get_state()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
                # On a GPU vLLM draws a seed for each sample from here instead.
                np.random.seed(seed.generate_state(4))
                for number, index in numbers.items():
                    ids = list(requests[index].prompt_ids)
                    params = self._params(requests[index], max_new_tokens)
                    engine.add_request(number, {"prompt_token_ids": ids}, params)
                while engine.has_unfinished_requests():
                    counted = 0
                    for output in self._step(engine):
                        if not output.finished:
                            continue
                        index = numbers[output.request_id]
                        group = _completions(requests[index], output, self.weights_version)
                        results[index] = group
                        counted += sum(len(one.completion_ids) for one in group)
                        if on_group is not None:
                            on_group(index, group)
                    if on_tokens is not None:
                        on_tokens(counted)
        finally:
            np.random.set_state(numpy_state)
            if engine.has_unfinished_requests():
                engine.abort_request(list(numbers))
        if len(results) != len(requests):
            raise RolloutError(f"vLLM answered {len(results)} of {len(requests)} requests")
        return [results[index] for index in range(len(requests))]

    def _params(self, request: Request, max_new_tokens: int) -> SamplingParams:
        return SamplingParams(
            n=request.num_samples,
            temperature=request.temperature,
            max_tokens=max_new_tokens,
            stop_token_ids=self.eos_ids,
            ignore_eos=True,  # the ids above are all that ends a completion
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _check_lengths(self, requests: Sequence[Request], max_new_tokens: int) -> None:
        limit = self.llm.model_config.max_model_len
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest + max_new_tokens > limit:
            raise RolloutError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit vLLM's "
                f"limit of {limit}: raise rollout.max_prompt_tokens or drop long prompts"
            )

    @staticmethod
    def _step(engine: Any) -> list[Any]:
        try:
            return engine.step()
        except Exception as error:  # whatever a kernel or a dead engine raises
            raise RolloutError(
                f"vLLM failed while sampling: {type(error).__name__}: {error}. If memory ran out, "
                "lower rollout.gpu_memory_utilization or trainer.tokens_per_microbatch"
            ) from error


def _completions(request: Request, output: Any, version: int) -> list[Completion]:
    samples = sorted(output.outputs, key=lambda sample: sample.index)
    if len(samples) != request.num_samples:
        raise RolloutError(f"vLLM returned {len(samples)} of {request.num_samples} samples")
    return [_completion(request, sample, version) for sample in samples]


def _completion(request: Request, sample: Any, version: int) -> Completion:
    if sample.finish_reason not in ("stop", "length"):
        raise RolloutError(
            f"vLLM ended a request with {sample.finish_reason!r}: it was aborted or did not fit "
            "the cache; raise rollout.gpu_memory_utilization or rollout.cpu_kv_cache_gib"
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


def _cache_blocks() -> dict[str, Any]:
    """On a CPU 128 tokens are a block by default, and samples of shorter prompts share nothing."""
    return {"block_size": 16 if vllm.__version__.startswith("0.28.") else 32}  # later: 32 at least


def _discard(tag: str) -> None:
    """Free the GPU memory allocated under `tag`; vLLM 0.26 has no call for it."""
    allocator: Any = get_mem_allocator_instance()
    if hasattr(allocator, "discard"):
        allocator.discard(tag)
        return
    from vllm.device_allocator.cumem import unmap_and_release

    torch.cuda.synchronize()
    for data in allocator.pointer_to_data.values():
        if data.tag == tag and not data.is_asleep:
            unmap_and_release(data.handle)
            data.is_asleep = True


def _used_gib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30
