"""Rollouts with transformers: a batched decode loop that needs no extra install.

transformers' own `generate` has one temperature and one random stream per call, prefills a prompt
once per sample, and decodes finished rows to the end of the batch. This loop prefills each prompt
once, samples every row with its own temperature and stream, and drops finished rows. Rows that have
sampled the same tokens so far share a branch: the model computes it once.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from aepo_fast.config.resolve import Machine
from aepo_fast.model.kept import cut_at_top_p, keep_most_likely, padded
from aepo_fast.model.load import takes_positions
from aepo_fast.model.quantized import computing_in
from aepo_fast.model.sharded import whole
from aepo_fast.rollout.cache import fork_rows, keep_rows, make_room
from aepo_fast.rollout.engine import BrokenWeightsError
from aepo_fast.rollout.packed_linear import can_pack, packed_linears
from aepo_fast.rollout.stop_strings import Watch
from aepo_fast.samples import Completion, Request
from aepo_kernels import cpu

# Dropping branches copies the key-value cache, so wait until enough have no rows left.
COMPACT_BELOW = 0.75
# Prompts that begin with so many tokens in common, as chat templates do, have them prefilled once.
_LEAST_SHARED = 8
_NOT_FINITE = "the model's logits are not finite"


@dataclass
class _Row:
    request: int
    sample: int
    temperature: float
    top_p: float
    top_k: int
    uniforms: np.ndarray  # one per token to sample
    watch: Watch | None  # for stop strings
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[np.ndarray] | None = None  # ids of each token, where the request wants them
    stopped: bool = False  # by an end id or a stop string
    done: bool = False


class HfRollout:
    """Samples with a transformers model; holds a copy where the rollout dtype differs.

    model: the trainer's model. machine: where it samples, in rollout_dtype; with the model's own
    dtype the weights are the trainer's, on a CPU beside a copy of linear layers' that lies as its
    GEMMs read it. Each of several processes trains a part and has a whole model for this alone,
    which becomes the engine's. eos_ids: ids that end a completion. batch_rows: samples decoded
    together. watch: of `watcher`, with stop strings. pack: whether that copy is made.
    """

    verify = False  # its weights are the trainer's, or copied one by one
    ranks = 1

    def __init__(
        self,
        model: PreTrainedModel,
        machine: Machine,
        *,
        eos_ids: Sequence[int],
        batch_rows: int,
        watch: Callable[[Sequence[int]], Watch] | None = None,
        pack: bool = True,
    ) -> None:
        dtype = machine.rollout_dtype
        self.shared = model.dtype == dtype and machine.world.size == 1
        packs = pack and not machine.is_gpu and can_pack(dtype)
        if machine.world.size > 1 or (self.shared and not packs):
            self.model = model
        else:  # modules of its own, which packing changes
            # 4-bit weights never change.
            kept = [w for w in model.parameters() if self.shared or not w.is_floating_point()]
            self.model = copy.deepcopy(model, {id(weight): weight for weight in kept})
        if not self.shared:
            for parameter in self.model.parameters():  # no buffers: rotary angles need float32
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
            self.model.to(machine.device)  # type: ignore[arg-type]  # from where weights wait
        self._linears = packed_linears(self.model) if packs else []
        for linear in self._linears:
            linear.pack()
        self._dtype = dtype
        self._in_cpp = machine.runs_cpp
        grouped = self.model.config._attn_implementation == "grouped"
        self._in_place = grouped and machine.runs_cpp  # its cache is read where it lies
        # What transformers calls it from 5.24 on, and before.
        takes = inspect.signature(type(self.model).forward).parameters
        self._cache_argument = "cache" if "cache" in takes else "past_key_values"
        self.eos_ids = frozenset(eos_ids)
        self.batch_rows, self._watch = batch_rows, watch
        self.weights_version = 0
        self.metrics: dict[str, float] = {}

    @torch.no_grad()
    def sync_weights(self, model: nn.Module, version: int) -> None:
        """Copy what is trained into the rollout copy, casting to its dtype."""
        if not self.shared:
            ours = dict(self.model.named_parameters())
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    ours[name].copy_(whole(parameter))
        for linear in self._linears:
            if linear.weight.requires_grad:
                linear.pack()
        self.weights_version = version

    def sleep(self) -> None:
        """Do nothing: the cache lives only while `generate` runs."""

    def close(self) -> None:
        """Forget the model, so that its memory can be reused."""
        self.__dict__.pop("model", None)
        self._linears.clear()

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        on_tokens: Callable[[int], None] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample every request; see `RolloutEngine.generate`."""
        rows = [
            _Row(
                index,
                sample,
                request.temperature,
                request.top_p,
                request.top_k,
                np.random.default_rng([request.seed, sample]).random(max_new_tokens),
                None if self._watch is None else self._watch(request.prompt_ids),
                kept=[] if request.with_kept else None,
            )
            for index, request in enumerate(requests)
            for sample in range(request.num_samples)
        ]
        groups: dict[int, list[_Row]] = {index: [] for index in range(len(requests))}
        for row in rows:
            groups[row.request].append(row)
        results: dict[int, list[Completion]] = {}

        def finish() -> None:
            for index, group in groups.items():
                if index not in results and all(row.done for row in group):
                    results[index] = [self._completion(requests[index], row) for row in group]
                    if on_group is not None:
                        on_group(index, results[index])

        was_training = self.model.training
        self.model.eval()
        try:
            with computing_in(self.model, self._dtype):
                for start in range(0, len(rows), self.batch_rows):
                    batch = rows[start : start + self.batch_rows]
                    self._decode(batch, requests, max_new_tokens, on_tokens, finish)
        finally:
            self.model.train(was_training)
        finish()  # requests without samples
        return [results[index] for index in range(len(requests))]

    def _completion(self, request: Request, row: _Row) -> Completion:
        return Completion(
            prompt_ids=request.prompt_ids,
            completion_ids=tuple(row.ids),
            logprobs=tuple(row.logprobs),
            finish_reason="stop" if row.stopped else "length",
            temperature=row.temperature,
            weights_version=self.weights_version,
            kept_ids=None if row.kept is None else padded(row.kept),
        )

    @torch.inference_mode()
    def _decode(
        self,
        rows: list[_Row],
        requests: Sequence[Request],
        max_new_tokens: int,
        on_tokens: Callable[[int], None] | None,
        finish: Callable[[], None],
    ) -> None:
        device = self.model.device
        unique = sorted({row.request for row in rows})
        logits, mask, cache = self._prefill([requests[index].prompt_ids for index in unique])
        if self._in_place:
            make_room(cache, len(rows), max_new_tokens)
        branches = [unique.index(row.request) for row in rows]
        active = list(rows)
        cut, by_rank = any(row.top_p < 1 for row in rows), any(row.top_k for row in rows)
        for step in range(max_new_tokens):
            temperature = torch.tensor([row.temperature for row in active], device=device)
            uniform = torch.tensor([row.uniforms[step] for row in active], device=device)
            if branches != list(range(len(logits))):
                logits = logits[torch.tensor(branches, device=device)]
            top_p = torch.tensor([row.top_p for row in active], device=device) if cut else None
            if by_rank:
                most = [row.top_k or logits.shape[1] for row in active]
                top_k = torch.tensor(most, device=device)
                ids, logprobs, kept_ids = sample_kept(logits, temperature, uniform, top_k, top_p)
                _record(active, kept_ids)
            else:
                ids, logprobs = sample_tokens(
                    logits, temperature, uniform, in_cpp=self._in_cpp, top_p=top_p
                )
            for row, token, logprob in zip(active, ids.tolist(), logprobs.tolist(), strict=True):
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.stopped = token in self.eos_ids or bool(row.watch and row.watch(token))
                row.done = row.stopped or step + 1 == max_new_tokens
            if on_tokens is not None:
                on_tokens(len(active))
            finish()
            branches = [
                branch for branch, row in zip(branches, active, strict=True) if not row.done
            ]
            active = [row for row in active if not row.done]
            if not active:
                return
            living = sorted(set(branches))
            if len(living) <= COMPACT_BELOW * len(mask):
                kept = torch.tensor(living, device=device)
                keep_rows(cache, kept, len(active))
                mask = mask[kept]
                places = {branch: place for place, branch in enumerate(living)}
                branches = [places[branch] for branch in branches]
            branches, parents, tokens = _fork(branches, [row.ids[-1] for row in active], len(mask))
            if parents:
                forked = torch.tensor(parents, device=device)
                fork_rows(cache, forked, len(mask))
                mask = torch.cat([mask, mask[forked]])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = self._forward(torch.tensor(tokens, device=device)[:, None], mask, cache)
            logits = output.logits[:, -1]

    def _prefill(
        self, prompts: list[tuple[int, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        device = self.model.device
        cache = DynamicCache(config=self.model.config)
        shared = _shared_length(prompts)
        # A window counts columns, and so would count the padding behind what is shared; so do
        # positions that are not given.
        by_columns = any(cache.is_sliding) or not takes_positions(self.model.config)
        if len(prompts) == 1 or shared < _LEAST_SHARED or by_columns:
            shared = 0
        if shared:
            ids = torch.tensor([prompts[0][:shared]], device=device)
            self._forward(ids, torch.ones_like(ids), cache)
            cache.batch_repeat_interleave(len(prompts))
        width = max(len(prompt) for prompt in prompts) - shared
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.ones(len(prompts), shared + width, dtype=torch.long)
        for index, prompt in enumerate(prompts):
            # Left padding keeps every row's next position in the last column. Rows are told apart
            # by this mask, never by a pad id, which may equal the end-of-sequence id.
            padding = shared + width - len(prompt)
            ids[index, padding:] = torch.tensor(prompt[shared:])
            mask[index, shared : shared + padding] = 0
        mask = mask.to(device)
        output = self._forward(ids.to(device), mask, cache)
        return output.logits[:, -1], mask, cache

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> Any:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        options = {"decode_in_cpp": True} if self._in_place else {}  # for our own attention
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
            **options,
        )


def _fork(
    branches: list[int], tokens: list[int], count: int
) -> tuple[list[int], list[int], list[int]]:
    """Part the rows of a branch that have sampled different tokens.

    branches, tokens: of each row. count: branches so far. The first token of a branch stays in it,
    each other one gets a new branch. Returns each row's branch, the parents of the new branches,
    and the token of every branch; 0 for one that no row is in.
    """
    places: dict[tuple[int, int], int] = {}
    parents: list[int] = []
    next_tokens, taken = [0] * count, [False] * count
    for branch, token in zip(branches, tokens, strict=True):
        if (branch, token) in places:
            continue
        if taken[branch]:
            places[branch, token] = len(next_tokens)
            parents.append(branch)
            next_tokens.append(token)
        else:
            places[branch, token] = branch
            next_tokens[branch], taken[branch] = token, True
    rows = [places[pair] for pair in zip(branches, tokens, strict=True)]
    return rows, parents, next_tokens


def _shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with, such that each has another one."""
    first, last = min(prompts), max(prompts)  # all others lie between them
    most = min(len(prompt) for prompt in prompts) - 1
    same = (a == b for a, b in zip(first[:most], last[:most], strict=False))
    return next((index for index, equal in enumerate(same) if not equal), max(most, 0))


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
    *,
    in_cpp: bool,
    top_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row of softmax(logits / temperature) by inverting its distribution.

    logits: [B, V]. temperature, uniform in [0, 1), top_p: [B], see `Request`. in_cpp: by our C++
    operation, on a CPU, where nothing is cut off by top_p. Returns ids [B] and log-probs [B], fp32.
    A token of probability zero is never drawn. Raises BrokenWeightsError of logits not finite.
    """
    greedy = temperature == 0
    if greedy.any():
        best, most_likely = torch.log_softmax(logits.float(), dim=-1).max(dim=-1)
        if not best.isfinite().all():
            raise BrokenWeightsError(_NOT_FINITE)
        if greedy.all():
            return most_likely, best
        others = temperature.masked_fill(greedy, 1.0)
        ids, chosen = sample_tokens(logits, others, uniform, in_cpp=in_cpp, top_p=top_p)
        return torch.where(greedy, most_likely, ids), torch.where(greedy, best, chosen)
    if top_p is not None:
        logits = cut_at_top_p(logits, temperature, top_p)
    elif in_cpp:
        ids, logprobs = cpu.draw_tokens(logits, temperature.float().reciprocal(), uniform)
        if (ids < 0).any():
            raise BrokenWeightsError(_NOT_FINITE)
        return ids, logprobs
    logprobs = torch.log_softmax(logits.float() / temperature.float()[:, None], dim=-1)
    cdf = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:].contiguous()
    ids = torch.searchsorted(cdf, uniform.double()[:, None] * total, right=True).squeeze(1)
    # Rounding may push the point onto the total: then the last token that has any mass is meant.
    last = torch.searchsorted(cdf, total).squeeze(1)
    ids = torch.minimum(ids, last).clamp_(max=logits.shape[1] - 1)
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1)
    if not (chosen + total.squeeze(1)).isfinite().all():
        raise BrokenWeightsError(_NOT_FINITE)
    return ids, chosen


def sample_kept(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sample_tokens` from the tokens alone that `keep_most_likely` keeps.

    Returns ids [B], log-probs [B] among them, and the kept ids [B, K], -1 for padding.
    """
    heat = temperature.where(temperature > 0, 1.0)
    tempered, kept = keep_most_likely(logits, heat, top_k, top_p)
    places, logprobs = sample_tokens(tempered, temperature / heat, uniform, in_cpp=False)
    return kept.gather(1, places[:, None]).squeeze(1), logprobs, kept


def _record(rows: Sequence[_Row], kept: torch.Tensor) -> None:
    """Give each row that goes on the kept ids of its next token; kept: [B, K]."""
    for row, ids in zip(rows, kept.to(torch.int32).cpu().numpy(), strict=True):
        if row.kept is not None and not row.done:
            row.kept.append(ids[ids >= 0])
