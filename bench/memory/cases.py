"""The runs of the benchmark: layout, attention, checkpointing, optimizer, adapters and dtype."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from bench.sampling import engines

SHAPES = {  # as bench.sampling.engines has them
    # Qwen2.5-0.5B with a sixth of its layers and the vocabulary of the tokenizer that is at hand.
    "qwen2.5-0.5b, 4 layers": (896, 4864, 4, 14, 2, 49152, True),
    # SmolLM2-135M with a quarter of its layers.
    "smollm2-135m, 8 layers": (576, 1536, 8, 9, 3, 49152, True),
    # For processes that split its heads; head and embedding are two tensors, most of its weights.
    "hidden 512, 6 layers, untied": (512, 2048, 6, 8, 2, 49152, False),
    # The model of the recipes; GPU only.
    "qwen2.5-1.5b": engines.SHAPES["qwen2.5-1.5b"],
}
_FULL, _NONE = 'model.gradient_checkpointing="full"', 'model.gradient_checkpointing="none"'
_BF16 = 'model.dtype="bfloat16"'
_LORA = "model.lora.rank=16"


def _layout(name: str) -> str:
    return f'trainer.layout="{name}"'


def _attention(name: str) -> str:
    return f'model.attention="{name}"'


def _optimizer(name: str) -> str:
    return f'trainer.optimizer="{name}"'


# Each value of a setting beside each value of most others, in few runs.
ON_CPU: tuple[tuple[str, ...], ...] = (
    (_layout("shared"), _attention("grouped"), _NONE, _optimizer("adamw")),
    (_layout("shared"), _attention("sdpa"), _FULL, _optimizer("adamw_8bit")),
    (_layout("shared"), _attention("eager"), _NONE, _optimizer("muon")),
    (_layout("padded"), _attention("grouped"), _FULL, _optimizer("adamw_8bit"), _BF16),
    (_layout("padded"), _attention("sdpa"), _NONE, _optimizer("adamw_bf16"), _BF16),
    (_layout("padded"), _attention("eager"), _FULL, _optimizer("adamw")),
    (_layout("packed"), _attention("sdpa"), _FULL, _optimizer("adamw"), _BF16),
    (_layout("packed"), _attention("eager"), _NONE, _optimizer("adamw_8bit")),
    (_layout("shared"), _attention("grouped"), _FULL, _optimizer("adamw"), _LORA),
    (_layout("padded"), _attention("sdpa"), _NONE, _optimizer("adamw_8bit"), _LORA, _BF16),
    (_layout("padded"), _attention("grouped"), _NONE, _optimizer("adamw"), _LORA, _BF16),
    (_layout("packed"), _attention("sdpa"), _FULL, _optimizer("muon"), _LORA),
    (_layout("shared"), _attention("grouped"), _FULL, _optimizer("adamw"), "loss.kl_coef=0.1"),
    (_layout("padded"), _attention("grouped"), _NONE, _optimizer("adamw"), 'loss.policy="gspo"'),
)
ON_GPU: tuple[tuple[str, ...], ...] = (
    (_layout("shared"), _attention("sdpa"), _FULL, _optimizer("adamw")),
    (_layout("padded"), _attention("sdpa"), _FULL, _optimizer("adamw")),
    (_layout("packed"), _attention("varlen"), _FULL, _optimizer("adamw")),
    (_layout("packed"), _attention("varlen"), _NONE, _optimizer("adamw_8bit"), _BF16),
    (_layout("padded"), _attention("sdpa"), _NONE, _optimizer("adamw_bf16"), _BF16),
    (_layout("packed"), _attention("varlen"), _FULL, _optimizer("muon")),
    (_layout("packed"), _attention("varlen"), _FULL, _optimizer("adamw"), _LORA, _BF16),
    (_layout("padded"), _attention("sdpa"), _NONE, _optimizer("adamw_8bit"), _LORA, _BF16),
)

# Of processes that share a run on a CPU, and the one model of theirs.
OVER_RANKS: tuple[tuple[str, ...], ...] = (
    (_layout("shared"), _attention("grouped"), _NONE, _optimizer("adamw")),
    (_layout("padded"), _attention("sdpa"), _FULL, _optimizer("adamw_8bit")),
    (_layout("padded"), _attention("grouped"), _FULL, _optimizer("adamw_bf16"), _BF16),
    (_layout("packed"), _attention("sdpa"), _FULL, _optimizer("adamw"), _LORA),
    (_layout("shared"), _attention("grouped"), _FULL, _optimizer("adamw"), "loss.kl_coef=0.1"),
    (_layout("shared"), _attention("sdpa"), _FULL, _optimizer("adamw"), "trainer.replicas=2"),
    (_layout("shared"), _FULL, _optimizer("adamw"), "trainer.tensor_parallel=2"),
)
_OF_RANKS = "hidden 512, 6 layers, untied"


def runs(*, on_gpu: bool, swap: bool = False, ranks: int = 1) -> list[tuple[str, tuple[str, ...]]]:
    """A model's name and settings for each run. swap: the two models of the CPU change places.

    ranks: processes of a run on a CPU.
    """
    if ranks > 1:
        return [(_OF_RANKS, case) for case in OVER_RANKS]
    if on_gpu:
        return [("qwen2.5-1.5b", case) for case in ON_GPU]
    names = [name for name in SHAPES if name not in (_OF_RANKS, "qwen2.5-1.5b")]
    return list(zip(cycle(names[::-1] if swap else names), ON_CPU, strict=False))


def settings(model: Path, output: Path, *, on_gpu: bool, steps: int = 2) -> dict[str, Any]:
    """The configuration that all runs share, of a model's folder."""
    new, prompts, tokens = (1024, 8, 16384) if on_gpu else (32, 2, 512)
    return {
        "output_dir": str(output),
        "model": {"path": str(model)},
        "data": {
            "sources": [
                {
                    "kind": "reasoning_gym",
                    "name": "products",
                    "params": {"min_terms": 2, "max_terms": 2, "max_digits": 1},
                    "size": 60,
                }
            ]
        },
        "reward": {"function": "bench.memory.rewards:alternating"},
        "rollout": {"max_new_tokens": new},
        "trainer": {
            "steps": steps,
            "prompts_per_step": prompts,
            "group_size": 8 if on_gpu else 4,
            "tokens_per_microbatch": tokens,
            "device": "cuda" if on_gpu else "cpu",
        },
        "aepo": {"enabled": False},
        "eval": {"prompts": 0},
        "checkpoint": {"every": 0},
        "logging": {"plot": False},
    }
