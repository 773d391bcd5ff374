"""The baselines by name: BASELINES, and get_baseline(name). A new one is one file beside this one and one line here."""

from __future__ import annotations

from elsteer.errors import ElsteerError
from elsteer.steering.methods.ablation import ABLATION
from elsteer.steering.methods.alphasteer import ALPHASTEER
from elsteer.steering.methods.baseline import Baseline
from elsteer.steering.methods.caa import CAA, RANDOM_VECTOR
from elsteer.steering.methods.cast import CAST
from elsteer.steering.methods.els_paper import ELS_PAPER, ELS_PAPER_SMALL
from elsteer.steering.methods.k_steering import K_STEERING
from elsteer.steering.methods.plain import NONE, SYSTEM_PROMPT
from elsteer.steering.methods.surgical import SURGICAL

__all__ = ["BASELINES", "get_baseline"]

_ALL = (
    NONE,
    SYSTEM_PROMPT,
    CAA,
    ABLATION,
    SURGICAL,
    CAST,
    ALPHASTEER,
    K_STEERING,
    ELS_PAPER,
    ELS_PAPER_SMALL,
    RANDOM_VECTOR,
)

BASELINES: dict[str, Baseline] = {one.name: one for one in _ALL}


def get_baseline(name: str) -> Baseline:
    """The baseline of that name. Raises ElsteerError, naming those that are known, where there is none."""
    if name not in BASELINES:
        raise ElsteerError(f"There is no method {name!r} to compare with: choose among {', '.join(BASELINES)}.")
    return BASELINES[name]
