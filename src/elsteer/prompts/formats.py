"""Files of rows: JSONL, JSON array, CSV, TSV, Parquet and plain text, each row with the place it came from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elsteer.errors import PromptError

__all__ = ["SUFFIXES", "PlacedRow", "file_rows"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")

PlacedRow = tuple[str, Any]
"""Where a row stands ("line 3"), and the row: an object of columns, or a bare string that is the prompt itself."""


def file_rows(path: Path) -> list[PlacedRow]:
    """All rows of `path`, read by its suffix. Raises PromptError for a file that is missing, empty or broken."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise PromptError(f"{path} has an unknown kind of file name; use one that ends in {', '.join(SUFFIXES)}.")
    data = _bytes_of(path)
    if suffix == ".parquet":
        return _parquet_rows(path, data)
    text = _text_of(path, data)
    if suffix == ".txt":
        rows: list[PlacedRow] = [
            (f"line {number}", line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()
        ]
    elif suffix in (".csv", ".tsv"):
        rows = list(_table_rows(path, text, delimiter="," if suffix == ".csv" else "\t"))
    elif suffix == ".json" and text.lstrip().startswith("["):
        rows = _array_rows(path, text)
    else:
        rows = list(_line_rows(path, text))
    if not rows:
        raise PromptError(f"{path} holds no rows: it needs at least one prompt.")
    return rows


def _bytes_of(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise PromptError(f"{path} was not found: check the path.") from None
    except IsADirectoryError:
        raise PromptError(f"{path} is a folder, not a file: name one file of prompts in it.") from None
    except OSError as error:
        raise PromptError(f"{path} could not be read ({error.strerror}): check its permissions.") from error
    if not data.strip():
        raise PromptError(f"{path} is empty: it needs at least one prompt.")
    return data


def _text_of(path: Path, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PromptError(f"{path} is encoded in UTF-16, not UTF-8: save it as UTF-8 and try again.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With the "-sig" codec the position counts from after the byte order mark.
        position = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, position) + 1
        raise PromptError(
            f"{path}, line {line} is not UTF-8 (byte 0x{data[position]:02x} at position {position}): "
            "save the file as UTF-8 and try again."
        ) from None


def _line_rows(path: Path, text: str) -> Iterator[PlacedRow]:
    # Not str.splitlines: it also breaks at U+2028 and others that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(
                f"{path}, line {number} is not JSON ({_reason(error)}): each line must hold one JSON object, "
                'such as {"prompt": "...", "harmful": false}.'
            ) from None


def _array_rows(path: Path, text: str) -> list[PlacedRow]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise PromptError(f"{path}{line} is not JSON ({_reason(error)}): mend the array, or use JSONL.") from None
    return [(f"item {number}", row) for number, row in enumerate(rows, start=1)]


def _reason(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"


def _table_rows(path: Path, text: str, delimiter: str) -> Iterator[PlacedRow]:
    # The csv module's limit on a field (128 KiB) is global; a prompt over MAX_CHARS gets its own, clearer error later.
    before = csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        doubled = {name for name in header if name and header.count(name) > 1}
        if doubled:
            raise PromptError(f"{path} has two columns named {sorted(doubled)[0]!r}: rename one of them.")
        start = reader.line_num + 1
        for fields in reader:
            place, start = f"line {start}", reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                raise PromptError(
                    f"{path}, {place} has {len(fields)} fields where the header has {len(header)}: "
                    "put quotes around a prompt that holds the separator or a line break."
                )
            yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise PromptError(
            f"{path}, line {reader.line_num} is broken ({error}): check that every quote is closed and quotes inside a "
            "quoted prompt are doubled."
        ) from None
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path, data: bytes) -> list[PlacedRow]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise PromptError(
            f"{path} is not a whole Parquet file ({str(error).splitlines()[0]}): write it anew."
        ) from error
    if not rows:
        raise PromptError(f"{path} holds no rows: it needs at least one prompt.")
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]
