"""The command line: train, plan, eval, export, plot, configs, doctor, bench."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from aepo_fast.cli.streams import (
    open_closed_streams,
    outlive_the_terminal,
    quiet_torchao,
    show_every_character,
)
from aepo_fast.config.errors import ConfigError
from aepo_fast.report.unexpected import SAID, describe

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."),
]


_OVER_RANKS = ("train", "doctor")
_folder: list[Path] = []  # of the run that a command works on, for the traceback of its errors


@app.callback()
def refuse_ranks(context: typer.Context) -> None:
    """Refuse a command that several processes would do several times."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and context.invoked_subcommand not in (None, *_OVER_RANKS):
        reason = f"says that several processes do this, and {context.invoked_subcommand} is for one"
        raise ConfigError("WORLD_SIZE", size, reason, "Start it without torchrun")


def run() -> None:
    """Run the command line; what a user can fix is one message and exit code 2 or 1.

    What nobody foresaw is one line as well, exit code 1, and a file with the traceback.
    """
    open_closed_streams()
    show_every_character()
    quiet_torchao()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where its failure is caught
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except ConfigError as error:
        _fail(error, f"{error}", 2)
    except RuntimeError as error:
        from aepo_fast.rewards.reward import RewardError
        from aepo_fast.rollout.canary import StaleWeightsError
        from aepo_fast.rollout.engine import RolloutError
        from aepo_fast.training.checkpoint import CheckpointError
        from aepo_fast.training.rank_watch import LostRankError
        from aepo_fast.training.trainer import TrainingError

        expected = (CheckpointError, RewardError, RolloutError, StaleWeightsError, TrainingError)
        expected += (LostRankError,)
        _fail(error, str(error) if isinstance(error, expected) else _unexpected(error), 1)
    except Exception as error:
        _fail(error, _unexpected(error), 1)


def _unexpected(error: Exception) -> str:
    command = " ".join(["running aepo-fast", *sys.argv[1:2]])
    return describe(error, command, _folder[0] if _folder else None)


def _fail(error: Exception, message: str, code: int) -> NoReturn:
    if SAID not in getattr(error, "__notes__", ()):
        with suppress(OSError):  # nobody reads it
            print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A TOML file or the name of a shipped config.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last step.")] = False,
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="CHECKPOINT", help="With --resume: not the last one."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an older run.")] = False,
) -> None:
    """Train a model with AEPO or one of its rivals."""
    from aepo_fast.config.toml import load_config

    outlive_the_terminal()
    cfg = load_config(config, set_ or [])
    _folder[:] = [Path(cfg.output_dir)]
    from aepo_fast.training.run import train as train_run
    from aepo_fast.world import part

    code = train_run(cfg, resume=resume, overwrite=overwrite, start_from=start_from)
    part()
    raise SystemExit(code)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A TOML file or the name of a shipped config.")],
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help='A card of that memory, e.g. "24GiB"; else this machine.'
        ),
    ] = None,
    devices: Annotated[
        int, typer.Option(min=1, help="Processes that train together, on a device each.")
    ] = 1,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of the longest prompt; else rollout.max_prompt_tokens."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and run two steps to compare.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
    set_: Overrides = None,
) -> None:
    """Say what a run needs in memory, whether it fits, and what would make it fit."""
    from aepo_fast.cli.plan import plan_text

    options = {"gpu": gpu, "prompt_tokens": prompt_tokens, "measure": measure, "as_json": as_json}
    print(plan_text(config, set_ or [], devices=devices, **options))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a model folder, a hub id or package:NAME.")],
    config: Annotated[
        str | None, typer.Option(help="Config to evaluate under; a run has its own.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Data instead: a reasoning-gym task, a file or a hub id.")
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="Data instead: gsm8k, math500, aime24, aime25 or amc23.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="The benchmark's problems; else the hub's.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Per prompt; else 4, with --greedy 1.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(help="How many, at most; else 64, of a benchmark all.")
    ] = None,
    k: Annotated[
        str | None, typer.Option(metavar="LIST", help="Of pass@k, e.g. 1,8,32; else 1, 2, 4 ...")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; else 1.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most likely tokens that hold this share.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from so many of the most likely tokens.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most likely token.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="hf or vllm; else the configuration's, or vLLM if installed.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="MODEL|FILE", help="Other model, or --output of an evaluation."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Sample held-out prompts or a benchmark: avg@k, unbiased pass@k, 95% intervals.

    --compare adds the difference to another model, paired by problem.
    """
    from aepo_fast.cli.eval_options import read_ks
    from aepo_fast.cli.evaluate import evaluate_model

    result = evaluate_model(
        model,
        config=config,
        task=task,
        benchmark=benchmark,
        data=data,
        samples=samples,
        prompts=prompts,
        k=read_ks(k),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        greedy=greedy,
        backend=backend,
        compare=compare,
        output=output,
        overrides=set_ or [],
    )
    print(result)
    if result.comparison is not None:
        print(result.comparison)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The output_dir of a run.")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the run's adapter to the model's weights.")
    ] = False,
) -> None:
    """Write a run's last checkpoint as a model or adapter that other programs load."""
    from aepo_fast.cli.export import export_run

    print(export_run(run, folder, merge=merge))


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="The output_dir of a run.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw this; else plot.png in the run.")
    ] = None,
) -> None:
    """Draw a run's reward, entropy, temperature and lengths to plot.png."""
    from aepo_fast.report.plot import plot_run

    print(plot_run(run, output))


@app.command()
def configs(name: Annotated[str | None, typer.Argument(help="Print this one.")] = None) -> None:
    """List the shipped configs, or print one."""
    from aepo_fast.config.shipped import config_path, shipped_configs

    if name is not None:
        print(config_path(name).read_text(encoding="utf-8"), end="")
        return
    for shipped, path in shipped_configs().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"{shipped:24} {first}")


@app.command()
def doctor() -> None:
    """Say what this machine offers: versions, devices, kernel backends, optional packages."""
    from aepo_fast.cli.doctor import report
    from aepo_fast.cli.doctor_ranks import report_ranks
    from aepo_fast.world import part

    world, ranks = report_ranks()
    if world.is_first:
        print(report(), *([ranks] if ranks else []), sep="\n\n")
    part()


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Run a benchmark of the source repository: `bench kernels --quick`, `bench --help`."""
    from aepo_fast.cli.bench import run_bench

    raise SystemExit(run_bench(context.args))
