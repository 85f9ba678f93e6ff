"""What shards do that a run shows late or not at all, as each of two ranks sees it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import TrainerConfig
from aepo_fast.model.load import load_model
from aepo_fast.model.load_parts import load_parts
from aepo_fast.model.policy import Policy
from aepo_fast.model.sharded import device_mesh, whole
from aepo_fast.samples import Completion, Sample
from aepo_fast.training.optim import build_optimizer
from aepo_fast.world import World
from tests.tiny_run import a_machine, tiny_config

# Rows of 64 numbers: what two ranks have of them, and whether one of them has whole blocks of 256.
ROWS = {"in blocks": 256, "of half a block": 300, "too few": 64}


def look(world: World, folder: Path) -> dict[str, Any]:
    """What a rank finds."""
    machine = dataclasses.replace(a_machine(), world=world, data=world)
    mesh = device_mesh(machine)
    found: dict[str, Any] = _passes(machine, mesh, folder)
    return found | {"8 bit": {name: _in_8_bits(mesh, rows) for name, rows in ROWS.items()}}


def check(found: dict[str, Any]) -> None:
    """Of any rank."""
    before, after = found["differences"]
    assert before < 1e-5 and after < 1e-5, "a pass computes with the head of before an update"
    # Two layers, and one group of embedding, last norm and head.
    assert found["gradients reduced"] == 3, "a tied matrix is reduced twice"
    for name, (difference, has_codes) in found["8 bit"].items():
        assert has_codes == (name == "in blocks")
        assert (difference == 0) == has_codes, f"{name}: {difference:.1e}"


def _passes(machine: Machine, mesh: Any, folder: Path) -> dict[str, Any]:
    """How far log-probs lie from those of a whole model, and how often gradients are reduced."""
    cfg = tiny_config(folder, folder)
    models = (
        load_parts(cfg.model, folder, machine, mesh),
        load_model(cfg.model, folder, a_machine()),
    )
    parts, alone = (
        Policy(model, one, cfg.trainer)
        for model, one in zip(models, (machine, a_machine()), strict=True)
    )
    samples = [
        Sample(Completion((5, prompt), (3, 4, 9), (), "length", 1.0, 0), prompt, False, 1.0)
        for prompt in range(4)
    ]
    # As an optimizer has them: of a model whose head is whole, they would be the whole ones.
    weights = [one for model in models for one in model.parameters()]
    differences = []
    for _ in range(2):  # no backward pass frees the head that was whole for the first ones
        ours, theirs = (one.token_values(samples, range(4)).logprob for one in (parts, alone))
        differences.append((ours - theirs).abs().max().item())
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.5)
    with CommDebugMode() as seen, parts.same_weights():
        for batch in parts.microbatches(samples, range(4)):
            loss = parts.token_loss(batch, lambda logprob, *_: (logprob.sum(), {})).loss
            loss.backward()
    counts = {str(name): count for name, count in seen.get_comm_counts().items()}
    reduced = sum(count for name, count in counts.items() if "reduce_scatter" in name)
    return {"differences": differences, "gradients reduced": reduced, "counts": counts}


def _in_8_bits(mesh: Any, rows: int) -> tuple[float, bool]:
    """After three steps with the same gradients, the difference of a matrix from one in shards.

    And whether the optimizer's state of a shard is in 8 bits.
    """
    random = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, rows, 64, generator=random)
    cfg = TrainerConfig(optimizer="adamw_8bit", lr=1e-3)

    def shards_of(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor.clone(), mesh, [Shard(0)], src_data_rank=None)

    ends, state = [], {}
    for place in (Tensor.clone, shards_of):
        module = nn.Module()
        module.weight = nn.Parameter(place(start))
        optimizer = build_optimizer(module, cfg)
        for gradient in gradients:
            module.weight.grad = place(gradient)
            optimizer.step()
        ends.append(whole(module.weight.detach()))
        state = optimizer.state[module.weight]
    codes = is_traceable_wrapper_subclass(state["exp_avg"].to_local())
    return (ends[0] - ends[1]).abs().max().item(), codes
