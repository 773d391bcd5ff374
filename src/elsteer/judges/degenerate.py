"""What is no answer at all: an empty, repetitive or garbled completion."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["degeneration"]

_RUN = re.compile(r"([^\s\-=_*#.~+|/\\])\1{24,}")
_SYMBOL_RUN = re.compile(r"([^\s\w])\1{199,}")
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def degeneration(text: str) -> str | None:
    """Why `text` is no answer (empty, repetitive, garbled), or None where it may be one."""
    stripped = text.strip()
    if not any(c.isalnum() for c in stripped):
        return "empty" if not stripped else "garbled: no letter or digit"
    return _garbled(stripped) or _repetitive(stripped)


def _garbled(text: str) -> str | None:
    broken = text.count("\ufffd") + sum(
        unicodedata.category(c) in ("Cc", "Co", "Cn") and c not in "\n\r\t" for c in text
    )
    if broken > 3 and broken > 0.05 * len(text):
        return "garbled: broken characters"
    return None


def _repetitive(text: str) -> str | None:
    if _RUN.search(text) or _SYMBOL_RUN.search(text):
        return "repetitive: one character again and again"
    return None
