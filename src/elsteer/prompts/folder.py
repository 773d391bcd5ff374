"""The data folder: where public benchmarks and attacks lie on this machine, since none of them is shipped."""

from __future__ import annotations

import os
from pathlib import Path

from elsteer.errors import PromptError
from elsteer.files import expanded

__all__ = ["data_folder"]


def data_folder(data_dir: str | Path | None = None) -> Path | None:
    """`data_dir`, or the folder that the variable ELSTEER_DATA names, or None. Raises PromptError if it is not there."""
    found = data_dir or os.environ.get("ELSTEER_DATA") or None
    folder = expanded(found) if found else None
    if folder is not None and not folder.is_dir():
        what = "no folder" if folder.exists() else "not there"
        raise PromptError(f"The data folder {folder} is {what}: check --data-dir or the variable ELSTEER_DATA.")
    return folder
