"""What a comparison found."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elsteer.evaluation.statistics import Interval
from elsteer.tuning import Trial

__all__ = ["CONTROLS", "ComparedMethod", "ComparisonResult", "settings_text"]

CONTROLS = ("random", "shuffled")  # of the landscape


@dataclass
class ComparedMethod:
    """What one method did.

    settings: what was chosen on dev. feasible: whether it kept the constraints there. dev: its trial, where it was tuned here.
    removed, harmful_difference: by part of a suite ("xstest_safe"), and "all". benign_refused, harmful_refused: rates.
    p_value: exact McNemar over all benign prompts, plain against steered, adjusted by Holm over the methods. ahead: share
    removed by els less that of this method, by part and "all"; empty for els and where els took no part. unscored: answers
    that the judge could not score; a prompt takes part where the answers that are compared are scored.
    """

    name: str
    settings: dict[str, Any]
    feasible: bool
    dev: Trial | None = None
    removed: dict[str, Interval] = field(default_factory=dict)
    harmful_difference: dict[str, Interval] = field(default_factory=dict)
    benign_refused: dict[str, Interval] = field(default_factory=dict)
    harmful_refused: dict[str, Interval] = field(default_factory=dict)
    unscored: int = 0
    p_value: float = math.nan
    ahead: dict[str, Interval] = field(default_factory=dict)


@dataclass
class ComparisonResult:
    """Methods by name, the plain model's rates, what harmful difference the sample can show, the words and the files."""

    methods: dict[str, ComparedMethod]
    plain_benign: dict[str, Interval]
    plain_harmful: dict[str, Interval]
    detectable: float
    sentence: str
    folder: Path


def settings_text(settings: dict[str, Any]) -> str:
    """The chosen settings in a line."""
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items() if value is not None)
