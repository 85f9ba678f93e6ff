"""A run of TRL's GRPOTrainer (tested with 1.16), as it comes or with our head."""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
import statistics
from pathlib import Path
from typing import Any

import torch

from aepo_fast.config.resolve import Machine, resolve_machine
from aepo_fast.config.sections import Config
from aepo_fast.data.sampler import make_sampler
from aepo_fast.samples import Prompt
from aepo_fast.training.assemble import Inputs, read_inputs
from bench.e2e.phases import LEARNING, LOGPROBS, OTHER, REWARD, ROLLOUT
from bench.e2e.recorder import Recorder

OUR_HEAD = "aepo_kernels.integrations.trl"


def train(cfg: Config, recorder: Recorder, *, our_head: bool) -> dict[str, Any]:
    """Train with TRL what our configuration says; raises ImportError where TRL is missing."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    replaced = importlib.import_module(OUR_HEAD).install() if our_head else None
    machine = resolve_machine(cfg)
    cfg = machine.settled(cfg)
    inputs = read_inputs(cfg, cfg.model.path)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_folder)
    sampler = make_sampler(cfg, inputs.prompts)
    prompts = sampler.next(cfg.trainer.steps * cfg.trainer.prompts_per_step)
    check_prompts(tokenizer, prompts)
    rows = [{"prompt": list(one.messages), "index": i} for i, one in enumerate(prompts)]
    reward = _Reward(inputs, prompts)
    settings = grpo_settings(cfg, machine, longest=max(len(one.token_ids) for one in prompts))
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            inputs.model_folder, dtype=machine.weights_dtype
        ),
        reward_funcs=reward,
        args=trl.GRPOConfig(output_dir=str(recorder.folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_callback(recorder, reward, tokenizer)],
    )
    time_phases(trainer, recorder)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    for step, entry in zip(recorder.steps, logged, strict=True):
        step |= {name: float(entry[name]) for name in ("loss", "grad_norm", "entropy")}
    return {
        "version": trl.__version__,
        "replaced": replaced,
        "attention": trainer.model.config._attn_implementation,
        "settings": settings,
    }


def grpo_settings(cfg: Config, machine: Machine, *, longest: int) -> dict[str, Any]:
    """Arguments of GRPOConfig for our configuration; longest: tokens of the longest prompt.

    A micro-batch has as many samples as divide a step's evenly and, padded, do not exceed
    trainer.tokens_per_microbatch.
    """
    trainer, rollout, loss = cfg.trainer, cfg.rollout, cfg.loss
    samples = trainer.prompts_per_step * trainer.group_size
    most = max(1, trainer.tokens_per_microbatch // (longest + rollout.max_new_tokens))
    together = max(rows for rows in range(1, samples + 1) if samples % rows == 0 and rows <= most)
    settings: dict[str, Any] = {
        "max_steps": trainer.steps,
        "per_device_train_batch_size": together,
        "gradient_accumulation_steps": samples // together,
        "num_generations": trainer.group_size,
        "max_completion_length": rollout.max_new_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "shuffle_dataset": False,
        "loss_type": "grpo",
        "scale_rewards": "group",
        "beta": 0.0,
        "epsilon": loss.clip_low,
        "epsilon_high": loss.clip_high,
        "learning_rate": trainer.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": trainer.weight_decay,
        "adam_beta1": trainer.beta1,
        "adam_beta2": trainer.beta2,
        "adam_epsilon": trainer.eps,
        "max_grad_norm": trainer.max_grad_norm,
        "bf16": machine.compute_dtype == torch.bfloat16,
        "gradient_checkpointing": cfg.model.gradient_checkpointing != "none",
        "use_cpu": not machine.is_gpu,
        "seed": trainer.seed,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if rollout.backend == "vllm":
        settings |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": rollout.gpu_memory_utilization,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": loss.importance_correction.high,
        }
    return settings


def check_prompts(tokenizer: Any, prompts: list[Prompt]) -> None:
    """Raise RuntimeError unless TRL makes of the prompts the ids that our trainer samples from."""
    chats = [list(one.messages) for one in prompts]
    rendered = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    if [tuple(ids) for ids in rendered] != [one.token_ids for one in prompts]:
        raise RuntimeError("TRL's prompts are not ours: the chat template gives other tokens")


def time_phases(trainer: Any, recorder: Recorder) -> None:
    """Let TRL's methods be phases of the clock."""
    clock = recorder.clock
    clock.wrap(trainer, "training_step", lambda: LEARNING)
    clock.wrap(trainer, "_prepare_inputs", lambda: OTHER)
    clock.wrap(trainer, "_generate", lambda: ROLLOUT)
    clock.wrap(trainer, "_calculate_rewards", lambda: REWARD)
    clock.wrap(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda: LEARNING if torch.is_grad_enabled() else LOGPROBS,
    )


class _Reward:
    """Our reward as a function of TRL's, and what it was called with since the last step."""

    __name__ = "reward"

    def __init__(self, inputs: Inputs, prompts: list[Prompt]) -> None:
        self.inputs, self.prompts = inputs, prompts
        self.tokens, self.rewards = 0, []

    def __call__(
        self, completion_ids: list[list[int]], index: list[int], **columns: Any
    ) -> list[float | None]:
        texts = [self.inputs.decode(ids) for ids in completion_ids]
        prompts = [self.prompts[number] for number in index]
        found = self.inputs.reward.score(prompts, texts, completion_ids).rewards
        self.tokens += sum(map(len, completion_ids))
        self.rewards += [value for value in found if value is not None]
        return found

    def take(self) -> dict[str, float]:
        """Tokens and mean reward since the last call."""
        found = {
            "tokens": self.tokens,
            "reward": statistics.fmean(self.rewards) if self.rewards else float("nan"),
        }
        self.tokens, self.rewards = 0, []
        return found


def _callback(recorder: Recorder, reward: _Reward, tokenizer: Any) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        """Starts and ends the steps of a recorder."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            optimizer = given["optimizer"]
            recorder.clock.watch(getattr(optimizer, "optimizer", optimizer))

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            recorder.clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            def save(folder: Path) -> None:
                given["model"].save_pretrained(folder)
                tokenizer.save_pretrained(folder)

            recorder.end_step(save, **reward.take())

    return Steps()
