"""Files that are whole or absent: atomic writes, and JSONL logs that survive being killed in the middle of a line."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from elsteer.errors import RunError

__all__ = [
    "append_jsonl",
    "expanded",
    "read_json",
    "read_jsonl",
    "read_rows",
    "sweep",
    "whole_path",
    "write_atomic",
    "write_json",
    "write_jsonl",
]

Made = TypeVar("Made")

_HALF = ".half-written."  # in front of the names of files that are being written
_DEAD_SECONDS = 3600  # one that nothing was written to for so long is what a killed command left


def expanded(path: str | Path) -> Path:
    """`path` with the home folder in place of ~. Raises RunError where ~NAME names nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RunError(f"{path} lies in the home folder of nobody known here: give the path in full.") from error


def _explain(error: OSError, path: Path) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"No space left on the disk that holds {path}: free some and run the same command again to go on."
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return RunError(f"{path} may not be written: choose another folder or change its permissions.")
    return RunError(f"{path} could not be written: {error.strerror or error}.")


def whole_path(path: Path) -> Path:
    """From the root on. Of a file that is a link, not what it links to: in the hub's cache that has no suffix."""
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` beside `path`, flush it to disk and rename it to `path`.

    Readers see the old file or the new one, never a part. Raises RunError when the disk is full or read-only.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{_HALF}{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as written:  # Windows syncs what may be written alone
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Delete what killed commands left half written in `folder` and the folders in it, where it can be large.

    No deeper: the folder may be one of the user's, with much below it.
    """
    for left in (*folder.glob(f"{_HALF}*"), *folder.glob(f"*/{_HALF}*")):
        try:
            if time.time() - left.stat().st_mtime > _DEAD_SECONDS:
                left.unlink()
        except OSError:  # it is whole by now, or not ours to delete
            continue


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(
        path, lambda to: to.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    )


def read_json(path: Path) -> Any:
    """What the JSON file `path` holds; None where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all `rows`, one JSON object a line, atomically."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, lambda to: to.write_text(text, encoding="utf-8"))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append `rows` and flush them to disk. A part of a line left by an earlier crash is cut off first."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size and _last_byte(file, size) != b"\n":
                file.truncate(_end_of_last_line(file, size))
            file.seek(0, os.SEEK_END)
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _explain(error, path) from error


def _last_byte(file: Any, size: int) -> bytes:
    file.seek(size - 1)
    return bytes(file.read(1))


def _end_of_last_line(file: Any, size: int) -> int:
    file.seek(0)
    return file.read(size).rfind(b"\n") + 1


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL log that elsteer wrote itself; an unfinished last line (a crash) is left out, no file gives no rows."""
    return read_rows(path, lambda row: row)


def read_rows(path: Path, made: Callable[[dict[str, Any]], Made]) -> Iterator[Made]:
    """`made(row)` of the rows that `read_jsonl` gives. Raises RunError for a row that is none, or that it can make nothing of."""
    if not path.exists():
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise RunError(f"{path} could not be read: {error.strerror or error}.") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TypeError("no object")
                found = made(row)
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                raise RunError(
                    f"{path}, line {number} is damaged or of another version: delete that file and run the stage again."
                ) from error
            yield found
