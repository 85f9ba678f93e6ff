"""A setting that does nothing is refused: every condition, and what is never refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.cli.evaluate import _configuration
from aepo_fast.config.conditions import conditions_of
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.method import Controller, EntropyMethod, Form, LossConfig
from aepo_fast.config.over_ranks import check_parts
from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config, RolloutConfig, TrainerConfig
from aepo_fast.config.shipped import shipped_configs
from aepo_fast.config.toml import dump_config, load_config
from aepo_fast.method.policy_losses import POLICY_LOSSES
from aepo_fast.model.kept import check_top_k
from aepo_fast.training.optim import learning_rate

SOURCE = '[[data.sources]]\nkind = "reasoning_gym"\nname = "products"\n'
MINIMAL = f'[model]\npath = "some/model"\n{SOURCE}'
KINDS, BACKENDS = ("reasoning_gym", "file", "hub"), ("hf", "vllm")
METHODS, FORMS, CONTROLLERS = (
    typing.get_args(choice) for choice in (EntropyMethod, Form, Controller)
)
POLICIES = tuple(POLICY_LOSSES)
CORRECTIONS = ("off", "token_truncate", "sequence_mask", "icepop")
NO_AEPO = "aepo.enabled=false"  # with which every entropy_method goes


@dataclasses.dataclass(frozen=True)
class Case:
    """A setting with a value, and the values of another for which it acts and does nothing."""

    key: str
    value: Any
    other: str
    acts: tuple[Any, ...]
    idle: tuple[Any, ...]
    beside: tuple[str, ...] = ()


def choices(
    key: str, value: Any, other: str, acts: str, known: Sequence[str], *beside: str
) -> Case:
    """It acts for the choices named in `acts` and does nothing for the others of `known`."""
    users = tuple(acts.split())
    assert set(users) < set(known)
    return Case(key, value, other, users, tuple(x for x in known if x not in users), beside)


# Read from the code that uses each setting.
OF_METHODS = [
    choices(f"loss.{name}", value, "loss.entropy_method", users, METHODS, NO_AEPO)
    for name, value, users in [
        ("entropy_coef", 0.01, "bonus adaptive_bonus"),
        ("adaptive_target", 0.5, "adaptive_bonus entropic repo_r"),
        ("adaptive_delta", 0.01, "adaptive_bonus"),
        ("advantage_entropy_coef", 0.1, "entropy_advantage"),
        ("advantage_entropy_kappa", 3.0, "entropy_advantage"),
        ("top_entropy_fraction", 0.5, "top_entropy"),
        ("cov_fraction", 0.01, "clip_cov kl_cov"),
        ("clip_cov_low", 0.5, "clip_cov"),
        ("clip_cov_high", 9.0, "clip_cov"),
        ("kl_cov_coef", 2.0, "kl_cov"),
        ("entropic_kp", 2.0, "entropic"),
        ("entropic_ki", 0.1, "entropic"),
        ("entropic_min_prob", 0.9, "entropic"),
        ("repo_r_zeta", 0.01, "repo_r"),
        ("repo_r_zeta_min", 0.001, "repo_r"),
        ("repo_r_zeta_max", 0.1, "repo_r"),
        ("era_scale", 3.0, "era"),
        ("era_entropy_low", 0.3, "era"),
        ("ucpo_tau", 0.5, "ucpo"),
        ("ds_grpo_gamma", 0.1, "ds_grpo"),
    ]
]
SAPO = ("loss.policy=sapo",)
VLLM = "rollout.backend=vllm"
FILE = "data.sources.0.kind=file"
TWO, ONE = '[{kind="file", name="a"}, {kind="file", name="b"}]', '[{kind="file", name="a"}]'
CASES = [
    *OF_METHODS,
    choices("loss.params", {"tau_pos": 2.0}, "loss.policy", "sapo", POLICIES),
    Case("loss.clip_low", 0.1, "aepo.enabled", (True,), (False,), SAPO),
    Case("loss.clip_high", 0.1, "aepo.form", ("lift", "expected", "one_pass"), ("dcpo",), SAPO),
    Case("loss.clip_high", 0.1, "loss.policy", POLICIES[:-1], ("sapo",), (NO_AEPO,)),
    choices("loss.dual_clip", 2.0, "loss.policy", "grpo dr_grpo dapo", POLICIES),
    choices("loss.dual_clip", 0.0, "loss.policy", "grpo dr_grpo dapo", POLICIES),
    Case("loss.kl_estimator", "k1", "loss.kl_coef", (0.1,), (0.0,)),
    choices("loss.correction_low", 0.2, "loss.correction", "sequence_mask icepop", CORRECTIONS),
    choices(
        "loss.correction_high",
        2.5,
        "loss.correction",
        "token_truncate sequence_mask icepop",
        CORRECTIONS,
    ),
    choices("aepo.alpha", 0.3, "aepo.form", " ".join(x for x in FORMS if x != "dcpo"), FORMS),
    choices("aepo.gain", 0.7, "aepo.controller", "published pi", CONTROLLERS),
    choices("aepo.integral_gain", 0.2, "aepo.controller", "pi", CONTROLLERS),
    choices("aepo.normalizer", "positives", "aepo.form", "resample", FORMS),
    choices("aepo.rho_clip", 2.0, "aepo.form", "lift one_pass dcpo", FORMS),
    choices("aepo.baseline", True, "aepo.form", "one_pass", FORMS),
    Case("model.lora.alpha", 8.0, "model.lora.rank", (1, 16), (0,)),
    Case("model.lora.targets", ("q_proj",), "model.lora.rank", (1, 16), (0,)),
    Case("model.lora.rslora", True, "model.lora.rank", (1, 16), (0,)),
    Case("model.quantization", "nf4", "model.lora.rank", (1, 16), (0,)),
    Case("model.freeze_router", True, "model.lora.rank", (0,), (1, 16)),
    Case("model.router_aux_loss_coef", 0.01, "model.lora.rank", (0,), (1, 16)),
    Case("model.router_aux_loss_coef", 0.01, "model.freeze_router", (False,), (True,)),
    Case("rollout.top_p", 0.9, "rollout.top_k", (2, 64), (0,)),
    choices("rollout.batch_rows", 64, "rollout.backend", "hf", BACKENDS),
    choices("rollout.gpu_memory_utilization", 0.5, "rollout.backend", "vllm", BACKENDS),
    choices("rollout.cpu_kv_cache_gib", 2.0, "rollout.backend", "vllm", BACKENDS),
    choices("rollout.enforce_eager", True, "rollout.backend", "vllm", BACKENDS),
    choices("rollout.allow_untested_vllm", True, "rollout.backend", "vllm", BACKENDS),
    choices("rollout.tensor_parallel", 2, "rollout.backend", "vllm", BACKENDS),
    choices("rollout.engine_kwargs", {"a": 1}, "rollout.backend", "vllm", BACKENDS),
    choices("rollout.share_weights", False, "rollout.backend", "vllm", BACKENDS),
    choices("rollout.sleep", "none", "rollout.backend", "vllm", BACKENDS),
    choices("rollout.offload_optimizer", True, "rollout.backend", "vllm", BACKENDS),
    Case("rollout.offload_optimizer", True, "rollout.steps_ahead", (0,), (1,), (VLLM,)),
    choices(
        "rollout.offload_optimizer",
        True,
        "trainer.offload",
        "none",
        ("none", "optimizer", "all"),
        VLLM,
    ),
    Case("rollout.share_weights", False, "rollout.steps_ahead", (0,), (1,), (VLLM,)),
    Case("rollout.sleep", "none", "rollout.steps_ahead", (0,), (1,), (VLLM,)),
    choices("data.sources.0.params", {"a": 1}, "data.sources.0.kind", "reasoning_gym", KINDS),
    choices("data.sources.0.size", 64, "data.sources.0.kind", "reasoning_gym", KINDS),
    choices("data.sources.0.split", "test", "data.sources.0.kind", "hub", KINDS),
    choices("data.sources.0.subset", "main", "data.sources.0.kind", "hub", KINDS),
    choices("data.sources.0.prompt_column", "q", "data.sources.0.kind", "file hub", KINDS),
    choices("data.sources.0.answer_column", "q", "data.sources.0.kind", "file hub", KINDS),
    Case(
        "data.answer_column", "q", "data.sources", (ONE,), ('[{kind="reasoning_gym", name="a"}]',)
    ),
    Case("data.sources.0.weight", 2.0, "data.sources", (TWO,), (ONE,)),
    Case("data.seed", 3, "data.holdout_fraction", (0.2,), (0.0,), (FILE,)),
    Case("reward.max_error_share", 0.1, "reward.on_error", ("count",), ("stop",)),
    Case("trainer.lr_schedule", "cosine", "trainer.warmup_steps", (0, 98), (99, 300)),
    Case("trainer.lr_schedule", "linear", "trainer.steps", (9, 50), (1,)),
    Case("eval.prompts", 8, "data.holdout_fraction", (0.2,), (0.0,)),
    Case("eval.samples", 8, "data.holdout_fraction", (0.2,), (0.0,)),
    Case("eval.every", 8, "data.holdout_fraction", (0.2,), (0.0,)),
    Case("eval.samples", 8, "eval.prompts", (64, 1), (0,)),
    Case("eval.every", 8, "eval.prompts", (64, 1), (0,)),
    Case("checkpoint.keep_best", "eval/avg@k", "eval.every", (5,), (0,)),
]


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL)
    return str(path)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def read(config: str, case: Case, other: Any) -> Config:
    own = f"{case.key}={toml(case.value)}"
    return load_config(config, [*case.beside, f"{case.other}={toml(other)}", own])


def value_of(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[int(part)] if part.isdigit() else getattr(cfg, part)
    return cfg


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.key}-{case.other}")
def test_a_setting_is_refused_where_it_does_nothing_and_else_accepted(
    minimal: str, case: Case
) -> None:
    for other in case.acts:
        assert value_of(read(minimal, case, other), case.key) == case.value
    key, decides = (name.replace(".0.", ".") for name in (case.key, case.other))
    for other in case.idle:
        with pytest.raises(ConfigError) as caught:
            read(minimal, case, other)
        error = caught.value
        assert error.key == key and error.value == case.value
        assert error.reason.startswith("does nothing with ") and decides in error.reason
        if case.other != "data.sources":
            assert str(other) in error.reason
        assert error.fix.startswith("Leave it out, or ") and decides in error.fix
        assert all(part in str(error) for part in (key, repr(case.value), decides))


def with_conditions(cls: Any, prefix: str) -> Iterator[str]:
    for item in dataclasses.fields(cls):
        if conditions_of(item):
            yield prefix + item.name
        hint = typing.get_type_hints(cls)[item.name]
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from with_conditions(inner, f"{prefix}{item.name}.")


def test_every_condition_has_its_case_and_every_case_a_condition() -> None:
    assert {case.key.replace(".0.", ".") for case in CASES} == set(with_conditions(Config, ""))


def test_every_setting_of_an_entropy_method_says_which() -> None:
    found = {item.name: item for item in dataclasses.fields(LossConfig)}
    names = list(found)
    of_methods = names[names.index("entropy_method") + 1 : names.index("correction")]
    assert of_methods[-1] == "ds_grpo_gamma"
    for name in of_methods:
        keys = [key for needs in conditions_of(found[name]) for key in needs.keys]
        assert keys == ["entropy_method"], f"loss.{name} does not say which methods read it"
    assert {f"loss.{name}" for name in of_methods} == {case.key for case in OF_METHODS}


def test_a_seed_that_draws_nothing_and_holds_nothing_out_is_refused(minimal: str) -> None:
    settings = ["data.seed=3", "data.holdout_fraction=0.0"]
    assert load_config(minimal, settings).data.seed == 3  # it draws the task's questions
    reason = "data.holdout_fraction = 0.0 and no source of kind 'reasoning_gym' in data.sources"
    with pytest.raises(ConfigError, match=f"data.seed = 3: does nothing with {reason}"):
        load_config(minimal, [*settings, FILE])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_is_refused_exactly_where_it_changes_no_rate(schedule: Any) -> None:
    for steps, warmup in itertools.product(range(1, 6), range(7)):
        cfg = TrainerConfig(steps=steps, warmup_steps=warmup)
        constant = [learning_rate(cfg, step) for step in range(steps)]
        object.__setattr__(cfg, "lr_schedule", schedule)  # as if nothing were refused
        if [learning_rate(cfg, step) for step in range(steps)] != constant:
            dataclasses.replace(cfg)
            continue
        with pytest.raises(ConfigError, match="trainer.lr_schedule"):
            dataclasses.replace(cfg)


def test_the_message_is_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        LossConfig(entropic_kp=2.0)
    assert str(caught.value) == (
        "loss.entropic_kp = 2.0: does nothing with loss.entropy_method = 'none'. "
        "Leave it out, or set loss.entropy_method = 'entropic'."
    )


def test_sections_alone_judge_what_they_can() -> None:
    # The correction is decided by the rollouts, in a Config.
    assert LossConfig(correction_high=4.0).correction_high == 4.0
    with pytest.raises(ConfigError, match=r"rollout.sleep = 'none'.*rollout.backend = 'hf'"):
        RolloutConfig(sleep="none")


def test_a_correction_that_rollouts_decide_decides_over_its_bounds(minimal: str) -> None:
    with pytest.raises(ConfigError, match=r"correction_high = 4.0: .* loss.correction = 'off'"):
        load_config(minimal, ["loss.correction_high=4.0"])
    assert load_config(minimal, ["loss.correction_high=4.0", VLLM]).loss.correction_high == 4.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("top_k=1", "rollout.top_k = 1: is neither 0, for all tokens, nor from 2 to 1024: "),
        ("top_k=-1", "rollout.top_k = -1: .* Set e.g. 64"),
        ("top_k=2000", "rollout.top_k = 2000: .* the ids of all that are kept go with each token"),
        ("top_p=0.0", "rollout.top_p = 0.0: is no share of probability above 0 and at most 1"),
        ("top_p=1.5", "rollout.top_p = 1.5: "),
        ("top_p=0.9", "the loss needs the ids .* top_p alone keeps any number.*set rollout.top_k"),
    ],
)
def test_what_samples_are_drawn_from_is_bounded(minimal: str, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, [f"rollout.{setting}"])


@pytest.mark.parametrize("by", ["setting", "environment"])
def test_a_head_over_all_tokens_does_not_go_with_a_part_of_them(
    minimal: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["rollout.top_k=64", "trainer.device=cpu", "model.compute_dtype=float32"]
    resolve_machine(load_config(minimal, settings))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as if it could run here
    if by == "setting":
        settings.append("model.head_backend=fused")
    else:
        monkeypatch.setenv("AEPO_KERNELS_BACKEND", "fused")
    with pytest.raises(ConfigError, match="rollout.top_k = 64: .*model.head_backend = .chunked"):
        resolve_machine(load_config(minimal, settings))


def test_a_vocabulary_in_parts_and_one_that_is_kept_whole_are_refused(minimal: str) -> None:
    cfg = load_config(minimal, ["rollout.top_k=64"])
    check_top_k(cfg.rollout, 65)
    with pytest.raises(ConfigError, match="rollout.top_k = 64: leaves none of the model's 64"):
        check_top_k(cfg.rollout, 64)
    split = load_config(minimal, ["rollout.top_k=64", "trainer.tensor_parallel=2"])
    with pytest.raises(ConfigError, match="rollout.top_k = 64: .*trainer.tensor_parallel = 2"):
        check_parts(split, 2, "chunked")


def test_a_default_is_never_refused(minimal: str) -> None:
    load_config(minimal, ["loss.entropic_kp=1.0", "rollout.sleep=true", "loss.correction_high=1.0"])
    load_config(minimal, ["aepo.controller=published", "aepo.form=dcpo", "aepo.alpha=0.015625"])
    with pytest.raises(ConfigError, match=r"aepo.alpha = 1.0: does nothing with aepo.form"):
        load_config(minimal, ["aepo.controller=published", "aepo.form=dcpo", "aepo.alpha=1.0"])


def test_settings_of_aepo_stay_where_it_is_switched_off(minimal: str) -> None:
    on = ["aepo.form=one_pass", "aepo.baseline=true", "aepo.entropy_target=0.3", "aepo.alpha=0.2"]
    assert load_config(minimal, [*on, NO_AEPO]).aepo.baseline


def loads_again(cfg: Config, folder: Path) -> bool:
    path = folder / "resolved.toml"
    path.write_text(dump_config(cfg))
    return load_config(str(path)) == cfg


VARIANTS = [
    *(f"loss.policy={name}" for name in POLICIES),
    *(f"loss.entropy_method={name}" for name in METHODS),
    *(f"loss.correction={name}" for name in CORRECTIONS),
    *(f"aepo.controller={name}" for name in CONTROLLERS),
    *(f"aepo.form={name}" for name in FORMS),
    *(f"rollout.backend={name}" for name in BACKENDS),
    *(f"data.sources.0.kind={name}" for name in KINDS),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resolved_configuration_loads_again(minimal: str, tmp_path: Path, variant: str) -> None:
    aepo = NO_AEPO if "method" in variant else "aepo.enabled=true"
    for backend in BACKENDS:
        settings = [aepo, f"rollout.backend={backend}", variant]
        assert loads_again(load_config(minimal, settings), tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.key}-{case.other}")
def test_a_resolved_setting_loads_again(minimal: str, tmp_path: Path, case: Case) -> None:
    for other in case.acts:
        assert loads_again(read(minimal, case, other), tmp_path)


@pytest.mark.parametrize("name", list(shipped_configs()))
def test_shipped_configs_go_with_every_documented_choice(name: str, tmp_path: Path) -> None:
    choices_of = {
        "rollout.backend": BACKENDS,
        "loss.policy": POLICIES,
        "aepo.controller": CONTROLLERS,
        "aepo.enabled": ("true", "false"),
        # First-light's alpha would do nothing with dcpo.
        "aepo.form": [form for form in FORMS if form != "dcpo" or name != "first-light"],
        "rollout.steps_ahead": ("0", "1"),
    }
    for key, values in choices_of.items():
        for value in values:
            assert loads_again(load_config(name, [f"{key}={value}"]), tmp_path)
    for method in METHODS:
        assert load_config(name, [NO_AEPO, f"loss.entropy_method={method}"])
    assert not load_config(name, [VLLM]).rollout.enforce_eager  # so with CUDA graphs on a GPU
    assert load_config(name, [VLLM, "rollout.enforce_eager=true"])  # as make train does on a CPU


def test_another_task_is_evaluated_whatever_the_run_held_out(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(f"{MINIMAL}[eval]\nprompts = 8\nevery = 5\nseed = 7\n")
    overrides = ["data.seed=3"]
    cfg, _ = _configuration("some/model", str(run), "other.jsonl", overrides)
    assert cfg.data.sources[0].name == "other.jsonl" and cfg.eval.seed == 7
    cfg, _ = _configuration("some/model", str(run), "chain_sum", overrides)
    assert cfg.data.seed == 3
