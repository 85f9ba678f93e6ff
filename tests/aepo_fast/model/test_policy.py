"""Log-probs, layouts under autocast and eager attention, and the gradients of an update."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import ModelConfig, TrainerConfig
from aepo_fast.method.objective import Objective, build_objective
from aepo_fast.method.tokens import StepContext
from aepo_fast.model.load import load_model
from aepo_fast.model.policy import Policy, choose_layout
from aepo_fast.samples import Sample, token_index, token_mean, token_offsets
from aepo_fast.training.optim import build_optimizer
from aepo_fast.training.update import update
from aepo_fast.world import World
from tests.aepo_fast.model.test_batch import lone_logprobs, make_samples
from tests.tiny_run import a_machine, tiny_config


def policy_of(folder: Path, *, attention: str = "sdpa", layout: str = "auto") -> Policy:
    cfg = ModelConfig(path=str(folder), compute_dtype="float32", attention=attention)  # type: ignore[arg-type]
    model = load_model(cfg, folder, a_machine())
    return Policy(model, a_machine(), TrainerConfig(layout=layout, tokens_per_microbatch=40))  # type: ignore[arg-type]


def test_a_process_among_others_makes_fewer_micro_batches(tiny_model_dir: Path) -> None:
    model = policy_of(tiny_model_dir).model
    samples = make_samples([60] * 10 + [30] * 20)
    counts = [
        len(Policy(model, machine, TrainerConfig(layout="padded")).microbatches(samples, range(30)))
        for machine in (a_machine(), replace(a_machine(), data=World(0, 2)))
    ]
    assert counts == [2, 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "grouped"])
@pytest.mark.parametrize("layout", ["shared", "padded", "packed"])
def test_token_values_are_the_models_own_logprobs(
    tiny_model_dir: Path, attention: str, layout: str
) -> None:
    policy = policy_of(tiny_model_dir, attention=attention, layout=layout)
    samples = make_samples([4, 1, 0, 9, 3])
    values = policy.token_values(samples, range(5), second_temperature=1.3)
    expected = torch.cat(
        [lone_logprobs(policy.model, sample).detach() for sample in samples if sample.length]
    )
    torch.testing.assert_close(values.logprob, expected, atol=2e-5, rtol=1e-5)
    assert values.second_logprob is not None
    assert (values.entropy > 0).all() and (values.second_logprob != values.logprob).all()


def test_token_means_are_over_the_chosen_rows() -> None:
    samples = make_samples([2, 3, 1])
    values = torch.tensor([1.0, 2.0, 9.0, 9.0, 9.0, 6.0])
    assert token_mean(values, samples, [0, 2])[0] == 3.0
    assert token_index(token_offsets(samples), [2, 0]).tolist() == [5, 0, 1]


def ragged(prompts: int, generator: torch.Generator) -> tuple[list[Sample], torch.Tensor]:
    """1 to 5 samples a prompt of 0 to 7 tokens, with values that a prompt's samples share."""
    lengths, groups, shared = [], [], []
    for group in range(prompts):
        level = torch.randn((), generator=generator).item()
        for _ in range(int(torch.randint(1, 6, (), generator=generator))):
            lengths.append(int(torch.randint(0, 8, (), generator=generator)))
            groups.append(group)
            shared += [level] * lengths[-1]
    samples = [
        replace(sample, group=group)
        for sample, group in zip(make_samples(lengths), groups, strict=True)
    ]
    return samples, torch.tensor(shared) + 0.3 * torch.randn(len(shared), generator=generator)


def by_prompt(
    values: torch.Tensor, samples: list[Sample], indices: list[int]
) -> tuple[list[float], list[float]]:
    """Sums and counts of the tokens of each prompt, one token after the other."""
    sums: dict[int, float] = {}
    counts: dict[int, float] = {}
    for index in indices:
        first = sum(sample.length for sample in samples[:index])
        group = samples[index].group
        for value in values[first : first + samples[index].length].tolist():
            sums[group] = sums.get(group, 0.0) + value
        counts[group] = counts.get(group, 0.0) + samples[index].length
    return [sums.get(group, 0.0) for group in counts], list(counts.values())


def test_the_standard_error_is_that_of_a_ratio_over_prompts() -> None:
    samples, values = ragged(9, torch.Generator().manual_seed(0))
    assert any(sample.length == 0 for sample in samples)
    for indices in (list(range(len(samples))), list(range(0, len(samples), 2)), [5, 0, 3, 1, 7]):
        mean, error = token_mean(values, samples, indices)
        sums, counts = by_prompt(values, samples, indices)
        truth = sum(sums) / sum(counts)
        squares = sum((s - truth * n) ** 2 for s, n in zip(sums, counts, strict=True))
        num = len(sums)
        assert mean == pytest.approx(truth, rel=1e-12)
        expected = math.sqrt(num / (num - 1) * squares) / sum(counts)
        assert error == pytest.approx(expected, rel=1e-12)


def test_the_standard_error_is_that_of_prompts_drawn_again() -> None:
    samples, values = ragged(60, torch.Generator().manual_seed(1))
    _, error = token_mean(values, samples, range(len(samples)))
    sums, counts = (torch.tensor(x) for x in by_prompt(values, samples, list(range(len(samples)))))
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(len(sums), (4000, len(sums)), generator=generator)
    again = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert error == pytest.approx(again.std().item(), rel=0.1)
    # Tokens of a prompt have much in common, so that they count for less than their number.
    alone = values.std().item() / math.sqrt(len(values))
    assert error > 2 * alone


def test_the_error_of_equal_values_is_zero_and_that_of_one_prompt_unknown() -> None:
    samples = [
        replace(sample, group=index // 2) for index, sample in enumerate(make_samples([2, 3, 1, 0]))
    ]
    assert token_mean(torch.full((6,), 1.5), samples, range(4)) == (1.5, 0.0)
    mean, error = token_mean(torch.arange(6.0), samples, [0, 1])
    assert mean == 2.0 and math.isnan(error)
    # A prompt of which nothing was sampled is one among the prompts still.
    assert math.isfinite(token_mean(torch.arange(6.0), samples, [0, 1, 3])[1])


def test_a_sliding_window_is_never_hidden_behind_a_shared_prompt(tiny_model_dir: Path) -> None:
    policy = policy_of(tiny_model_dir)
    assert policy.layout == "shared"
    policy.model.config.layer_types = ["full_attention", "sliding_attention"]
    assert choose_layout(policy.model, "auto") == "padded"
    with pytest.raises(ConfigError, match="trainer.layout"):
        choose_layout(policy.model, "shared")


def build(folder: Path, model_type: str, **settings: Any) -> Path:
    """Write a model of 2 layers without a tokenizer to `folder`; returns the folder."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "phi3", "starcoder2"])
def test_a_window_of_the_whole_model_is_kept(model_type: str, tmp_path: Path) -> None:
    policy = policy_of(build(tmp_path / "windowed", model_type, sliding_window=4))
    assert not getattr(policy.model.config, "layer_types", None)
    samples = make_samples([4, 1, 9, 3])
    expected = torch.cat([lone_logprobs(policy.model, sample).detach() for sample in samples])
    torch.testing.assert_close(
        policy.token_values(samples, range(4)).logprob, expected, atol=2e-5, rtol=0
    )
    assert policy.layout == "padded"
    with pytest.raises(ConfigError, match="trainer.layout"):
        choose_layout(policy.model, "shared")
    assert policy_of(build(tmp_path / "full", model_type, sliding_window=None)).layout == "shared"


class Configured:
    """As much of a model as choosing a layout looks at."""

    def __init__(self, config: PretrainedConfig) -> None:
        config._attn_implementation = "sdpa"
        self.config = config


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (AutoConfig.for_model("qwen2_moe", sliding_window=7), "shared"),
        (AutoConfig.for_model("qwen3_moe", sliding_window=7, use_sliding_window=True), "padded"),
        (AutoConfig.for_model("llama", sliding_window=7, use_sliding_window=False), "shared"),
        (AutoConfig.for_model("gemma3"), "padded"),  # its text is a part of it
    ],
)
def test_windows_are_found_wherever_configurations_keep_them(
    config: PretrainedConfig, layout: str
) -> None:
    assert choose_layout(Configured(config), "auto") == layout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_casting_weights_once_and_sparse_embeddings_change_no_gradient(
    tiny_model_dir: Path, checkpointing: bool
) -> None:
    cfg = ModelConfig(
        path=str(tiny_model_dir),
        compute_dtype="bfloat16",
        gradient_checkpointing=checkpointing,
    )
    machine = a_machine(compute=torch.bfloat16)
    model = load_model(cfg, tiny_model_dir, machine)
    policy = Policy(model, machine, TrainerConfig(tokens_per_microbatch=20))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert embedding.sparse == (embedding.weight is policy.weight)
    samples = make_samples([4, 1, 9, 3])
    batches = policy.microbatches(samples, range(4))
    assert len(batches) > 1

    def gradients(context: AbstractContextManager[None], sparse: bool) -> list[torch.Tensor]:
        embedding.sparse = sparse
        model.zero_grad()
        with context:
            for batch in batches:
                policy.logprobs(batch).logprob.sum().backward()
        found = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None and grad.layout == torch.strided for grad in found)
        return [grad.clone() for grad in found if grad is not None]

    wanted = gradients(nullcontext(), False)
    for ours, theirs in zip(gradients(policy.same_weights(), True), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_an_update_takes_columns_by_their_names(tiny_model_dir: Path, tmp_path: Path) -> None:
    samples = make_samples([4, 1, 9, 3])
    cfg = tiny_config(tiny_model_dir, tmp_path)
    objective = build_objective(
        cfg,
        samples,
        torch.tensor([1.0, -1.0, 0.5, -0.5]),
        range(4),
        StepContext(1.0, 0.0, 0.0, 0, 0, 1),
        old=None,
        reference=None,
        generator=torch.Generator(),
    )
    turned = replace(objective, columns=dict(reversed(objective.columns.items())))
    assert list(turned.columns) != list(objective.columns)

    def updated(chosen: Objective) -> tuple[float, list[torch.Tensor]]:
        policy = policy_of(tiny_model_dir)
        optimizer = build_optimizer(policy.model, cfg.trainer)
        done = update(
            policy, optimizer, samples, range(4), chosen, max_grad_norm=1.0, check=lambda: None
        )
        assert done.taken and done.loss != 0
        return done.loss, list(policy.model.parameters())

    (loss, weights), (other_loss, others) = updated(objective), updated(turned)
    assert loss == other_loss
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, others, strict=True))


@pytest.mark.parametrize("change", ["recurrent", "positions"])
def test_rows_of_other_models_are_kept_apart(tiny_model_dir: Path, change: str) -> None:
    policy = policy_of(tiny_model_dir)
    if change == "recurrent":
        policy.model.config.layer_types = ["full_attention", "linear_attention"]
    else:
        policy.model.config.rope_parameters = None
    assert choose_layout(policy.model, "auto") == choose_layout(policy.model, "padded") == "padded"
    for layout in ("packed", "shared"):
        with pytest.raises(ConfigError, match="trainer.layout.*rotary embeddings in every layer"):
            choose_layout(policy.model, layout)
