"""TRL's trainers with our head in place of theirs, with the real TRL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aepo_kernels import linear_logprob
from aepo_kernels.integrations import seams
from aepo_kernels.integrations import trl as ours
from aepo_kernels.integrations.tiny_models import MODELS, VOCAB, tiny_model
from tests.kernels.gemm_units import counted
from tests.peers.heads import differentiate, errors, token_ids, truth

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    ours.uninstall()


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """Rewards that differ within a group."""
    return [float(len(str(completion)) % 7) for completion in completions]


def run_grpo(model_dir: Path, folder: Path) -> list[dict[str, float]]:
    """Loss, gradient norm and entropy of each of 4 steps of TRL's GRPO on the CPU."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    config = GRPOConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        learning_rate=1e-3,
        beta=0.04,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        reward_funcs=length_reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": f"what is {i}"} for i in range(16)]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: step[name] for name in ("loss", "grad_norm", "entropy")} for step in steps]


def test_grpo_trains_as_with_its_own_head(tiny_model_dir: Path, tmp_path: Path) -> None:
    theirs = run_grpo(tiny_model_dir, tmp_path)
    ours.install()
    found = run_grpo(tiny_model_dir, tmp_path)
    assert len(found) == len(theirs) == 4
    for step, expected in zip(found, theirs, strict=True):
        # The first loss is a sum that cancels, of terms near 1.
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert found[-1]["grad_norm"] > 0.1


def run_offline(kind: str, model_dir: Path, folder: Path) -> list[dict[str, float]]:
    """All metrics of each of 3 steps of TRL's SFT or DPO on the CPU."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = getattr(trl, f"{kind}Config")(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows: list[dict[str, str]] = [{"text": f"what is {i} and why {i * i}"} for i in range(8)]
    if kind == "DPO":
        rows = [{"prompt": f"is {i}", "chosen": f" {i * i}", "rejected": " no"} for i in range(8)]
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.train()
    return [
        {name: value for name, value in entry.items() if isinstance(value, float)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_sft_and_dpo_report_the_same(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    theirs = run_offline(kind, tiny_model_dir, tmp_path)
    ours.install()
    found = run_offline(kind, tiny_model_dir, tmp_path)
    assert len(found) == 3 and len(found[0]) > 4
    for step, expected in zip(found, theirs, strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)


def scores_in_trl(name: str, temperature: float) -> Any:
    """The scores of a tiny float32 model by TRL's own patched forward."""
    from trl.trainer.utils import add_fused_lm_head

    model, ids = tiny_model(name), token_ids()
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    return differentiate(model, out.log_probs, out.entropy)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_head_against_float64(name: str) -> None:
    expected = truth(name, token_ids(), 0.7)
    theirs = errors(scores_in_trl(name, 0.7), expected)
    ours.install()
    found = errors(scores_in_trl(name, 0.7), expected)
    assert max(theirs) < 1e-4, "the seam has changed"
    assert max(found) < 2e-5


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")])
def test_a_head_without_an_adapter_is_frozen_and_takes_two_gemms(outputs: tuple[str, ...]) -> None:
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    model, ids, found = tiny_model("qwen2"), token_ids(), []
    add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    leaves = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    torch.nn.init.normal_(leaves[1])
    weight = model.get_output_embeddings().weight
    for install in (None, ours.install):
        if install is not None:
            install()
        with counted(ids[:, 1:].numel(), weight.shape[1], weight.shape[0]) as units:
            out = adapted(input_ids=ids, labels=ids, fused_lm_head=True)
            found.append(torch.autograd.grad(out.log_probs.sin().sum(), leaves))
    assert not weight.requires_grad and units.total == pytest.approx(2)
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_install_says_what_it_replaced_and_uninstall_puts_it_back() -> None:
    import trl
    from trl.trainer import utils

    before = utils._ChunkedLogProbFunction
    said = ours.install()
    assert said.startswith(f"trl {trl.__version__}: trl.trainer.utils._ChunkedLogProbFunction -> ")
    assert ours.install() == said and utils._ChunkedLogProbFunction.apply is ours.logprobs
    ours.uninstall()
    assert utils._ChunkedLogProbFunction is before
    ours.uninstall()


def test_an_older_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams.metadata, "version", lambda _: "1.14.2")
    with pytest.raises(ImportError, match=r"trl 1.14.2 is older than 1.15.*pip install -U trl"):
        ours.install()


def test_another_signature_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    other = SimpleNamespace(forward=lambda ctx, hidden, weight: None)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", other)
    with pytest.raises(ImportError, match=r"forward takes \(ctx, hidden, weight\) and not \(ctx, "):
        ours.install()
    assert utils._ChunkedLogProbFunction is other


def head_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 8, generator=generator)
    weight = torch.randn(VOCAB, 8, generator=generator)
    return hidden, weight, torch.randint(VOCAB, (6,), generator=generator)


def test_a_partitioned_weight_is_refused() -> None:
    hidden, weight, targets = head_inputs()
    weight.ds_id = 7  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="ZeRO-3"):
        ours.logprobs(hidden, weight, None, targets, 1.0, 32768)


def test_autocast_multiplies_in_its_dtype() -> None:
    hidden, weight, targets = head_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours.logprobs(hidden, weight, None, targets, 1.0, 32768, outputs=("entropy",))
    expected = linear_logprob(hidden.bfloat16(), weight, targets)
    assert torch.equal(found[0], expected.logprob) and found[2:] == (None, None, None)  # type: ignore[arg-type]


def test_all_outputs_are_those_of_trl() -> None:
    from trl.trainer.utils import _ChunkedLogProbFunction

    hidden, weight, targets = head_inputs()
    logits = hidden.double() @ weight.double().T
    targets[:3] = logits[:3].argmax(1)
    arguments = (hidden, weight, None, targets, 0.7, 64, 5.0, 0.5)
    theirs = _ChunkedLogProbFunction.apply(*arguments)
    found = ours.logprobs(*arguments)
    for left, right in zip(found[:4], theirs[:4], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[4], theirs[4]) and found[4].sum() >= 3  # type: ignore[arg-type,union-attr]
    tempered = 5.0 * torch.tanh(logits * 0.5 / 5.0) / 0.7
    squares = torch.log_softmax(tempered, 1).exp().square().sum(1).log()
    torch.testing.assert_close(found[2].double(), squares, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    assert math.isclose(found[3][0].item(), tempered[0].mean().item(), rel_tol=1e-4)  # type: ignore[index]
