"""Checks of the arguments, before any work.

Every check raises a ValueError that names the argument, its value, the reason and a fix. No check
waits for a GPU: `is_readable_at_once` guards each look at a tensor's values.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from aepo_kernels.backends import is_readable_at_once, writes_float32
from aepo_kernels.problem import OUTPUTS, Problem
from aepo_kernels.ranges import take
from aepo_kernels.tensors import describe, is_recomputed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_problem(problem: Problem) -> None:
    """Raise ValueError unless shapes, dtypes, devices and options of a problem fit together."""
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets
    if hidden.ndim != 2:
        _fail("hidden", tuple(hidden.shape), "must be [N, H]", "flatten batch and time first")
    num_tokens, hidden_size = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != hidden_size or weight.shape[0] == 0:
        _fail(
            "weight",
            tuple(weight.shape),
            f"must be [V, {hidden_size}]",
            "pass lm_head.weight as is",
        )
    if tuple(targets.shape) != (num_tokens,):
        _fail("targets", tuple(targets.shape), f"must be [{num_tokens}]", "one id per hidden row")
    if targets.dtype != torch.int64:
        _fail("targets", targets.dtype, "must be int64", "call .long()")
    bias = problem.bias
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        _fail(
            "bias", tuple(bias.shape), f"must be [{weight.shape[0]}]", "one value per row of weight"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            _fail(name, tensor.dtype, "unsupported dtype", "use bfloat16 or float32")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            _fail(name, tensor.device, f"hidden is on {hidden.device}", "move both to one device")
    _check_temperature("temperature", problem.temperature, hidden)
    if problem.second_temperature is not None:
        _check_temperature("second_temperature", problem.second_temperature, hidden)
    if problem.softcap is not None and not 0 < problem.softcap < math.inf:
        _fail("softcap", problem.softcap, "must be positive and finite", "use None for no cap")
    for name in ("softcap", "logit_scale", "lora_scale"):
        value = getattr(problem, name)
        if isinstance(value, Tensor) and value.requires_grad:
            reason = "it would get no gradient"
            _fail(name, "requires_grad", reason, "pass a float, or scale hidden by it before")
    if not math.isfinite(problem.logit_scale):
        _fail("logit_scale", problem.logit_scale, "must be finite", "use 1.0 for no scale")
    _check_logits_dtype(problem)
    _check_lora(problem)
    _check_shard(problem)
    _check_weight_grad(problem)
    _check_weight_slice(problem)
    _check_kept_ids(problem)
    if problem.chunk_tokens is not None and problem.chunk_tokens < 1:
        _fail(
            "chunk_tokens", problem.chunk_tokens, "must be at least 1", "use None for the default"
        )
    if is_readable_at_once(targets):
        _check_targets(problem)


def check_grad_of(problem: Problem) -> None:
    """Raise ValueError unless `grad_of` names outputs that there are."""
    names = problem.grad_of
    if names is None:
        return
    fix = f"pass some of {OUTPUTS}, or None for any of them"
    if not names:
        _fail("grad_of", names, "names no output", "call it under torch.no_grad")
    for name in names:
        if name not in OUTPUTS or names.count(name) > 1:
            reason = f"{name!r} is no output with a gradient, or stands there twice"
            _fail("grad_of", names, reason, fix)
    if "second_logprob" in names and problem.second_temperature is None:
        _fail("grad_of", names, "there is no second_logprob", "pass second_temperature")


def check_token_tensors(problem: Problem, tensors: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless each tensor is [N, ...], detached and on hidden's device."""
    num_tokens = len(problem.targets)
    for index, tensor in enumerate(tensors):
        name = f"token_tensors[{index}]"
        if tensor.ndim == 0 or len(tensor) != num_tokens:
            _fail(name, tuple(tensor.shape), f"must have {num_tokens} rows", "one per hidden row")
        if tensor.requires_grad:
            _fail(name, "requires_grad", "it would get no gradient", "pass tensor.detach()")
        if tensor.device != problem.hidden.device:
            _fail(name, tensor.device, f"hidden is on {problem.hidden.device}", "move it there")


def _check_targets(problem: Problem) -> None:
    # On a GPU a look at the targets would wait. There a bad target gives a log-prob of NaN, and
    # with the reference backend torch's own gather traps it.
    targets = problem.targets
    vocab = problem.vocab
    bad = (targets < 0) | (targets >= vocab)
    if problem.ignore_index is not None:
        bad &= targets != problem.ignore_index
    if bad.any():
        value = int(targets[bad][0])
        reason = f"outside [0, {vocab}) and not ignore_index = {problem.ignore_index}"
        _fail("targets", value, reason, "check the tokenizer against the head's vocabulary")


def check_active(problem: Problem) -> None:
    """Raise ValueError unless `active` is [A] int64: positions in [0, N), each at most once."""
    active = problem.active
    if active is None:
        return
    num_tokens = len(problem.targets)
    fix = "pass positions of tokens as int64 [A], each once"
    if active.ndim != 1 or active.dtype != torch.int64:
        _fail("active", (tuple(active.shape), active.dtype), "is no list of positions", fix)
    if active.device != problem.hidden.device:
        _fail("active", active.device, f"hidden is on {problem.hidden.device}", "move it there")
    if is_readable_at_once(active) and len(active):
        if not 0 <= int(active.min()) <= int(active.max()) < num_tokens:
            _fail("active", active.tolist()[:8], f"outside [0, {num_tokens})", fix)
        if len(active.unique()) != len(active):
            _fail("active", active.tolist()[:8], "a position stands there twice", fix)


def _check_logits_dtype(problem: Problem) -> None:
    dtype, hidden = problem.logits_dtype, problem.hidden
    if dtype is None or dtype == hidden.dtype:
        return
    if dtype != torch.float32 or hidden.dtype not in (torch.bfloat16, torch.float16):
        _fail(
            "logits_dtype", dtype, f"hidden is {hidden.dtype}", "use None, or float32 on bfloat16"
        )
    # On a CPU, logits of float16 operands are float32 in any case.
    if hidden.dtype == torch.bfloat16 and not writes_float32(hidden):
        reason = f"{hidden.device} has no GEMM from bfloat16 to float32"
        _fail("logits_dtype", dtype, reason, "use None, or float32 hidden and weight")


def _check_lora(problem: Problem) -> None:
    lora_a, lora_b, hidden = problem.lora_a, problem.lora_b, problem.hidden
    if lora_a is None and lora_b is None:
        return
    fix = "pass lora_a [R, H] and lora_b [V, R] together"
    if lora_a is None or lora_b is None:
        _fail("lora_a" if lora_a is None else "lora_b", None, "the other one is given", fix)
        return
    rank = lora_a.shape[0]
    for name, tensor, shape in (
        ("lora_a", lora_a, (rank, hidden.shape[1])),
        ("lora_b", lora_b, (problem.weight.shape[0], rank)),
    ):
        if tuple(tensor.shape) != shape:
            _fail(name, tuple(tensor.shape), f"must be {list(shape)}", fix)
        if tensor.dtype not in _DTYPES:
            _fail(name, tensor.dtype, "unsupported dtype", "use bfloat16 or float32")
        if tensor.device != hidden.device:
            _fail(name, tensor.device, f"hidden is on {hidden.device}", "move it there")
    if not math.isfinite(problem.lora_scale):
        _fail("lora_scale", problem.lora_scale, "must be finite", "use alpha / rank")
    if not problem.features.lora:
        _fail("backend", problem.backend, "has no low-rank part of the head", "use chunked")


def _check_shard(problem: Problem) -> None:
    shard = problem.shard
    if shard is None:
        return
    if not problem.features.shard:
        _fail("backend", problem.backend, "knows no sharded vocabulary", "use chunked")
    if not dist.is_available() or not dist.is_initialized():
        reason = "torch.distributed is not initialised"
        _fail("shard", shard, reason, "call torch.distributed.init_process_group first")
    end = shard.start + problem.weight.shape[0]
    if not 0 <= shard.start < end <= shard.vocab:
        reason = f"rows {shard.start} to {end} are not in a vocabulary of {shard.vocab}"
        _fail("shard", shard, reason, "pass the first id of this rank's rows and the whole size")


def _check_weight_grad(problem: Problem) -> None:
    grad, weight = problem.weight_grad, problem.weight
    if grad is None:
        return
    if not problem.features.weight_grad:
        _fail("weight_grad", "given", f"{problem.backend} returns its gradients", "use chunked")
    if grad.shape != weight.shape or grad.dtype != problem.stats_dtype:
        what = f"{tuple(grad.shape)}, {grad.dtype}"
        reason = f"must be {list(weight.shape)}, {problem.stats_dtype}"
        _fail("weight_grad", what, reason, "allocate it once with torch.zeros")
    if grad.device != weight.device:
        _fail("weight_grad", grad.device, f"weight is on {weight.device}", "move it there")
    if grad.data_ptr() == weight.data_ptr() and grad.numel():
        _fail("weight_grad", "weight", "is the weight itself", "allocate it with torch.zeros")
    (step, count), (stride, rows) = sorted(zip(grad.stride(), grad.shape, strict=True))
    if (step == 0 and count > 1) or (rows > 1 and stride < step * (count - 1) + 1):
        _fail("weight_grad", grad.stride(), "its rows share memory", "pass it without expand()")
    if problem.weight.requires_grad and torch.is_grad_enabled() and is_recomputed():
        reason = "a checkpoint computes this again, and would add the gradient a second time"
        _fail("weight_grad", "given", reason, "call it outside of the checkpointed function")
    if torch.is_grad_enabled() and not weight.requires_grad:
        _fail("weight", "frozen", "has no gradient to add to weight_grad", "drop weight_grad")


def _check_weight_slice(problem: Problem) -> None:
    size = problem.weight_slice
    if size is None:
        return
    if size < 1:
        _fail("weight_slice", size, "must be at least 1", "use None for chunks of tokens")
    if not problem.features.weight_slice:
        _fail("weight_slice", size, f"{problem.backend} has no slices", "use chunked")
    if torch.float16 in (problem.hidden.dtype, problem.weight.dtype):
        reason = "writes float16 gradients before a loss scale reaches them"
        _fail("weight_slice", size, reason, "use None, or bfloat16")
    for name, value in (
        ("weight_grad", problem.weight_grad),
        ("row_sampling", problem.row_sampling),
    ):
        if value is not None:
            _fail("weight_slice", size, f"goes by whole rows no more, as {name} does", "drop one")


def _check_kept_ids(problem: Problem) -> None:
    ids, targets = problem.kept_ids, problem.targets
    if ids is None:
        return
    fix = "pass the ids that the sampler kept, [N, K] int64, padded with -1"
    if ids.ndim != 2 or len(ids) != len(targets) or ids.shape[1] == 0:
        _fail("kept_ids", tuple(ids.shape), f"must be [{len(targets)}, K]", fix)
    if ids.dtype != torch.int64:
        _fail("kept_ids", ids.dtype, "must be int64", "call .long()")
    if ids.device != targets.device:
        _fail("kept_ids", ids.device, f"targets are on {targets.device}", "move them there")
    if not problem.features.kept_ids:
        _fail(
            "kept_ids", tuple(ids.shape), f"{problem.backend} has logits of all ids", "use chunked"
        )
    others = "shard weight_grad weight_slice row_sampling sum_squares mean_logits is_top1"
    for name in others.split():
        value = getattr(problem, name)
        if value is not None and value is not False:
            _fail(name, describe(value), "does not go together with kept_ids", "drop one")
    if not is_readable_at_once(ids) or not len(ids):
        return
    # On a GPU a look at the ids would wait. There an id that is not in the vocabulary, and a target
    # that was not kept, give NaN.
    kept = problem.kept()
    ids, targets, vocab = take(ids, kept), take(targets, kept), problem.weight.shape[0]
    bad = (ids < -1) | (ids >= vocab)
    if bad.any():
        _fail("kept_ids", int(ids[bad][0]), f"outside [0, {vocab}) and not -1", fix)
    lost = (ids != targets[:, None]).all(1)
    if lost.any():
        value = int(targets[lost][0])
        reason = "is not among its kept_ids, so its log-prob would be -inf"
        _fail("targets", value, reason, "keep each sampled token, or set it to ignore_index")


def check_row_sampling(problem: Problem) -> None:
    """Raise ValueError unless the threshold is positive and the backend can sample rows."""
    how = problem.row_sampling
    if how is None:
        return
    if not 0 < how.threshold < math.inf:
        _fail("row_sampling.threshold", how.threshold, "must be positive", "use None for none")
    if not problem.features.row_sampling:
        _fail("row_sampling", how, f"{problem.backend} takes every row", "use chunked")
    if problem.shard is not None:
        _fail("row_sampling", how, "ranks of a shard would draw different rows", "drop one")


def _check_temperature(name: str, value: float | Tensor, hidden: Tensor) -> None:
    fix = "pass a positive float or a tensor with one per token"
    if not isinstance(value, Tensor):
        if not 0 < value < math.inf:
            _fail(name, value, "must be positive and finite", fix)
        return
    if tuple(value.shape) != (len(hidden),):
        _fail(name, tuple(value.shape), f"must be a float or [{len(hidden)}]", fix)
    if not value.is_floating_point():
        _fail(name, value.dtype, "must be floating point", "call .float()")
    if value.requires_grad:
        _fail(name, "requires_grad", "temperatures get no gradient", "pass tensor.detach()")
    if value.device != hidden.device:
        _fail(name, value.device, f"hidden is on {hidden.device}", "move it there")
    if is_readable_at_once(value) and not bool(((value > 0) & value.isfinite()).all()):
        _fail(name, value[~((value > 0) & value.isfinite())][0].item(), "must be positive", fix)


def _fail(name: str, value: object, reason: str, fix: str) -> None:
    raise ValueError(f"{name} = {value}: {reason}; {fix}")
