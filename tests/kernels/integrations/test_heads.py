"""Heads of transformers models, as `head_arguments` hands them to the kernels."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from aepo_kernels import linear_logprob
from aepo_kernels.integrations import backbone_of, head_arguments
from aepo_kernels.integrations.heads import compare_logits, relative_error, unwrapped
from aepo_kernels.integrations.tiny_models import MODELS, VOCAB, tiny_model


def token_logprobs(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the next tokens by the kernels, and by the model's own logits."""
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = torch.log_softmax(logits.double(), -1).gather(1, ids[:, 1:].flatten()[:, None])
    hidden = backbone_of(model)(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    weight, arguments = head_arguments(model)
    found = linear_logprob(hidden, weight, ids[:, 1:].flatten(), **arguments)
    return found.logprob, expected[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_gradients_of_each_kind_of_head(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    found, expected = token_logprobs(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(value.sin().sum(), parameters, allow_unused=True)
        for value in (found, expected)
    ]
    for left, right in zip(*grads, strict=True):
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


SETTINGS = {
    "qwen2": (1.0, None),
    "gemma2": (1.0, 2.0),
    "granite": (1 / 4.0, None),
    "cohere": (0.25, None),
    "hyperclovax": (0.5, None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_read_from_the_config(name: str) -> None:
    _, arguments = head_arguments(tiny_model(name))
    assert (arguments["logit_scale"], arguments["softcap"]) == SETTINGS[name]


def with_config(head: nn.Module | None, **settings: Any) -> Any:
    """As little of a model as `head_arguments` looks at."""
    config = SimpleNamespace(to_dict=lambda: settings)
    config.get_text_config = lambda: config
    return SimpleNamespace(get_output_embeddings=lambda: head, config=config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"output_multiplier": 3.0, "final_logit_softcapping": 20.0}, (3.0, 20.0)),  # Muse
        ({"lm_head_multiplier": 0.125}, (0.125, None)),  # Falcon-H1
        ({"logits_soft_cap": 30.0}, (1.0, 30.0)),  # RecurrentGemma
        ({"output_logit_soft_cap": 15.0}, (1.0, 15.0)),  # xLSTM
        ({"logits_scaling": 8.0, "model_type": "granite"}, (0.125, None)),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, (8.0, None)),
        ({"logit_scale": None}, (1.0, None)),
        ({"logit_scale": "inv_sqrt_d_model", "model_type": "mpt"}, (1.0, None)),
    ],
)
def test_every_spelling_of_a_scale_and_a_cap(settings: dict, expected: tuple) -> None:
    _, arguments = head_arguments(with_config(nn.Linear(4, 9), **settings))
    assert (arguments["logit_scale"], arguments["softcap"]) == expected


@pytest.mark.parametrize("kind", ["falcon_h1", "mpt"])
def test_models_whose_config_needs_care(kind: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "mamba_d_ssm": 32, "mamba_n_heads": 4}
    special = {"lm_head_multiplier": 0.3, "vocab_size": 64, "n_layers": 1, "n_heads": 2}
    config = CONFIG_MAPPING[kind]()
    chosen = {**sizes, **special, "d_model": 32, "mamba_d_head": 8, "num_attention_heads": 2}
    chosen |= {"num_key_value_heads": 2, "intermediate_size": 32, "logit_scale": 0.5}
    known = config.to_dict()
    settings = {key: value for key, value in chosen.items() if key in known}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings)).eval()
    assert relative_error(*compare_logits(model)) < 1e-5


def test_a_setting_that_nobody_knows_shows_in_the_comparison() -> None:
    model = tiny_model("cohere")
    assert relative_error(*compare_logits(model)) < 1e-5
    model.config.logit_scale = None  # the model read it when it was made
    assert relative_error(*compare_logits(model)) > 1


def test_wrappers_are_looked_through() -> None:
    model = tiny_model("llama")
    ddp = nn.Module()
    ddp.module = model
    compiled = torch.compile(ddp)
    assert unwrapped(ddp) is unwrapped(compiled) is model
    assert head_arguments(compiled)[0] is model.lm_head.weight
    with pytest.raises(ValueError, match="Linear is no transformers model"):
        head_arguments(nn.Linear(2, 2))


class Quantised(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 8)
        self.weight = nn.Parameter(torch.zeros(8, 2, dtype=torch.uint8), requires_grad=False)


def partitioned() -> nn.Linear:
    head = nn.Linear(4, 8)
    head.weight = nn.Parameter(torch.empty(0))
    return head


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "has no linear head but NoneType"),
        (nn.Conv1d(4, 8, 1), "has no linear head but Conv1d"),
        (Quantised(), "Quantised: its weight is quantised to torch.uint8; keep the head in"),
        (partitioned(), r"Linear: its weight is \(0,\) and not \[V, 4\].*gather it"),
    ],
)
def test_heads_that_are_not_known_are_named(head: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_arguments(with_config(head))


def test_importing_the_integrations_needs_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("aepo_kernels.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("transformers", "peft", "trl", "verl"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    import aepo_kernels.integrations as fresh

    assert fresh.head_arguments is not head_arguments
