"""The fused form of linear layers with an adapter, against peft's own and against float64."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from aepo_fast.model.lora_layers import fuse_adapters

RANK, INPUTS, OUTPUTS = 3, 10, 14


def a_layer(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Module:
    """A module whose one linear layer of frozen weights has an adapter in float32."""
    torch.manual_seed(0)
    base = nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype).requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=6.0)
    layer = Linear(base, "default", config=config, r=RANK, lora_alpha=6.0)
    for half in (layer.lora_A["default"], layer.lora_B["default"]):
        half.float()
    nn.init.normal_(layer.lora_B["default"].weight)
    return nn.Sequential(layer)


def results(layer: nn.Module, x: Tensor, *, autocast: bool = False) -> list[Tensor]:
    """Output, and gradients of the input and both halves of the adapter, for one loss."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    (output * weights.to(output.dtype)).sum().backward()
    halves = [p.grad for p in layer.parameters() if p.requires_grad]
    found = [output.detach(), x.grad, *halves]
    layer.zero_grad()
    assert len(halves) == 2 and all(isinstance(one, Tensor) for one in found)
    return found  # type: ignore[return-value]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(found, truth, strict=True)
    ]


@pytest.mark.parametrize("shape", [(5, INPUTS), (2, 3, INPUTS), (1, INPUTS)])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_peft_s(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = a_layer(bias=bias), torch.randn(*shape)
    expected = results(layer, x)
    fuse_adapters(layer)  # type: ignore[arg-type]
    found = results(layer, x)
    assert type(layer[0]) is not Linear
    assert [one.shape for one in found] == [one.shape for one in expected]
    assert max(errors(found, expected)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_no_error_is_much_above_peft_s(dtype: torch.dtype) -> None:
    layer, x = a_layer(dtype), torch.randn(64, INPUTS, dtype=dtype)
    truth = results(a_layer(dtype).double(), x.double())
    theirs = errors(results(layer, x, autocast=True), truth)
    fuse_adapters(layer)  # type: ignore[arg-type]
    found = results(layer, x, autocast=True)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == dtype
    assert all(half.dtype == torch.float32 for half in found[2:])
    for ours, peft in zip(errors(found, truth), theirs, strict=True):
        assert ours <= 2 * peft and peft < 0.02


def test_no_tokens_give_empty_rows_and_zero_gradients() -> None:
    layer = a_layer()
    fuse_adapters(layer)  # type: ignore[arg-type]
    output, dx, da, db = results(layer, torch.randn(0, INPUTS))
    assert output.shape == (0, OUTPUTS) and dx.shape == (0, INPUTS)
    assert not da.any() and not db.any()


def test_an_adapter_that_is_off_or_merged_is_left_to_peft() -> None:
    layer, x = a_layer(), torch.randn(5, INPUTS)
    fuse_adapters(layer)  # type: ignore[arg-type]
    with_adapter = layer(x)
    layer[0].enable_adapters(False)
    assert torch.equal(layer(x), layer[0].base_layer(x))
    layer[0].enable_adapters(True)
    layer[0].merge()
    torch.testing.assert_close(layer(x), with_adapter)


def test_the_first_layer_s_input_needs_no_gradient() -> None:
    layer = a_layer()
    fuse_adapters(layer)  # type: ignore[arg-type]
    layer(torch.randn(5, INPUTS)).sum().backward()
    assert layer[0].lora_A["default"].weight.grad.abs().sum() > 0
