"""What is said where a name of suites or attacks is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["known_names"]


def known_names(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'xstest'? Known are xstest, ...", without the question where none of the known names is close."""
    known = list(known)
    close = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? Known" if close else "known"
    return f"{hint} are {', '.join(known)}"
