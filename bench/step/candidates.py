"""Whole training steps over the same rows: ours, and plain trainers with other heads.

All share the weights, the optimizer, the budget of a micro-batch and the loss function. Ours
differs in the layout, the attention, the head, and in rows without an advantage, which it only
measures.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config
from aepo_fast.config.toml import load_config
from aepo_fast.method.metric_sums import MetricSum
from aepo_fast.method.objective import Objective, build_objective
from aepo_fast.method.tokens import StepContext
from aepo_fast.model.batch import MicroBatch
from aepo_fast.model.load import load_model
from aepo_fast.model.policy import Policy
from aepo_fast.samples import Completion, Sample, token_index, token_offsets
from aepo_fast.training.optim import build_optimizer, guarded_step
from aepo_fast.training.update import UpdateResult, update
from aepo_kernels.integrations import head_arguments
from bench.peers import materialised, trl
from bench.step.run import OURS

# So small that every step starts from the same weights: AdamW moves each by about this much.
LEARNING_RATE = 1e-12
FEWEST_TOKENS = 4
REFERENCE_TOKENS = 1024
MATERIALISED = "logits materialised"

Scores = Callable[[Policy, MicroBatch], tuple[Tensor, Tensor]]
ScoresOfLogits = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Problem:
    """What every candidate is given; the policies share their weights.

    ours: with the default layout. padded: one row per sample. plain: that with transformers' own
    attention.
    """

    cfg: Config
    rows: list[Sample]
    objective: Objective
    optimizer: torch.optim.Optimizer
    ours: Policy
    padded: Policy
    plain: Policy

    @property
    def num_tokens(self) -> int:
        """Number of completion tokens."""
        return sum(row.length for row in self.rows)


@dataclass(frozen=True)
class Candidate:
    """A way to make one optimizer step, or why it cannot be made here."""

    name: str
    policy: Policy
    step: Callable[[], UpdateResult]
    unavailable_reason: str | None = None


def make_rows(
    prompts: int, samples: int, prompt_tokens: int, tokens: int, vocab: int, seed: int
) -> tuple[list[Sample], Tensor]:
    """Random rows of FEWEST_TOKENS to `tokens` tokens, and their advantages [R].

    The advantages of one group in three are zero, as where all its samples got the same reward.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab, (length,), generator=random).tolist())

    rows = []
    for group in range(prompts):
        prompt = draw(prompt_tokens)
        lengths = torch.randint(FEWEST_TOKENS, tokens + 1, (samples,), generator=random)
        for length in lengths.tolist():
            completion = Completion(prompt, draw(length), (0.0,) * length, "length", 1.0, 0)
            rows.append(Sample(completion, group, False, 0.0))
    advantages = torch.randn(len(rows), generator=random)
    advantages[: prompts // 3 * samples] = 0
    return rows, advantages


def load_problem(
    folder: str,
    *,
    prompts: int,
    samples: int,
    prompt_tokens: int,
    tokens: int,
    tokens_per_microbatch: int,
    seed: int,
    dtype: str = "float32",
    lora_rank: int = 0,
) -> Problem:
    """The model in `folder` with rows, the objective of an AEPO config and an optimizer.

    dtype: of the weights. lora_rank: of an adapter that is trained in their place; 0: none.

    The loss is that config's before the first update, weight * advantage * ratio with the ratio
    exp(logprob - logprob.detach()); there are no auxiliary rows.
    """
    settings = [
        f"trainer.tokens_per_microbatch={tokens_per_microbatch}",
        f"trainer.lr={LEARNING_RATE}",
        f'model.dtype="{dtype}"',
        f"model.lora.rank={lora_rank}",
    ]
    cfg = load_config("first-light", settings)
    machine = resolve_machine(cfg)
    cfg = machine.settled(cfg)
    model = load_model(cfg.model, folder, machine)
    # Whatever is timed beside ours takes the faster of transformers' own at these lengths.
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    twin.set_attn_implementation("sdpa" if machine.is_gpu else "eager")
    in_lines = dataclasses.replace(cfg.trainer, layout="padded")
    vocab = len(head_arguments(model)[0])
    rows, advantages = make_rows(prompts, samples, prompt_tokens, tokens, vocab, seed)
    context = StepContext(
        temperature=1.0,
        bonus_coef=0.0,
        dcpo_mix=0.0,
        aux_draws=0,
        aux_positives=0,
        num_minibatches=1,
    )
    objective = build_objective(
        cfg,
        rows,
        advantages,
        range(len(rows)),
        context,
        old=None,
        reference=None,
        generator=torch.Generator(),
    )
    return Problem(
        cfg,
        rows,
        objective,
        build_optimizer(model, cfg.trainer),
        ours=Policy(model, machine, cfg.trainer),
        padded=Policy(model, machine, in_lines),
        plain=Policy(twin, machine, in_lines),
    )


def all_candidates(problem: Problem) -> list[Candidate]:
    """Ours first, whether they can run here or not."""
    plain = problem.plain
    compiled = functools.partial(logits_materialised, torch.compile(materialised.scores_of_logits))
    eager = functools.partial(logits_materialised, materialised.scores_of_logits)
    where = plain.device, plain.machine.compute_dtype
    return [
        Candidate(OURS, problem.ours, functools.partial(our_step, problem, problem.ours)),
        Candidate(
            f"{OURS}, padded", problem.padded, functools.partial(our_step, problem, problem.padded)
        ),
        plain_candidate(problem, MATERIALISED, eager),
        plain_candidate(
            problem, f"{MATERIALISED}, compiled", compiled, materialised.unavailable_reason(*where)
        ),
        plain_candidate(problem, "TRL chunked", trl_chunked, trl.unavailable_reason(*where)),
    ]


def lora_candidate(problem: Problem, rank: int) -> Candidate:
    """Our step over a problem whose policy has an adapter."""
    step = functools.partial(our_step, problem, problem.ours)
    return Candidate(f"{OURS}, LoRA rank {rank}", problem.ours, step)


def plain_candidate(
    problem: Problem, name: str, scores: Scores, unavailable_reason: str | None = None
) -> Candidate:
    """A plain trainer's step with a head of its own."""
    step = functools.partial(plain_step, problem, problem.plain, scores)
    return Candidate(name, problem.plain, step, unavailable_reason)


def reference_step(problem: Problem, dtype: torch.dtype) -> UpdateResult:
    """The materialised step in autocast to `dtype`, none in float32, in small micro-batches."""
    policy = copy.copy(problem.plain)
    policy.machine = dataclasses.replace(policy.machine, compute_dtype=dtype)
    # So that the gate passes where the candidate's own logits do not fit.
    policy.max_tokens = min(policy.max_tokens, REFERENCE_TOKENS)
    eager = functools.partial(logits_materialised, materialised.scores_of_logits)
    return plain_step(problem, policy, eager)


def our_step(problem: Problem, policy: Policy) -> UpdateResult:
    """The trainer's own step."""
    return update(
        policy,
        problem.optimizer,
        problem.rows,
        range(len(problem.rows)),
        problem.objective,
        max_grad_norm=problem.cfg.trainer.max_grad_norm,
        check=lambda: None,
    )


def plain_step(problem: Problem, policy: Policy, scores: Scores) -> UpdateResult:
    """The same loss over all rows by autograd, those without an advantage included."""
    offsets, objective = token_offsets(problem.rows), problem.objective
    total = torch.zeros((), device=policy.device)
    entropy_sum = torch.zeros((), device=policy.device)
    logprobs, entropies = torch.zeros(2, int(offsets[-1]))
    model_tokens = 0
    policy.model.train()
    for batch in policy.microbatches(problem.rows, range(len(problem.rows))):
        index = token_index(offsets, batch.samples)
        columns = {
            name: values[index].to(policy.device) for name, values in objective.columns.items()
        }
        logprob, entropy = scores(policy, batch)
        loss, metrics = objective.token_loss(logprob, entropy, None, columns)
        loss.backward()
        total += loss.detach()
        entropy_sum += metrics[MetricSum.ENTROPY]
        logprobs[index] = logprob.detach().cpu()
        entropies[index] = entropy.detach().cpu()
        model_tokens += batch.input_ids.numel()
    norm, taken = guarded_step(
        problem.optimizer, total.item(), max_grad_norm=problem.cfg.trainer.max_grad_norm
    )
    return UpdateResult(
        loss=total.item(),
        grad_norm=norm,
        taken=taken,
        sums={MetricSum.ENTROPY: entropy_sum.item()},
        model_tokens=model_tokens,
        active_tokens=problem.num_tokens,
        logprob=logprobs,
        entropy=entropies,
    )


def logits_materialised(
    scores_of_logits: ScoresOfLogits, policy: Policy, batch: MicroBatch
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy [N] from the model's logits of all positions after the prompts."""
    lines, width = batch.input_ids.shape
    first = int((batch.select % width).min())
    assert batch.attention_mask is not None
    with policy.machine.autocast():
        logits = policy.model(
            input_ids=batch.input_ids.to(policy.device),
            position_ids=batch.position_ids.to(policy.device),
            attention_mask=batch.attention_mask.to(policy.device),
            use_cache=False,
            logits_to_keep=width - first,
        ).logits
    targets = torch.zeros(lines * width, dtype=torch.long).index_copy(
        0, batch.select, batch.targets
    )
    targets = targets.view(lines, width)[:, first:].flatten().to(policy.device)
    logprob, entropy, _ = scores_of_logits(logits.flatten(0, 1), targets, 1.0, None, True)
    assert entropy is not None
    kept = batch.select // width * (width - first) + batch.select % width - first
    kept = kept.to(policy.device)
    return logprob.index_select(0, kept), entropy.index_select(0, kept)


def trl_chunked(policy: Policy, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy [N] by TRL's function over the completion tokens' hidden states."""
    logprob, entropy = trl.scores(
        policy.hidden(batch),
        policy.weight,
        batch.targets.to(policy.device),
        1.0,
        wants_entropy=True,
        **policy.head,
    )
    assert entropy is not None
    return logprob, entropy.detach()
