"""The folder of a landscape: config.json, model.safetensors and README.md, written whole or not at all.

config.json holds the size, SHA-256 and shapes of model.safetensors, so that a damaged or exchanged file is noticed. Nothing
is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise
from torch import Tensor

from elsteer.errors import LandscapeError
from elsteer.files import expanded, write_atomic, write_json

__all__ = ["CARD", "CONFIG", "FILES", "FORMAT", "FORMAT_VERSION", "TENSORS", "read_folder", "write_folder"]

FORMAT, FORMAT_VERSION = "elsteer-landscape", 1
CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
FILES = (CONFIG, TENSORS, CARD)


def write_folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], card: str) -> None:
    """Write the three files to the folder `path`; a landscape that is there is replaced, anything else is left alone.

    The files are written to a hidden folder beside it, which then takes its place, so that readers see the old landscape or
    the new one. Raises LandscapeError where `path` is something else or cannot be written, RunError when the disk is full.
    """
    path = expanded(path).absolute()
    path = path.resolve() if path.is_symlink() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _restore(path)
        _refuse_others(path)
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
        try:
            # Copies, because safetensors takes no views of one storage, such as the guards of a stack of them.
            data = serialise({name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()})
            write_atomic(made / TENSORS, lambda to: to.write_bytes(data))
            write_json(made / CONFIG, _header(config, data, tensors))
            write_atomic(made / CARD, lambda to: to.write_text(card, encoding="utf-8"))
            made.chmod(0o755)
            _swap(made, path)
        finally:
            shutil.rmtree(made, ignore_errors=True)  # nothing is there any more if all went well
    except OSError as error:
        raise LandscapeError(f"The landscape could not be written to {path}: {error.strerror or error}.") from error


def _header(config: dict[str, Any], data: bytes, tensors: dict[str, Tensor]) -> dict[str, Any]:
    about = {
        "file": TENSORS,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "shapes": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())},
    }
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **config, "tensors": about}


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _swap(made: Path, path: Path) -> None:
    """`made` becomes `path`. Between the two renames the old landscape has its other name, where it is still found."""
    old = _previous(path)
    if path.exists():
        path.rename(old)
    try:
        made.rename(path)
    except BaseException:
        _restore(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore(path: Path) -> None:
    """Undo a swap that was killed between its renames, or clear away what one left behind after them."""
    old = _previous(path)
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)


def _refuse_others(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise LandscapeError(f"{path} is a file: choose a folder for the landscape.")
    inside = {entry.name for entry in path.iterdir()}
    if inside and not _is_landscape(path):
        raise LandscapeError(f"{path} is not empty and holds no landscape: nothing was written, choose another folder.")
    if others := sorted(inside - set(FILES)):
        raise LandscapeError(
            f"{path} holds more than a landscape ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}), which would be "
            "lost: choose another folder, or move those files away."
        )


def _is_landscape(path: Path) -> bool:
    try:
        found = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def read_folder(path: Path, name: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors in float32) of a landscape's folder; name: what errors call it, default `path`.

    Checks the format's version, and the size and SHA-256 of the tensors; `elsteer.energy.tensors` checks what they are.
    Raises LandscapeError.
    """
    name, path = name or str(path), Path(path)
    if not path.exists() and _previous(path).is_dir():
        path = _previous(path)  # a save was killed between its two renames
    config = _read_config(path / CONFIG, name)
    about = config.get("tensors")
    if not isinstance(about, dict) or not isinstance(shapes := about.get("shapes"), dict):
        raise LandscapeError(f"{name}/{CONFIG} does not describe the tensors of {TENSORS}: {_AGAIN}.")
    return config, _read_tensors(path / TENSORS, about, shapes, name)


_AGAIN = "get the landscape again from where it came from"


def _read_config(file: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LandscapeError(f"{name} is no landscape: it has no {CONFIG}; make one with `elsteer fit`.") from error
    except OSError as error:
        raise LandscapeError(f"{name}/{CONFIG} could not be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise LandscapeError(f"{name}/{CONFIG} is damaged, it is not JSON: {_AGAIN}.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise LandscapeError(f"{name} is no landscape: its {CONFIG} belongs to something else.")
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise LandscapeError(f"{name}/{CONFIG} is damaged, its format_version is {version!r}: {_AGAIN}.")
    if version > FORMAT_VERSION:
        raise LandscapeError(
            f"{name} has format {version}, and this elsteer reads up to format {FORMAT_VERSION}: upgrade it with "
            "`pip install --upgrade elsteer`."
        )
    return config


def _read_tensors(file: Path, about: dict[str, Any], shapes: dict[str, Any], name: str) -> dict[str, Tensor]:
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise LandscapeError(f"{name} is incomplete, {TENSORS} is missing: {_AGAIN}.") from error
    except OSError as error:
        raise LandscapeError(f"{name}/{TENSORS} could not be read: {error.strerror or error}.") from error
    if len(data) != about.get("bytes"):
        raise LandscapeError(f"{name}/{TENSORS} has {len(data)} bytes instead of {about.get('bytes')}: {_AGAIN}.")
    if hashlib.sha256(data).hexdigest() != about.get("sha256"):
        raise LandscapeError(f"{name}/{TENSORS} was altered, its SHA-256 is not the one in {CONFIG}: {_AGAIN}.")
    try:
        tensors = parse_tensors(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise LandscapeError(f"{name}/{TENSORS} is no safetensors file: {_AGAIN}.") from error
    for key in sorted(shapes.keys() | tensors.keys()):
        found = list(tensors[key].shape) if key in tensors else "missing"
        if found != shapes.get(key):
            wanted = shapes.get(key, "no such tensor")
            raise LandscapeError(f"{name}/{TENSORS}: {key} is {found} where {CONFIG} says {wanted}: {_AGAIN}.")
        if tensors[key].dtype != torch.float32:
            raise LandscapeError(f"{name}/{TENSORS}: {key} is {tensors[key].dtype}, not torch.float32: {_AGAIN}.")
    return tensors
