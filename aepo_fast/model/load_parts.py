"""Loads a model of which no process ever holds more than its own part.

It is built without memory, put into shards, and each process reads from the safetensors files what
its shards are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import ModelConfig
from aepo_fast.model.activations import checkpoint_layers
from aepo_fast.model.cpu_layers import fuse_layers, with_numbers
from aepo_fast.model.experts import freeze_routers
from aepo_fast.model.load import choose_attention, load_model, read_config, without_dropout
from aepo_fast.model.lora import add_adapter, load_adapter
from aepo_fast.model.sharded import shard
from aepo_fast.report.unexpected import first_line

Range = tuple[int, int]


def load_parts(
    cfg: ModelConfig,
    folder: Path | str,
    machine: Machine,
    mesh: Any,
    *,
    adapter: Path | None = None,
    seed: int = 0,
    frozen: bool = False,
    offload: bool = False,
) -> PreTrainedModel:
    """Load this process's part of a model onto its device; arguments as those of `load_model`.

    mesh: that of `device_mesh`. frozen: nothing of it is trained. offload: as in `shard`; all
    weights are first loaded into CPU memory. So they are where the files name weights otherwise
    than the model does, as those of experts, and it says so.

    Raises ConfigError as `load_model` and `shard` do.
    """
    folder = Path(folder)
    files = weight_files(folder)
    model = _without_memory(cfg, folder, machine)
    if machine.runs_cpp:
        fuse_layers(model, with_numbers)
    if cfg.lora.rank:
        with _pretending(model):  # peft draws nothing for weights that have no memory
            add_adapter(model, cfg.lora, seed=seed)
        if adapter is not None:
            load_adapter(model, adapter)
    if cfg.freeze_router:
        freeze_routers(model)
    names = _names_in_files(model, files)
    if names is None:
        print(f"the weights of {folder} have other names than the model's: each process loads all")
    if offload:  # shards that are read would be put on the GPU
        names = None
    if names is None:
        options: dict[str, Any] = {"adapter": adapter, "seed": seed, "stays_on_cpu": True}
        model = load_model(cfg, folder, machine, **options)
    else:
        checkpoint_layers(model, cfg.gradient_checkpointing)
    if frozen:
        model.requires_grad_(False)
    shard(model.train(not frozen), machine, mesh, offload=offload)
    if names is not None:
        _read(model, names, files, machine.device)
    return model


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds which weight, as transformers finds them; safetensors alone."""
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return dict.fromkeys(file.keys(), whole)
    if not index.is_file():
        return {}
    found = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
    return {name: folder / file for name, file in found.items()}


def own_ranges(parameter: Any) -> list[Range]:
    """Of each dimension of a weight, the first and the last index but one of this process's part.

    parameter: a DTensor of `shard`: split by the "split" dimension of its mesh, and each part by
    rows over the "shard" dimension.
    """
    mesh, ranges = parameter.device_mesh, [(0, size) for size in parameter.shape]
    steps = [("split", None), ("shard", 0)]
    for name, rows in steps:
        if name not in mesh.mesh_dim_names:
            continue
        dim = mesh.mesh_dim_names.index(name)
        placement = parameter.placements[dim]
        if placement.is_replicate():
            continue
        which = placement.dim if rows is None else rows
        ranges[which] = _chunk(ranges[which], mesh.size(dim), mesh.get_local_rank(dim))
    return ranges


def _chunk(given: Range, count: int, number: int) -> Range:
    """A part of a range, as torch.chunk would give it; empty where there are too few."""
    start, stop = given
    each = -(-(stop - start) // count)
    return min(start + number * each, stop), min(start + (number + 1) * each, stop)


def _without_memory(cfg: ModelConfig, folder: Path, machine: Machine) -> PreTrainedModel:
    """A model whose weights are on the meta device, and its buffers in memory."""
    config = without_dropout(read_config(folder, trust_code=cfg.trust_remote_code))
    attention = choose_attention(cfg.attention, machine, config.model_type)
    wanted = None if (cfg.attention, attention) == ("auto", "sdpa") else attention
    try:
        with no_init_weights(), _weights_on_meta():
            model: Any = AutoModelForCausalLM.from_config(
                config,
                dtype=machine.weights_dtype,
                attn_implementation=wanted,
                trust_remote_code=cfg.trust_remote_code,
            )
        model.tie_weights()
    except Exception as error:  # of code that builds anything
        reason = f"transformers cannot build it from its settings: {first_line(error)}"
        fix = "Check config.json, and model.attention"
        raise ConfigError("model.path", str(folder), reason, fix) from error
    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        model.generation_config = generation
    except OSError:  # there is none: that of its settings stays
        pass
    return model


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """While it is open, parameters of new modules have no memory."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            bare = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = bare

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


@contextmanager
def _pretending(model: nn.Module) -> Iterator[None]:
    """While it is open, weights on meta are on the CPU: one number each, repeated."""

    def swap(made: dict[int, nn.Parameter], new: Any) -> None:
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is not None and (id(old) in made or old.is_meta):
                    module._parameters[name] = made.setdefault(id(old), new(old))

    def repeated(bare: Tensor) -> nn.Parameter:
        number = torch.zeros((), dtype=bare.dtype).expand(bare.shape)
        return nn.Parameter(number, requires_grad=bare.requires_grad)

    pretended: dict[int, nn.Parameter] = {}
    swap(pretended, repeated)
    try:
        yield
    finally:
        bare = {
            id(one): nn.Parameter(one.to("meta"), requires_grad=one.requires_grad)
            for one in pretended.values()
        }
        swap(bare, lambda old: old)


def _names_in_files(model: nn.Module, files: Mapping[str, Path]) -> dict[str, str] | None:
    """How the files call each weight that the model has on meta; None where they lack one."""
    found, of_weight = {}, dict[int, str]()
    weights = [
        (name, one) for name, one in model.named_parameters(remove_duplicate=False) if one.is_meta
    ]
    plain = {name: name.replace(".base_layer.", ".") for name, _ in weights}  # peft's, of layers
    for name, weight in weights:  # of tied ones, the files have one
        if plain[name] in files:
            of_weight.setdefault(id(weight), plain[name])
    for name, weight in weights:
        if id(weight) not in of_weight:
            return None
        found[name] = of_weight[id(weight)]
    return found


@torch.no_grad()
def _read(
    model: nn.Module, names: Mapping[str, str], files: Mapping[str, Path], device: torch.device
) -> None:
    """Give a model in shards its weights, and its buffers what the files have of them."""
    from torch.distributed.tensor import DTensor

    made: dict[str, nn.Parameter] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(names, key=lambda name: str(files[names[name]])):
        source = names[name]
        if source in made:
            continue
        shard: Any = parameters[name]
        part = _slice(files[source], source, own_ranges(shard))
        # Not the part itself, which may be a piece of the file as it is mapped.
        own = torch.empty(part.shape, dtype=shard.dtype, device=device).copy_(part)
        assert own.shape == shard.to_local().shape, f"{name} is laid out in another way"
        whole = {"shape": shard.shape, "stride": shard.stride(), "run_check": False}
        made[source] = nn.Parameter(
            DTensor.from_local(own, shard.device_mesh, shard.placements, **whole),
            requires_grad=shard.requires_grad,
        )
    state = {name: made[source] for name, source in names.items()}
    model.load_state_dict(state, assign=True, strict=False)
    for name, buffer in model.named_buffers():
        if name in files:
            buffer.copy_(_slice(files[name], name, [(0, size) for size in buffer.shape]))


def _slice(file: Path, name: str, ranges: list[Range]) -> Tensor:
    with safe_open(file, framework="pt") as weights:
        return weights.get_slice(name)[tuple(slice(*one) for one in ranges)]
