"""Builds the parts of a run, cheapest checks first: bad input fails before any model loads."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.config.toml import dump_config
from aepo_fast.data.prompts import PromptSet, load_prompts
from aepo_fast.model.load import (
    check_vocabulary,
    load_model,
    load_tokenizer,
    read_config,
    resolve,
)
from aepo_fast.model.policy import Policy
from aepo_fast.report.logger import check_tensorboard
from aepo_fast.rewards.reward import Reward, build_reward
from aepo_fast.rollout.agreement import check_agreement
from aepo_fast.rollout.engine import RolloutEngine
from aepo_fast.rollout.load import (
    check_rollout_backend,
    eos_ids,
    generation_config,
    load_engine,
)
from aepo_fast.training.checkpoint import check_same_model, complete_checkpoints, load_state

_OF_A_RUN = (
    "config.toml",
    "metrics.jsonl",
    "rollouts.jsonl",
    "plot.png",
    "checkpoints",
    "tensorboard",
)


@dataclass(frozen=True)
class Inputs:
    """What can be checked without a model."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    reward: Reward
    model_folder: str
    checkpoint: Path | None = None  # to go on from
    state: dict[str, Any] | None = None  # saved in it

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
    if resume and overwrite:
        reason = "--resume goes on from what it deletes"
        raise ConfigError("--overwrite", True, reason, "Give one of the two")
    if cfg.logging.tensorboard:
        check_tensorboard()
    folder = Path(cfg.output_dir)
    check_rollout_backend(cfg)
    _check_samples_ahead(cfg)
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
    inputs = read_inputs(cfg, cfg.model.path)
    _check_lengths(cfg, inputs.prompts, inputs.model_folder)
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return dataclasses.replace(inputs, checkpoint=checkpoint, state=state)


def read_inputs(cfg: Config, model: str) -> Inputs:
    """Prompts and rewards of a configuration, as the tokenizer of `model` sees them.

    model: anything `model.path` may be. There is no checkpoint to go on from.
    """
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    ends = eos_ids(generation_config(folder), tokenizer)
    if not ends:
        reason = "neither its tokenizer nor its generation_config.json names an end token"
        fix = "Set eos_token in tokenizer_config.json: else no completion would end"
        raise ConfigError("model.path", str(folder), reason, fix)
    reward = build_reward(cfg.reward, cfg.data)
    prompts = load_prompts(
        cfg.data,
        tokenizer,
        max_prompt_tokens=cfg.rollout.max_prompt_tokens,
        required_columns=reward.required_columns,
    )
    everyone = [*prompts.train, *prompts.heldout]
    used = {token for prompt in everyone for token in prompt.token_ids}
    check_vocabulary(folder, tokenizer, used | {min(ends)})
    return Inputs(tokenizer, prompts, reward, str(folder))


def _check_samples_ahead(cfg: Config) -> None:
    rollout = cfg.rollout
    if rollout.steps_ahead and rollout.backend == "hf" and rollout.dtype == cfg.model.dtype:
        raise ConfigError(
            "rollout.steps_ahead",
            rollout.steps_ahead,
            f"with rollout.dtype = model.dtype = {cfg.model.dtype!r} the samples come from the "
            "very weights that are being trained",
            'Set rollout.dtype to another dtype, or rollout.backend = "vllm"',
        )


def _check_lengths(cfg: Config, prompts: PromptSet, model_folder: Path | str) -> None:
    config = read_config(model_folder).get_text_config()
    most = max(getattr(config, "max_position_embeddings", None) or 0, 0)  # XLNet has -1: no limit
    longest = max(len(prompt.token_ids) for prompt in [*prompts.train, *prompts.heldout])
    new = cfg.rollout.max_new_tokens
    if most and longest + new > most:
        reason = f"with prompts of up to {longest} tokens that is more than the model's {most}"
        fix = f"Set rollout.max_prompt_tokens below {most} to drop the long prompts"
        if longest < most:
            fix = f"Set it to {most - longest} or less"
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


def load_models(cfg: Config, machine: Machine, inputs: Inputs) -> Models:
    """Load the policy (from the checkpoint where there is one) and what goes with it."""
    source = inputs.model_folder if inputs.checkpoint is None else str(inputs.checkpoint)
    model = load_model(cfg.model, source, machine)
    policy = Policy(model, machine, cfg.trainer)
    reference = None
    if cfg.loss.kl_coef > 0:
        if inputs.checkpoint is None:
            frozen = copy.deepcopy(model)
        else:
            frozen = load_model(cfg.model, inputs.model_folder, machine)
        reference = Policy(frozen.requires_grad_(False).eval(), machine, cfg.trainer)
    engine = load_engine(cfg, machine, source, inputs.tokenizer, model=model)
    if not engine.verify:  # a canary compares others
        some = [prompt.token_ids for prompt in inputs.prompts.train[:2]]
        check_agreement(cfg, machine, model, some)
    return Models(model, policy, reference, engine)
