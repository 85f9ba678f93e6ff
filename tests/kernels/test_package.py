"""The package: what importing it costs, its backends and its errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import aepo_kernels
from aepo_kernels import backend_status, linear_logprob, linear_token_loss, resolve_backend

KERNELS = Path(aepo_kernels.__file__).parents[1]


def test_kernels_folder_is_a_source_root_and_never_a_package() -> None:
    # `kernels` is Hugging Face's import name; a package of ours would shadow it.
    assert KERNELS.name != "kernels" or not (KERNELS / "__init__.py").exists()
    repository = Path(__file__).parents[2]
    assert (repository / "kernels" / "aepo_kernels" / "__init__.py").exists()
    assert not (repository / "kernels" / "__init__.py").exists()


def test_import_needs_nothing_but_torch() -> None:
    script = """
import sys
import torch
before = set(sys.modules)
import aepo_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"torch", "aepo_kernels"}))
print([name for name in ("transformers", "triton", "aepo_fast") if name in sys.modules])
"""
    command = [sys.executable, "-c", script]
    environment = {"PYTHONPATH": str(KERNELS), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def arguments(**changes: Any) -> dict[str, Any]:
    values = {
        "hidden": torch.randn(6, 4),
        "weight": torch.randn(9, 4),
        "targets": torch.arange(6),
    }
    return {**values, **changes}


def test_backend_status_says_what_can_run_and_why_the_rest_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend_status("cpu") == {
        "reference": None,
        "chunked": None,
        "fused": "its kernels need a GPU",
    }
    assert backend_status("cuda") == dict.fromkeys(["reference", "chunked", "fused"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    reason = "its kernels need triton, which is not installed: pip install triton"
    assert backend_status("cuda") == {"reference": None, "chunked": reason, "fused": reason}


def test_fused_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = arguments(hidden=torch.randn(6, 4).double())
    with pytest.raises(ValueError, match="backend = 'fused': .*hidden is float64.*another"):
        linear_logprob(**wide, backend="fused")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend = 'fused': cannot run here .*need a GPU"):
        linear_logprob(**arguments(), backend="fused")


@pytest.mark.parametrize("device", ["xpu", "mps", "hpu", "meta", "privateuseone"])
def test_a_device_without_kernels_is_refused_by_its_name(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AEPO_KERNELS_BACKEND", raising=False)
    for backend in ("auto", "chunked", "fused"):
        with pytest.raises(ValueError, match=f"^backend = .*hidden is on {device}.*cpu or cuda"):
            resolve_backend(backend, device, torch.float32)
        assert backend == "auto" or backend_status(device)[backend] is not None
    monkeypatch.setenv("AEPO_KERNELS_BACKEND", "chunked")
    with pytest.raises(ValueError, match=f"^AEPO_KERNELS_BACKEND = 'chunked'.*on {device}"):
        resolve_backend("auto", device, torch.float32)
    if device == "meta":
        with pytest.raises(ValueError, match="'reference': .*tensors have no numbers"):
            resolve_backend("reference", device, torch.float32)
    else:
        assert resolve_backend("reference", device, torch.float32) == "reference"


@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "temperature", "bias"])
def test_a_tensor_on_meta_is_refused(name: str) -> None:
    extra = {"temperature": torch.ones(6), "bias": torch.zeros(9)}
    moved = {**arguments(), **extra}
    moved[name] = moved[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} .*meta" if name != "hidden" else "on meta"):
        linear_logprob(**moved)


@pytest.mark.parametrize("name", ["softcap", "logit_scale", "lora_scale"])
def test_a_number_that_would_get_no_gradient_is_refused(name: str) -> None:
    learnt = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=f"{name} = requires_grad: it would get no gradient"):
        linear_logprob(**arguments(), **{name: learnt})
    assert linear_logprob(**arguments(), **{name: learnt.detach()}).logprob.isfinite().all()


def test_auto_is_chunked_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("AEPO_KERNELS_BACKEND", raising=False)
    assert linear_logprob(**arguments()).backend == "chunked"
    monkeypatch.setenv("AEPO_KERNELS_BACKEND", "reference")
    assert linear_logprob(**arguments()).backend == "reference"
    assert linear_logprob(**arguments(), backend="chunked").backend == "chunked"
    monkeypatch.setenv("AEPO_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="AEPO_KERNELS_BACKEND = 'fast': no such backend"):
        linear_logprob(**arguments())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.randn(2, 3, 4)}, r"hidden = \(2, 3, 4\): must be \[N, H\]; flatten"),
        ({"hidden": torch.ones(6, 4).int()}, r"hidden = torch.int32: unsupported.*; use bfloat16"),
        ({"hidden": torch.ones(6, 4).long()}, r"hidden = torch.int64: unsupported dtype"),
        ({"weight": torch.randn(4, 9)}, r"weight = \(4, 9\): must be \[V, 4\]; pass lm_head"),
        ({"targets": torch.arange(5)}, r"targets = \(5,\): must be \[6\]"),
        ({"targets": torch.arange(6).int()}, r"targets = torch.int32: must be int64; call .long"),
        ({"targets": torch.arange(6) + 4}, r"targets = 9: outside \[0, 9\).*; check the tokenizer"),
        ({"targets": torch.arange(6) - 1}, r"targets = -1: outside \[0, 9\)"),
        ({"bias": torch.zeros(4)}, r"bias = \(4,\): must be \[9\]"),
        ({"temperature": 0.0}, r"temperature = 0.0: must be positive and finite; pass"),
        ({"temperature": float("nan")}, r"temperature = nan: must be positive"),
        ({"temperature": torch.ones(5)}, r"temperature = \(5,\): must be a float or \[6\]"),
        ({"temperature": torch.arange(6.0)}, r"temperature = 0.0: must be positive"),
        ({"temperature": torch.ones(6).long()}, r"temperature = torch.int64: must be floating"),
        ({"temperature": torch.ones(6).requires_grad_()}, r"temperature = requires_grad: .*detach"),
        ({"second_temperature": -1.0}, r"second_temperature = -1.0: must be positive"),
        ({"softcap": 0.0}, r"softcap = 0.0: must be positive and finite; use None"),
        ({"logit_scale": float("inf")}, r"logit_scale = inf: must be finite"),
        ({"chunk_tokens": 0}, r"chunk_tokens = 0: must be at least 1; use None"),
        ({"backend": "cuda"}, r"backend = 'cuda': no such backend; use one of reference, chunked"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments(**changes))
    with pytest.raises(ValueError, match=message):
        linear_token_loss(**arguments(**changes), token_loss=lambda logprob, *_: logprob.sum())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(5), r"token_tensors\[0\] = \(5,\): must have 6 rows"),
        (torch.tensor(1.0), r"token_tensors\[0\] = \(\): must have 6 rows"),
        (
            torch.ones(6).requires_grad_(),
            r"token_tensors\[0\] = requires_grad: .*; pass tensor.det",
        ),
    ],
)
def test_bad_token_tensors_are_named(tensor: torch.Tensor, message: str) -> None:
    values = arguments()
    with pytest.raises(ValueError, match=message):
        linear_token_loss(
            values["hidden"], values["weight"], values["targets"], lambda lp, *_: lp.sum(), tensor
        )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logprob, *_: logprob, r"token_loss returned \(6,\).*add .sum\(\)"),
        (lambda logprob, *_: 0.0, r"token_loss returned float"),
    ],
)
def test_a_loss_that_is_no_scalar_is_named(loss: Any, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_token_loss(**arguments(), token_loss=loss, backend=backend)
