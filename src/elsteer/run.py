"""The run folder: plain files, one owner at a time, and stages that are done again only when what they rest on changed.

    settings.yaml  prompts.jsonl  model.json  completions.jsonl  glimpses.jsonl  states/*.safetensors  dev_states/  energy/
    dev.jsonl  frontier.jsonl  frontier.png  landscape/  evaluation/*.jsonl  report.html  compare/  capability/  stages.json

stages.json holds, for each stage, a key: a hash of the settings and inputs that it depends on, the keys of the stages
before it included. A stage whose key changed loses its files, and so do those after it, since their keys change too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from elsteer.errors import RunError
from elsteer.files import expanded, read_json, read_rows, sweep, write_json
from elsteer.prompts import Prompt

__all__ = ["RESULT", "RunFolder", "key_of", "of_stage", "told_apart", "without_nan"]


# Rests on all stages: where one is done anew, the old ones must not stand for it.
RESULT = ("landscape", "frontier.png")


def key_of(*parts: Any) -> str:
    """A short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def of_stage(progress: Callable[[str, int, int], None] | None, stage: str) -> Callable[[int, int], None] | None:
    """`progress(stage, done, total)` as a call of (done, total); None where there is none."""
    return None if progress is None else lambda done, total: progress(stage, done, total)


def without_nan(value: Any) -> Any:
    """`value` with None for numbers that are not finite, since JSON has no word for them."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def told_apart(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, an id of the user's own made longer by a hash of the chat.

    Ids are what resuming looks for: those of two files may be the same, and a row may be rewritten under its old id.
    """
    found = []
    for one in prompts:
        by_content = Prompt(one.messages, one.harmful).id
        own = one.id == by_content or one.id.endswith(f"-{by_content}")
        found.append(one if own else dataclasses.replace(one, id=f"{one.id}-{by_content}"))
    return found


class RunFolder:
    """A folder of one run. Use `with run.owned():` around everything that writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the folder. Raises RunError at once where another process holds it, or where it cannot be made."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file: give a folder for the run.")
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise RunError(
                f"Another process is working in {self.path}: wait for it, or give another folder."
            ) from error
        except PermissionError as error:
            raise RunError(
                f"{self.path} may not be written: choose another folder or change its permissions."
            ) from error
        except OSError as error:
            raise RunError(f"{self.path} cannot be made: {error.strerror or error}; give another folder.") from error
        # What is raised from here on is not about the lock, and is told by whoever raises it.
        try:
            self._sweep()
            yield
        finally:
            lock.release()

    def refuse_others(self, names: Iterable[str], marks: Iterable[str]) -> None:
        """Raise RunError where one of the files or folders `names` is there and none of `marks`, so that it is not ours."""
        if any((self.path / name).exists() for name in marks):
            return
        if theirs := [name for name in names if (self.path / name).exists()]:
            raise RunError(
                f"{self.path} is no folder of an earlier run, and its {theirs[0]} would be lost: give another folder."
            )

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder of its own for what is wanted for a moment. What a killed run left of it goes with the next `owned`.

        One need not own the run folder for it: a comparison trains its control beside what a fit left.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="scratch.", dir=self.path))
        try:
            with FileLock(folder / ".lock"):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete the scratch folders that no process holds any more, and half-written files."""
        sweep(self.path)
        for left in self.path.glob("scratch.*"):
            try:
                with FileLock(left / ".lock", timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
            except (Timeout, OSError):  # another command's, or not ours to delete
                continue

    def prompts(self, split: str) -> list[Prompt]:
        """Those of a fit's `split`: "train", "dev" or "neutral" (folders of earlier versions lack these)."""

        def of(row: dict[str, Any]) -> tuple[str, Prompt]:
            return row.pop("split"), Prompt.from_row(row)

        return [prompt for one, prompt in read_rows(self.path / "prompts.jsonl", of) if one == split]

    def stage(self, name: str, key: str, files: list[str]) -> bool:
        """Begin stage `name`. True if it was begun with this key before, so its files can be gone on with.

        With another key (or none) its `files` (names or folders in the run folder) are deleted first.
        """
        stages = self.stages()
        if stages.get(name) == key:
            return True
        if name in stages:  # killed from here on, what is left of the files must not pass for whole
            del stages[name]
            write_json(self.path / "stages.json", stages)
        for file in files:
            self.remove(file)
        write_json(self.path / "stages.json", {**stages, name: key})
        return False

    def remove(self, name: str) -> None:
        """Delete the file or folder `name`, where there is one."""
        target = self.path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def renamed(self, name: str, before: str, key: str) -> None:
        """Where stage `name` was begun with the key `before`, an earlier form of `key`, it was begun with `key`."""
        stages = self.stages()
        if stages.get(name) == before != key:
            write_json(self.path / "stages.json", {**stages, name: key})

    def stages(self) -> dict[str, str]:
        """Keys by stage."""
        path = self.path / "stages.json"
        if not path.exists():
            return {}
        found = read_json(path)
        if not isinstance(found, dict):
            raise RunError(f"{path} is damaged: delete it; the stages will be checked and done again.")
        return {str(name): str(key) for name, key in found.items()}
