"""A stand-in for vLLM with the interface that `aepo_fast.rollout.vllm` uses, GPU parts included.

Its model is one fused weight, its samples are fixed; `events` lists what was done to it in order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, Literal, TypeVar

import bitsandbytes  # noqa: F401  # before there seems to be a GPU: it looks for one
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from aepo_fast.model.lora import ADAPTER_WEIGHTS

One, Other = TypeVar("One"), TypeVar("Other")
ROWS = {"q": (0, 4), "k": (4, 2)}


class Model(nn.Module):
    """q and k of a checkpoint, fused as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        fused = torch.arange(18, dtype=torch.bfloat16).view(6, 3)
        self.qk = nn.Parameter(fused, requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, value in weights:
            self.qk.data.narrow(0, *ROWS[name]).copy_(value)


@dataclass
class Info:
    """Base of the transfer's messages."""


@dataclass
class InitRequest:
    init_info: dict[str, Any] = field(default_factory=dict)


@dataclass
class UpdateRequest:
    update_info: dict[str, Any] = field(default_factory=dict)


class TransferEngine(Generic[One, Other]):
    """Base class of weight-transfer engines."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_config = SimpleNamespace(dtype=torch.bfloat16, hf_config=SimpleNamespace())


class Factory:
    engines: dict[str, type[Any]] = {}

    @classmethod
    def register_engine(cls, name: str, engine: type[Any]) -> None:
        if name in cls.engines:
            raise ValueError("registered already")
        cls.engines[name] = engine


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


class OutputKind(Enum):
    FINAL_ONLY = 2


class Inner:
    """The engine behind an LLM: answers one request a step."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events
        self.waiting: list[tuple[str, dict[str, Any], Any]] = []
        self.finish_reason = "length"
        self.failure: Exception | None = None
        self.takes_lora = True
        self.adapter: dict[str, torch.Tensor] = {}  # as the last one was read
        self.seeds: list[int | None] = []

    def add_lora(self, request: LoRARequest) -> bool:
        self.events.append(request)
        self.adapter = load_file(Path(request.lora_path) / ADAPTER_WEIGHTS)
        return self.takes_lora

    def add_request(
        self,
        number: str,
        prompt: dict[str, Any],
        params: Any,
        lora_request: LoRARequest | None = None,
    ) -> None:
        if lora_request is not None:
            self.events.append(lora_request)
        self.waiting.append((number, prompt, params))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def abort_request(self, numbers: list[str]) -> None:
        self.events.append("abort")
        self.waiting = [one for one in self.waiting if one[0] not in numbers]

    def step(self) -> list[Any]:
        if self.failure is not None:
            raise self.failure
        self.events.append("step")
        number, _, params = self.waiting.pop()
        self.seeds.append(params.seed)
        samples = [
            SimpleNamespace(
                index=index,
                token_ids=[5] * params.max_tokens,
                logprobs=[{5: SimpleNamespace(logprob=-1.0)}] * params.max_tokens,
                finish_reason=self.finish_reason,
            )
            for index in reversed(range(params.n))
        ]
        return [SimpleNamespace(request_id=number, finished=True, outputs=samples)]


class Mode(Enum):
    ONE = "package.of.one"


# What it takes: a few of vLLM's arguments, with its kinds of types.
EngineArgs = make_dataclass(
    "EngineArgs",
    [
        ("max_num_seqs", int | None, None),
        ("max_num_batched_tokens", int | None, None),
        ("enable_prefix_caching", bool | None, None),
        ("kv_cache_dtype", Literal["auto", "fp8"], "auto"),
        ("attention_backend", Mode | None, None),
        ("speculative_config", dict[str, Any] | None, None),
        ("lora_dtype", str | torch.dtype | None, None),
        ("block_size", int | None, None),
        ("enforce_eager", bool, False),
    ],
)


class LLM:
    """vLLM's entry point."""

    failure: Exception | None = None
    of_transformers = False
    worker: Any = None  # of which the allocator is all that counts here

    def __init__(self, **arguments: Any) -> None:
        if LLM.failure is not None:
            raise LLM.failure
        self.arguments = arguments
        self.events: list[Any] = []
        self.llm_engine = Inner(self.events)
        self.model_config = SimpleNamespace(
            max_model_len=arguments["max_model_len"],
            dtype=torch.bfloat16,
            using_transformers_backend=lambda: LLM.of_transformers,
            get_vocab_size=lambda: 6,
        )
        self.model = Model()
        self.transfer = Factory.engines[arguments["weight_transfer_config"].backend](self.model)
        self.cache_resets = True
        self.worker.model = self.model

    def init_weight_transfer_engine(self, request: InitRequest) -> None:
        info = self.transfer.init_info_cls(**request.init_info)
        self.transfer.init_transfer_engine(info)

    def start_weight_update(self) -> None:
        self.transfer.start_weight_update()

    def update_weights(self, request: UpdateRequest) -> None:
        info = self.transfer.update_info_cls(**request.update_info)
        self.transfer.receive_weights(info)

    def finish_weight_update(self) -> None:
        self.transfer.finish_weight_update()

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        getattr(self.worker, method)(*args)

    def reset_prefix_cache(self) -> bool:
        self.events.append("reset")
        return self.cache_resets


class Allocator:
    """Memory of a GPU whose cache takes 8 of 20 GiB, and its weights 3."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.free = 4
        self.model: Model | None = None

    def discard(self, tag: str) -> None:
        self.events.append(("discard", tag))
        self.free += 8

    def sleep(self, level: int) -> None:
        assert level == 2 and self.model is not None
        self.events.append(("sleep", level))
        self.free += 8 + 3
        self.model.qk.data.fill_(float("nan"))

    def wake_up(self, tags: list[str]) -> None:
        self.events.append(("wake", tags))
        self.free -= sum({"kv_cache": 8, "weights": 3}[tag] for tag in tags)


def install(patch: pytest.MonkeyPatch) -> Allocator:
    """Put the stand-in in vLLM's place, and a GPU into torch's report, until `patch` is undone."""
    allocator = Allocator()
    patch.setattr(LLM, "worker", allocator)

    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("weights of a GPU are not reloaded layer by layer")

    modules: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "__version__": "0.29.0"},
        "vllm.config": {"WeightTransferConfig": SimpleNamespace},
        "vllm.config.lora": {"MaxLoRARanks": Literal[1, 8, 16, 32]},
        "vllm.device_allocator": {"get_mem_allocator_instance": lambda: allocator},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferEngine": TransferEngine,
            "WeightTransferInitInfo": Info,
            "WeightTransferInitRequest": InitRequest,
            "WeightTransferUpdateInfo": Info,
            "WeightTransferUpdateRequest": UpdateRequest,
        },
        "vllm.distributed.weight_transfer.factory": {"WeightTransferEngineFactory": Factory},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.utils": {"dispatch_cpu_unquantized_gemm": nothing},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.reload": {
            "finalize_layerwise_reload": nothing,
            "initialize_layerwise_reload": nothing,
        },
        "vllm.sampling_params": {
            "RequestOutputKind": OutputKind,
            "SamplingParams": SimpleNamespace,
        },
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)  # so that it is found as an installed one is
        vars(module).update(contents)
        patch.setitem(sys.modules, name, module)
    # Both modules are imported anew with each stand-in, and not left behind: undone is what is set.
    for name in ("aepo_fast.rollout.vllm", "aepo_fast.rollout.vllm_weights"):
        patch.setitem(sys.modules, name, ModuleType("replaced"))
        patch.delitem(sys.modules, name)
    Factory.engines = {}
    LLM.failure = None
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    patch.setattr(torch.cuda, "mem_get_info", lambda: (allocator.free * 2**30, 20 * 2**30))
    return allocator
