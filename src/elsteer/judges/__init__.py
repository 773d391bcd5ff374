"""Judges of completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    "judge_all",
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


def get_judge(judge: str | Judge, *, url: str | None = None, model: str | None = None) -> Judge:
    """The judge of this name, ready to use; one that is a judge already is given back. Raises JudgeError with the known names.

    url, model: of the judge `api` (`elsteer.judges.api`), and of no other.
    """
    if not isinstance(judge, str):
        return judge
    if judge == "api":
        from elsteer.judges.api import ApiJudge

        return ApiJudge(url or "", model or "")
    if url or model:
        raise JudgeError(f"An address and a model's name are for the judge api, not for {judge}: choose --judge api.")
    if judge not in JUDGES:
        raise JudgeError(f"There is no judge called {judge!r}: choose one of {', '.join(sorted([*JUDGES, 'api']))}.")
    return JUDGES[judge]()


def judge_all(judge: Judge, prompts: Sequence[str], completions: Sequence[str]) -> list[Verdict]:
    """Verdicts on many completions, by the judge's own `judge_many` where it has one (many requests at a time)."""
    many = getattr(judge, "judge_many", None)
    if many is not None:
        return list(many(prompts, completions))
    return [judge.judge(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
