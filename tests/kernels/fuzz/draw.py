"""A call of the kernels, drawn at random by its seed: shapes, dtypes, layouts and options."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.cpu import library as cpu_library
from aepo_kernels.head.budget import Budget
from tests.kernels.oracle import IGNORED

F32, BF16, F64, F16 = torch.float32, torch.bfloat16, torch.float64, torch.float16
LAYOUTS = "rows", "columns", "upcast"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass
class Draw:
    """A call: tensors are hidden, weight, bias, lora_a and lora_b, None where there is none.

    coefs: the loss's derivatives by log-prob, entropy, second log-prob and lse, [N] each. wants:
    which tensors require a gradient. factor: what the loss's backward brings. buffer: numbers that
    are in weight_grad before, or None without one. bounds: first rows of a shard's ranks, and the
    end. active: pass the positions of the tokens with a coefficient. isa, layout: which row
    operations and GEMMs a CPU uses; "rows" multiplies float16 as a GPU does.
    """

    seed: int
    tensors: list[Tensor | None]
    targets: Tensor
    ignored: int | None
    coefs: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    backend: str = "chunked"
    token_loss: bool = False
    wants: list[bool] = field(default_factory=list)
    factor: float = 1.0
    buffer: Tensor | None = None
    bounds: list[int] | None = None
    active: Tensor | None = None
    budget: Budget = field(default_factory=Budget)
    isa: str | None = None
    layout: str = "rows"

    def __str__(self) -> str:
        """The call in one line, for whoever has to mend it."""
        kinds = [None if x is None else (list(x.shape), str(x.dtype)[6:]) for x in self.tensors]
        options = {
            name: str(value.dtype) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        call = "linear_token_loss" if self.token_loss else "linear_logprob"
        more = {
            "ignored": self.ignored,
            "wants": self.wants,
            "factor": self.factor,
            "buffer": self.buffer is not None,
            "bounds": self.bounds,
            "active": self.active is not None,
            "isa": self.isa,
            "layout": self.layout,
        }
        return f"{call} {self.backend} {kinds} {options} {more} {self.budget}"


def draw(seed: int) -> Draw:
    """Everything of a call, by the seed."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    backend = rng.choices(["chunked", "fused", "reference"], [20, 1 if HAS_TRITON else 0, 2])[0]
    count = rng.choices([0, 1, 3, 40, 150, 300], [1, 1, 1, 3, 2, 1])[0]
    vocab = rng.choices([1, 2, 7, 31, 300, 2049, 4200], [2, 2, 2, 2, 5, 2, 1])[0]
    size, dtype = rng.choice([1, 8, 33, 64]), rng.choice([F32, F32, BF16, BF16, BF16, F64])
    if backend == "fused":  # Triton's interpreter is slow, and multiplies bfloat16 wrongly
        count, vocab, dtype = min(count, 40), min(vocab, 300), F32
    if dtype == BF16 and random.Random(f"float16 {seed}").random() < 0.3:
        dtype = F16

    def normal(*shape: int, dtypes: tuple[torch.dtype, ...] = (F32, dtype)) -> Tensor:
        return torch.randn(*shape, generator=generator).to(rng.choice(dtypes))

    def temperature(*numbers: float) -> float | Tensor:
        per_token = torch.rand(count, generator=generator) + 0.5
        return rng.choice([*numbers, per_token, per_token.to(rng.choice([F64, BF16]))])

    weight = normal(vocab, size, dtypes=(dtype, dtype, dtype, F32, BF16)) * (2 / size**0.5)
    tensors: list[Tensor | None] = [normal(count, size, dtypes=(dtype,)), weight, None, None, None]
    if rng.random() < 0.3:
        tensors[2] = normal(vocab)
    options: dict[str, Any] = {}
    if rng.random() < 0.3 and backend != "fused":
        rank = rng.choice([1, 4, 9])
        tensors[3:] = normal(rank, size) / size**0.5, normal(vocab, rank)
        options["lora_scale"] = rng.choice([0.5, -2.0])
    slices = 0.25 if backend == "chunked" else 0.0
    for name, value, chance in (
        ("temperature", temperature(0.7, 0.2, 5.0), 0.4),
        ("second_temperature", temperature(1.3, 0.3), 0.4),
        ("softcap", rng.choice([5.0, 0.5, 30.0]), 0.3),
        ("logit_scale", rng.choice([0.6, -0.6, 3.0]), 0.3),
        ("chunk_tokens", rng.choice([1, 16, 50, 1000]), 0.3),
        ("weight_slice", rng.choice([64, 100, 5000, 100_000]), slices),
        ("logits_dtype", dtype, 0.1),
    ):
        if rng.random() < chance:
            options[name] = value
    if dtype == F16:
        options.pop("weight_slice", None)
    _make_extreme(rng, tensors, options)
    targets, ignored = _targets(rng, generator, count, vocab)
    if tensors[2] is not None and options.get("logit_scale", 1.0) > 0 and rng.random() < 0.3:
        _mask_columns(tensors[2], targets, generator)
    coefs = [torch.randn(count, generator=generator) / max(count, 1) for _ in range(4)]
    passive = torch.rand(count, generator=generator) < rng.choice([0.0, 0.3, 0.95, 1.0])
    for coef in coefs:
        coef[passive] = 0
    case = Draw(seed, tensors, targets, ignored, coefs, options, backend, rng.random() < 0.7)
    _draw_gradients(rng, generator, case)
    if dtype == F16 and case.buffer is None:
        # A token's weight in the loss, and a loss scale that makes up for it.
        size = random.Random(f"size {seed}").choice([1.0, 1e-6, 1e4])
        case.coefs = [coef * size for coef in coefs]
        case.factor /= size
    case.tensors = [x if x is None or x.ndim < 2 else _laid_out(rng, x) for x in tensors]
    case.budget = _small_budget(rng, vocab, size)
    case.isa = rng.choice([*cpu_library.instruction_sets(), "torch"])
    case.layout = rng.choice(LAYOUTS)
    return case


def _make_extreme(rng: random.Random, tensors: list[Tensor | None], options: dict) -> None:
    """Logits far from zero, or so far apart that a row is all but one-hot."""
    hidden, weight = tensors[:2]
    assert hidden is not None and weight is not None
    how = rng.choice([""] * 6 + ["up", "down", "sharp"])
    if how == "sharp":
        tensors[1] = weight * 8
    elif how:
        hidden[:, 0] = 1.0
        weight[:, 0] = 60.0 if how == "up" else -60.0


def _targets(
    rng: random.Random, generator: torch.Generator, count: int, vocab: int
) -> tuple[Tensor, int | None]:
    """Targets [N], and ignore_index: None where no target is ignored and none is looked for."""
    targets = torch.randint(vocab, (count,), generator=generator)
    where = rng.choice(["none", "nobody", "some", "some", "first", "last", "all", "a token"])
    if where == "nobody":
        return targets, None
    ignored = rng.choice([IGNORED, -1, vocab + 5])
    if where == "some":
        targets[torch.rand(count, generator=generator) < 0.3] = ignored
    elif where == "first":
        targets[: count // 2] = ignored
    elif where == "last":
        targets[count // 2 :] = ignored
    elif where == "all":
        targets[:] = ignored
    elif where == "a token":
        ignored = rng.randrange(vocab)
    return targets, ignored


def _mask_columns(bias: Tensor, targets: Tensor, generator: torch.Generator) -> None:
    """A bias of -inf on some columns, none of them a target."""
    masked = torch.rand(len(bias), generator=generator) < 0.2
    masked[targets[(targets >= 0) & (targets < len(bias))]] = False
    masked[0] = False
    bias[masked] = -torch.inf


def _draw_gradients(rng: random.Random, generator: torch.Generator, case: Draw) -> None:
    """Who gets a gradient, and how the caller asks for it."""
    hidden, weight, options = case.tensors[0], case.tensors[1], case.options
    assert hidden is not None and weight is not None
    case.wants = [rng.random() < 0.85 for _ in case.tensors]
    case.factor = rng.choice([1.0, -2.5])
    takes_buffer = case.backend != "reference" and "weight_slice" not in options
    if case.wants[1] and takes_buffer and rng.random() < 0.25:
        wide = F64 if hidden.dtype == F64 else F32
        start = torch.randn(weight.shape, generator=generator, dtype=wide) / 100
        case.buffer = start * rng.choice([0, 1])
        case.factor = 1.0
    if case.backend == "chunked" and 2 <= len(weight) and len(hidden) < 300 and rng.random() < 0.1:
        world = rng.choice([2, 3]) if len(weight) > 2 else 2
        cuts = sorted(rng.sample(range(1, len(weight)), world - 1))
        case.bounds = [0, *cuts, len(weight)]
    if not case.token_loss:
        _freeze(random.Random(f"frozen {case.seed}"), case)
        return
    if rng.random() < 0.4:
        active = (case.coefs[0] != 0).nonzero().squeeze(1)
        case.active = active[torch.randperm(len(active), generator=generator)]
    case.options["row_sampling"] = (
        case.backend != "reference"
        and case.bounds is None
        and "weight_slice" not in options
        and rng.random() < 0.2
    )


def _freeze(rng: random.Random, case: Draw) -> None:
    """A head that needs no gradient, and one output that has a gradient."""
    if case.buffer is not None or rng.random() < 0.7:
        return
    case.wants = [True] + [False] * 4
    names = ["logprob", "entropy", "second_logprob", "lse"]  # in the order of coefs
    if "second_temperature" not in case.options:
        names[2] = "logprob"
    chosen = rng.choice(names)
    case.options["grad_of"] = (chosen,)
    for name, coef in zip(names, case.coefs, strict=True):
        coef *= name == chosen


def _small_budget(rng: random.Random, vocab: int, size: int) -> Budget:
    """Budgets of memory that make several chunks, slices and blocks of a small call."""
    names = {}
    for name, values in (
        ("chunk_bytes", [32 * vocab, 96 * vocab, 2**23 + 128 * vocab]),
        ("slice_bytes", [2**12, 2**16, 2**20]),
        ("stash_bytes", [0, 40 * vocab, 2**25]),
        ("sum_bytes", [0, 200 * size, 2**25, 2**25]),
        ("stats_columns", [2048, 4096, 16384]),
        ("stats_tokens", [16, 64, 256]),
        ("fused_forward_tokens", [16, 64, 4096]),
    ):
        names[name] = rng.choice(values)
    names["block_sum_bytes"] = rng.choice([256 * size, 2**24])
    return Budget(**names, block_tokens=rng.choice([64, 1024]))


def _laid_out(rng: random.Random, matrix: Tensor) -> Tensor:
    """The same matrix by rows, by columns, or with other memory between its rows."""
    how = rng.choice(["rows", "rows", "columns", "apart"])
    if how == "columns":
        return matrix.T.contiguous().T
    if how == "rows":
        return matrix.clone()
    wide = torch.full((len(matrix), 2 * matrix.shape[1] + 1), torch.nan, dtype=matrix.dtype)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]
