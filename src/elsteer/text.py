"""Text that cannot be written: UTF-8 has no bytes for half of a character."""

from __future__ import annotations

import re

__all__ = ["half_character"]

_HALF = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> str | None:
    """The first half of a character (a lone surrogate) in `text`, or None.

    Python makes them of bytes of a terminal, an argument or a file name that are not UTF-8; JSON can hold them escaped.
    """
    found = _HALF.search(text)
    return found[0] if found else None
