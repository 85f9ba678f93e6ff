"""What docs/models.md says of an architecture: one check a column, run on a tiny model of it.

A check returns "" where the column works, or the message with which it is refused. It raises
AssertionError where something is wrong without a word. `python -m tests.model_checks KIND...` runs
the checks with vLLM, which may take the process down, and prints a line of JSON for each.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import ModelConfig, RolloutConfig, TrainerConfig
from aepo_fast.model.experts import check_routers, has_experts
from aepo_fast.model.isolation import check_isolation
from aepo_fast.model.load import load_model, load_tokenizer, read_config
from aepo_fast.model.policy import Policy
from aepo_fast.rollout.engine import RolloutError
from aepo_fast.samples import Completion, Sample
from aepo_fast.training.checkpoint import save_model
from aepo_fast.training.run import train
from tests.tiny_architectures import VOCAB, Architecture, architecture
from tests.tiny_run import a_machine, tiny_config, with_trainer

Layout = Literal["padded", "shared", "packed"]
# Of log-probs, nats, and of the gradient by all weights, relative; float32 against float64. Errors
# were up to 5e-6 and 4e-6, with linear attention 2e-5 and 7e-6.
_LOGPROB, _GRADIENT = 1e-4, 5e-5
_A_PROCESS = 3  # architectures
_IN_VLLM = 1e-4  # nats, mean; both in float32


@dataclass(frozen=True)
class Measured:
    """Log-probs of the completion tokens of `some_samples`, in order, and gradients by name."""

    logprob: Tensor
    gradients: dict[str, Tensor]

    def errors(self, truth: Measured) -> tuple[float, float, float]:
        """Largest and mean error of log-probs, nats, and that of all gradients, relative."""
        assert self.gradients.keys() == truth.gradients.keys()
        difference = (self.logprob.double() - truth.logprob).abs()
        pairs = [(self.gradients[name].double(), true) for name, true in truth.gradients.items()]
        norms = [torch.stack([(a - b).norm(), b.norm()]).square() for a, b in pairs]
        wrong, whole = torch.stack(norms).sum(0).sqrt().tolist()
        return difference.max().item(), difference.mean().item(), wrong / whole


def some_samples() -> list[Sample]:
    """Two prompts, longer than the tiny models' windows, with two and three completions."""
    rng = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=rng).tolist())

    samples = []
    for group, (length, completions) in enumerate(((13, (7, 4)), (10, (9, 1, 12)))):
        prompt = ids(length)
        for new in completions:
            completion = Completion(prompt, ids(new), (0.0,) * new, "length", 1.0, 0)
            samples.append(Sample(completion, group, False, None))
    return samples


def _weights() -> Iterator[Tensor]:
    """Those of each sample's log-probs and entropies in the loss, [2, tokens], float64."""
    rng = torch.Generator().manual_seed(1)
    for sample in some_samples():
        length = len(sample.completion.completion_ids)
        yield torch.randn(2, length, generator=rng, dtype=torch.float64)


@functools.lru_cache(maxsize=2)
def materialised(folder: Path, dtype: torch.dtype) -> Measured:
    """By transformers alone, from all logits of one sample after the other, nothing packed.

    dtype: float64, the truth; bfloat16 is float32 weights under autocast.
    """
    half = dtype == torch.bfloat16
    options: Any = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32 if half else dtype, **options
    )
    logprobs = []
    for sample, weight in zip(some_samples(), _weights(), strict=True):
        prompt, completion = sample.completion.prompt_ids, sample.completion.completion_ids
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(torch.tensor([prompt + completion]), use_cache=False).logits
        every = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        logprob = every.gather(1, torch.tensor(completion)[:, None])[:, 0]
        entropy = -(every.exp() * every).sum(-1)
        (weight[0] @ logprob + weight[1] @ entropy).backward()
        logprobs.append(logprob.detach())
    return Measured(torch.cat(logprobs), _gradients(model))


def ours(folder: Path, layout: Layout | Literal["auto"], compute: torch.dtype) -> Measured:
    """By the policy, as a run computes them, with layers computed twice; refuses what runs do."""
    machine = a_machine(compute=compute)
    model = load_model(ModelConfig(path=str(folder)), folder, machine)
    policy = Policy(model, machine, TrainerConfig(layout=layout))
    check_isolation(policy, layout)
    samples, weights = some_samples(), list(_weights())
    logprobs: dict[int, Tensor] = {}
    for batch in policy.microbatches(samples, range(len(samples))):
        output = policy.logprobs(batch, with_entropy_gradient=True)
        weight = torch.cat([weights[index] for index in batch.samples], dim=1).float()
        (weight[0] @ output.logprob + weight[1] @ output.entropy).backward()
        lengths = [weights[index].shape[1] for index in batch.samples]
        logprobs.update(zip(batch.samples, output.logprob.detach().split(lengths), strict=True))
    return Measured(torch.cat([logprobs[i] for i in range(len(samples))]), _gradients(model))


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in found.items()}


def check_layout(layout: Layout, one: Architecture, folder: Path) -> str:
    """Log-probs, entropies and gradients in float32 are those of materialised float64 logits."""
    try:
        found = ours(folder, layout, torch.float32)
    except ConfigError as error:
        return str(error)
    worst, _, gradient = found.errors(materialised(folder, torch.float64))
    assert worst < _LOGPROB and gradient < _GRADIENT, (one.name, layout, worst, gradient)
    return ""


def check_bfloat16(one: Architecture, folder: Path) -> str:
    """Under autocast it is as near to the truth as transformers under autocast is."""
    truth = materialised(folder, torch.float64)
    _, logprob, gradient = ours(folder, "auto", torch.bfloat16).errors(truth)
    theirs = materialised(folder, torch.bfloat16).errors(truth)
    assert logprob < 2 * theirs[1] + 2e-3, (one.name, logprob, theirs)
    assert gradient < 2 * theirs[2] + 0.01, (one.name, gradient, theirs)
    return ""


def check_runs(one: Architecture, folder: Path) -> str:
    """Two steps with hf rollouts are one step, saved, and one after a resume, bit for bit."""
    with tempfile.TemporaryDirectory() as place:
        once, twice = Path(place) / "once", Path(place) / "twice"
        cfg = with_trainer(tiny_config(folder, once), steps=2, prompts_per_step=2, minibatches=1)
        try:
            train(cfg)
        except ConfigError as error:
            return str(error)
        shutil.copytree(once, twice)
        shutil.rmtree(twice / "checkpoints" / "step_2")
        train(dataclasses.replace(cfg, output_dir=str(twice)), resume=True)
        ends = [
            load_model(cfg.model, run / "checkpoints" / "step_2", a_machine()).state_dict()
            for run in (once, twice)
        ]
        assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items()), one.name
        start = load_model(cfg.model, folder, a_machine()).state_dict()
        assert any(not torch.equal(start[name], value) for name, value in ends[0].items())
    return ""


def check_saved(one: Architecture, folder: Path) -> str:
    """What is saved after a change of weights loads again, also by transformers, bit for bit."""
    cfg = ModelConfig(path=str(folder))
    model = load_model(cfg, folder, a_machine())
    _move(model)
    with tempfile.TemporaryDirectory() as place:
        save_model(model, load_tokenizer(folder), Path(place))
        again = load_model(cfg, place, a_machine()).state_dict()
        plain = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value) and torch.equal(plain[name], value), (one.name, name)
    return ""


def check_router(freeze: bool, one: Architecture, folder: Path) -> str:
    """model.freeze_router or model.router_aux_loss_coef is taken."""
    settings: Any = {"freeze_router": True} if freeze else {"router_aux_loss_coef": 0.01}
    cfg = ModelConfig(path=str(folder), **settings)
    try:
        check_routers(cfg, read_config(folder))
        model = load_model(cfg, folder, a_machine())
    except ConfigError as error:
        return str(error)
    policy = Policy(
        model, a_machine(), TrainerConfig(), router_aux_loss_coef=cfg.router_aux_loss_coef
    )
    batch = policy.microbatches(some_samples(), (0, 1))[0]
    policy.logprobs(batch).logprob.sum().backward()
    frozen = [one for one in model.parameters() if not one.requires_grad]
    assert bool(frozen) == freeze and has_experts(model.config)
    return ""


CHECKS: dict[str, Callable[[Architecture, Path], str]] = {
    "padded": functools.partial(check_layout, "padded"),
    "shared": functools.partial(check_layout, "shared"),
    "packed": functools.partial(check_layout, "packed"),
    "bfloat16": check_bfloat16,
    "saved": check_saved,
    "router frozen": functools.partial(check_router, True),
    "router balanced": functools.partial(check_router, False),
    "hf rollouts, resume": check_runs,
}
VLLM = "vLLM"


def _move(model: PreTrainedModel, size: float = 0.1) -> None:
    """Change all weights."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter += size * parameter.abs().mean() * noise


def check_vllm(one: Architecture, folder: Path, dtype: Literal["float32", "bfloat16"]) -> str:
    """vLLM samples with the weights of each sync, and the canary sees that it did not before."""
    from aepo_fast.rollout.canary import Canary, StaleWeightsError
    from aepo_fast.rollout.vllm import VllmRollout

    cfg = RolloutConfig(
        backend="vllm", max_prompt_tokens=64, max_new_tokens=16, dtype=dtype, enforce_eager=True
    )
    machine = a_machine(compute=getattr(torch, dtype))
    model = load_model(ModelConfig(path=str(folder)), folder, a_machine())
    policy = Policy(model, machine, TrainerConfig(layout="padded"))
    rng = torch.Generator().manual_seed(3)
    prompts = [
        tuple(torch.randint(3, VOCAB, (length,), generator=rng).tolist()) for length in (40, 25, 31)
    ]
    engine = None
    try:
        engine = VllmRollout(str(folder), cfg, eos_ids=[2], seed=0, on_gpu=machine.vllm_on_gpu)
        canary = Canary(engine, policy, prompts)
    except (ConfigError, RolloutError) as error:
        return str(error)
    else:
        if dtype == "float32":
            assert canary.fresh < _IN_VLLM, (one.name, canary.fresh)
        engine.sync_weights(model, 0)
        canary.check()
        _move(model)
        try:
            canary.check()
        except StaleWeightsError:
            engine.sync_weights(model, 1)
            canary.check()
            return ""
        raise AssertionError(f"{one.name}: the canary did not see stale weights")
    finally:
        if engine is not None:
            engine.close()


def in_vllm(kinds: Sequence[str], folder: Path) -> dict[str, str]:
    """`check_vllm` of some architectures, in processes of their own: model_type -> its result.

    A process checks a few, since vLLM keeps a cache of 1 GiB for each, as long as vLLM leaves it
    alive.
    """
    results: dict[str, str] = {}
    while left := [kind for kind in kinds if kind not in results][:_A_PROCESS]:
        command = [sys.executable, "-m", "tests.model_checks", str(folder), *left]
        done = subprocess.run(command, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if line.startswith('{"kind"'):
                found = json.loads(line)
                results[found["kind"]] = found["result"]
        died = next((kind for kind in left if kind not in results), None)
        if died is not None:
            assert done.returncode < 0 and done.returncode != -signal.SIGKILL, done.stderr[-3000:]
            results[died] = f"vLLM ends the process with signal {-done.returncode}"
    return results


def _main(folder: Path, kinds: Sequence[str]) -> None:
    from vllm.distributed.parallel_state import (  # pyright: ignore[reportMissingImports]
        cleanup_dist_env_and_memory,
    )

    os.environ["HF_HUB_OFFLINE"] = "1"
    for kind in kinds:
        one = architecture(kind)
        built = one.build(folder / kind)
        result = check_vllm(one, built, one.vllm_dtype)
        print(json.dumps({"kind": kind, "result": result}), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()  # experts have groups of their own


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2:])
