"""Every method on the same prompts, tuned by the same tuner on the same dev rows: `elsteer.comparison.compare.compare`."""

from elsteer.comparison.result import ComparedMethod, ComparisonResult
from elsteer.comparison.tune import Tuned, tune_baseline

__all__ = ["ComparedMethod", "ComparisonResult", "Tuned", "tune_baseline"]
