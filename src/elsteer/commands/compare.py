"""`elsteer compare`: methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from elsteer.commands.shared import FILE, debug_option, load_for, model_options
from elsteer.console import ProgressBars, invocation, note, screen

__all__ = ["compare"]


def _names(_ctx: click.Context, _option: click.Parameter, value: tuple[str, ...]) -> list[str]:
    """Names given between commas, blanks, or by repeating the option."""
    return [word for one in value for word in one.replace(",", " ").split()]


class _Command(click.Command):
    """Names of methods may follow `--methods` as words of their own, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Those that are methods, put between commas."""
        if "--methods" in args[:-2]:
            from elsteer.comparison.compare import PLAIN, known_methods

            known, at = {PLAIN, *known_methods()}, args.index("--methods") + 1
            while len(args) > at + 1 and set(args[at + 1].split(",")) <= known:
                args = [*args[:at], f"{args[at]},{args[at + 1]}", *args[at + 2 :]]
        return super().parse_args(ctx, args)


def _numbers(_ctx: click.Context, _option: click.Parameter, value: str) -> list[float]:
    try:
        found = [float(word) for word in value.split(",") if word.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 0 or not all(one < 1e6 for one in found):
        raise click.BadParameter(f"{value!r} must be numbers from 0 up between commas, such as 0.5,1,1.5.")
    return found


@click.command(cls=_Command, short_help="Methods side by side: one table, one frontier.")
@click.argument("model")
@click.option("--run-dir", type=FILE, required=True, help="Folder of a finished `elsteer fit` for MODEL.")
@click.option(
    "--methods",
    multiple=True,
    callback=_names,
    metavar="NAMES",
    help="Between commas or blanks, such as els,caa,surgical. [default: all]",
)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    required=True,
    metavar="NAME",
    help="A benchmark (see elsteer suites) or a file; with +ATTACK its harmful prompts under attack; may be repeated.",
)
@click.option("--data-dir", type=FILE, help="Folder that holds the benchmarks. [default: $ELSTEER_DATA, else the hub]")
@click.option("--limit", type=click.IntRange(min=1), help="Prompts of each suite at most, drawn by seed.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draw and of the intervals."
)
@click.option(
    "--strengths",
    default="1",
    show_default=True,
    callback=_numbers,
    help="Points of each method's frontier, as multiples of its tuned strength.",
)
@click.option(
    "--budget", type=click.IntRange(min=1), default=24, show_default=True, help="Settings screened per method."
)
@click.option("--finalists", type=click.IntRange(min=1), default=4, show_default=True, help="Settings judged in full.")
@click.option("--judge", default="rules", show_default=True, help="Who says whether an answer refuses.")
@click.option("--out", type=FILE, help="Folder for all files. [default: compare in the run folder]")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Prompts at a time.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=4),
    default=48,
    show_default=True,
    help="Tokens that are judged at most.",
)
@model_options
@debug_option
def compare(
    model: str,
    run_dir: Path,
    methods: list[str],
    suites: tuple[str, ...],
    data_dir: Path | None,
    limit: int | None,
    seed: int,
    strengths: list[float],
    budget: int,
    finalists: int,
    judge: str,
    out: Path | None,
    batch_size: int,
    max_new_tokens: int,
    **loading: Any,
) -> None:
    """Tune methods against over-refusal on the dev prompts of a fit, and measure them on the same suites.

    Every baseline learns from that fit's training prompts and gets at most --budget trials, three more around the best, under
    constraints that are no harder than the landscape's. Without --methods all take part, and els-paper trains for hours on a CPU.
    Started again, it goes on where it was.

    \b
    Example:  elsteer compare Qwen/Qwen2.5-Coder-0.5B-Instruct --run-dir runs/qwen --suite xstest
    Example:  elsteer compare MODEL --run-dir runs/qwen --methods els,surgical,caa --suite xstest --suite harmbench
    """
    from elsteer import show
    from elsteer.comparison.compare import check_methods, finished_fit, known_methods
    from elsteer.judges import judge_of_fit
    from elsteer.prompts import load_suite

    judge_of_fit(judge)
    methods = check_methods(methods or known_methods())
    _, landscape = finished_fit(run_dir)
    for name in suites:
        note(show.count_prompts(load_suite(name, data_dir=data_dir, limit=limit, seed=seed), name))
    invocation().kept = out or run_dir / "compare"
    llm, tokenizer = load_for(landscape, model, **loading)
    from elsteer.comparison.compare import compare as run

    with ProgressBars() as progress:
        result = run(
            llm,
            tokenizer,
            run_dir,
            methods,
            list(suites),
            out=out,
            data_dir=data_dir,
            limit=limit,
            seed=seed,
            judge=judge,
            strengths=strengths,
            budget=budget,
            finalists=finalists,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
            command=invocation().command,
        )
    show.comparison(result, screen())
    click.echo(result.sentence)
    click.echo(f"The table is {result.folder / 'compare.md'}, the frontier {result.folder / 'frontier.png'}.")
