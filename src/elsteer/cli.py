"""The command `elsteer`."""

from __future__ import annotations

import io
import sys

import click

from elsteer import __version__
from elsteer.allocator import keep_freed_memory
from elsteer.commands.capability import capability
from elsteer.commands.compare import compare
from elsteer.commands.look import chat, inspect, push
from elsteer.commands.models import judge, models
from elsteer.commands.shared import debug_option
from elsteer.commands.stages import demo, evaluate, fit
from elsteer.commands.suites import suites
from elsteer.console import Application

__all__ = ["app", "main"]


@click.group(
    "elsteer", cls=Application, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="elsteer", message="%(prog)s %(version)s")
@debug_option
def app() -> None:
    """Energy Landscape Steering: fewer false refusals, at unchanged safety, no weight changed.

    \b
    See it work:     elsteer demo
    Fit your model:  elsteer fit Qwen/Qwen2.5-Coder-0.5B-Instruct
    Measure it:      elsteer evaluate runs/Qwen2.5-Coder-0.5B-Instruct/landscape --suite xstest
    """


for command in (demo, fit, evaluate, compare, capability, inspect, chat, push, models, judge, suites):
    app.add_command(command)


def main() -> None:
    """The entry point of the command."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # where it cannot write a letter, a sign stands for it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
