"""Judges of completions."""

from elsteer.judges.verdict import DESIRABLE, OUTCOMES, Judge, Label, Outcome, Verdict, outcome_of

__all__ = ["DESIRABLE", "OUTCOMES", "Judge", "Label", "Outcome", "Verdict", "outcome_of"]
