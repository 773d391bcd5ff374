"""The one format of every file under results/: figures with their interval, n, command, seed, model and machine.

{"figures": [{"name": "removed.xstest_safe", "value": 0.61, "low": 0.52, "high": 0.69, "n": 250, "command": "...",
"seed": 0, "model": "...", "machine": "..."}]}. `low`, `high` and `n` are left out where they mean nothing (a time),
`note` (the judge, the split, what was left out) where there is nothing to add.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from elsteer.errors import RunError
from elsteer.evaluation.statistics import Interval
from elsteer.files import write_json

__all__ = ["Figure", "figures_markdown", "machine", "read_figures", "write_figures"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. Rates and shares lie between 0 and 1; a name says what, for example "removed.xstest_safe".

    Raises ValueError for a number that is not finite or a value outside its own interval: it was not measured.
    """

    name: str
    value: float
    command: str
    seed: int
    model: str
    machine: str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        numbers = [number for number in (self.value, self.low, self.high) if number is not None]
        if not self.name or not all(_is_number(number) and math.isfinite(number) for number in numbers):
            raise ValueError(f"figure {self.name!r} holds a value or a limit that is not a finite number: {numbers}")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"figure {self.name!r} has one limit of its interval without the other")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise ValueError(f"figure {self.name!r}: {self.value} lies outside its interval {self.low} to {self.high}")

    @classmethod
    def of(
        cls, name: str, interval: Interval, command: str, seed: int, model: str, machine: str, note: str | None = None
    ) -> Figure:
        """The figure of an estimate with its interval and n."""
        return cls(name, interval.value, command, seed, model, machine, interval.low, interval.high, interval.n, note)


def write_figures(path: Path, figures: Iterable[Figure], *, only: bool = False) -> None:
    """Write `figures` into the file, atomically and sorted by name; those of other names that are there stay.

    only: none of other names stays, and what the file holds is not read.
    Raises RunError when the file that is there is not a figures file, or cannot be written.
    """
    kept = {figure.name: figure for figure in read_figures(path)} if Path(path).exists() and not only else {}
    kept |= {figure.name: figure for figure in figures}
    write_json(Path(path), {"figures": [_as_json(kept[name]) for name in sorted(kept)]})


def read_figures(path: Path) -> list[Figure]:
    """The figures of one file, in its order. Raises RunError when it is missing or not in the format."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is not there: run the command that measures these figures first.") from error
    except ValueError as error:
        raise RunError(f"{path} is not JSON: delete it and measure again.") from error
    rows = found.get("figures") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise RunError(f'{path} holds no list under "figures": it is not a file of figures, choose another name.')
    figures = [_from_json(path, number, row) for number, row in enumerate(rows, start=1)]
    if len({figure.name for figure in figures}) != len(figures):
        raise RunError(f"{path} holds two figures of one name: delete it and measure again.")
    return figures


def figures_markdown(
    figures: Sequence[Figure], goals: Mapping[str, str] | None = None, title: str = "Figures", about: str = ""
) -> str:
    """The page made from a figures file: a table, then the commands, models and machines behind the numbers.

    goals: name to the goal in words ("at least 0.55"), shown beside the figure; one without a figure is "not measured".
    about: a paragraph below the title.
    """
    goals = goals or {}
    commands = list(dict.fromkeys(figure.command for figure in figures))
    head = ["figure", "value", "95% interval", "n", *(["goal"] if goals else []), "seed", "command", "note"]
    lines = [
        f"# {title}",
        "",
        *([about, ""] if about else []),
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for name in sorted({figure.name for figure in figures} | set(goals)):
        figure = next((one for one in figures if one.name == name), None)
        if figure is None:
            cells = [f"`{name}`", "not measured", "", "", goals[name], "", "", ""]
        else:
            limits = (
                "" if figure.low is None or figure.high is None else f"{_short(figure.low)} to {_short(figure.high)}"
            )
            cells = [f"`{name}`", _short(figure.value), limits, "" if figure.n is None else f"{figure.n:,}"]
            cells += [goals.get(name, "")] if goals else []
            cells += [str(figure.seed), f"[{commands.index(figure.command) + 1}]", figure.note or ""]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    lines += ["", "Commands:", ""]
    lines += [f"{number}. `{command}`" for number, command in enumerate(commands, start=1)]
    for word, values in (("Model", [f.model for f in figures]), ("Machine", [f.machine for f in figures])):
        lines += ["", f"{word}: {'; '.join(dict.fromkeys(values)) or 'none'}"]
    return "\n".join(lines) + "\n"


@cache
def machine() -> str:
    """This machine in a line: cores that may be used, CPU, accelerator, torch. No host name, no user, no path."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [f"{cores} core{'' if cores == 1 else 's'}", _cpu_model()]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}"])


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown CPU"


def _as_json(figure: Figure) -> dict[str, Any]:
    order = ("name", "value", "low", "high", "n", "command", "seed", "model", "machine", "note")
    values = asdict(figure)
    return {key: values[key] for key in order if values[key] is not None}


def _from_json(path: Path, number: int, row: Any) -> Figure:
    known = {field.name for field in fields(Figure)}
    if not isinstance(row, dict) or not known >= set(row):
        raise RunError(
            f"{path}, figure {number} is not in the format: its keys must be among {', '.join(sorted(known))}."
        )
    try:
        return Figure(**row)
    except (TypeError, ValueError) as error:
        raise RunError(
            f"{path}, figure {number} is not in the format ({error}): delete it and measure again."
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: float) -> str:
    """Three decimals below 10 in size, one below 1000, none above: enough to compare with a goal."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
