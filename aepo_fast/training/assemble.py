"""Builds the parts of a run, cheapest checks first: bad input fails before any model loads."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import Config
from aepo_fast.config.toml import dump_config
from aepo_fast.data.prompts import PromptSet, load_prompts, prints_date
from aepo_fast.model.experts import check_routers
from aepo_fast.model.isolation import check_isolation
from aepo_fast.model.kept import check_top_k
from aepo_fast.model.load import (
    check_vocabulary,
    load_model,
    load_tokenizer,
    read_config,
    resolve,
)
from aepo_fast.model.load_parts import load_parts
from aepo_fast.model.lora import check_lora, check_same_adapter
from aepo_fast.model.policy import Policy
from aepo_fast.model.quantized import check_quantization, check_same_quantization
from aepo_fast.model.sharded import device_mesh, on_cpu, shard
from aepo_fast.model.tensor_parallel import check_tensor_parallel
from aepo_fast.report.json_lines import is_step, lines_of
from aepo_fast.report.logger import check_tensorboard
from aepo_fast.report.unexpected import TRACEBACK_NAME, doing
from aepo_fast.rewards.math_answers import unusable_gold
from aepo_fast.rewards.reward import Reward, build_reward, check_answers
from aepo_fast.rollout.agreement import check_agreement
from aepo_fast.rollout.engine import RolloutEngine
from aepo_fast.rollout.load import (
    check_rollout_backend,
    eos_ids,
    generation_config,
    load_engine,
)
from aepo_fast.rollout.stop_strings import check_stop_strings
from aepo_fast.samples import Prompt
from aepo_fast.training.checkpoint import (
    CheckpointError,
    check_same_model,
    check_same_optimizer,
    complete_checkpoints,
    load_state,
)
from aepo_fast.training.checkpoint_damage import damage, newest_whole
from aepo_fast.training.optim import check_optimizer
from aepo_fast.training.run_lock import RunLock

_OF_A_RUN = (
    "config.toml",
    "metrics.jsonl",
    "rollouts.jsonl",
    "plot.png",
    "checkpoints",
    "tensorboard",
    TRACEBACK_NAME,
)


@dataclass(frozen=True)
class Inputs:
    """What can be checked without a model."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    reward: Reward
    model_folder: str
    rendered_at: datetime  # what the chat template took for now
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


def load_inputs(
    cfg: Config, *, resume: bool, overwrite: bool, start_from: str | None = None
) -> Inputs:
    """Everything that can fail before the model loads; leaves an earlier run as it is.

    start_from: the checkpoint to go on from, by name or path; None is the last one.
    """
    if start_from is not None and not resume:
        reason = "names what to go on from, and the run starts anew"
        raise ConfigError("--from", start_from, reason, "Add --resume")
    if resume and overwrite:
        reason = "--resume goes on from what it deletes"
        raise ConfigError("--overwrite", True, reason, "Give one of the two")
    if cfg.logging.tensorboard:
        check_tensorboard()
    check_lora(cfg.model.lora)
    check_quantization(cfg.model)
    check_optimizer(cfg.trainer)
    folder = Path(cfg.output_dir)
    check_rollout_backend(cfg)
    _check_samples_ahead(cfg)
    _check_offload(cfg)
    found = complete_checkpoints(folder / "checkpoints")
    used = found or (folder / "metrics.jsonl").exists()
    if used and not (resume or overwrite):
        raise ConfigError(
            "output_dir",
            cfg.output_dir,
            "holds an earlier run",
            "Add --resume to go on, --overwrite to start anew, or name another folder",
        )
    checkpoint = _checkpoint_to_resume(found, start_from) if resume else None
    if checkpoint is None:
        _check_foreign(folder)
    state = None
    if checkpoint is not None:
        state = load_state(checkpoint)
        check_same_model(state, cfg.model.origin, checkpoint)
        check_same_adapter(checkpoint, cfg.model.lora)
        check_same_quantization(checkpoint, cfg.model)
        check_same_optimizer(state, cfg.trainer.optimizer, checkpoint)
    rendered_at = rendering_time(state)
    with doing("reading the tokenizer and the data"):
        inputs = read_inputs(cfg, cfg.model.path, rendered_at=rendered_at)
    if checkpoint is not None and rendered_at is None and prints_date(inputs.tokenizer):
        print(
            f"{checkpoint} does not say when its prompts were rendered, and the chat template "
            "prints the date: today's is taken",
            file=sys.stderr,
        )
    check_lengths(cfg, [*inputs.prompts.train, *inputs.prompts.heldout], inputs.model_folder)
    config = read_config(inputs.model_folder, trust_code=cfg.model.trust_remote_code)
    check_tensor_parallel(cfg.trainer.tensor_parallel, config.get_text_config())
    check_top_k(cfg.rollout, config.get_text_config().vocab_size)
    return dataclasses.replace(inputs, checkpoint=checkpoint, state=state)


def _checkpoint_to_resume(found: Sequence[Path], start_from: str | None) -> Path | None:
    """The checkpoint that a run goes on from; raises CheckpointError for a damaged one."""
    if start_from is None:
        chosen = found[-1] if found else None
    else:
        wanted = Path(start_from).expanduser()
        chosen = next((one for one in found if one.name == wanted.name), None)
        # A name alone, or a path that must be right.
        if chosen is None or len(wanted.parts) > 1 and not _same_folder(wanted, chosen):
            names = ", ".join(one.name for one in found) or "none"
            raise ConfigError("--from", start_from, "is no checkpoint of this run", f"Has: {names}")
    reason = None if chosen is None else damage(chosen)
    if chosen is None or reason is None:
        return chosen
    older = newest_whole(found[: found.index(chosen)])
    fix = "no older one is whole; start anew with --overwrite"
    if older is not None:
        fix = f"--resume --from {older.name} goes on from a whole one and deletes those after it"
    raise CheckpointError(f"the checkpoint {chosen} is damaged: {fix} ({reason})")


def _same_folder(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _check_foreign(folder: Path) -> None:
    """Refuse a folder without a checkpoint whose files another program wrote."""
    for name, is_ours in (("metrics.jsonl", _has_steps), ("config.toml", _is_config)):
        path = folder / name
        if path.is_file() and path.stat().st_size and not is_ours(path):
            reason = f"its {name} is not of a run of aepo-fast, which would replace it"
            raise ConfigError("output_dir", str(folder), reason, "Name another folder, or move it")


def _has_steps(path: Path) -> bool:
    """Whether lines are of steps, or are at least no other program's."""
    lines = list(lines_of(path))
    return not lines or any(is_step(line) for line in lines)


def _is_config(path: Path) -> bool:
    try:
        return {"model", "data"} <= set(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except ValueError:
        return not path.read_bytes().strip(b"\0")  # zeros, after a power loss


def rendering_time(state: dict[str, Any] | None) -> datetime | None:
    """When the prompts of a checkpoint's run were rendered; None where its state does not say."""
    saved = None if state is None else state.get("rendered_at")  # older checkpoints have none
    return None if saved is None else datetime.fromisoformat(saved)


def read_inputs(cfg: Config, model: str, *, rendered_at: datetime | None = None) -> Inputs:
    """Prompts and rewards of a configuration, as the tokenizer of `model` sees them.

    model: anything `model.path` may be. There is no checkpoint to go on from. rendered_at: the time
    that chat templates take for now, so that a run's prompts stay what they were on its first day.
    """
    rendered_at = rendered_at or datetime.now()
    trusts = cfg.model.trust_remote_code
    revision = cfg.model.revision if model == cfg.model.path else ""
    folder = resolve(model, revision=revision, with_code=trusts)
    tokenizer = load_tokenizer(folder, chat_template=cfg.model.chat_template, trust_code=trusts)
    check_routers(cfg.model, read_config(folder, trust_code=trusts))
    check_stop_strings(cfg.rollout, tokenizer)
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
        unusable=unusable_gold if cfg.reward.function in ("task", "math_verify") else None,
        rendered_at=rendered_at,
    )
    everyone = [*prompts.train, *prompts.heldout]
    check_answers(reward, cfg.data, everyone)
    used = {token for prompt in everyone for token in prompt.token_ids}
    check_vocabulary(folder, tokenizer, used | {min(ends)}, trust_code=trusts)
    return Inputs(tokenizer, prompts, reward, str(folder), rendered_at)


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


def _check_offload(cfg: Config) -> None:
    same_weights = cfg.rollout.backend == "hf" and cfg.rollout.dtype == cfg.model.dtype
    if cfg.trainer.offload == "all" and same_weights:
        raise ConfigError(
            "trainer.offload",
            "all",
            f"with rollout.dtype = model.dtype = {cfg.model.dtype!r} the samples come from the "
            "very weights that lie in CPU memory, all of them for each token",
            'Set rollout.backend = "vllm" or rollout.dtype to another dtype, or use "optimizer"',
        )


def check_lengths(cfg: Config, prompts: Sequence[Prompt], model_folder: Path | str) -> None:
    """Raise ConfigError where prompts and completions are longer than the model takes."""
    trusts = cfg.model.trust_remote_code
    config = read_config(model_folder, trust_code=trusts).get_text_config()
    most = max(getattr(config, "max_position_embeddings", None) or 0, 0)  # XLNet has -1: no limit
    longest = max(len(prompt.token_ids) for prompt in prompts)
    new = cfg.rollout.max_new_tokens
    if most and longest + new > most:
        reason = f"with prompts of up to {longest} tokens that is more than the model's {most}"
        fix = f"Set rollout.max_prompt_tokens below {most} to drop the long prompts"
        if longest < most:
            fix = f"Set it to {most - longest} or less"
        raise ConfigError("rollout.max_new_tokens", new, reason, fix)


def prepare_folder(cfg: Config, *, overwrite: bool, checkpoint: Path | None = None) -> None:
    """Write the run's configuration to its folder.

    overwrite: an earlier run's files go first, and nothing else that is there. checkpoint: what the
    run goes on from; later ones go.
    """
    folder = Path(cfg.output_dir)
    with _writing_to(folder):
        for name in _OF_A_RUN if overwrite else ():
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        found = complete_checkpoints(folder / "checkpoints")
        for later in found[found.index(checkpoint) + 1 :] if checkpoint else ():
            shutil.rmtree(later)
        draft = folder / "config.tmp"
        try:
            draft.write_text(dump_config(cfg), encoding="utf-8")
            draft.replace(folder / "config.toml")
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; raises ConfigError where one is in it, or none can write."""
    with ExitStack() as stack:
        with _writing_to(folder):
            stack.enter_context(RunLock(folder))
        yield


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "Make it writable, or name another folder"
        raise ConfigError("output_dir", str(folder), str(error), fix) from error


def load_models(cfg: Config, machine: Machine, inputs: Inputs) -> Models:
    """Load the policy (from the checkpoint where there is one) and what goes with it."""
    source, adapter = inputs.model_folder, inputs.checkpoint
    if adapter is not None and not cfg.model.lora.rank:
        source, adapter = str(adapter), None
    if machine.world.size > 1:
        return _load_over_ranks(cfg, machine, inputs, source, adapter)
    offload = cfg.trainer.offload == "all"
    where: Any = {"machine": machine, "stays_on_cpu": offload}
    model = load_model(cfg.model, source, **where, adapter=adapter, seed=cfg.trainer.seed)
    with on_cpu(model, machine) if offload else nullcontext(machine) as checks:
        check_isolation(Policy(model, checks, cfg.trainer), cfg.trainer.layout)
    frozen = partial(load_model, cfg.model, inputs.model_folder, **where)
    if inputs.checkpoint is None:
        frozen = partial(copy.deepcopy, model)
    policy, reference = _policies(cfg, machine, model, frozen)
    engine = load_engine(cfg, machine, source, inputs.tokenizer, model=model, adapter=adapter)
    if not engine.verify:  # a canary compares others
        some = [prompt.token_ids for prompt in inputs.prompts.train[:2]]
        with on_cpu(model, machine) if offload else nullcontext(machine) as checks:
            check_agreement(cfg, checks, model, some)
    if offload:  # now that everything is made of the model that is made of it
        mesh = device_mesh(machine)
        for one in {id(one.model): one.model for one in (policy, reference) if one}.values():
            shard(one, machine, mesh, offload=True)
    return Models(model, policy, reference, engine)


def _load_over_ranks(
    cfg: Config, machine: Machine, inputs: Inputs, source: str, adapter: Path | None
) -> Models:
    """The models of one of several processes, which never holds a whole one that it trains.

    source, adapter: where the policy's weights are. hf samples from a whole model of each process,
    on which head and attention are checked first; vLLM's log-probs are compared by its canary.
    """
    whole = None
    if cfg.rollout.backend == "hf":
        options: dict[str, Any] = {"adapter": adapter, "stays_on_cpu": True}
        whole = load_model(cfg.model, source, machine, **options, seed=cfg.trainer.seed)
        some = [prompt.token_ids for prompt in inputs.prompts.train[:2]]
        with on_cpu(whole, machine) as checks:
            check_agreement(cfg, checks, whole, some)
    engine = load_engine(cfg, machine, source, inputs.tokenizer, model=whole, adapter=adapter)
    mesh, offload = device_mesh(machine), cfg.trainer.offload == "all"
    where: Any = {"machine": machine, "mesh": mesh, "offload": offload, "seed": cfg.trainer.seed}
    model = load_parts(cfg.model, source, **where, adapter=adapter)
    frozen = partial(load_parts, cfg.model, inputs.model_folder, **where, frozen=True)
    policy, reference = _policies(cfg, machine, model, frozen)
    check_isolation(policy, cfg.trainer.layout)
    return Models(model, policy, reference, engine)


def _policies(
    cfg: Config, machine: Machine, model: PreTrainedModel, frozen: Callable[[], PreTrainedModel]
) -> tuple[Policy, Policy | None]:
    """A model's policy and the loss's reference, where it has one: without adapter, or `frozen`."""
    options: dict[str, Any] = {
        "activation_offloading": cfg.model.activation_offloading,
        "router_aux_loss_coef": cfg.model.router_aux_loss_coef,
    }
    policy = Policy(model, machine, cfg.trainer, **options)
    if cfg.loss.kl_coef == 0:
        return policy, None
    if cfg.model.lora.rank:
        return policy, Policy(model, machine, cfg.trainer, adapter=False)
    return policy, Policy(frozen().requires_grad_(False).eval(), machine, cfg.trainer)
