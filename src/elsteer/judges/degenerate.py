"""What is no answer at all: an empty, repetitive or garbled completion, or one that only says the question again."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from difflib import SequenceMatcher
from itertools import pairwise

__all__ = ["degeneration", "no_answer", "repeats"]

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_WORD = re.compile(r"\w+")
# Rules and dot leaders are long runs by intent, a googol has a hundred zeros.
_RUN = re.compile(r"([^\s\d\-=_*#.~+|/\\─━═])\1{24,}|(\d)\2{119,}|([\-=_*#.~+|/\\─━═])\3{299,}")
_CHAR_LOOP = re.compile(r"(.{2,60}?)\1{7,}", re.DOTALL)
_FRAMING = frozenset("-=|_+*#~>─━═│┃┌┐└┘├┤┬┴┼:.")
_CHARS_PER_WORD = 15  # beyond this the language is written without spaces

_TAIL_WORDS = 80
_TAIL_SHARE = 0.75
_MIN_WORDS = 16
_WHOLE_SHARE = 0.6
_WHOLE_WORDS = 200
_LIST_LINES = 8
_ECHO_WORDS = 4
_ECHO_SHARE = 0.8
_YES_OR_NO = frozenset({"yes", "no"})


def no_answer(prompt: str, text: str) -> str | None:
    """Why `text` is no answer to `prompt`: it degenerates, or says nothing but the question again; None where it may be one."""
    return degeneration(text) or repeats(prompt, text)


def degeneration(text: str) -> str | None:
    """Why `text` is no answer (empty, repetitive or garbled), or None where it may be one.

    Repetitive: one character again and again; or three quarters of the runs of four words among the last 80 words have
    stood there before (three fifths over a whole text of 200 words or more); or a whole line eight times in a row.
    Garbled: no letter or digit, broken characters, mostly symbols, or scripts that change within and between words.
    Fenced code may repeat itself and be full of symbols: of it only one character again and again counts. Short answers
    ("42", "Yes."), lists, tables, refrains and any language pass.
    """
    stripped = text.strip()
    if not stripped:
        return "empty"
    if not any(c.isalnum() for c in stripped):
        return "garbled: no letter or digit"
    if _RUN.search(stripped):
        return "repetitive: one character again and again"
    prose = _CODE.sub(" ", stripped)
    return _repetitive(prose) or _garbled(stripped, prose)


def repeats(prompt: str, text: str) -> str | None:
    """Why `text` is no answer to `prompt`: it says nothing but the question again, or None.

    That is, four words or more, nearly all of them in a run with the prompt's own (a similarity of .8 or more of the two
    sequences of words), and no two words behind it. A word or two of the question ("the second one") may be an answer, and so
    are "Yes, it is ..." and "No, it is not ..." in the question's words.
    """
    asked, said = ([word.casefold() for word in _WORD.findall(one)] for one in (prompt, text))
    if len(said) < _ECHO_WORDS or len(said) > 2 * len(asked) or (said[0] in _YES_OR_NO and said[0] != asked[0]):
        return None
    alike = SequenceMatcher(None, asked, said, autojunk=False)
    if alike.quick_ratio() < _ECHO_SHARE or alike.ratio() < _ECHO_SHARE:
        return None
    last = max(match.b + match.size for match in alike.get_matching_blocks() if match.size)
    return "repeats the question" if len(said) < last + 2 else None


def _repetitive(text: str) -> str | None:
    words = [w.casefold() for w in _WORD.findall(text) if not w.isdigit()]
    if len(words) >= _MIN_WORDS and _repeated(words[-_TAIL_WORDS:]) > _TAIL_SHARE:
        return "repetitive: the same words again and again"
    if len(words) >= _WHOLE_WORDS and _repeated(words) > _WHOLE_SHARE:
        return "repetitive: the same sentences again and again"
    if len(text) > max(30, _CHARS_PER_WORD * len(words)):
        loop = _CHAR_LOOP.search(text[-600:])
        if loop and any(c.isalpha() for c in loop[1]):
            return "repetitive: the same characters again and again"
    lines = [line.strip() for line in text.splitlines() if any(c.isalpha() for c in line)]
    same = 1
    for before, line in pairwise(lines):
        same = same + 1 if line == before else 1
        if same >= _LIST_LINES:
            return "repetitive: the same line again and again"
    return None


def _repeated(words: list[str]) -> float:
    """The share of the runs of four words that have stood in `words` before."""
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(runs)) / len(runs)


def _garbled(text: str, prose: str) -> str | None:
    broken = sum(
        c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Co", "Cn") and c not in "\n\r\t\f\v") for c in text
    )
    if broken > 3 and broken > 0.05 * len(text):
        return "garbled: broken characters"
    visible = [c for c in prose if not c.isspace() and c not in _FRAMING]
    if len(visible) >= 30 and sum(c.isalnum() or unicodedata.category(c)[0] == "M" for c in visible) < 0.3 * len(
        visible
    ):
        return "garbled: mostly symbols"
    scripts = [_script(c) for c in prose if c.isalpha()]
    if scripts:
        changes = sum(a != b for a, b in pairwise(scripts))
        common = [s for s, n in Counter(scripts).items() if n >= 3]
        if len(common) >= 3 and changes >= 12 and changes > 0.1 * len(scripts):
            return "garbled: scripts mixed at random"
    return None


def _script(character: str) -> str:
    """The script of a letter, roughly; the scripts of one East Asian text count as one."""
    if character < "\u0250":
        return "latin"
    name = unicodedata.name(character, "?").split(" ", 1)[0]
    return (
        "east asian" if name in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "KATAKANA-HIRAGANA", "IDEOGRAPHIC") else name
    )
