"""The run configuration: one frozen dataclass per TOML section, validated once when built.

Defaults follow the AEPO papers where they state one. `config_io` reads TOML onto these classes
and writes the resolved configuration back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

PolicyLoss = Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo"]
Advantage = Literal["group_norm", "group_mean"]
Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]
EntropyMethod = Literal[
    "none", "bonus", "adaptive_bonus", "entropy_advantage", "top_entropy", "clip_cov", "kl_cov"
]

# What each policy loss uses unless the run says otherwise:
# advantage, aggregation, clip_low, clip_high.
POLICY_DEFAULTS: dict[str, tuple[Advantage, Aggregation, float, float]] = {
    "grpo": ("group_norm", "sequence_mean", 0.2, 0.2),
    "dr_grpo": ("group_mean", "constant_length", 0.2, 0.2),
    "dapo": ("group_norm", "token_mean", 0.2, 0.28),
    "cispo": ("group_norm", "token_mean", 0.2, 0.28),
    "gspo": ("group_norm", "sequence_mean", 3e-4, 4e-4),
}


class ConfigError(ValueError):
    """A configuration that cannot run: says the key, the value, the reason and the next step."""

    def __init__(self, key: str, value: object, reason: str, fix: str) -> None:
        self.key, self.value, self.reason, self.fix = key, value, reason, fix
        super().__init__(f"{key} = {value!r}: {reason}. {fix}.")


def _require(ok: bool, key: str, value: object, reason: str, fix: str) -> None:
    if not ok:
        raise ConfigError(key, value, reason, fix)


def _positive(section: str, obj: object, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        _require(value > 0, f"{section}.{name}", value, "must be above 0", "Set a positive number")


def _not_negative(section: str, obj: object, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        _require(value >= 0, f"{section}.{name}", value, "must not be negative", "Set 0 or more")


@dataclass(frozen=True)
class ModelConfig:
    """Which weights to train and how they are held."""

    path: str = ""  # local folder, hub id, or package:NAME (see `aepo-fast doctor`)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the trained weights
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # autocast
    attention: Literal["auto", "sdpa", "flash_attention_2", "varlen", "eager"] = "auto"
    gradient_checkpointing: bool = True
    liger: bool = False  # Liger-Kernel for the layers other than the head
    head_backend: Literal["auto", "chunked", "fused", "reference"] = "auto"

    def __post_init__(self) -> None:
        _require(
            bool(self.path),
            "model.path",
            self.path,
            "no model is named",
            "Set a folder, a hub id, or package:smollm2-135m-instruct",
        )


@dataclass(frozen=True)
class SourceConfig:
    """One source of prompts: a reasoning-gym task, a JSONL or parquet file, or a hub dataset."""

    kind: Literal["reasoning_gym", "file", "hub"] = "file"
    name: str = ""  # task name, file path, or hub id
    params: dict[str, Any] = field(default_factory=dict)  # of the reasoning-gym task
    size: int = 512  # questions drawn from a reasoning-gym task before duplicates are dropped
    split: str = "train"  # of a hub dataset
    subset: str = ""  # of a hub dataset
    prompt_column: str = "prompt"
    weight: float = 1.0  # share of the prompts drawn from this source

    def __post_init__(self) -> None:
        _require(
            bool(self.name),
            "data.sources.name",
            self.name,
            "the source has no name",
            "Name a reasoning-gym task, a file or a hub dataset",
        )
        _positive("data.sources", self, "size", "weight")


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from and how they are rendered."""

    sources: tuple[SourceConfig, ...] = ()
    system_prompt: str = ""  # empty: the chat template's own default
    instruction: str = ""  # appended to each question after a space
    holdout_fraction: float = 0.2  # of distinct questions, kept from training for evaluation
    seed: int = 0  # of task generation and of the hold-out

    def __post_init__(self) -> None:
        _require(
            len(self.sources) > 0,
            "data.sources",
            self.sources,
            "there is nothing to train on",
            "Add a [[data.sources]] table",
        )
        _require(
            0 <= self.holdout_fraction < 1,
            "data.holdout_fraction",
            self.holdout_fraction,
            "must lie in [0, 1)",
            "Set the share of questions to hold out, e.g. 0.2",
        )


@dataclass(frozen=True)
class RewardConfig:
    """How a completion is scored."""

    # "task": the source's own verifier; "math_verify": boxed or last answer against the `answer`
    # column; otherwise "module:function" with TRL's signature.
    function: str = "task"
    timeout_s: float = 30.0
    on_error: Literal["stop", "count"] = "stop"  # "count" drops the sample and counts it
    soft_overlong_tokens: int = 0  # DAPO's penalty zone before max_new_tokens; 0 is off

    def __post_init__(self) -> None:
        _positive("reward", self, "timeout_s")
        _not_negative("reward", self, "soft_overlong_tokens")
        _require(
            self.function in ("task", "math_verify") or self.function.count(":") == 1,
            "reward.function",
            self.function,
            "is neither a built-in nor module:function",
            'Use "task", "math_verify" or "my_module:my_reward"',
        )


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled; main rows are always sampled at temperature 1, top_p 1."""

    backend: Literal["hf", "vllm"] = "hf"
    max_new_tokens: int = 256
    max_prompt_tokens: int = 1024
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_rows: int = 256  # rows decoded together, hf
    gpu_memory_utilization: float = 0.3  # of the whole GPU, for weights and cache, vllm
    cpu_kv_cache_gib: float = 1.0  # vllm without a GPU
    enforce_eager: bool = False  # vllm without compilation and CUDA graphs

    def __post_init__(self) -> None:
        _positive("rollout", self, "max_new_tokens", "max_prompt_tokens", "batch_rows")
        _positive("rollout", self, "gpu_memory_utilization", "cpu_kv_cache_gib")
        _require(
            self.gpu_memory_utilization <= 1,
            "rollout.gpu_memory_utilization",
            self.gpu_memory_utilization,
            "is a share of the GPU's memory, at most 1",
            "Try 0.3; the trainer needs the rest",
        )


@dataclass(frozen=True)
class LossConfig:
    """The policy loss; None means the default of `policy` (POLICY_DEFAULTS)."""

    policy: PolicyLoss = "grpo"
    advantage: Advantage | None = None
    aggregation: Aggregation | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float = 3.0  # 0 is off
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_method: EntropyMethod = "none"
    entropy_coef: float = 1e-3  # bonus, adaptive_bonus (starting value)
    adaptive_target: float = 0.2  # nats, adaptive_bonus
    adaptive_delta: float = 1e-4  # change of the coefficient a step, adaptive_bonus
    advantage_entropy_coef: float = 0.4  # entropy_advantage
    advantage_entropy_kappa: float = 2.0  # entropy_advantage
    top_entropy_fraction: float = 0.2  # top_entropy
    cov_fraction: float = 2e-4  # clip_cov, kl_cov
    clip_cov_low: float = 1.0  # covariance range from which clip_cov draws
    clip_cov_high: float = 5.0
    kl_cov_coef: float = 1.0

    def __post_init__(self) -> None:
        defaults = POLICY_DEFAULTS[self.policy]
        names = ("advantage", "aggregation", "clip_low", "clip_high")
        for name, default in zip(names, defaults, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        assert self.clip_low is not None
        _positive("loss", self, "clip_low", "clip_high")
        _not_negative("loss", self, "dual_clip", "kl_coef")
        _require(
            self.clip_low < 1,
            "loss.clip_low",
            self.clip_low,
            "would allow a ratio of 0 or less",
            "Set a value below 1, e.g. 0.2",
        )
        _require(
            self.dual_clip == 0 or self.dual_clip > 1,
            "loss.dual_clip",
            self.dual_clip,
            "bounds the ratio of negative advantages from above, so it must exceed 1",
            "Use 3.0, or 0 to switch it off",
        )
        for name in ("top_entropy_fraction", "cov_fraction"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"loss.{name}", value, "is a share of tokens", "Use (0, 1]")
        _require(
            self.policy != "gspo" or self.entropy_method in ("none", "bonus", "adaptive_bonus"),
            "loss.entropy_method",
            self.entropy_method,
            "acts on single tokens, and gspo weighs whole sequences",
            "Use none, bonus or adaptive_bonus with gspo",
        )


@dataclass(frozen=True)
class AepoConfig:
    """AEPO: the temperature-regulated REINFORCE term and its entropy controller."""

    enabled: bool = True
    form: Literal["resample", "one_pass", "dcpo"] = "resample"
    controller: Literal["proportional", "switch"] = "proportional"
    entropy_target: float = 0.5  # H0, nats per token
    alpha: float = 1 / 64
    gain: float = 1.0  # k, per nat
    integral_gain: float = 0.0  # per nat and step; stops while T is at its limit
    lead_steps: float = 0.0  # steps to look ahead along the entropy's trend
    ramp_steps: int = 0  # steps over which the target falls from the first entropy to H0
    temperature_min: float = 0.8  # also T_low of the switch
    temperature_max: float = 1.2  # also T_high of the switch
    reward_threshold: float = 1.0  # R_plus
    normalizer: Literal["draws", "positives"] = "draws"
    rho_clip: float = 3.0  # c, one_pass and dcpo
    baseline: bool = False  # one_pass: weight rho - 1 instead of rho

    def __post_init__(self) -> None:
        _require(
            self.entropy_target > 0,
            "aepo.entropy_target",
            self.entropy_target,
            "an entropy of 0 or less cannot be held",
            "Set a target in nats, e.g. 0.5",
        )
        t_range = (self.temperature_min, self.temperature_max)
        _require(
            0 < self.temperature_min <= 1 <= self.temperature_max,
            "aepo.temperature_min/max",
            t_range,
            "the range must contain 1, the temperature that leaves entropy alone",
            "Use e.g. temperature_min = 0.8, temperature_max = 1.2",
        )
        _positive("aepo", self, "alpha")
        _not_negative("aepo", self, "gain", "integral_gain", "lead_steps", "ramp_steps")
        _require(
            self.rho_clip >= 1,
            "aepo.rho_clip",
            self.rho_clip,
            "bounds rho to [1/c, c]",
            "Set 1 or more, e.g. 3.0",
        )
        _require(
            not self.baseline or self.form == "one_pass",
            "aepo.baseline",
            self.baseline,
            f"has no meaning with form = {self.form!r}",
            'Set form = "one_pass" or baseline = false',
        )


@dataclass(frozen=True)
class TrainerConfig:
    """Steps, batch shape and optimizer."""

    steps: int = 100
    prompts_per_step: int = 64
    group_size: int = 8  # samples per prompt
    minibatches: int = 1  # optimizer steps per pass over a rollout
    epochs: int = 1  # passes over a rollout
    tokens_per_microbatch: int = 16384
    # How rows are laid out for the model: "packed" end to end (varlen attention), "shared" with
    # one copy of the prompt for all its samples (sdpa), "padded" one row per sample.
    layout: Literal["auto", "packed", "shared", "padded"] = "auto"
    lr: float = 1e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 5  # non-finite steps in a row before the run stops
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        names = "steps prompts_per_step group_size minibatches epochs tokens_per_microbatch lr"
        _positive("trainer", self, *names.split(), "max_grad_norm", "max_skipped_steps", "eps")
        _not_negative("trainer", self, "warmup_steps", "weight_decay")
        _require(
            self.minibatches <= self.prompts_per_step,
            "trainer.minibatches",
            self.minibatches,
            f"more minibatches than the {self.prompts_per_step} prompts of a step",
            "Lower minibatches or raise prompts_per_step",
        )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out prompts at temperature 1."""

    every: int = 0  # steps; 0: only before and after training
    prompts: int = 64
    samples: int = 4  # per prompt
    seed: int = 1234

    def __post_init__(self) -> None:
        _not_negative("eval", self, "every", "prompts")
        _positive("eval", self, "samples")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = 50  # steps; 0: only at the end and on a signal
    keep: int = 2

    def __post_init__(self) -> None:
        _not_negative("checkpoint", self, "every")
        _positive("checkpoint", self, "keep")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written besides metrics.jsonl."""

    tensorboard: bool = False
    rollouts_per_step: int = 4  # rows of rollouts.jsonl a step; -1: all
    plot: bool = True


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    output_dir: str = "runs/aepo"
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    aepo: AepoConfig = field(default_factory=AepoConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        _require(
            self.trainer.group_size > 1,
            "trainer.group_size",
            self.trainer.group_size,
            f"advantage {self.loss.advantage!r} compares the samples of a group with each other",
            "Set group_size to 2 or more, e.g. 8",
        )
        _require(
            self.loss.policy != "gspo" or not self.aepo.enabled or self.aepo.form == "resample",
            "aepo.form",
            self.aepo.form,
            "weighs single tokens, and gspo weighs whole sequences",
            'Use form = "resample" with gspo',
        )
        _require(
            self.reward.soft_overlong_tokens < self.rollout.max_new_tokens,
            "reward.soft_overlong_tokens",
            self.reward.soft_overlong_tokens,
            f"must be below rollout.max_new_tokens = {self.rollout.max_new_tokens}",
            "Lower it",
        )
