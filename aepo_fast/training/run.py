"""A whole run: set-up, the step loop with evaluation, logs and checkpoints, and its end."""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from aepo_fast.config.resolve import resolve_machine
from aepo_fast.config.sections import Config
from aepo_fast.memory.check import Prediction, predict
from aepo_fast.model.cpu_layers import fused_kinds
from aepo_fast.model.policy import Policy
from aepo_fast.model.sharded import leave
from aepo_fast.report.logger import MetricsLogger
from aepo_fast.report.phase import phase
from aepo_fast.report.plot import plot_run
from aepo_fast.report.rollout_log import RolloutLog
from aepo_fast.report.unexpected import doing, first_line, out_of_memory
from aepo_fast.rewards.reward import RewardError
from aepo_fast.rollout.engine import BrokenWeightsError, RolloutError
from aepo_fast.training.assemble import hold_folder, load_inputs, prepare_folder
from aepo_fast.training.best import BestCheckpoint
from aepo_fast.training.checkpoint import CheckpointError, complete_checkpoints, save_checkpoint
from aepo_fast.training.evaluate import EvalResult, evaluate
from aepo_fast.training.interrupt import Interrupted, InterruptGuard
from aepo_fast.training.malloc import keep_freed_memory, return_freed_memory, return_holes
from aepo_fast.training.optim import HalfUpdateError
from aepo_fast.training.rank_agreement import check_same_inputs, check_same_settings
from aepo_fast.training.rank_watch import LostRankError, RankWatch
from aepo_fast.training.step_metrics import StepResult
from aepo_fast.training.trainer import Trainer, TrainingError
from aepo_fast.versions import check_versions
from aepo_kernels import whole_sums

_NOT_SAVED_AFTER = (BrokenWeightsError, CheckpointError, HalfUpdateError, TrainingError)


def train(
    cfg: Config, *, resume: bool = False, overwrite: bool = False, start_from: str | None = None
) -> int:
    """Train as `cfg` says; returns the exit code: 0, or 130/143/129 after Ctrl-C/SIGTERM/SIGHUP.

    start_from: with resume, the checkpoint to go on from; None is the last one.

    Raises ConfigError before any model loads, and TrainingError, RewardError or CheckpointError
    where the run cannot go on.
    """
    given, machine = cfg, resolve_machine(cfg)
    check_versions(machine)
    cfg = machine.settled(cfg)
    # Beside the kernels, which switch cuBLAS's sums, the sampler's must not differ by chance.
    sums = whole_sums if cfg.rollout.steps_ahead else nullcontext()
    world = machine.world
    output = Path(cfg.output_dir)
    with InterruptGuard() as guard, sums, world.quiet(), ExitStack() as stack:
        stack.callback(leave)  # last; also where the model does not load
        watch = stack.enter_context(RankWatch(world, guard, output))
        check_same_settings(given, machine)
        world.on_first(lambda: stack.enter_context(hold_folder(output)))
        inputs = world.together(
            lambda: load_inputs(cfg, resume=resume, overwrite=overwrite, start_from=start_from)
        )
        check_same_inputs(inputs, output, world)
        print(inputs.prompts.preview(), flush=True)
        if resume:
            print(f"goes on from {inputs.checkpoint or 'the start: there is no checkpoint'}")
        longest = max(len(prompt.token_ids) for prompt in inputs.prompts.train)
        folder = inputs.model_folder
        prediction = predict(cfg, machine, folder, prompt_tokens=longest, given=given)
        if not machine.is_gpu:
            keep_freed_memory() if world.size == 1 else return_freed_memory()
        with doing("loading the model"):
            trainer = Trainer(cfg, machine, inputs, guard)
        policy = trainer.policy
        layers = ", ".join(fused_kinds(policy.model)) or "none"
        attention = policy.model.config._attn_implementation
        head = f"head: {machine.head_backend}, rows {_rows(cfg, policy)}; attention: {attention}"
        print(f"{head}; fused layers: {layers}\n{machine.describe()}", flush=True)
        try:
            # Only now: whatever the model's settings had to say, an earlier run is still there.
            world.on_first(
                lambda: prepare_folder(cfg, overwrite=overwrite, checkpoint=inputs.checkpoint)
            )
            logger = MetricsLogger(
                output,
                tensorboard=cfg.logging.tensorboard and world.is_first,
                total_steps=cfg.trainer.steps,
            )
            return _Run(cfg, trainer, logger, prediction, watch).run()
        finally:
            trainer.close()


class _Run:
    def __init__(
        self,
        cfg: Config,
        trainer: Trainer,
        logger: MetricsLogger,
        prediction: Prediction,
        watch: RankWatch,
    ) -> None:
        self.cfg, self.trainer, self.logger, self.watch = cfg, trainer, logger, watch
        self.prediction, self.world = prediction, trainer.policy.machine.world
        self.folder = Path(cfg.output_dir)
        self.rollouts = RolloutLog(self.folder, cfg.logging.rollouts_per_step)
        self.logged = trainer.steps_done  # the last step that is in both logs
        checkpoints = self.folder / "checkpoints"
        self.best = BestCheckpoint(cfg.checkpoint.keep_best, trainer.inputs.state, checkpoints)

    def run(self) -> int:
        done, total = self.trainer.steps_done, self.cfg.trainer.steps
        self.world.on_first(lambda: self._forget_after(done))
        try:
            with self.watch.one_end():
                if done == 0 and self._heldout():
                    self._log({"step": 0, **self._evaluate().metrics()})
                while self.trainer.steps_done < total:
                    self._step()
        except Interrupted as stop:
            path = self._save()
            if self.world.is_first:
                print(f"{stop}: saved {path}; go on with --resume", file=sys.stderr)
            return stop.exit_code
        except BrokenWeightsError as error:
            raise RolloutError(self._after_broken_weights(error)) from error
        except torch.OutOfMemoryError as error:
            raise TrainingError(self._after_saving(out_of_memory(error))) from error
        except (RolloutError, RewardError) as error:
            raise type(error)(self._after_saving(str(error))) from error
        except OSError as error:  # a full disk, mostly
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise TrainingError(self._after_saving(reason)) from error
        except LostRankError as error:
            if not error.all_left:
                raise
            saves = not isinstance(error.__cause__, _NOT_SAVED_AFTER)
            raise LostRankError(f"{error} {self._after_unexpected(saves=saves)}") from error
        except (CheckpointError, TrainingError):
            raise
        except HalfUpdateError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                reason = out_of_memory(error.__cause__)
                raise TrainingError(self._after_saving(reason, saves=False)) from error
            error.add_note(self._after_unexpected(saves=False))
            raise
        except Exception as error:
            error.add_note(self._after_unexpected())
            raise
        self._finish(ran=done < total)
        return 0

    def _after_saving(self, reason: str, *, saves: bool = True) -> str:
        """The message of a run that stops, saved if it has weights of its own that are whole.

        saves: whether it may be saved, as far as this process knows.
        """
        self.world = self.world.anew()
        trainer = self.trainer
        # A step that could not be logged is done again, so that no step is missing in the log.
        is_whole = saves and trainer.unchanged and trainer.steps_done == self.logged
        everyone = self.world.gather((is_whole, trainer.steps_done, trainer.updates))
        if trainer.steps_done and set(everyone) == {(True, trainer.steps_done, trainer.updates)}:
            return f"{reason}. Saved {self._save()}; go on with --resume"
        last = self._last_checkpoint()
        return f"{reason}. {f'Go on from {last} with --resume' if last else 'Nothing is saved'}"

    def _after_unexpected(self, *, saves: bool = True) -> str:
        try:
            return self._after_saving("", saves=saves).removeprefix(". ")
        except Exception as error:  # nothing is certain any more
            return f"Nothing could be saved: {first_line(error)}"

    def _after_broken_weights(self, error: BrokenWeightsError) -> str:
        last = self._last_checkpoint()
        if last is None:
            return f"{error}: lower trainer.lr and start anew; there is no checkpoint"
        return (
            f"{error}, and nothing was saved: lower trainer.lr and go on from {last} with "
            "--resume; delete that one if its weights are the same"
        )

    def _step(self) -> None:
        cfg = self.cfg
        number = self.trainer.steps_done + 1
        with (
            self.logger.progress(f"step {number}") as advance,
            doing(f"training, in step {number}"),
        ):
            result = self.trainer.step(advance)
        return_holes()
        last = number == cfg.trainer.steps
        metrics: dict[str, Any] = {"step": number, **self.trainer.metrics(result)}
        # Of the fullest process, as predicted.
        metrics["perf/peak_memory_gib"] = self.world.most(metrics["perf/peak_memory_gib"])
        peak = self.prediction.peak
        metrics["perf/predicted_memory_gib"] = None if peak is None else peak / 2**30
        metrics["kernel/backend"] = self.trainer.policy.machine.head_backend
        metrics["kernel/rows"] = _rows(cfg, self.trainer.policy)
        is_best = False
        try:
            if self._heldout() and (last or (cfg.eval.every and number % cfg.eval.every == 0)):
                metrics |= self._evaluate().metrics()
                is_best = self.best.update(number, metrics)
        finally:  # the step is done and counted, however its evaluation ends
            self._log(metrics, result)
            self.logged = number
        if last or is_best or (cfg.checkpoint.every and number % cfg.checkpoint.every == 0):
            self._save()

    def _forget_after(self, step: int) -> None:
        self.logger.truncate_after(step if step else -1)
        self.rollouts.truncate_after(step)

    def _log(self, metrics: dict[str, Any], result: StepResult | None = None) -> None:
        def write() -> None:
            self.logger.log(metrics)
            if result is not None:
                self.rollouts.write(metrics["step"], result.rollout, result.advantages)

        self.world.on_first(write)

    def _heldout(self) -> int:
        return min(self.cfg.eval.prompts, len(self.trainer.inputs.prompts.heldout))

    def _evaluate(self) -> EvalResult:
        cfg, prompts = self.cfg, self.trainer.inputs.prompts.heldout[: self._heldout()]
        with self.logger.progress("held-out evaluation") as advance, doing("evaluating"):

            def count(tokens: int) -> None:
                self.trainer.guard.check()
                advance(tokens)

            result = evaluate(
                self.trainer.engine,
                self.trainer.inputs.reward,
                prompts,
                self.trainer.inputs.decode,
                samples=cfg.eval.samples,
                max_new_tokens=cfg.rollout.max_new_tokens,
                seed=cfg.eval.seed,
                overlap=cfg.reward.overlap,
                on_tokens=count,
                world=self.world,
            )
        print(f"held-out accuracy at T = 1: {result}", flush=True)
        return result

    def _last_checkpoint(self) -> Path | None:
        folder = self.folder / "checkpoints"
        return self.world.on_first(lambda: next(reversed(complete_checkpoints(folder)), None))

    @phase("saving a checkpoint")
    def _save(self) -> Path:
        trainer, last = self.trainer, self._last_checkpoint()
        step = trainer.resume_state["steps_done"]
        if last is not None and last.name == f"step_{step}":
            return last
        return save_checkpoint(
            self.folder / "checkpoints",
            step,
            model=trainer.model,
            tokenizer=trainer.inputs.tokenizer,
            optimizer=trainer.optimizer,
            state={**trainer.resume_state, **self.best.state_dict()},
            keep=self.cfg.checkpoint.keep,
            world=self.world,
            best=self.best.step,
        )

    def _finish(self, *, ran: bool) -> None:
        self.logger.close()
        if not ran:
            print(f"already trained for {self.cfg.trainer.steps} steps: {self.folder}")
        evals = [line for line in self.logger.lines() if "eval/avg@k" in line]
        if evals:
            first, last = evals[0], evals[-1]
            print(
                f"held-out accuracy at T = 1: {first['eval/avg@k']:.3f} at step {first['step']}, "
                f"{last['eval/avg@k']:.3f} at step {last['step']}"
            )
        if self.best.step is not None:
            where = self.folder / "checkpoints" / f"step_{self.best.step}"
            print(f"best {self.best.metric}: {self.best.value:.3f}, {where}")
        if self.cfg.logging.plot:
            with doing("drawing the plot of the finished run"):
                print(f"plot: {self.world.on_first(lambda: plot_run(self.folder))}")


def _rows(cfg: Config, policy: Policy) -> str:
    """Which row operations the head runs: over kept ids torch's, on whatever device."""
    return "torch (kept ids)" if cfg.rollout.top_k else policy.row_kernels
