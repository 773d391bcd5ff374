"""Command line options made from settings classes: one flag per field, a YAML file below them, errors in one sentence.

A nested class gives its fields a prefix (`training.width` is --training-width) and a heading of its own in --help, unless
it is one of those whose fields stand among the main options.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

__all__ = ["SettingsCommand", "read_settings", "settings_options"]

Settings = TypeVar("Settings", bound=BaseModel)
Decorated = Callable[..., Any]


class SettingOption(click.Option):
    """An option that stands for a field of a settings class.

    field: its path in the class. section: the heading in --help that it stands under, empty for the main options.
    """

    def __init__(self, *args: Any, field: tuple[str, ...] = (), section: str = "", **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.field, self.section = field, section


class SettingsCommand(click.Command):
    """A command whose --help puts the options of each section under a heading."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write all options, the main ones first."""
        sections: dict[str, list[tuple[str, str]]] = {"": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", ""), []).append(record)
        for name, records in sections.items():
            with formatter.section(name or "Options"):
                formatter.write_dl(records)


class _List(click.ParamType[Any]):
    """Values between commas; whether they are numbers is the settings class's business."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        words = [word.strip() for word in value.split(",") if word.strip()]
        return [None if word.lower() == "none" else word for word in words]


def settings_options(
    settings: type[BaseModel], *, among_main: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command one option per field of `settings`, all without a value unless it is given.

    among_main: nested classes whose fields get no prefix and stand among the main options.
    """
    options = _options(settings, among_main)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _options(
    settings: type[BaseModel], among_main: Sequence[str], path: tuple[str, ...] = (), section: str = ""
) -> list[Callable[[Decorated], Decorated]]:
    found = []
    for name, field in settings.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            heading = "" if name in among_main else f"{name.capitalize()} options"
            found += _options(inner, among_main, (*path, name), heading)
        else:
            prefix = [part for part in path if part not in among_main]
            found.append(_option((*path, name), [*prefix, name], field, section))
    return found


def _option(
    path: tuple[str, ...], words: Sequence[str], field: FieldInfo, section: str
) -> Callable[[Decorated], Decorated]:
    flag = "-".join(words).replace("_", "-")
    kind = _kind(field.annotation)
    names = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    text = f"{field.description or ''} [default: {_shown(field.default)}]"
    more: dict[str, Any] = {} if kind is bool else {"type": kind}
    return click.option(
        names, "_".join(words), cls=SettingOption, field=path, section=section, default=None, help=text, **more
    )


def _kind(annotation: Any) -> Any:
    """The click type of a field: `int | None` is an int, a tuple is a list."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(one for one in get_args(annotation) if one is not type(None))
    return _List() if get_origin(annotation) is tuple else annotation


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(_shown, value)) if isinstance(value, tuple) else str(value)


def read_settings(settings: type[Settings], config: Path | None) -> Settings:
    """The settings of the command that is running: its flags over the YAML file `config` over the defaults.

    Raises click.UsageError, in one sentence, for a file that cannot be read and a value that is not allowed.
    """
    ctx = click.get_current_context()
    values = {} if config is None else _read_yaml(config)
    # `training:` with nothing below it is a heading without settings.
    values = {name: value for name, value in values.items() if value is not None or not _is_section(settings, name)}
    flags: dict[tuple[str, ...], str] = {}
    for parameter in ctx.command.params:
        if isinstance(parameter, SettingOption) and (value := ctx.params.get(parameter.name or "")) is not None:
            flags[parameter.field] = parameter.opts[0]
            _put(values, parameter.field, value, config)
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise click.UsageError(_sentence(error, flags, config)) from error


def _is_section(settings: type[Settings], name: str) -> bool:
    field = settings.model_fields.get(name)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _put(values: dict[str, Any], field: tuple[str, ...], value: Any, config: Path | None) -> None:
    for part in field[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise click.UsageError(f"{part} in {config} is {values!r}: it must hold settings.")
    values[field[-1]] = value


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise click.UsageError(f"{path} was not found: give a YAML file of settings with --config.") from None
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is not UTF-8: save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:  # such as the 30th of February
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise click.UsageError(f"{path} is not YAML: {why}.") from None
    except OSError as error:
        raise click.UsageError(f"{path} could not be read: {error.strerror or error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise click.UsageError(
            f"{path}{where} is not YAML: {getattr(error, 'problem', None) or 'it is broken'}."
        ) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise click.UsageError(f"{path} must hold settings as `name: value` lines.")
    return {str(key): value for key, value in found.items()}


def _sentence(error: ValidationError, flags: Mapping[tuple[str, ...], str], config: Path | None) -> str:
    """The first thing that is wrong."""
    first = error.errors()[0]
    place = tuple(str(part) for part in first["loc"] if not isinstance(part, int))
    flag = next((name for field, name in flags.items() if place[: len(field)] == field), None)
    where = flag or f"{'.'.join(place)}{f' in {config}' if config else ''}"
    if first["type"] == "extra_forbidden":
        return f"There is no setting {where}: see the names in the settings.yaml of a run folder, or in --help."
    reason = str(first["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    if first["type"] == "int_parsing_size":
        reason = "a smaller number"
    if first["type"] == "string_pattern_mismatch":  # such as ^(product|network)$
        reason = " or ".join(first["ctx"]["pattern"].strip("^()$").split("|"))
    if first["type"] in ("too_short", "too_long"):
        words, key = ("at least", "min_length") if first["type"] == "too_short" else ("at most", "max_length")
        reason = f"{words} {first['ctx'][key]} value{'s' if first['ctx'][key] > 1 else ''}"
    if first["type"] == "missing":  # of a list of a certain length
        reason = "more values"
    return f"{where} is {first['input']!r}: it must be {reason}."
