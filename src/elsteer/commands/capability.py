"""`elsteer capability`: whether steering makes the model worse at what has nothing to do with refusing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elsteer.commands.shared import FILE, debug_option, load_for, model_options, read_landscape, run_folder_of
from elsteer.console import ProgressBars, invocation, note, screen

if TYPE_CHECKING:
    from rich.table import Table

    from elsteer.evaluation.capability import Capability, Paired
    from elsteer.evaluation.statistics import Interval
    from elsteer.prompts import Prompt

__all__ = ["capability"]

_TASKS = ("mmlu", "arc", "truthfulqa", "facts", "kl")


@click.command(short_help="Whether steering makes the model worse at other things.")
@click.argument("landscape")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=click.Choice(_TASKS),
    default=_TASKS,
    help="What to measure; may be repeated. [default: all]",
)
@click.option("--data-dir", type=FILE, help="Folder that holds the benchmarks. [default: $ELSTEER_DATA, else the hub]")
@click.option("--limit", type=click.IntRange(min=1), help="Questions of each task at most, drawn by seed.")
@click.option("--neutral", metavar="FILE", help="Prompts of the task kl. [default: plain starter prompts]")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draw and of the intervals."
)
@click.option("--strength", type=float, help="Scales the steps. [default: the landscape's]")
@click.option("--model", help="Hub id, folder or GGUF file. [default: the model it was fitted to]")
@click.option(
    "--out", type=FILE, help="Folder for all files. [default: the landscape's run folder, else runs/ and its name]"
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Prompts at a time.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=4),
    default=128,
    show_default=True,
    help="Tokens of an answer to a neutral prompt at most.",
)
@model_options
@debug_option
def capability(
    landscape: str,
    tasks: tuple[str, ...],
    data_dir: Path | None,
    limit: int | None,
    neutral: str | None,
    seed: int,
    strength: float | None,
    model: str | None,
    out: Path | None,
    batch_size: int,
    max_new_tokens: int,
    **loading: Any,
) -> None:
    """Measure plain against steered on multiple-choice benchmarks, short facts and neutral prompts.

    Started again, it goes on where it was.

    \b
    Example:  elsteer capability runs/demo/landscape --task facts --task kl
    Example:  elsteer capability runs/demo/landscape --task mmlu --limit 500 --data-dir data
    """
    from elsteer.evaluation.capability_data import BENCHMARKS, load_choices
    from elsteer.prompts import read_prompts

    prompts: list[Prompt] | None = None if neutral is None else read_prompts(neutral, harmful=False)
    for task in tasks:
        if task in BENCHMARKS:  # a file that cannot be read is told of before the model is loaded
            found = load_choices(task, data_dir=data_dir, limit=limit, seed=seed)
            note(f"{BENCHMARKS[task].title}: {len(found)} questions")
    read = read_landscape(landscape)
    folder = out or run_folder_of(landscape, read)
    invocation().kept = folder
    llm, tokenizer = load_for(read, model, **loading)
    from elsteer.evaluation.capability import capability as run

    with ProgressBars() as progress:
        result = run(
            llm,
            tokenizer,
            read,
            tasks,
            out=folder,
            data_dir=data_dir,
            limit=limit,
            seed=seed,
            strength=strength,
            neutral=prompts,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
            command=invocation().command,
        )
    console = screen()
    for table in _tables(result):
        console.print(table)
    for line in _sentences(result):
        click.echo(line)
    click.echo(f"The figures are {folder / 'capability.json'}; every row is in {folder / 'capability'}.")


def _tables(found: Capability) -> list[Table]:
    from elsteer.evaluation.capability_data import BENCHMARKS
    from elsteer.show import plain_table

    rows = [_row(f"{BENCHMARKS[name].title}, right", pair) for name, pair in found.choices.items()]
    if found.facts is not None:
        rows.append(_row("facts, right", found.facts))
    if found.degenerate is not None:
        rows.append(_row("neutral prompts, degenerate answers", found.degenerate))
    if not rows:
        return []
    return [plain_table("Plain and steered", ("share of", "n", "plain", "steered", "difference", "95%", "p"), rows)]


def _row(name: str, pair: Paired) -> tuple[str, ...]:
    return (
        name,
        f"{pair.n:,}",
        f"{pair.plain.value:.1%}",
        f"{pair.steered.value:.1%}",
        f"{100 * pair.difference.value:+.1f}",
        f"{100 * pair.difference.low:+.1f} to {100 * pair.difference.high:+.1f}",
        f"{pair.p:.2g}",
    )


def _sentences(found: Capability) -> list[str]:
    lines = []
    if found.facts_kept is not None:
        if found.facts_kept.defined:
            kept = found.facts_kept
            lines.append(
                f"Of {kept.n} facts that the plain model knows, {kept.value:.1%} stay right{_limits(kept, 100)}."
            )
        else:
            lines.append("The plain model got no fact right: nothing can be said of what is kept.")
    if found.kl is not None:
        lines.append(
            f"On {found.kl.n} neutral prompts the steered model is {found.kl.value:.4f} nats per token away from the plain "
            f"one{_limits(found.kl)}."
        )
    if found.lengths is not None:
        one = found.lengths
        ratio = f"{one.ratio.value:.3f} times as long{_limits(one.ratio)}" if one.ratio.defined else "of no length"
        lines.append(
            f"Answers to them have {one.steered:.1f} tokens, plain {one.plain:.1f}: {ratio}; {one.cut[1]:.0%} and "
            f"{one.cut[0]:.0%} of them were cut off at {one.limit}."
        )
    return lines


def _limits(one: Interval, scale: float = 1) -> str:
    unit = "%" if scale == 100 else ""
    digits = 1 if scale == 100 else 4
    return f" (95%: {one.low * scale:.{digits}f}{unit} to {one.high * scale:.{digits}f}{unit})"
