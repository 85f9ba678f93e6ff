# vLLM is installed by choice:
# pyright: reportMissingImports=false, reportCallIssue=false, reportAttributeAccessIssue=false
"""Rollouts with vLLM in the trainer's own process, weights through its weight-transfer interface.

The only module that imports vLLM, with `vllm_weights`, `vllm_ranks` and `engine_kwargs`. `load`
imports it when a configuration asks for it, not before.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import vllm
from torch import nn
from vllm import LLM
from vllm.config import WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.device_allocator import get_mem_allocator_instance
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RolloutConfig
from aepo_fast.model.kept import room
from aepo_fast.model.lora import ADAPTER_WEIGHTS, save_adapter
from aepo_fast.model.sharded import whole_weights
from aepo_fast.report.unexpected import first_line
from aepo_fast.rollout.engine import RolloutError
from aepo_fast.rollout.vllm_output import completions
from aepo_fast.rollout.vllm_ranks import own_shared_memory, settings_over_ranks
from aepo_fast.rollout.vllm_weights import BACKEND, register
from aepo_fast.rollout.weight_names import as_in_checkpoint, differs_from_checkpoint
from aepo_fast.samples import Completion, Request, seed_of
from aepo_fast.world import ALONE, World

_ADAPTER = "policy"
_LOGPROBS = 20  # most log-probs of a token by vLLM's default
_CACHE, _WEIGHTS = "kv_cache", "weights"  # vLLM's names for parts of its memory
_LORA_RANKS = get_args(MaxLoRARanks)
# Its loader rounds to NF4, in blocks of 64 with scales of 8 bits, as `model.quantized` asks for.
_IN_4_BITS = {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}


class VllmRollout:
    """Samples with a vLLM engine in this process.

    folder: the model's, with its tokenizer. eos_ids: ids that end a completion. on_gpu: whether
    this vLLM runs on a GPU. lora_rank: of the adapter that is trained, 0 without one; the folder's
    weights then stay as they are, and a sync hands over the adapter. quantization: of the folder's
    weights, as `model.quantization` names it; vLLM rounds them in the same way. trust_code:
    `model.trust_remote_code`. world: of several processes, each or so many neighbours as
    `rollout.tensor_parallel` says have one engine.

    The completions' log-probs are those after temperature, of the very ids that were sampled. The
    same requests with the same seeds and weights give the same samples. In one process, a request
    alone may give others; over ranks it gives the same, whichever engine has it.
    """

    verify = True

    def __init__(
        self,
        folder: str,
        cfg: RolloutConfig,
        *,
        eos_ids: Sequence[int],
        seed: int,
        on_gpu: bool,
        lora_rank: int = 0,
        quantization: str = "none",
        trust_code: bool = False,
        world: World = ALONE,
    ) -> None:
        self.cfg, self.eos_ids, self.on_gpu = cfg, list(eos_ids), on_gpu
        self.over_ranks = world.size > 1
        self.ranks = cfg.tensor_parallel if self.over_ranks else 1
        self._peers = world.neighbours(self.ranks)  # they sample the same at the same time
        self.weights_version = 0
        self.metrics: dict[str, float] = {}
        self._numbers = itertools.count()
        self._connected: nn.Module | None = None
        self._asleep: set[str] = set()  # tags of vLLM's memory that were given back
        self._lora_rank = lora_rank
        # What samples with the adapter; None before the first sync, when it would change nothing.
        self._adapter: LoRARequest | None = None
        # The engine in this process, so that weights pass by reference.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        logging.getLogger("vllm").setLevel(logging.WARNING)
        # It warns of layers that hold no weights of their own; the canary tests the rest.
        reload = "vllm.model_executor.model_loader.reload.layerwise"
        logging.getLogger(reload).setLevel(logging.ERROR)
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(cfg.cpu_kv_cache_gib)))
        register()
        self._sleeps = on_gpu and cfg.sleep != "none" and not cfg.steps_ahead
        fix = "Change rollout.gpu_memory_utilization, rollout.cpu_kv_cache_gib or the lengths"
        if quantization != "none":
            fix += ", install the vllm-bnb-plugin that goes with this vLLM"
        settings = {**({} if on_gpu else _cache_blocks()), **cfg.engine_kwargs}
        if self.over_ranks:
            settings |= settings_over_ranks(world, self.ranks, on_gpu)
        try:
            with own_shared_memory(world) if self.ranks > 1 and not on_gpu else nullcontext():
                self.llm = LLM(
                    model=folder,
                    dtype=cfg.dtype,
                    seed=seed,
                    max_model_len=cfg.max_prompt_tokens + cfg.max_new_tokens,
                    gpu_memory_utilization=cfg.gpu_memory_utilization,
                    enforce_eager=cfg.enforce_eager,
                    enable_sleep_mode=self._sleeps,
                    logprobs_mode="processed_logprobs",
                    max_logprobs=max(_LOGPROBS, room(cfg.top_k)),
                    weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                    disable_log_stats=True,
                    skip_tokenizer_init=not cfg.stop,  # ids go in and come out
                    trust_remote_code=trust_code,
                    **_lora_settings(lora_rank),
                    **({} if quantization == "none" else _IN_4_BITS),
                    **settings,
                )
        except Exception as error:  # of its code for this model, or of a plugin for another vLLM
            reason = f"vLLM did not start: {error}"
            if quantization == "none" and not isinstance(error, RuntimeError | ValueError):
                reason = f"vLLM {vllm.__version__} cannot run this model: {first_line(error)}"
                fix = "Use another model or another vLLM"
            if cfg.engine_kwargs:
                fix += ", or leave out what of rollout.engine_kwargs it cannot have"
            fix += ', or set it to "hf"'
            raise ConfigError("rollout.backend", "vllm", reason, fix) from error
        if self.llm.model_config.using_transformers_backend():
            reason = "vLLM takes transformers' code for this model, and changes it for the trainer"
            raise ConfigError("rollout.backend", "vllm", reason, 'Use "hf"')
        self._vocab = self.llm.model_config.get_vocab_size()

    @torch.no_grad()
    def sync_weights(self, model: nn.Module, version: int) -> None:
        """Hand over the trainer's weights and forget what was cached with the old ones.

        The first call for a model finds out how; then its parameters may become views of vLLM's.
        Of a model with an adapter, only that is handed over.
        """
        if self._lora_rank:
            # vLLM reads it once. A folder that stayed would be left in memory by a kill.
            with tempfile.TemporaryDirectory(dir=_in_memory()) as folder:
                save_adapter(model, Path(folder))  # type: ignore[arg-type]
                self.load_adapter(Path(folder), version)
            return
        self._wake(_WEIGHTS)
        # What ranks gather is there only while vLLM loads it, one weight after the other; what a
        # checkpoint has otherwise is copied for each sync.
        renamed = differs_from_checkpoint(model)
        in_place = not self.over_ranks and not renamed
        dtype = self.llm.model_config.dtype if self.over_ranks else None
        whole: Any = whole_weights(model, dtype)  # type: ignore[arg-type]
        weights = list(whole) if in_place else as_in_checkpoint(model, whole) if renamed else whole
        if model is not self._connected:
            share = self.cfg.share_weights and not self.cfg.steps_ahead
            known = weights if in_place else None
            info = {"weights": known, "share": share, "on_gpu": self.on_gpu}
            self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
            self._connected = model
        self.llm.start_weight_update()
        report: dict[str, int] = {}
        update = {"weights": weights, "report": report}
        self.llm.update_weights(WeightTransferUpdateRequest(update_info=update))
        self.llm.finish_weight_update()
        self._taken_over(report["bytes"], version)

    def load_adapter(self, folder: Path, version: int) -> None:
        """Sample with the adapter in a folder, as peft writes it, from now on."""
        assert self._lora_rank, "the engine was started without an adapter"
        update = LoRARequest(_ADAPTER, 1, str(folder), load_inplace=True)
        if not self.llm.llm_engine.add_lora(update):
            raise RolloutError(f"vLLM did not take the adapter in {folder}")
        self._adapter = LoRARequest(_ADAPTER, 1, str(folder))
        self._taken_over((folder / ADAPTER_WEIGHTS).stat().st_size, version)

    def _taken_over(self, num_bytes: int, version: int) -> None:
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM kept its prefix cache, which belongs to the old weights")
        self.metrics["sync/bytes_copied"] = num_bytes
        self.weights_version = version

    def sleep(self) -> None:
        """Free the GPU memory of the key-value cache, and of the weights where `sleep` is "all".

        The weights must then be handed over before `generate`.
        """
        if not self._sleeps or self._asleep:
            return
        torch.cuda.synchronize()
        self.metrics["memory/rollout_awake_gib"] = _used_gib()
        self.llm.reset_prefix_cache()
        if self.cfg.sleep == "all":
            # Through the worker, which keeps what no sync writes: the model's buffers.
            self.llm.collective_rpc("sleep", args=(2,))
            self._asleep = {_CACHE, _WEIGHTS}
        else:
            # Not LLM.sleep, which moves the weights to the CPU, where trained parameters may be
            # views.
            _discard(_CACHE)
            self._asleep = {_CACHE}
        torch.cuda.empty_cache()
        self.metrics["memory/rollout_asleep_gib"] = _used_gib()

    def _wake(self, tag: str) -> None:
        if tag in self._asleep:
            torch.cuda.empty_cache()
            # Through the worker, which also makes anew what its runner keeps in that memory.
            self.llm.collective_rpc("wake_up", args=([tag],))
            self._asleep.remove(tag)

    def close(self) -> None:
        """Let the engine's memory go."""
        self._connected = self._adapter = None
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
        if _WEIGHTS in self._asleep:
            raise RolloutError("vLLM has given its weights back, and got none since")
        self._wake(_CACHE)
        results: dict[int, list[Completion]] = {}
        # In one process, one stream for the whole call: a seed per request would make vLLM draw row
        # by row, which took two fifths of its speed on a CPU, and breaks there when a prompt is
        # split.
        seed = np.random.SeedSequence([request.seed for request in requests])
        numbers = {str(next(self._numbers)): index for index in range(len(requests))}
        engine = self.llm.llm_engine

        def step() -> None:
            counted = 0
            for output in self._step(engine):
                if not output.finished:
                    continue
                index = numbers[output.request_id]
                group = completions(requests[index], output, self.weights_version)
                results[index] = group
                counted += sum(len(one.completion_ids) for one in group)
                if on_group is not None:
                    on_group(index, group)
            if on_tokens is not None:
                on_tokens(counted)

        numpy_state = np.random.get_state()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]) >> 1)
                # On a GPU vLLM draws a seed for each sample from here instead.
                np.random.seed(seed.generate_state(4))
                for number, index in numbers.items():
                    ids = list(requests[index].prompt_ids)
                    params = self._params(requests[index], max_new_tokens)
                    engine.add_request(
                        number, {"prompt_token_ids": ids}, params, lora_request=self._adapter
                    )
                while engine.has_unfinished_requests():
                    # Where one stops, its peers would wait for it in their next step.
                    self._peers.together(step)
        finally:
            np.random.set_state(numpy_state)
            if engine.has_unfinished_requests():
                engine.abort_request(list(numbers))
        if len(results) != len(requests):
            raise RolloutError(f"vLLM answered {len(results)} of {len(requests)} requests")
        return [results[index] for index in range(len(requests))]

    def _params(self, request: Request, max_new_tokens: int) -> SamplingParams:
        # Else it makes an object for each of the kept ids.
        flat: dict[str, Any] = {"flat_logprobs": True} if request.with_kept else {}
        return SamplingParams(
            n=request.num_samples,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            max_tokens=max_new_tokens,
            # vLLM adds a sample's number to it.
            seed=seed_of(request.seed) >> 1 if self.over_ranks else None,
            stop_token_ids=self.eos_ids,
            ignore_eos=True,  # the ids above are all that ends a completion
            logprobs=room(request.top_k, self._vocab) if request.with_kept else 0,
            stop=list(self.cfg.stop),
            include_stop_str_in_output=True,
            detokenize=bool(self.cfg.stop),
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **flat,
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


def _in_memory() -> Path | None:
    """A folder of files that lie in memory; None, the place of all such folders, without one."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else None


def _lora_settings(rank: int) -> dict[str, Any]:
    if not rank:
        return {}
    most = next((size for size in _LORA_RANKS if size >= rank), None)
    if most is None:
        fix = f'Use {_LORA_RANKS[-1]} or less, or rollout.backend = "hf"'
        raise ConfigError("model.lora.rank", rank, "is more than vLLM takes", fix)
    return {"enable_lora": True, "max_lora_rank": most, "max_loras": 1}


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
