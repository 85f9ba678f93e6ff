"""Is the entropy held at any target, and what does it cost? GRPO, AEPO and rivals, on two sizes.

`--size small` trains a model of characters, a minute or two a run, `--size smollm2` SmolLM2-135M.
Each finished run is one JSON part under bench/results, and is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.common.environment import RESULTS
from bench.entropy.settings import SETTINGS, SIZES, TARGETS, admits, grid


def add_command(commands: Any) -> None:
    """Add `entropy` to the benchmark's commands."""
    parser = commands.add_parser("entropy", help=(__doc__ or "").split("\n")[0])
    tasks = [task for size in SIZES.values() for task in size.tasks]
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--task", nargs="+", choices=tasks, help="of the size; all by default")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of a run; the size's by default")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--redo", action="store_true", help="replace parts of other sources")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-entropy"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only tables and figures, from parts")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Run what has no part yet, then write tables and figures of all parts."""
    # Here: rewards of this package are imported by every run, and need none of this.
    from bench.entropy import report

    if not arguments.report:
        _run(arguments)
    for size in SIZES:
        report.write(size, arguments.results)


def _run(arguments: argparse.Namespace) -> None:
    from bench.entropy.runs import Job, part_path, plan_of, run_all

    size = SIZES[arguments.size]
    tasks = arguments.task or list(size.tasks)
    other = [task for task in tasks if task not in size.tasks]
    if other:
        raise SystemExit(
            f"--task {' '.join(other)}: --size {size.name} has {', '.join(size.tasks)}"
        )
    for task in tasks:
        dropped = [target for target in arguments.targets if not admits(task, target)]
        if dropped:
            names = ", ".join(f"{target:g}" for target in dropped)
            print(f"{task} cannot be always right at {names} nats: left out")
    changes = [*arguments.set]
    if arguments.steps is not None:
        changes.append(f"trainer.steps={arguments.steps}")
    folder = arguments.runs.resolve()
    bases = {task: _base(size.name, task, folder) for task in tasks}
    work = []
    for run in grid(size.name, tasks, arguments.settings, arguments.targets, arguments.seeds):
        base, local = bases[run.task]
        plan = plan_of(run, changes, base)
        place = folder / run.size / f"{run.task}-{run.name}"
        work.append(Job(plan, place, part_path(run, arguments.results.resolve()), local))
    run_all(work, arguments.jobs, redo=arguments.redo)


def _base(size: str, task: str, folder: Path) -> tuple[str, list[str]]:
    """The base model's name, and what its run is told of where model and prompts lie."""
    if size != "small":
        return "as in the configuration", []
    from bench.entropy.small_model import WARM_UPS, base_model, write_prompts
    from bench.entropy.small_tasks import TASKS

    models = folder / "base"
    models.mkdir(parents=True, exist_ok=True)
    model = base_model(TASKS[task], WARM_UPS[task], models)
    prompts = write_prompts(TASKS[task], models)
    return model.name, [f"model.path={model}", f"data.sources.0.name={prompts}"]
