"""What commands share: options for loading a model, --debug, landscapes and models by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elsteer.console import invocation, note, quiet
from elsteer.errors import ModelError, RunError
from elsteer.files import expanded
from elsteer.text import half_character

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from elsteer.landscape import Landscape

__all__ = [
    "FILE",
    "debug_option",
    "judge_options",
    "load_for",
    "load_model",
    "model_options",
    "read_landscape",
    "run_folder_of",
]

Command = Callable[..., Any]


class _File(click.Path):
    """A path whose name can be written into reports; of --option=~/file the shell leaves the ~ to us."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = expanded(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if half_character(str(path)):
            self.fail(f"{str(path)!a} is not UTF-8: rename it.", param, ctx)
        return path


FILE = _File(path_type=Path)


def run_folder_of(name: str, landscape: Landscape) -> Path:
    """Where what is measured of the landscape goes by default: its run folder; runs/NAME where it lies elsewhere.

    Raises RunError where that folder holds another one.
    """
    from elsteer.landscape import holds

    local = expanded(name)
    if local.is_dir() and (local := local.resolve()).name == "landscape":
        return local.parent
    folder = Path("runs") / local.name
    if (folder / "landscape").exists() and not holds(folder, [landscape]):
        raise RunError(f"{folder} is the run folder of another landscape: give a folder of its own.")
    return folder


def _debug(ctx: click.Context, _option: click.Parameter, value: bool) -> None:
    told = invocation()
    told.debug = told.debug or value
    quiet(told.debug)


debug_option = click.option("--debug", is_flag=True, expose_value=False, callback=_debug, help="Show tracebacks.")


def model_options(command: Command) -> Command:
    """How a model is loaded: as in `elsteer.load`."""
    for option in (
        click.option(
            "--blocks", help="Dotted path of the decoder blocks, such as model.layers, where they are not found."
        ),
        click.option("--chat-template", type=FILE, help="Jinja file, instead of the tokenizer's own template."),
        click.option("--revision", help="Branch, tag or commit of the model on the hub."),
        click.option("--device-map", help="Spread the model over devices, such as auto."),
        click.option("--device", help="cpu, cuda, cuda:1. [default: cuda where there is one, else cpu]"),
        click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    ):
        command = option(command)
    return command


def judge_options(command: Command) -> Command:
    """Which model the judges `api` and `local` are."""
    for option in (
        click.option(
            "--judge-model",
            metavar="NAME",
            help="The service's model, for --judge api; a guard model, for --judge local.",
        ),
        click.option(
            "--judge-url",
            metavar="URL",
            help="Address of an OpenAI-compatible service, for --judge api; its key: ELSTEER_JUDGE_KEY, else OPENAI_API_KEY.",
        ),
    ):
        command = option(command)
    return command


def _check(name: str) -> None:
    """Raises click.UsageError for a name that could not be written into reports, RunError for one in the home of nobody."""
    if half_character(name):
        raise click.UsageError(f"The name {name!a} is not UTF-8: rename it.")
    expanded(name)


def read_landscape(name: str) -> Landscape:
    _check(name)
    from elsteer.landscape import Landscape

    return Landscape.from_pretrained(name)


def load_for(found: Landscape, model: str | None, **loading: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`model`, or the one that the landscape was fitted to."""
    name = model or found.fingerprint.name
    if name is None:
        raise click.UsageError("The landscape does not name its model: give it with --model.")
    if model is None and found.fingerprint.is_local and not expanded(name).exists():
        raise ModelError(
            f"The landscape was fitted to the local model {name}, which is not there: say where it is with --model."
        )
    loading["revision"] = loading.get("revision") or found.fingerprint.revision_of(name)
    llm, tokenizer = load_model(name, **loading)
    found.attach(llm, 0.0, tokenizer=tokenizer).remove()  # whether it fits is said now, not after the plain answers
    return llm, tokenizer


def load_model(name: str, **loading: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """loading: the values of `model_options`."""
    _check(name)
    note(f"Loading {name}")
    from elsteer.models import load

    return load(name, **loading)
