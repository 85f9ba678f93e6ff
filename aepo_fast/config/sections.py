"""The run configuration: one frozen dataclass per TOML section, validated once when built.

Defaults follow the AEPO papers where they state one. A setting that acts only beside others says
what it `needs`, and is refused where it would do nothing (`conditions`). `toml` reads
TOML onto these classes and writes the resolved configuration back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from os.path import expanduser
from typing import Any, Literal

from aepo_fast.config.conditions import (
    Needs,
    above_zero,
    one_of,
    refuse_across_sections,
    refuse_what_does_nothing,
    setting,
    settle,
    settle_older,
)
from aepo_fast.config.data import DataConfig
from aepo_fast.config.errors import ConfigError, require, require_not_negative, require_positive
from aepo_fast.config.method import (
    ONE_TEMPERATURE_FORMS,
    SECOND_TEMPERATURE_METHODS,
    TOKEN_FORMS,
    AepoConfig,
    LossConfig,
)
from aepo_fast.config.model import Attention, ComputeDtype, LoraConfig, ModelConfig
from aepo_fast.config.trainer import TrainerConfig

__all__ = [
    "AepoConfig",
    "Attention",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LoggingConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "TrainerConfig",
]


@dataclass(frozen=True)
class RewardConfig:
    """How a completion is scored."""

    # "task": the source's own verifier; "math_verify": the final answer against the `answer`
    # column; otherwise "module:function" with TRL's signature.
    function: str = "task"
    # Most seconds for one completion, or with a function of your own for one call.
    timeout_s: float = 30.0
    # What an error, a timeout, a crash or a NaN does: "count" drops the sample and counts it,
    # "stop" ends the run.
    on_error: Literal["count", "stop"] = "count"
    # Share of a step's samples that may fail; more end the run. One may always fail, all never.
    max_error_share: float = setting(0.5, needs=one_of("on_error", "count"))
    # Most memory of the process that scores, GiB. Where the system's own limit is lower, it holds.
    memory_gib: float = 8.0
    # Groups are scored while others are still being sampled; false: all of a step in one call.
    overlap: bool = True
    soft_overlong_tokens: int = 0  # DAPO's penalty zone before rollout.max_new_tokens; 0 is off

    def __post_init__(self) -> None:
        require_positive("reward", self, "timeout_s", "memory_gib")
        require(
            0 <= self.max_error_share <= 1,
            "reward.max_error_share",
            self.max_error_share,
            "is a share of a step's samples",
            "Use [0, 1], e.g. 0.5",
        )
        refuse_what_does_nothing("reward", self)
        require_not_negative("reward", self, "soft_overlong_tokens")
        require(
            self.function in ("task", "math_verify") or self.function.count(":") == 1,
            "reward.function",
            self.function,
            "is neither a built-in nor module:function",
            'Use "task", "math_verify" or "my_module:my_reward"',
        )

    @property
    def memory_bytes(self) -> int:
        """memory_gib in bytes."""
        return int(self.memory_gib * 2**30)

    def allowed_errors(self, samples: int) -> int:
        """How many of so many samples may fail: max_error_share of them, one at least, never all.

        That leaves a step of few samples the one that hangs, and stops a reward that never works.
        """
        return min(max(1, int(self.max_error_share * samples)), samples - 1)


_VLLM = one_of("backend", "vllm")
_IN_TURN = one_of("steps_ahead", 0)  # sampling and training; else vLLM holds weights of its own
_MOST_KEPT = 1024  # of a token: 4 KiB of ids, and as many rows of the head's weight are read
_TOP_K = Needs(
    ("top_k",),
    lambda top_k: top_k > 0,
    "set {0} to the most tokens to keep, e.g. 64",
    "{0} = 0: the loss needs the ids of all kept tokens, and top_p alone keeps any number",
)


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled; main ones are always at temperature 1."""

    backend: Literal["hf", "vllm"] = "hf"  # what samples: transformers or vLLM
    max_new_tokens: int = 256  # a completion is cut off here
    max_prompt_tokens: int = 1024  # longer prompts are dropped, see data.long_prompts
    # Dtype of the sampler. "auto" is bfloat16 where the device has instructions for its GEMMs, else
    # float32.
    dtype: ComputeDtype = "auto"
    # Strings that end a completion, besides the end ids. It keeps all tokens up to the one that
    # completes a string, and these are trained.
    stop: tuple[str, ...] = ()
    # Samples are drawn from so many of the most likely tokens of each place; 0: from all. The loss
    # is over the same tokens.
    top_k: int = 0
    # Of these tokens, the fewest whose probabilities sum to this share or more.
    top_p: float = setting(1.0, needs=_TOP_K)
    batch_rows: int = setting(256, needs=one_of("backend", "hf"))  # samples decoded together
    # Share of the whole GPU's memory that vLLM takes, for weights and cache.
    gpu_memory_utilization: float = setting(0.3, needs=_VLLM)
    cpu_kv_cache_gib: float = setting(1.0, needs=_VLLM)  # vLLM's cache without a GPU, GiB
    enforce_eager: bool = setting(False, needs=_VLLM)  # vLLM without compilation and CUDA graphs
    # Of several processes: so many neighbours hold one vLLM together, each a part of its weights;
    # 1: each has one of its own. For models that one GPU does not hold beside the policy's part.
    tensor_parallel: int = setting(1, needs=_VLLM)
    # On a GPU: trained weights of rollout.dtype live in vLLM's storage, so a sync copies nothing.
    # Not of several processes, of which each has only a part of the weights.
    share_weights: bool = setting(True, needs=(_VLLM, _IN_TURN))
    # What vLLM gives back of a GPU's memory while the policy trains: its cache, or "all", its
    # weights, too, which a sync then writes anew.
    sleep: Literal["none", "cache", "all"] = setting(
        "cache", needs=(_VLLM, _IN_TURN), older={True: "cache", False: "none"}
    )
    # The optimizer's state is on the GPU for the updates alone, and lies in pinned CPU memory while
    # vLLM is awake. Needs a GPU.
    offload_optimizer: bool = setting(
        False, needs=(_VLLM, _IN_TURN, one_of("trainer.offload", "none"))
    )
    # Versions of vLLM that are too old are tried; false: they are refused. Newer ones than tested
    # always run, with a warning.
    allow_untested_vllm: bool = setting(False, needs=_VLLM)
    # Further arguments of vLLM's LLM(...), e.g. {max_num_seqs = 64}: docs/rollouts.md.
    engine_kwargs: dict[str, Any] = setting(default_factory=dict, needs=_VLLM)
    # 1: the next step's samples are drawn while this step trains, with the weights from before its
    # updates. Main samples are corrected for it.
    steps_ahead: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        settle_older(self)
        require_positive("rollout", self, "max_new_tokens", "max_prompt_tokens", "batch_rows")
        require_positive("rollout", self, "gpu_memory_utilization", "cpu_kv_cache_gib")
        require_positive("rollout", self, "tensor_parallel")
        require(
            self.tensor_parallel == 1 or self.steps_ahead == 0,
            "rollout.tensor_parallel",
            self.tensor_parallel,
            "ranks that sample together cannot do so in a thread beside those that train together",
            "Set it to 1, or rollout.steps_ahead = 0",
        )
        require(
            self.gpu_memory_utilization <= 1,
            "rollout.gpu_memory_utilization",
            self.gpu_memory_utilization,
            "is a share of the GPU's memory, at most 1",
            "Try 0.3; the trainer needs the rest",
        )
        require(
            self.top_k == 0 or 2 <= self.top_k <= _MOST_KEPT,
            "rollout.top_k",
            self.top_k,
            f"is neither 0, for all tokens, nor from 2 to {_MOST_KEPT}: a single token teaches "
            "nothing, and the ids of all that are kept go with each token",
            "Set e.g. 64",
        )
        require(
            0 < self.top_p <= 1,
            "rollout.top_p",
            self.top_p,
            "is no share of probability above 0 and at most 1",
            "Set e.g. 0.95",
        )
        require(
            all(self.stop),
            "rollout.stop",
            list(self.stop),
            "an empty string would end every completion at its first token",
            "Leave the empty string out",
        )
        refuse_what_does_nothing("rollout", self)
        require(
            self.sleep != "all" or not self.share_weights,
            "rollout.sleep",
            "all",
            "with rollout.share_weights the weights that train lie in vLLM's memory",
            'Set rollout.share_weights = false, or use "cache"',
        )

    @property
    def kept(self) -> dict[str, Any]:
        """What a `Request` says of the tokens that are drawn from; nothing where they are all."""
        if not self.top_k:
            return {}
        return {"top_k": self.top_k, "top_p": self.top_p, "with_kept": True}


_HELD_OUT = above_zero("data.holdout_fraction")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out prompts at temperature 1, from all tokens."""

    # Steps from one evaluation to the next; 0: only before and after training.
    every: int = setting(0, needs=(above_zero("prompts"), _HELD_OUT))
    prompts: int = setting(64, needs=_HELD_OUT)  # number of held-out prompts; 0: no evaluation
    samples: int = setting(4, needs=(above_zero("prompts"), _HELD_OUT))  # samples per prompt
    seed: int = 1234  # seed of the evaluation's samples, also by `aepo-fast eval`

    def __post_init__(self) -> None:
        require_not_negative("eval", self, "every", "prompts")
        require_positive("eval", self, "samples")
        refuse_what_does_nothing("eval", self)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = 50  # steps from one to the next; 0: only at the end and on a signal
    keep: int = 2  # number of checkpoints that are kept, the newest
    # A metric of the evaluations; the checkpoint with its highest value is kept, too. It is written
    # at its evaluation, whatever `every` says.
    keep_best: Literal["", "eval/avg@k", "eval/pass@k"] = setting(
        "", needs=above_zero("eval.every")
    )

    def __post_init__(self) -> None:
        require_not_negative("checkpoint", self, "every")
        require_positive("checkpoint", self, "keep")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written besides metrics.jsonl."""

    tensorboard: bool = False  # metrics for TensorBoard too; pip install 'aepo-fast[tensorboard]'
    rollouts_per_step: int = 4  # samples a step in rollouts.jsonl; -1: all
    plot: bool = True  # draws plot.png in the run's folder


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    output_dir: str = "runs/aepo"  # the run's folder, for everything that the run writes
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    aepo: AepoConfig = field(default_factory=AepoConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", expanduser(self.output_dir))
        if self.loss.correction is None:
            needed = self.rollout.backend == "vllm" or self.rollout.steps_ahead
            per_token = not self.loss.policy_loss.whole_sequences
            chosen = "token_truncate" if needed and per_token else "off"
            settle(self, "loss", replace(self.loss, correction=chosen))
        require(
            self.rollout.steps_ahead == 0 or self.loss.importance_correction.corrects,
            "rollout.steps_ahead",
            self.rollout.steps_ahead,
            "samples of older weights need an importance correction, and loss.correction is off",
            'Set loss.correction = "token_truncate", or "sequence_mask" with gspo',
        )
        require(
            self.trainer.group_size > 1,
            "trainer.group_size",
            self.trainer.group_size,
            f"advantage {self.loss.advantage!r} compares the samples of a group with each other",
            "Set group_size to 2 or more, e.g. 8",
        )
        require(
            not self.loss.policy_loss.whole_sequences
            or not self.aepo.enabled
            or self.aepo.form not in TOKEN_FORMS,
            "aepo.form",
            self.aepo.form,
            f"weighs the loss of single tokens, and {self.loss.policy} has one of whole sequences",
            f'Use form = "lift", "expected" or "resample" with {self.loss.policy}',
        )
        require(
            self.loss.entropy_method not in SECOND_TEMPERATURE_METHODS
            or not self.aepo.enabled
            or self.aepo.form in ONE_TEMPERATURE_FORMS,
            "loss.entropy_method",
            self.loss.entropy_method,
            f"needs the second temperature that aepo.form = {self.aepo.form!r} takes",
            'Set aepo.enabled = false, or form = "resample"',
        )
        self._check_optimizer()
        self._check_offload()
        require(
            self.rollout.sleep != "all" or not self.model.lora.rank,
            "rollout.sleep",
            "all",
            "with model.lora a sync hands over the adapter, and no weights below it",
            'Use "cache"',
        )
        require(
            self.reward.soft_overlong_tokens < self.rollout.max_new_tokens,
            "reward.soft_overlong_tokens",
            self.reward.soft_overlong_tokens,
            f"must be below rollout.max_new_tokens = {self.rollout.max_new_tokens}",
            "Lower it",
        )
        refuse_across_sections(self)

    def _check_offload(self) -> None:
        reason = fix = ""
        if self.trainer.offload != "all":
            return
        whole = not self.model.lora.rank
        if self.model.liger:
            reason = "a model whose weights stay on the CPU is checked there, without Liger"
            fix = 'Set model.liger = false, or use "optimizer"'
        elif self.model.quantization != "none":
            reason = "4-bit weights are not divided into shards"
            fix = 'Use "optimizer": what quantization leaves of the weights is little'
        elif self.trainer.optimizer == "muon":
            reason = "the processor would take Muon's step, which is made of matrix products"
            fix = 'Use "optimizer", or trainer.optimizer = "adamw"'
        elif self.trainer.optimizer == "adamw" and whole and self.model.dtype == "bfloat16":
            reason = "float32 copies are not made of bfloat16 weights in shards"
            fix = 'Set model.dtype = "float32": the GPU holds a layer in model.compute_dtype'
        require(not reason, "trainer.offload", "all", reason, fix)

    def _check_optimizer(self) -> None:
        optimizer, trained = self.trainer.optimizer, self.model.dtype
        if self.model.lora.rank:
            trained = "float32"  # adapters
        reason = fix = ""
        if optimizer == "adamw_bf16" and trained != "bfloat16":
            reason = "is for weights in bfloat16, and what is trained is in float32"
            fix = 'Set model.dtype = "bfloat16" without model.lora, or use "adamw_8bit"'
        elif optimizer == "muon" and trained != "float32":
            reason = "holds no float32 copies of bfloat16 weights, and small steps would be lost"
            fix = 'Set model.dtype = "float32", or use "adamw_bf16"'
        require(not reason, "trainer.optimizer", optimizer, reason, fix)
