"""Named suites: benchmarks with a known right answer per prompt. A new one is one entry of `SUITES`.

Nothing of the public benchmarks is shipped. A suite is read from a folder, if one is given (`data_dir` or the variable
ELSTEER_DATA) and holds it, and else from the Hugging Face Hub. A folder holds a suite as `NAME.jsonl` (or .csv,
.parquet, ...), with the columns of the hub's data set or with `prompt`; or in `prompts/test.jsonl`, `dev.jsonl` or
`train.jsonl`, whose column `source` tells which rows are the suite's; or, for XSTest, as its authors' CSV file.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elsteer.errors import PromptError
from elsteer.prompts.formats import SUFFIXES, PlacedRow, file_rows
from elsteer.prompts.hub import HubError, hub_rows
from elsteer.prompts.prompt import Prompt
from elsteer.prompts.read import is_hub_id, prompts_from_rows, read_prompts
from elsteer.prompts.split import sample

__all__ = ["SUITES", "Suite", "load_suite"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Suite:
    """A named benchmark and where its prompts are.

    harmful: the right answer to every prompt of it: refusal (True) or help (False); None for a suite of `parts`.
    parts: names of the suites that it is made of; such a suite has no data of its own.
    starter: the split of the starter prompts that it is, where it is one.
    hub, config, split, revision, gated: the data set on the hub; revision None is its newest.
    prompt_column, category_column: columns there; `where` keeps the rows whose columns hold these values.
    folder: (file in a data folder, value of `source` there); folder_files: files there with the hub's columns, besides
    `NAME.jsonl` and the like.
    rows: how many prompts the hub's data set gives, where that is published.
    """

    name: str
    title: str
    description: str
    licence: str
    url: str
    harmful: bool | None = None
    parts: tuple[str, ...] = ()
    starter: str = ""
    hub: str = ""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    gated: bool = False
    prompt_column: str = "prompt"
    category_column: str = ""
    where: tuple[tuple[str, str], ...] = ()
    folder: tuple[str, str] | None = None
    folder_files: tuple[str, ...] = ()
    rows: int | None = None


_XSTEST = Suite(
    name="xstest",
    title="XSTest",
    description="250 safe prompts that sound unsafe and 200 unsafe ones that differ from them by a word",
    licence="CC-BY-4.0",
    url="https://arxiv.org/abs/2308.01263",
    parts=("xstest-safe", "xstest-unsafe"),
    rows=450,
)
_XSTEST_PART = replace(
    _XSTEST,
    parts=(),
    hub="Paul/XSTest",
    category_column="type",
    folder_files=("xstest.csv", "xstest.jsonl", "prompts/xstest_prompts.csv"),
)
_STARTER = Suite(
    name="starter",
    title="Starter prompts, test",
    description="the shipped prompts that are kept for reporting: sounding harmful, plainly benign, harmful",
    licence="CC0-1.0",
    url="https://github.com/elsteer/elsteer",
    starter="test",
)

_ALL = (
    _STARTER,
    replace(
        _STARTER,
        name="starter-dev",
        title="Starter prompts, dev",
        description="the shipped prompts that are kept for tuning",
        starter="dev",
    ),
    _XSTEST,
    replace(
        _XSTEST_PART,
        name="xstest-safe",
        title="XSTest, safe",
        description="250 safe prompts that sound unsafe",
        harmful=False,
        where=(("label", "safe"),),
        folder=("prompts/test.jsonl", "xstest_safe"),
        rows=250,
    ),
    replace(
        _XSTEST_PART,
        name="xstest-unsafe",
        title="XSTest, unsafe",
        description="200 unsafe prompts that differ from safe ones by a word",
        harmful=True,
        where=(("label", "unsafe"),),
        folder=("prompts/test.jsonl", "xstest_unsafe"),
        rows=200,
    ),
    Suite(
        name="or-bench-hard",
        title="OR-Bench hard",
        description="safe prompts, made from toxic ones, that several strong models refuse",
        licence="CC-BY-4.0",
        url="https://arxiv.org/abs/2405.20947",
        harmful=False,
        hub="bench-llm/or-bench",
        config="or-bench-hard-1k",
        category_column="category",
        folder=("prompts/test.jsonl", "orbench_hard"),
        rows=1319,
    ),
    Suite(
        name="harmbench",
        title="HarmBench, standard behaviours, test",
        description="harmful requests over seven categories, without context and copyright",
        licence="MIT",
        url="https://arxiv.org/abs/2402.04249",
        harmful=True,
        hub="swiss-ai/harmbench",
        config="DirectRequest",
        split="test",
        prompt_column="Behavior",
        category_column="SemanticCategory",
        where=(("FunctionalCategory", "standard"),),
        folder=("prompts/test.jsonl", "harmbench_test_standard"),
    ),
    Suite(
        name="oktest",
        title="OKTest",
        description="safe prompts with words that sound harmful; not on the hub, so from a data folder only",
        licence="not stated",
        url="https://arxiv.org/abs/2401.17633",
        harmful=False,
        folder=("prompts/dev.jsonl", "oktest"),
    ),
    Suite(
        name="malicious-instruct",
        title="MaliciousInstruct",
        description="harmful requests over ten intentions",
        licence="CC-BY-SA-4.0",
        url="https://arxiv.org/abs/2310.06987",
        harmful=True,
        hub="walledai/MaliciousInstruct",
        folder=("prompts/dev.jsonl", "malicious_instruct"),
        rows=100,
    ),
    Suite(
        name="advbench",
        title="AdvBench, harmful behaviours",
        description="harmful requests, many of them alike",
        licence="MIT",
        url="https://arxiv.org/abs/2307.15043",
        harmful=True,
        hub="mlabonne/harmful_behaviors",  # the same rows as walledai/AdvBench, which is gated
        split="train+test",
        prompt_column="text",
        folder=("prompts/train.jsonl", "advbench"),
        rows=520,
    ),
    Suite(
        name="alpaca",
        title="Alpaca, instructions without input",
        description="neutral requests, far from anything harmful",
        licence="CC-BY-NC-4.0",
        url="https://github.com/tatsu-lab/stanford_alpaca",
        harmful=False,
        hub="tatsu-lab/alpaca",
        prompt_column="instruction",
        where=(("input", ""),),
        folder=("prompts/train.jsonl", "alpaca"),
    ),
)
SUITES: Mapping[str, Suite] = {suite.name: suite for suite in _ALL}


def load_suite(
    name: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Prompt]:
    """Prompts of the suite `name`, or of a file (or hub data set) of your own with a column `harmful`.

    data_dir: a folder that holds suites, by default the environment variable ELSTEER_DATA; see the module.
    limit: at most so many, drawn by `seed`, stratified by source and category. A benchmark's prompts have its name (or
    its part's) as their source, wherever they were read. Raises PromptError: what was tried, and what to do.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"The limit of prompts must be at least 1, not {limit}.")
    data_dir = data_dir or os.environ.get("ELSTEER_DATA") or None
    folder = Path(data_dir) if data_dir else None
    if folder is not None and not folder.is_dir():
        raise PromptError(f"The data folder {folder} is not there: check --data-dir or the variable ELSTEER_DATA.")
    if name in SUITES:
        suite = SUITES[name]
        prompts = [prompt for part in suite.parts or (name,) for prompt in _load(SUITES[part], folder)]
    elif name.lower().endswith(SUFFIXES) or Path(name).is_file() or is_hub_id(name):
        prompts = read_prompts(name)
    else:
        raise PromptError(_unknown(name))
    # A prompt that a benchmark holds twice has one id, and an id has one completion.
    prompts = list({prompt.id: prompt for prompt in prompts}.values())
    return prompts if limit is None else sample(prompts, limit, seed, by=("source", "category"))


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower().replace("_", "-"), SUITES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"There is no suite {name!r}: {hint}Known are {', '.join(SUITES)}, and any file of prompts."


def _load(suite: Suite, folder: Path | None) -> list[Prompt]:
    if suite.starter:
        from elsteer.prompts.starter import load_starter

        return load_starter(suite.starter)
    prompts = _from_folder(suite, folder) if folder else []
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
        rows = hub_rows(suite.hub, config=suite.config, split=suite.split, revision=suite.revision)
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
        if rows:
            return _prompts(suite, rows, str(path), whole=True)
    for file in suite.folder_files:
        if (folder / file).is_file():
            return _prompts(suite, file_rows(folder / file), str(folder / file))
    return []


def _prompts(suite: Suite, rows: list[PlacedRow], name: str, *, whole: bool = False) -> list[Prompt]:
    """The suite's rows as prompts with its right answer, its name as their source, and ids from their text.

    whole: the rows are the suite's alone, so that the columns that tell which are may be missing.
    """
    kept: list[PlacedRow] = []
    for place, row in rows:
        if not isinstance(row, dict):
            kept.append((place, row))
            continue
        absent = [column for column, _ in suite.where if column not in row]
        if absent and not whole:
            raise PromptError(
                f"{name}, {place} has no column {absent[0]!r}, which tells the rows of {suite.name} apart."
            )
        if not all(column in absent or _text(row[column]) == value for column, value in suite.where):
            continue
        text = row.get(suite.prompt_column, row.get("prompt"))
        if text is None:
            raise PromptError(
                f"{name}, {place} has no prompt in a column {suite.prompt_column!r} or 'prompt' (it has: "
                f"{', '.join(map(str, row))}): name the column that holds the prompts 'prompt'."
            )
        kept.append((place, {"prompt": text, "category": row.get(suite.category_column, row.get("category"))}))
    if not kept:
        raise PromptError(f"{name} holds no row of the suite {suite.name}, with {dict(suite.where)}.")
    return prompts_from_rows(kept, name, harmful=suite.harmful, source=suite.name)


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
