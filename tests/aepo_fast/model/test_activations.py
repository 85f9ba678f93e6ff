"""What of the activations is kept: recomputed layers and offloaded tensors change no gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from aepo_fast.config import resolve
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.model import Checkpointing
from aepo_fast.config.sections import LoraConfig, ModelConfig, TrainerConfig
from aepo_fast.config.toml import dump_config, load_config
from aepo_fast.model import activations
from aepo_fast.model.activations import OffloadedActivations
from aepo_fast.model.load import load_model
from aepo_fast.model.policy import Policy
from tests.aepo_fast.model.test_batch import make_samples
from tests.tiny_run import a_machine, tiny_config

LORA = LoraConfig(rank=4, targets=("q_proj", "down_proj", "lm_head"))


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("five_layers")
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def policy_of(
    folder: Path,
    choice: Checkpointing,
    *,
    layout: Any = "shared",
    lora: LoraConfig | None = None,
    compute: torch.dtype = torch.float32,
    offloads: bool = False,
) -> Policy:
    cfg = ModelConfig(str(folder), gradient_checkpointing=choice, lora=lora or LoraConfig())
    machine = a_machine(compute=compute)
    model = load_model(cfg, folder, machine)
    trainer = TrainerConfig(layout=layout, tokens_per_microbatch=40)
    return Policy(model, machine, trainer, activation_offloading=offloads)


def gradients(policy: Policy) -> list[torch.Tensor]:
    samples = make_samples([4, 1, 9, 3])
    with policy.same_weights():
        for batch in policy.microbatches(samples, range(4)):
            policy.logprobs(batch).logprob.sum().backward()
    found = [one.grad for one in policy.model.parameters() if one.requires_grad]
    return [grad for grad in found if grad is not None]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) > 0 and any(grad.any() for grad in ours)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("layout", ["shared", "padded", "packed"])
def test_layers_that_are_computed_again_change_no_gradient(
    five_layers: Path, layout: str, lora: LoraConfig | None
) -> None:
    choices: list[Checkpointing] = ["none", "full", 2, 3]
    all_kept, *others = (
        gradients(policy_of(five_layers, one, layout=layout, lora=lora)) for one in choices
    )
    for recomputed in others:
        assert_equal(recomputed, all_kept)


@pytest.mark.parametrize(
    ("choice", "recomputed"),
    [("none", []), ("full", [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])],
)
def test_which_layers_are_computed_again(
    five_layers: Path, choice: Checkpointing, recomputed: list[int]
) -> None:
    model = policy_of(five_layers, choice).model
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    assert [i for i, one in enumerate(layers) if one.gradient_checkpointing] == recomputed


def test_less_is_kept_the_more_layers_are_computed_again(five_layers: Path) -> None:
    def kept(choice: Checkpointing) -> int:
        sizes: list[int] = []
        policy = policy_of(five_layers, choice)
        (batch, *_) = policy.microbatches(make_samples([9]), [0])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            policy.hidden(batch)
        return sum(sizes)

    assert kept("full") < kept(2) < kept(3) < kept("none")


def test_a_model_whose_layers_cannot_be_chosen(
    five_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "GradientCheckpointingLayer", ())
    reason = r"model\.gradient_checkpointing = 2: the layers of LlamaForCausalLM cannot be chosen"
    with pytest.raises(ConfigError, match=reason):
        policy_of(five_layers, 2)
    policy_of(five_layers, "full")


@pytest.mark.parametrize(
    ("written", "read"),
    [("true", "full"), ("false", "none"), ('"none"', "none"), ("2", 2), ("9", 9)],
)
def test_booleans_of_older_configurations_are_read(
    tmp_path: Path, written: str, read: Checkpointing
) -> None:
    setting = f"model.gradient_checkpointing={written}"
    cfg = load_config("first-light", [setting])
    assert cfg.model.gradient_checkpointing == read
    (tmp_path / "again.toml").write_text(dump_config(cfg))
    assert load_config(str(tmp_path / "again.toml")) == cfg


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("1", "= 1: is no number of layers"),
        ("0", "= 0: is no number of layers"),
        ("half", "= 'half': is not one of its values"),
        ("2.5", "= 2.5: is not one of its values"),
    ],
)
def test_what_is_no_choice_of_layers_is_refused(written: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.gradient_checkpointing {reason}"):
        load_config("first-light", [f"model.gradient_checkpointing={written}"])


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("choice", ["none", "full", 2])
def test_offloaded_activations_change_no_gradient_and_no_weight_is_moved(
    five_layers: Path,
    monkeypatch: pytest.MonkeyPatch,
    choice: Checkpointing,
    lora: LoraConfig | None,
    compute: torch.dtype,
) -> None:
    moved: list[torch.Tensor] = []

    class Watched(OffloadedActivations):
        def __init__(self, **options: Any) -> None:
            super().__init__(least_bytes=0, **options)

        def _pack(self, tensor: torch.Tensor) -> Any:
            packed = super()._pack(tensor)
            if isinstance(packed, tuple):
                moved.append(packed[1])
                assert packed[1].data_ptr() != tensor.data_ptr() or not tensor.numel()
            return packed

    monkeypatch.setattr("aepo_fast.model.policy.OffloadedActivations", Watched)
    settings: dict[str, Any] = {"lora": lora, "compute": compute}
    kept = gradients(policy_of(five_layers, choice, **settings))
    assert not moved
    policy = policy_of(five_layers, choice, offloads=True, **settings)
    assert_equal(gradients(policy), kept)
    assert moved
    # No weight, as it is or cast, and nothing of the head, which saves gradients: one is V x H. Of
    # frozen weights autocast makes casts that nobody else keeps.
    weights = [
        one.detach().to(compute).float()
        for one in policy.model.parameters()
        if one.requires_grad or one.dtype == compute
    ]
    for one in moved:
        assert not any(same_numbers(one.float(), weight) for weight in weights)
        assert 301 not in one.shape


def same_numbers(one: torch.Tensor, weight: torch.Tensor) -> bool:
    if weight.ndim < 2:
        return False
    return any(one.shape == other.shape and torch.equal(one, other) for other in (weight, weight.T))


def test_nothing_is_moved_without_gradients(
    five_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aepo_fast.model.policy.OffloadedActivations", None)
    policy_of(five_layers, "full", offloads=True).token_values(make_samples([4, 1]), range(2))


def test_offloading_activations_needs_a_gpu(tmp_path: Path) -> None:
    cfg = load_config("first-light", ["model.activation_offloading=true", "trainer.device=cpu"])
    reason = r"model\.activation_offloading = True: moves something from a GPU"
    with pytest.raises(ConfigError, match=reason):
        resolve.resolve_machine(cfg)
    assert not resolve.resolve_machine(cfg, trains=False).is_gpu
    assert resolve.resolve_machine(tiny_config(tmp_path, tmp_path)).device.type == "cpu"
