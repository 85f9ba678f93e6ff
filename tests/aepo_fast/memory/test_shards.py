"""The plan of one of several processes: its bytes against FSDP2's own, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aepo_fast.cli.app import app
from aepo_fast.cli.plan import plan_text
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config, LoraConfig
from aepo_fast.config.toml import load_config
from aepo_fast.memory import check
from aepo_fast.memory.check import predict
from aepo_fast.memory.devices import named_device
from aepo_fast.memory.fit import changes_over, machine_over, planner
from aepo_fast.memory.model_pass import samples_of
from aepo_fast.memory.phases import Traced, trace
from aepo_fast.memory.plan import Device, MemoryPlan, shape_of
from aepo_fast.model.load import read_config
from aepo_fast.model.load_parts import load_parts
from aepo_fast.model.policy import Policy
from aepo_fast.model.sharded import device_mesh
from aepo_fast.training.optim import build_optimizer
from aepo_fast.world import part
from tests.aepo_fast.memory.models import SMALL, qwen, write_config
from tests.aepo_fast.world.ranks import run_ranks
from tests.aepo_fast.world.test_split import qwen as qwen_model
from tests.aepo_fast.world.test_split import ragged
from tests.tiny_run import tiny_config

# Models, and settings of a run of two processes. The tied one has 301 tokens, an uneven number.
CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "shards": ("tied", {}),
    "shards, untied": ("untied", {}),
    "adapters": ("tied", {"model": {"lora": LoraConfig(rank=4)}}),
    "eight bits": ("untied", {"trainer": {"optimizer": "adamw_8bit"}}),
    "parts of layers": ("tied", {"trainer": {"tensor_parallel": 2}}),
    "parts of layers, untied": ("untied", {"trainer": {"tensor_parallel": 2}}),
    "replicas": ("tied", {"trainer": {"replicas": 2}}),
}


def held(cfgs: dict[str, Config]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """The bytes that this rank holds of each configuration's model, and those that become whole.

    And what the check of the first one says.
    """
    torch.set_num_threads(1)
    heard, found = _checked(cfgs["shards"]), {}
    for name, cfg in cfgs.items():
        machine = resolve_machine(cfg)
        cfg = machine.settled(cfg)
        model = load_parts(cfg.model, cfg.model.path, machine, device_mesh(machine))
        policy, whole = Policy(model, machine, cfg.trainer), dict[str, int]()
        layer: Any = policy.backbone.layers[0]
        layer.mlp.register_forward_hook(lambda *_: whole.update(layer=_whole(layer)))  # noqa: B023
        policy.backbone.norm.register_forward_hook(  # when the layers are in shards again
            lambda *_: whole.update(outside=_whole(policy.model))  # noqa: B023
        )
        samples = samples_of(shape_of(cfg, 8))
        policy.token_values(samples, range(len(samples)))
        optimizer = build_optimizer(model, cfg.trainer)
        trained = [one for one in model.parameters() if one.requires_grad]
        for one in trained:
            one.grad = torch.zeros_like(one)
        optimizer.step()
        states = [value for one in trained for value in optimizer.state[one].values()]
        found[name] = whole | {
            "weights": sum(map(_own_bytes, [*model.parameters(), *model.buffers()])),
            "gradients": sum(_own_bytes(one.grad) for one in trained),
            "optimizer": sum(_own_bytes(one) for one in states if one.ndim),
        }
    part()
    return found, heard


def _checked(cfg: Config) -> list[str]:
    """What the check of a run says where both ranks have memory, and where the second has none."""
    machine = resolve_machine(cfg)
    known = {"prompt_tokens": 8, "given": cfg}
    check._upper_bound = lambda *some: 2**62  # type: ignore[assignment]
    check.cheapest_changes = lambda *some: []  # they take long

    def said(memory: int) -> str:
        check.this_device = lambda **kind: Device(memory, 0, counted=True)  # type: ignore
        try:
            found = predict(machine.settled(cfg), machine, cfg.model.path, **known)
            return f"{found.peak} of {found.plan is not None}"
        except ConfigError as error:
            return str(error)

    return [said(2**40), said(2**18 if machine.world.rank else 2**40)]


def _own_bytes(tensor: Any) -> int:
    own = tensor.to_local() if hasattr(tensor, "full_tensor") else tensor
    names = [name for name in ("codes", "scale", "qmap") if hasattr(own, name)]
    parts = [getattr(own, name) for name in names] or [own]
    return sum(one.numel() * one.element_size() for one in parts)


def _whole(module: Any) -> int:
    """Bytes of weights that are no shards now, with what fills them up."""
    found = {}
    for one in module.parameters():
        in_parts = hasattr(one, "full_tensor")
        if not (in_parts and "shard" in one.device_mesh.mesh_dim_names):
            local = one.to_local() if in_parts else one
            found[id(one)] = local.untyped_storage().nbytes()
    return sum(found.values())


@pytest.fixture(scope="module")
def ranks(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The configurations, and what `held` returns on both of two ranks."""
    folder = tmp_path_factory.mktemp("shards")
    models = {"tied": ragged(tiny_model_dir, folder / "tied")}
    models["untied"] = qwen_model(tiny_model_dir, folder / "untied")
    cfgs = {}
    for name, (model, changes) in CASES.items():
        cfg = tiny_config(models[model], folder)
        parts = {key: replace(getattr(cfg, key), **new) for key, new in changes.items()}
        cfgs[name] = replace(cfg, **parts)
    return cfgs, *run_ranks("tests.aepo_fast.memory.test_shards:held", 2, folder / "ranks", cfgs)


def traced(cfg: Config) -> Traced:
    machine = machine_over(torch.device("cpu"), cfg, 2)
    samples = samples_of(shape_of(cfg, 8, 2))
    return trace(machine.settled(cfg), machine, read_config(cfg.model.path), samples)


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_first_rank(ranks: tuple[Any, Any, Any], name: str) -> None:
    cfgs, (first, _), (second, _) = ranks
    planned = traced(cfgs[name])
    states, whole = planned.states, planned.whole
    assert whole is not None
    expected = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "layer": 4 * whole.layer,
        "outside": 4 * whole.outside,
    }
    assert first[name] == expected
    assert all(second[name][key] <= size for key, size in expected.items())


@pytest.mark.slow
def test_a_run_is_refused_by_all_ranks_alike(ranks: tuple[Any, Any, Any]) -> None:
    cfgs, (_, first), (_, second) = ranks
    cfg, endless = cfgs["shards"], Device(2**40, 0, counted=True)
    options = {"prompt_tokens": 8, "for_gpu": False, "devices": 2}
    planned = planner(read_config(cfg.model.path), endless, **options)(cfg)
    assert first == second and first[0] == f"{planned.peak} of True"
    assert "trainer.check_memory" in first[1] and "in each of 2 processes" in first[1]


def plan_of(devices: int, *overrides: str, gpu: str = "80GiB", **changes: Any) -> MemoryPlan:
    cfg = load_config("first-light", ["rollout.max_new_tokens=512", *overrides])
    options = {"prompt_tokens": 256, "for_gpu": True, "devices": devices}
    return planner(qwen(num_hidden_layers=2, **changes), named_device(gpu), **options)(cfg)


VLLM = ('rollout.backend="vllm"', 'trainer.device="cuda"')


def test_each_device_holds_its_shards_and_what_is_whole() -> None:
    one, two, four = (plan_of(devices, *VLLM) for devices in (1, 2, 4))
    for plan, devices in ((two, 2), (four, 4)):
        assert plan.num_weights == one.num_weights
        parts = {phase.name: phase.parts for phase in plan.phases}
        whole = {phase.name: phase.parts for phase in one.phases}
        for name in ("weights", "optimizer", "gradients"):
            ours, theirs = (some["step"][name] for some in (parts, whole))
            assert ours == pytest.approx(theirs / devices, rel=1e-4)
        assert parts["sync"]["gathered"] == 2 * 151936 * 1536  # one weight, in bfloat16
        # vLLM has a copy of its own: shards cannot be shared.
        assert parts["step"]["sampler"] == 2 * one.num_weights
    halved = plan_of(2, *VLLM, "rollout.tensor_parallel=2")
    assert halved.phases[-1].parts["sampler"] == one.num_weights
    assert one.peak > two.peak > four.peak


def test_replicas_and_parts_of_layers() -> None:
    shards, replicas, parts = (
        {phase.name: phase.parts for phase in plan_of(4, *VLLM, *more).phases}
        for more in ((), ("trainer.replicas=2",), ("trainer.tensor_parallel=2",))
    )
    assert replicas["step"]["weights"] == pytest.approx(2 * shards["step"]["weights"], rel=1e-4)
    # Neighbours hold what the plan does not split twice, i.e. norms and biases.
    assert parts["step"]["weights"] == pytest.approx(shards["step"]["weights"], rel=1e-3)
    assert parts["update"]["gathered"] < 0.6 * shards["update"]["gathered"]
    alone = {phase.name: phase.parts for phase in plan_of(2, *VLLM, "trainer.replicas=2").phases}
    assert alone["step"]["weights"] == pytest.approx(4 * shards["step"]["weights"], rel=1e-4)


def test_shards_in_cpu_memory_leave_what_is_whole() -> None:
    offloaded = plan_of(2, *VLLM, 'trainer.offload="all"')
    parts = {phase.name: phase.parts for phase in offloaded.phases}
    assert {"weights", "optimizer", "gradients"}.isdisjoint(parts["update"])
    assert parts["update"]["gathered"] > 2 * 151936 * 1536


def test_a_reference_and_a_frozen_base_are_in_shards() -> None:
    pytest.importorskip("peft")
    kl, one = plan_of(2, *VLLM, "loss.kl_coef=0.1"), plan_of(1, *VLLM)
    assert kl.worst.parts["reference"] == pytest.approx(2 * one.num_weights, rel=1e-4)
    adapter = plan_of(2, *VLLM, "model.lora.rank=16")
    assert adapter.phases[0].parts["weights"] == pytest.approx(2 * adapter.num_weights, rel=1e-3)
    assert "gradients" not in adapter.phases[0].parts
    assert adapter.phases[-1].parts["gathered"] < 2**20  # the sampler gets the adapter alone


def test_what_does_not_fit_may_take_more_devices() -> None:
    cfg = load_config("first-light", ["rollout.max_new_tokens=512", *VLLM])

    def over(devices: int) -> Any:
        options = {"prompt_tokens": 256, "for_gpu": True, "devices": devices}
        return planner(qwen(num_hidden_layers=2), named_device("6GiB"), **options)

    assert not over(2)(cfg).fits
    changes = changes_over(cfg, over, 2)
    assert len(changes) == 3 and all(change.plan.fits for change in changes)
    assert [change.devices for change in changes[:2]] == [None, None]
    assert changes[2].devices in (4, 8, 16) and not changes[2].settings


def report(folder: Path, *options: str) -> Any:
    command = ["plan", "first-light", "--set", f'model.path="{folder}"', *options]
    return CliRunner().invoke(app, [*command, "--set", "rollout.max_prompt_tokens=64"])


def test_the_report_is_for_one_of_the_devices(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", {**SMALL, "num_hidden_layers": 1})
    done = report(folder, "--gpu", "8GiB", "--devices", "4")
    assert done.exit_code == 0, done.output
    for text in ("on one of 4 devices, each a GPU of 8.0 GiB", "gathered", "sync", "It fits"):
        assert text in done.output
    done = report(folder, "--devices", "2", "--json")
    assert json.loads(done.output)["devices"] == 2


@pytest.mark.parametrize(
    ("devices", "settings", "reason"),
    [
        (3, "trainer.tensor_parallel=2", "3 processes are no multiple of 2"),
        (6, "trainer.replicas=4", "6 processes are no multiple of 4"),
        (1, "trainer.tensor_parallel=2", "1 processes are no multiple of 2"),
        (4, 'trainer.optimizer="muon"', "--devices says there are several"),
        (3, "trainer.tensor_parallel=3", "does not divide the model's 4 num_attention_heads"),
    ],
)
def test_devices_that_cannot_share_a_run_are_refused(
    tmp_path: Path, devices: int, settings: str, reason: str
) -> None:
    folder = write_config(tmp_path / "model", {**SMALL, "num_hidden_layers": 1})
    overrides = [f'model.path="{folder}"', settings]
    with pytest.raises(ConfigError) as refusal:
        plan_text("first-light", overrides, gpu="8GiB", devices=devices)
    assert refusal.value.key == settings.split("=")[0] and reason in refusal.value.reason
    if "multiple" in reason:
        assert "--devices" in refusal.value.fix


def test_no_device_and_a_measurement_of_several_are_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", {**SMALL, "num_hidden_layers": 1})
    assert report(folder, "--devices", "0").exit_code == 2
    with pytest.raises(ConfigError, match="--measure = True: 2 processes"):
        plan_text("first-light", [f'model.path="{folder}"'], devices=2, measure=True)


# Bytes of one process in the phases that load, sample and step, which no trace has a part in, as
# they were before there were plans for more.
ALONE = {
    (): (2615768064, 4714438144, 5885476352),
    (*VLLM, "rollout.share_weights=false"): (1961825792, 29693454848, 5885476352),
    ('trainer.optimizer="adamw_8bit"', 'model.dtype="bfloat16"'): (
        653942272,
        1455001088,
        3839087104,
    ),
    ("loss.kl_coef=0.1", 'trainer.optimizer="muon"'): (3923652096, 5647980544, 6984169472),
}


@pytest.mark.parametrize("settings", ALONE)
def test_the_plan_of_one_process_is_what_it_was(settings: tuple[str, ...]) -> None:
    phases = plan_of(1, *settings).phases
    assert [phase.name for phase in phases] == ["load", "sample", "score", "update", "step"]
    assert tuple(phases[index].total for index in (0, 1, 4)) == ALONE[settings]
    assert all("gathered" not in phase.parts for phase in phases)
