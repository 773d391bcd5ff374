"""Judges of completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

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
    "judge_of_fit",
    "outcome_of",
    "require_harm",
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
    """The judge of this name, ready to use; one that is a judge already is given back.

    judge: a name, or the folder of a classifier that `elsteer judge --train` made. url, model: of the judges `api`
    (`elsteer.judges.api`) and `local` (`elsteer.judges.local`, model alone), and of no other. Raises JudgeError with the
    known names.
    """
    if not isinstance(judge, str):
        return judge
    if judge == "api":
        from elsteer.judges.api import ApiJudge

        return ApiJudge(url or "", model or "")
    if url:
        raise JudgeError(f"An address is for the judge api, not for {judge}: choose --judge api, or leave it out.")
    if judge == "local":
        from elsteer.judges.local import LocalJudge

        return LocalJudge(model or "")
    if model:
        raise JudgeError(f"A model's name is for the judges api and local, not for {judge}: choose one of these.")
    if judge in JUDGES:
        return JUDGES[judge]()
    if (Path(judge) / "classifier.json").is_file():
        from elsteer.judges.classifier import ClassifierJudge

        return ClassifierJudge.load(Path(judge))
    known = ", ".join(sorted([*JUDGES, "api", "local"]))
    raise JudgeError(
        f"There is no judge called {judge!r}: choose one of {known}, or the folder of a classifier that you trained."
    )


def judge_of_fit(name: str) -> Judge:
    """`get_judge` of a judge that a fit, and a comparison on it, can ask: by name alone, and tens of thousands of times.

    Raises JudgeError, for `api` and `local` too.
    """
    if name in ("api", "local"):
        raise JudgeError(
            f"A fit and a comparison ask too often for the judge {name}: choose {', '.join(sorted(JUDGES))}, or the folder of a "
            f"classifier that you trained (elsteer judge --train), and measure with elsteer evaluate --judge {name}."
        )
    return get_judge(name)


def judge_all(judge: Judge, prompts: Sequence[str], completions: Sequence[str]) -> list[Verdict]:
    """Verdicts on many completions, by the judge's own `judge_many` where it has one (many requests at a time)."""
    many = getattr(judge, "judge_many", None)
    if many is not None:
        return list(many(prompts, completions))
    return [judge.judge(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def require_harm(judge: Judge) -> None:
    """Raises JudgeError for a judge that cannot tell how harmful an answer is."""
    if not hasattr(judge, "harms"):
        raise JudgeError(f"The judge {judge.name} cannot tell how harmful an answer is: take api or local for that.")
