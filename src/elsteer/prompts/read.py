"""Prompts from files and hub data sets, checked row by row so that an error names the file and the line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from elsteer.errors import PromptError
from elsteer.files import expanded
from elsteer.prompts.formats import SUFFIXES, PlacedRow, file_rows
from elsteer.prompts.hub import hub_rows
from elsteer.prompts.prompt import Prompt
from elsteer.text import half_character

__all__ = ["MAX_CHARS", "check_name", "is_hub_id", "prompts_from_rows", "read_prompts"]

MAX_CHARS = 1_000_000
"""Longest chat that is read, in characters. Whether it fits a model's context is checked later, in tokens."""

ROLES = ("system", "user", "assistant")
_TRUE = frozenset({"true", "1", "1.0", "yes", "harmful", "unsafe"})
_FALSE = frozenset({"false", "0", "0.0", "no", "benign", "harmless", "safe"})
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def read_prompts(
    source: str | Path,
    *,
    harmful: bool | None = None,
    prompt_column: str = "prompt",
    harmful_column: str = "harmful",
    split: str = "train",
    revision: str | None = None,
) -> list[Prompt]:
    """Prompts of a file (JSONL, JSON array, CSV, TSV, Parquet, or plain text with one prompt a line) or a hub data set.

    source: a path, or a hub id "org/name" or "org/name:config", of which `split` at `revision` is read.
    harmful: the right answer to all of them is a refusal (True) or help (False); None reads it from `harmful_column`
    (true / false, 1 / 0, yes / no, harmful / benign, unsafe / safe, in any case).
    A row holds `prompt_column`, or else `messages`: a list of {"role", "content"} whose last is the user's. The columns
    source, category, family and id are kept where they are present; source falls back on the file's or data set's name.
    Raises PromptError, which names the file and the line, for anything that cannot be used.
    """
    check_name(str(source))
    if is_hub_id(source):
        hub_id, _, config = str(source).partition(":")
        name, stem = f"{source} ({split})", hub_id
        rows = hub_rows(hub_id, config=config or None, split=split, revision=revision)
    else:
        name, stem = str(source), Path(source).stem
        rows = file_rows(expanded(source))
    return prompts_from_rows(
        rows, name, harmful=harmful, prompt_column=prompt_column, harmful_column=harmful_column, source=stem
    )


def check_name(name: str) -> None:
    """Raises PromptError where the name of a file holds bytes that are not UTF-8: its prompts are called by it."""
    if half_character(name):
        raise PromptError(f"The name {name!a} is not UTF-8: rename the file.")


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` is read from the hub: a string of the form org/name[:config] that no file or folder has."""
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source) or source.startswith("."):
        return False
    return not source.lower().endswith(SUFFIXES) and not Path(source).exists()


def prompts_from_rows(
    rows: Iterable[PlacedRow],
    name: str,
    *,
    harmful: bool | None = None,
    prompt_column: str = "prompt",
    harmful_column: str = "harmful",
    source: str = "",
) -> list[Prompt]:
    """Checked prompts of `rows`, each a (place, row); `name` and the place stand in the errors. As `read_prompts`."""
    prompts: list[Prompt] = []
    taken: dict[str, tuple[str, Prompt]] = {}
    for place, row in rows:
        where = f"{name}, {place}"
        if isinstance(row, str):
            row = {prompt_column: row}
        if not isinstance(row, dict):
            raise PromptError(f"{where} is {_kind(row)}, not an object of columns such as {{{prompt_column!r}: ...}}.")
        prompt = Prompt(
            messages=_messages(row, prompt_column, where),
            harmful=_harmful(row, harmful_column, where) if harmful is None else harmful,
            source=_label(row, "source", where) or source,
            category=_label(row, "category", where),
            family=_label(row, "family", where),
            id=_label(row, "id", where),
        )
        other_place, other = taken.setdefault(prompt.id, (place, prompt))
        if (other.messages, other.harmful) != (prompt.messages, prompt.harmful):
            raise PromptError(
                f"{where} has the id {prompt.id!r} of another prompt ({other_place}): make the ids unique."
            )
        prompts.append(prompt)
    if not prompts:
        raise PromptError(f"{name} holds no rows: it needs at least one prompt.")
    return prompts


def _messages(row: dict[str, Any], prompt_column: str, where: str) -> tuple[dict[str, str], ...]:
    value = row.get(prompt_column)
    if value is None:
        value, prompt_column = row.get("messages"), "messages" if "messages" in row else prompt_column
    if value is None and prompt_column not in row:
        raise PromptError(
            f"{where} has no column {prompt_column!r} (it has: {', '.join(map(str, row)) or 'none'}): "
            "rename the one that holds the prompts, or name it with --prompt-column of `elsteer fit`."
        )
    if prompt_column == "messages" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise PromptError(f"{where}: 'messages' is text that is not a JSON list of messages.") from None
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    elif not isinstance(value, list) and value is not None:
        raise PromptError(f"{where}: {prompt_column!r} is {_kind(value)}; it must be text or a list of messages.")
    if not value:
        raise PromptError(f"{where}: the prompt is empty: fill it in or delete the row.")
    messages = tuple(_message(message, number, where) for number, message in enumerate(value, start=1))
    if messages[-1]["role"] != "user":
        raise PromptError(
            f"{where}: the last message is from the {messages[-1]['role']}; it must be the user's, which the model "
            "is to answer: cut off what follows it."
        )
    if any(message["role"] == "system" for message in messages[1:]):
        raise PromptError(f"{where}: a system message must be the first of its chat.")
    size = sum(len(message["content"]) for message in messages)
    if size > MAX_CHARS:
        raise PromptError(
            f"{where}: the prompt has {size:,} characters, more than the {MAX_CHARS:,} that are read: "
            "shorten it or delete the row."
        )
    return messages


def _message(message: Any, number: int, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise PromptError(f'{where}: message {number} must be an object such as {{"role": "user", "content": "..."}}.')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PromptError(f"{where}: message {number} has the role {role!r}; the roles are {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise PromptError(f"{where}: the content of message {number} is {_kind(content)}; it must be text.")
    if not content.strip():
        what = "the prompt is empty" if role == "user" else f"message {number} is empty"
        raise PromptError(f"{where}: {what}: fill it in or delete the row.")
    return {"role": role, "content": _whole(content, "the prompt", where)}


def _whole(text: str, what: str, where: str) -> str:
    """`text`. Raises PromptError where a character is half, so that it could not be written."""
    if half := half_character(text):
        raise PromptError(f"{where}: {what} holds half of a character (a lone surrogate, {half!a}): delete or mend it.")
    return text


def _harmful(row: dict[str, Any], column: str, where: str) -> bool:
    if column not in row:
        raise PromptError(
            f"{where} has no column {column!r} (it has: {', '.join(map(str, row)) or 'none'}), so whether the right "
            "answer is a refusal is unknown: rename the column, or name it with --harmful-column of `elsteer fit`, which also "
            "takes files with --benign or --harmful."
        )
    word = str(row[column]).strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise PromptError(
        f"{where}: {column!r} is {_short(row[column])}; it must be true or false (or 1 / 0, harmful / benign)."
    )


def _label(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (str, int, float)):
        return _whole(str(value).strip(), repr(column), where)
    raise PromptError(f"{where}: {column!r} is {_kind(value)}; it must be text.")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(
        type(value), f"a number ({_short(value)})" if isinstance(value, (int, float)) else "of a wrong type"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
