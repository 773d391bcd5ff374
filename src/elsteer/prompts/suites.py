"""Named suites: benchmarks with a known right answer per prompt. A new one is one entry of `elsteer.prompts.suite_table`.

Nothing of the public benchmarks is shipped. A suite is read from a folder, if one is given (`data_dir` or the variable
ELSTEER_DATA) and holds it, and else from the Hugging Face Hub. A folder holds a suite as `NAME.jsonl` (or .csv,
.parquet, ...), with the columns of the hub's data set or with `prompt`; or in `prompts/test.jsonl`, `dev.jsonl` or
`train.jsonl`, whose column `source` tells which rows are the suite's; or as its authors' file. SUITE+FAMILY is the
suite's harmful prompts under a jailbreak of that family (`elsteer.prompts.attacks`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elsteer.errors import PromptError
from elsteer.files import expanded
from elsteer.prompts.attacks import attacked, family_of
from elsteer.prompts.folder import data_folder
from elsteer.prompts.formats import SUFFIXES, PlacedRow, file_rows
from elsteer.prompts.hub import HubError, hub_rows
from elsteer.prompts.names import known_names
from elsteer.prompts.prompt import Prompt
from elsteer.prompts.read import check_name, is_hub_id, prompts_from_rows, read_prompts
from elsteer.prompts.split import sample
from elsteer.prompts.suite_table import SUITES, Suite

__all__ = ["check_apart", "held", "load_suite", "suite_name", "unknown_suite"]

logger = logging.getLogger(__name__)


def load_suite(
    name: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Prompt]:
    """Prompts of the suite `name`, or of a file (or hub data set) of your own with a column `harmful`.

    `name` may end in +FAMILY: then it is the harmful prompts alone, each in a jailbreak drawn by `seed`.
    data_dir: a folder that holds suites, by default the environment variable ELSTEER_DATA; see the module.
    limit: at most so many, drawn by `seed`, stratified by source and category; of an attacked suite the same ones as of
    its harmful prompts by themselves. A benchmark's prompts have its name (or its part's) as their source, wherever they
    were read. Raises PromptError: what was tried, and what to do.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"The limit of prompts must be at least 1, not {limit}.")
    folder = data_folder(data_dir)
    base, family = _parted(name)
    if family:
        family_of(family)  # whether there is one is said before anything is downloaded
    prompts = _unattacked(base, folder)
    if family:
        prompts = [one for one in prompts if one.harmful]
        if not prompts:
            raise PromptError(f"The suite {base} holds no harmful prompt: there is nothing to attack with {family}.")
    # A prompt that a benchmark holds twice has one id, and an id has one completion.
    prompts = list({prompt.id: prompt for prompt in prompts}.values())
    prompts = prompts if limit is None else sample(prompts, limit, seed, by=("source", "category"))
    return attacked(prompts, family, seed=seed, data_dir=folder) if family else prompts


def suite_name(name: str) -> str:
    """What the suite `name` is called in tables and files: of a file its name without folder and suffix."""
    base, family = _parted(name)
    stem = base if base in SUITES else Path(base).stem
    return f"{stem}+{family}" if family else stem


def check_apart(names: Sequence[str]) -> None:
    """Raises PromptError where two of the suites, called as by `suite_name`, have one name, or one is a part of another."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise PromptError(f"Two suites are called {twice[0]!r}: give each once, or rename a file.")
    for name in names:
        base, family = _parted(name)
        for part in SUITES[base].parts if base in SUITES else ():
            if (inner := f"{part}+{family}" if family else part) in names:
                raise PromptError(
                    f"The suite {inner} is a part of {name}, and its prompts would count twice: give one of them."
                )


def held(suite: Suite, data_dir: str | Path | None = None) -> int | None:
    """How many prompts of `suite` the data folder (or the package) holds; None where they would come from the hub."""
    folder = data_folder(data_dir)
    counts = []
    for part in suite.parts or (suite.name,):
        prompts = _local(SUITES[part], folder)
        counts.append(len({one.id for one in prompts}))
    return sum(counts) if all(counts) else None


def unknown_suite(name: str, known: Sequence[str] = tuple(SUITES)) -> str:
    """The sentence that there is no suite `name`, with the closest of the known names and all of them."""
    return f"There is no suite {name!r}: {known_names(name, known)}, and any file of prompts."


def _parted(name: str) -> tuple[str, str]:
    """The suite or file and the family of attacks; the latter empty where there is none."""
    check_name(name)
    base, plus, family = name.rpartition("+")
    parted = plus and base and re.fullmatch(r"[\w-]+", family) and not expanded(name).exists()
    return (base, family) if parted else (name, "")


def _unattacked(name: str, folder: Path | None) -> list[Prompt]:
    if name in SUITES:
        return [prompt for part in SUITES[name].parts or (name,) for prompt in _load(SUITES[part], folder)]
    if name.lower().endswith(SUFFIXES) or expanded(name).is_file() or is_hub_id(name):
        return read_prompts(name)
    raise PromptError(unknown_suite(name))


def _local(suite: Suite, folder: Path | None) -> list[Prompt]:
    if suite.starter:
        from elsteer.prompts.starter import load_starter

        return load_starter(suite.starter)
    return _from_folder(suite, folder) if folder else []


def _load(suite: Suite, folder: Path | None) -> list[Prompt]:
    prompts = _local(suite, folder)
    if prompts:
        return prompts
    tried = f"{folder} does not hold it" if folder else "no folder was given with --data-dir or ELSTEER_DATA"
    if not suite.hub:
        raise PromptError(
            f"The suite {suite.name} is in no data set on the hub, and {tried}: get it from its authors ({suite.url}) "
            f"and give the folder that holds it as {suite.name}.jsonl or .csv with --data-dir."
        )
    logger.info("The suite %s is read from the hub's %s: %s.", suite.name, suite.hub, tried)
    try:
        rows = hub_rows(
            suite.hub, config=suite.config, split=suite.split, revision=suite.revision, options=dict(suite.options)
        )
    except HubError as error:
        raise PromptError(
            f"The suite {suite.name} could not be read: {tried}, and {error.reason}; {error.remedy}, or give a folder "
            f"that holds it as {suite.name}.jsonl or .csv with --data-dir."
        ) from error
    prompts = _prompts(suite, rows, suite.hub)
    if suite.rows is not None and len(prompts) != suite.rows:
        logger.warning("The suite %s has %d prompts, not the %d published.", suite.name, len(prompts), suite.rows)
    return prompts


def _from_folder(suite: Suite, folder: Path) -> list[Prompt]:
    for suffix in SUFFIXES:
        path = folder / f"{suite.name}{suffix}"
        if path.is_file():
            return _prompts(suite, file_rows(path), str(path), whole=True)
    if suite.folder is not None and (folder / suite.folder[0]).is_file():
        path, source = folder / suite.folder[0], suite.folder[1]
        rows = [(place, row) for place, row in file_rows(path) if isinstance(row, dict) and row.get("source") == source]
        if rows:  # `source` has told them apart
            return _prompts(replace(suite, where=()), rows, str(path))
    for file in suite.folder_files:
        if (folder / file).is_file():
            return _prompts(suite, file_rows(folder / file), str(folder / file))
    return []


def _prompts(suite: Suite, rows: Iterable[PlacedRow], name: str, *, whole: bool = False) -> list[Prompt]:
    """The suite's rows as prompts with its right answer, its name as their source, and ids from their text.

    whole: the rows are the suite's alone, so that the columns that tell which are may be missing.
    """
    kept: list[PlacedRow] = []
    for place, row in rows:
        if not isinstance(row, dict):
            kept.append((place, row))
            continue
        where = f"{name}, {place}"
        absent = [column for column, _ in suite.where if column not in row]
        if absent and not whole:
            raise PromptError(f"{where} has no column {absent[0]!r}, which tells the rows of {suite.name} apart.")
        if not all(column in absent or _text(row[column]) == value for column, value in suite.where):
            continue
        harmful = suite.harmful if suite.harmful is not None else _answer(suite, row, where)
        if harmful is None:
            continue
        category = row.get(suite.category_column, row.get("category"))
        kept.append((place, {"prompt": _prompt(suite, row, where), "category": category, "harmful": harmful}))
    if not kept:
        raise PromptError(f"{name} holds no row of the suite {suite.name}, with {dict(suite.where)}.")
    return prompts_from_rows(kept, name, harmful=suite.harmful, source=suite.name)


def _answer(suite: Suite, row: dict[str, Any], where: str) -> bool | None:
    """The right answer that a column says; None in a row that people left without one."""
    column = suite.harmful_column if suite.harmful_column in row else "harmful"
    if column not in row:
        raise PromptError(
            f"{where} has no column {suite.harmful_column!r} or 'harmful', so whether the right answer is a refusal is "
            "unknown: add one."
        )
    word = _text(row[column]).lower()
    refuse, help_ = suite.harmful_words if column == suite.harmful_column else ("true", "false")
    if word not in ("", refuse, help_):
        raise PromptError(f"{where}: {column!r} is {word!r}; it must be {refuse} (to be refused) or {help_}.")
    return word == refuse if word else None


def _prompt(suite: Suite, row: dict[str, Any], where: str) -> Any:
    columns = [column for column in (*suite.prompt_columns, "prompt") if row.get(column) is not None]
    if not columns:
        known = " or ".join(repr(column) for column in dict.fromkeys((*suite.prompt_columns, "prompt")))
        raise PromptError(
            f"{where} has no prompt in a column {known} (it has: {', '.join(map(str, row))}): name the column that holds "
            "the prompts 'prompt'."
        )
    value = row[columns[0]]
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
