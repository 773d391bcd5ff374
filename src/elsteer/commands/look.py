"""Looking at a landscape, talking to it, passing it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from elsteer.commands.shared import FILE, debug_option, load_for, model_options, read_landscape
from elsteer.console import note, screen

__all__ = ["chat", "inspect", "push"]


@click.command()
@click.argument("landscape")
@debug_option
def inspect(landscape: str) -> None:
    """Show what LANDSCAPE (a folder or hub id) holds. The model is not loaded.

    \b
    Example:  elsteer inspect runs/demo/landscape
    """
    from elsteer import show

    show.landscape(read_landscape(landscape), screen())
    click.echo(f"Read from {landscape}; nothing was written.")


@click.command()
@click.argument("landscape")
@click.option("--model", help="Hub id, folder or GGUF file. [default: the model it was fitted to]")
@click.option("--strength", type=click.FloatRange(min=0), help="Scales the steps. [default: the landscape's]")
@click.option("--system", help="System prompt; '' for none. [default: the one it was fitted with]")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Length of an answer."
)
@model_options
@debug_option
def chat(
    landscape: str, model: str | None, strength: float | None, system: str | None, max_new_tokens: int, **loading: Any
) -> None:
    """Talk to the plain and the steered model side by side.

    /strength 0.5, /system TEXT, /reset, /help and /quit are commands; everything else goes to both.

    \b
    Example:  elsteer chat runs/demo/landscape
    Example:  echo 'How do I kill a Python process?' | elsteer chat runs/demo/landscape
    """
    found = read_landscape(landscape)
    llm, tokenizer = load_for(found, model, **loading)
    from elsteer.chat import Chat, converse

    collect = found.asked_with
    talk = Chat(
        llm,
        tokenizer,
        found,
        collect.get("system") if system is None else system or None,
        collect.get("thinking"),
        max_new_tokens,
    )
    value = found.rule.strength if strength is None else strength
    note(f"Strength {value:g}; /help lists the commands.")
    converse(talk, value, screen())
    click.echo("The chat is over; nothing was written.")


@click.command()
@click.argument("landscape", type=FILE)
@click.argument("repository", metavar="ORG/NAME")
@click.option(
    "--private/--public", default=None, help="Who may see a repository that is made. [default: as your account says]"
)
@debug_option
def push(landscape: Path, repository: str, private: bool | None) -> None:
    """Upload LANDSCAPE with its model card to the Hugging Face Hub.

    \b
    Example:  elsteer push runs/demo/landscape my-name/qwen-coder-landscape --private
    """
    address = read_landscape(str(landscape)).push_to_hub(repository, private=private)
    click.echo(f"The landscape is at {address}.")
