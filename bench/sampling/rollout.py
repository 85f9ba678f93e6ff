"""How fast do the rollout engines sample the same prompts at the same lengths?"""

from __future__ import annotations

import argparse
import time
from typing import Any

from aepo_fast.samples import Request
from bench.sampling.engines import add_arguments, load_engine, load_trained, spread, write


def add_command(commands: Any) -> None:
    """Add `rollout` to the benchmark's commands."""
    parser = commands.add_parser("rollout", help=__doc__)
    add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="below 1, samples have more in common"
    )
    parser.set_defaults(run=time_rollouts)


def time_rollouts(arguments: argparse.Namespace) -> None:
    """Tokens per second of each engine: median over rounds, engines in turn."""
    folder, model = load_trained(arguments)
    engines = {name: load_engine(name, folder, model, arguments) for name in arguments.engines}
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
    found = {name: spread(values) for name, values in rates.items()}
    for name, rate in found.items():
        print(f"{name:5} {rate['median']:8.0f} tokens/s ({rate['p20']:.0f} to {rate['p80']:.0f})")
    write("rollout", arguments, {"tokens": tokens, "tokens_per_s": found})


def _requests(folder: str, arguments: argparse.Namespace) -> list[Request]:
    if arguments.model.startswith("random:"):
        prompts = [tuple(range(10 + n, 74 + n)) for n in range(arguments.prompts)]
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        questions = [f"What is {n} times {n + 3}? Think aloud." for n in range(arguments.prompts)]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True
            )["input_ids"]
            for question in questions
        ]
    return [
        Request(tuple(prompt), arguments.samples, arguments.temperature, seed)
        for seed, prompt in enumerate(prompts)
    ]
