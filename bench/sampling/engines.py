"""The rollout engines as `rollout` and `sync` compare them, with real or random weights."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.common.environment import RESULTS, command_line, describe, result_path, write_result

ENGINES = ("hf", "vllm")
# Shapes of real models for random weights: hidden, intermediate, layers, heads, key-value heads,
# vocabulary, tied head.
SHAPES = {
    "tiny": (128, 128, 2, 2, 1, 1000, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that both benchmarks share."""
    parser.add_argument(
        "--model",
        default="package:smollm2-135m-instruct",
        help=f"a model, or random:NAME for random weights of {', '.join(SHAPES)}",
    )
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--trainer-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=64, help="of each sample, exactly")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(lora=0)


def model_folder(name: str) -> str:
    """The folder of a model by name, or of new random weights for random:NAME."""
    from aepo_fast.model.load import resolve

    if name.startswith("random:"):
        return _random_weights(name.removeprefix("random:"))
    return str(resolve(name))


def load_trained(arguments: argparse.Namespace) -> tuple[str, torch.nn.Module]:
    """The model's folder and the model as a trainer holds it."""
    # The other benchmarks run without the trainer's packages.
    from transformers import AutoModelForCausalLM

    from aepo_fast.config.resolve import auto_device

    folder = model_folder(arguments.model)
    device = auto_device()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, arguments.trainer_dtype),
        attn_implementation="sdpa" if device.type == "cuda" else "eager",
    )
    model.to(device)  # type: ignore[arg-type]
    if arguments.lora:
        from aepo_fast.config.sections import LoraConfig
        from aepo_fast.model.lora import add_adapter

        add_adapter(model, LoraConfig(rank=arguments.lora), seed=0)
    return folder, model


def load_engine(name: str, folder: str, model: Any, arguments: argparse.Namespace) -> Any:
    """A rollout engine with the model's weights."""
    from aepo_fast.config.resolve import Machine, dtype_name, fast_dtype
    from aepo_fast.config.sections import RolloutConfig
    from aepo_fast.rollout.hf import HfRollout

    dtype = fast_dtype(model.device)
    machine = Machine(model.device, model.dtype, dtype, dtype, head_backend="auto")
    if name == "hf":
        return HfRollout(model, machine, eos_ids=(), batch_rows=256)
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed: make test-vllm installs it, or --engines hf")
    from aepo_fast.rollout.vllm import VllmRollout

    cfg = RolloutConfig(
        backend="vllm",
        max_prompt_tokens=256,
        max_new_tokens=arguments.tokens,
        dtype=dtype_name(dtype),
        enforce_eager=arguments.eager,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
    )
    options: dict[str, Any] = {"on_gpu": machine.vllm_on_gpu, "lora_rank": arguments.lora}
    return VllmRollout(folder, cfg, eos_ids=[], seed=0, **options)


def spread(values: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * (len(ordered) - 1))],
        "p80": ordered[round(0.8 * (len(ordered) - 1))],
    }


def write(name: str, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Keep what was found beside the machine, the versions and the settings."""
    from aepo_fast.rollout.load import vllm_version

    settings = {key: value for key, value in vars(arguments).items() if key != "run"}
    settings["results"] = None
    record = {
        "benchmark": name,
        "environment": describe() | {"vllm": vllm_version()},
        "command": command_line(),
        "settings": settings,
        **found,
    }
    path = result_path(arguments.results, name)
    write_result(path, record)
    print(f"result: {path}")


def _random_weights(name: str) -> str:
    if name not in SHAPES:
        raise SystemExit(f"--model random:{name}: choose one of {', '.join(SHAPES)}")
    folder = tempfile.mkdtemp(prefix=f"{name}-")
    save_random_weights(folder, SHAPES[name])
    return folder


def save_random_weights(
    folder: Path | str, shape: tuple[int, int, int, int, int, int, bool]
) -> None:
    """Write a model of random weights in bfloat16; shape: as in SHAPES."""
    torch.manual_seed(0)
    _model(shape, "cuda" if torch.cuda.is_available() else "cpu").save_pretrained(folder)


def parameters_of(shape: tuple[int, int, int, int, int, int, bool]) -> int:
    """Number of weights of a model; shape: as in SHAPES."""
    return sum(weight.numel() for weight in _model(shape, "meta").parameters())


def _model(shape: tuple[int, int, int, int, int, int, bool], device: str) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = shape
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
