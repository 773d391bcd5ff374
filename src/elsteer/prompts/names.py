"""What is said where a name of suites or attacks is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["known_names"]


def known_names(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'xstest'? Known are xstest, ...", without the question where none of the known names is close."""
    known = list(known)
    asked = name.lower().replace("_", "-")
    begun = [one for one in known if asked and one.startswith(asked)]
    close = begun or difflib.get_close_matches(asked, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? Known" if close else "known"
    return f"{hint} are {', '.join(known)}"
