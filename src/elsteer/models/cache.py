"""The cache folder of elsteer, and checksums of files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from elsteer.files import expanded

__all__ = ["elsteer_cache", "sha256_of", "weights_digest"]

_SAMPLE = 1 << 20


def elsteer_cache() -> Path:
    """$ELSTEER_CACHE, or elsteer in $XDG_CACHE_HOME, or ~/.cache/elsteer. Not created here."""
    if own := os.environ.get("ELSTEER_CACHE"):
        return expanded(own)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "elsteer"


def sha256_of(path: Path) -> str:
    """SHA-256 of a whole file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 over the configuration and, of each weights file, name, size, first and last MiB: quick, also at 100 GB.

    Good enough to tell two folders apart; whether a model is the one that a landscape was made for is asked of the
    weights themselves (`fingerprint`).
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != "config.json" and path.suffix not in (".safetensors", ".bin", ".gguf"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            if size > _SAMPLE:
                file.seek(max(_SAMPLE, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
