"""Judges of completions."""

from __future__ import annotations

from collections.abc import Callable

from elsteer.errors import JudgeError
from elsteer.judges.degenerate import degeneration
from elsteer.judges.rules import RulesJudge
from elsteer.judges.verdict import DESIRABLE, OUTCOMES, Judge, Label, Outcome, Verdict, outcome_of

__all__ = [
    "DESIRABLE",
    "JUDGES",
    "OUTCOMES",
    "Judge",
    "Label",
    "Outcome",
    "RulesJudge",
    "Verdict",
    "degeneration",
    "get_judge",
    "outcome_of",
]


def _classifier() -> Judge:
    from elsteer.judges.classifier import trained_on_first_use  # scikit-learn takes a second to load

    return trained_on_first_use()


# A new judge is one file and one line here.
JUDGES: dict[str, Callable[[], Judge]] = {
    "rules": RulesJudge,
    "classifier": _classifier,
}


def get_judge(name: str) -> Judge:
    """The judge called `name`, ready to use. Raises JudgeError with the known names."""
    if name not in JUDGES:
        raise JudgeError(f"There is no judge called {name!r}: choose one of {', '.join(sorted(JUDGES))}.")
    return JUDGES[name]()
