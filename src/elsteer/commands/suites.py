"""What can be measured on: the named suites and the families of attacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from elsteer.commands.shared import FILE, debug_option
from elsteer.console import screen

if TYPE_CHECKING:
    from elsteer.prompts import AttackFamily, Suite

__all__ = ["suites"]


@click.command(short_help="List benchmarks and jailbreaks by name.")
@click.argument("name", required=False)
@click.option("--data-dir", type=FILE, help="Folder that holds the benchmarks. [default: $ELSTEER_DATA, else the hub]")
@debug_option
def suites(name: str | None, data_dir: Path | None) -> None:
    """List the suites that `elsteer evaluate --suite` knows, and the attacks that can be added to them as SUITE+ATTACK.

    With NAME, tell all about one of them. Nothing is downloaded.

    \b
    Example:  elsteer suites
    Example:  elsteer suites wildguardtest
    Example:  elsteer suites --data-dir DATA
    """
    from elsteer.prompts import FAMILIES, SUITES
    from elsteer.prompts.suites import held, unknown_suite
    from elsteer.show import pairs, plain_table

    console = screen()
    if name is None:
        rows = [_row(one, held(one, data_dir)) for one in SUITES.values()]
        console.print(plain_table("", ("suite", "prompts", "right answer", "from", "licence"), rows))
        attacks = [(one.name, _use(one), "a data folder" if one.files else "elsteer") for one in FAMILIES.values()]
        console.print("", plain_table("", ("attack", "for", "from"), attacks), sep="\n")
        click.echo("Tell all about one with `elsteer suites NAME`; attack a suite's harmful prompts as SUITE+ATTACK.")
    elif name in SUITES:
        console.print(pairs("", _suite(SUITES[name], held(SUITES[name], data_dir))))
        click.echo(f"Measure on it with `elsteer evaluate LANDSCAPE --suite {name}`.")
    elif name in FAMILIES:
        console.print(pairs("", _family(FAMILIES[name])))
        click.echo(f"Measure under it with `elsteer evaluate LANDSCAPE --suite harmbench+{name}`.")
    else:
        raise click.UsageError(unknown_suite(name, (*SUITES, *FAMILIES)))


def _row(suite: Suite, count: int | None) -> tuple[str, ...]:
    number = count or suite.rows
    return suite.name, str(number) if number else "-", _answer(suite), _place(suite, count), suite.licence


def _answer(suite: Suite) -> str:
    from elsteer.prompts import SUITES

    if suite.parts:
        answers = {_answer(SUITES[part]) for part in suite.parts}
        return answers.pop() if len(answers) == 1 else "by row"
    return "by row" if suite.harmful is None else "refusal" if suite.harmful else "help"


def _place(suite: Suite, count: int | None) -> str:
    from elsteer.prompts import SUITES

    if suite.starter:
        return "elsteer"
    if count is not None:
        return "the data folder"
    some = SUITES[suite.parts[0]] if suite.parts else suite
    return ("the hub, gated" if some.gated else "the hub") if some.hub else "a data folder"


def _suite(suite: Suite, count: int | None) -> dict[str, str]:
    from elsteer.prompts import SUITES

    parts = [SUITES[name] for name in suite.parts] or [suite]
    some = parts[0]
    files = [f"{one.name}.jsonl or .csv" for one in parts]
    files += dict.fromkeys(file for one in parts for file in one.folder_files)
    told = {
        "name": suite.name,
        "title": suite.title,
        "what": suite.description,
        "right answer": _answer(suite),
        "prompts": str(count or suite.rows or "not known before it is read"),
        "parts": ", ".join(suite.parts),
        "licence": suite.licence,
        "source": suite.url,
        "read from": _place(suite, count),
        "on the hub": f"{some.hub}, revision {some.revision or 'not pinned'}" if some.hub else "",
        "access": f"ask on https://huggingface.co/datasets/{some.hub}, then hf auth login" if some.gated else "",
        "in a data folder": ", ".join(files) if not some.starter else "",
    }
    return {key: value for key, value in told.items() if value}


def _use(family: AttackFamily) -> str:
    return "fitting and reporting" if family.use == "train" else "reporting only"


def _family(family: AttackFamily) -> dict[str, str]:
    from elsteer.prompts.attacks import templates_of

    told = {
        "name": family.name,
        "what": family.description,
        "for": _use(family),
        "templates": "" if family.files else str(len(templates_of(family.name))),
        "source": family.url,
        "in a data folder": ", ".join(family.files),
    }
    return {key: value for key, value in told.items() if value}
