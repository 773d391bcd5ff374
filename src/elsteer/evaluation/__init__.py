"""Evaluation: plain against steered on the same prompts, with the statistics, tables, figures and report made of it.

Pictures and the HTML report are in `elsteer.evaluation.plots` and `elsteer.evaluation.report`; importing this package
does not load matplotlib.
"""

from __future__ import annotations

from elsteer.evaluation.figures import Figure, figures_markdown, machine, read_figures, write_figures
from elsteer.evaluation.statistics import Interval, JudgeAccuracy
from elsteer.evaluation.tables import Comparison, compare, compare_all, to_console, to_markdown

__all__ = [
    "Comparison",
    "Figure",
    "Interval",
    "JudgeAccuracy",
    "compare",
    "compare_all",
    "figures_markdown",
    "machine",
    "read_figures",
    "to_console",
    "to_markdown",
    "write_figures",
]
