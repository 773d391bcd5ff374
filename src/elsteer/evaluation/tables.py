"""Evaluation rows to comparisons: a method against the plain model on the same prompts, group by group, with intervals.

A row is one completion with its verdict, as `elsteer evaluate` writes it (JSONL):
{"suite", "prompt_id", "prompt", "harmful", "source", "category", "method", "strength", "completion", "label", "score",
"reason", "finished"}. The method "none" is the plain model. Rows of two methods pair by (suite, prompt_id).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from elsteer.errors import RunError
from elsteer.evaluation.statistics import (
    Interval,
    JudgeAccuracy,
    corrected_rate,
    mcnemar_exact,
    paired_difference,
    removed,
    wilson,
)

__all__ = [
    "Comparison",
    "Row",
    "compare",
    "compare_all",
    "outwards",
    "p_text",
    "percent",
    "points",
    "to_console",
    "to_markdown",
]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One group of prompts with one right answer, answered by the plain model and by a method.

    by, key: the fields that make the group and their values; empty for a total. harmful: whether refusing is right.
    pairs: prompts that both answered; n: pairs in which the judge scored both, the only ones that every rate rests on.
    unscored_plain, unscored_steered: completions left out, per model. gone: refused by the plain model only; new:
    refused by the method only. difference: steered minus plain. p_value: exact McNemar. removed: share of the plain
    model's false refusals that are gone (benign groups only). corrected_*: the rates corrected for the judge's error.
    """

    by: tuple[str, ...]
    key: tuple[str, ...]
    harmful: bool
    method: str
    against: str
    pairs: int
    n: int
    unscored_plain: int
    unscored_steered: int
    gone: int
    new: int
    refused_plain: Interval
    refused_steered: Interval
    difference: Interval
    p_value: float
    removed: Interval | None
    corrected_plain: Interval | None = None
    corrected_steered: Interval | None = None

    @property
    def name(self) -> str:
        """What the group is called in a table."""
        return " / ".join(self.key) or "all"

    @property
    def right_answer(self) -> str:
        """What the prompts of this group deserve, in one word for a table."""
        return "harmful" if self.harmful else "benign"


def compare(
    rows: Iterable[Row],
    method: str,
    against: str = "none",
    by: Sequence[str] = ("suite",),
    judge: JudgeAccuracy | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Compare `method` with `against` (the plain model) in each group of `by`; benign groups first, then by name.

    by: row fields such as "suite", "source", "category"; () gives the two totals. A group never mixes benign and
    harmful prompts. Only prompts that both methods answered and the judge scored twice are compared; the unscored are
    counted apart. A row written twice (a resumed run) counts once, the later one.
    Raises RunError when a method is not among the rows, or when its rows do not fit together.
    """
    pairs = _paired(rows, method, against)
    groups: dict[tuple[bool, tuple[str, ...]], list[tuple[Row, Row]]] = {}
    for plain, steered in pairs:
        key = tuple(str(plain.get(field) or "(none)") for field in by)
        groups.setdefault((bool(plain["harmful"]), key), []).append((plain, steered))
    return [
        _comparison(tuple(by), key, harmful, method, against, group, judge, seed)
        for (harmful, key), group in sorted(groups.items(), key=lambda item: item[0])
    ]


def compare_all(
    rows: Iterable[Row], method: str, against: str = "none", judge: JudgeAccuracy | None = None, seed: int = 0
) -> dict[str, list[Comparison]]:
    """Every table of a report: "total" (all benign, all harmful prompts), "suite", "source" and "category"."""
    rows = list(rows)
    fields: dict[str, tuple[str, ...]] = {
        "total": (),
        "suite": ("suite",),
        "source": ("suite", "source"),
        "category": ("suite", "category"),
    }
    return {name: compare(rows, method, against, by, judge, seed) for name, by in fields.items()}


def _paired(rows: Iterable[Row], method: str, against: str) -> list[tuple[Row, Row]]:
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        of_method = found.setdefault(str(row["method"]), {})
        key = (str(row["suite"]), str(row["prompt_id"]))
        before = of_method.get(key)
        if before is not None and before.get("strength") != row.get("strength"):
            raise RunError(
                f"The rows of method {row['method']!r} hold prompt {key[1]!r} of {key[0]} at strengths "
                f"{before.get('strength')} and {row.get('strength')}: evaluate one strength a folder."
            )
        of_method[key] = row
    for name in (method, against):
        if name not in found:
            raise RunError(
                f"The evaluation holds no rows of method {name!r}, only {', '.join(sorted(found)) or 'none at all'}: "
                f"evaluate {name!r} on the same suites first."
            )
    pairs = [(plain, found[method][key]) for key, plain in found[against].items() if key in found[method]]
    for plain, steered in pairs:
        if bool(plain["harmful"]) != bool(steered["harmful"]) or plain.get("prompt") != steered.get("prompt"):
            raise RunError(
                f"Prompt {plain['prompt_id']!r} of {plain['suite']} is not the same prompt in the rows of {against!r} "
                f"and {method!r}: the suite changed between the runs, evaluate both again."
            )
    return pairs


def _comparison(
    by: tuple[str, ...],
    key: tuple[str, ...],
    harmful: bool,
    method: str,
    against: str,
    group: list[tuple[Row, Row]],
    judge: JudgeAccuracy | None,
    seed: int,
) -> Comparison:
    scored = [pair for pair in group if all(row["label"] != "unscored" for row in pair)]
    plain = np.array([pair[0]["label"] == "refusal" for pair in scored], dtype=bool)
    steered = np.array([pair[1]["label"] == "refusal" for pair in scored], dtype=bool)
    n, gone, new = len(scored), int((plain & ~steered).sum()), int((steered & ~plain).sum())
    return Comparison(
        by=by,
        key=key,
        harmful=harmful,
        method=method,
        against=against,
        pairs=len(group),
        n=n,
        unscored_plain=sum(pair[0]["label"] == "unscored" for pair in group),
        unscored_steered=sum(pair[1]["label"] == "unscored" for pair in group),
        gone=gone,
        new=new,
        refused_plain=wilson(int(plain.sum()), n),
        refused_steered=wilson(int(steered.sum()), n),
        difference=paired_difference(plain, steered),
        p_value=mcnemar_exact(gone, new),
        removed=None if harmful else removed(plain, steered, seed),
        corrected_plain=corrected_rate(int(plain.sum()), n, judge) if judge else None,
        corrected_steered=corrected_rate(int(steered.sum()), n, judge) if judge else None,
    )


def percent(interval: Interval | None, limits: bool = True) -> str:
    """ "46.7% (38.0 to 55.6)"; "-" where there is nothing to say."""
    if interval is None or not interval.defined:
        return "-"
    tail = f" ({_shown(interval.low)} to {_shown(interval.high)})" if limits else ""
    return f"{_shown(interval.value)}%{tail}"


def points(interval: Interval | None, limits: bool = True) -> str:
    """A difference of rates in percentage points, always with its sign: "+1.0 (-2.1 to +4.1)"."""
    if interval is None or not interval.defined:
        return "-"
    tail = f" ({_shown(interval.low, '+')} to {_shown(interval.high, '+')})" if limits else ""
    return f"{_shown(interval.value, '+')}{tail}"


def p_text(p_value: float, n: int = 1) -> str:
    """A p-value as people read it: never 0.000; "-" of no pair."""
    if n == 0:
        return "-"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _shown(share: float, sign: str = "") -> str:
    rounded = round(100 * share, 1) + 0.0  # adding zero turns -0.0 into 0.0
    return f"{rounded:.1f}" if rounded == 0 else f"{rounded:{sign}.1f}"


def _unscored(comparison: Comparison) -> str:
    return f"{comparison.unscored_plain} / {comparison.unscored_steered}"


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table with one line a group."""
    corrected = any(comparison.corrected_plain is not None for comparison in comparisons)
    head = ["prompts", "", "n", "refused, plain", "refused, steered", "difference (points)", "p", "removed", "unscored"]
    if corrected:
        head += ["corrected, plain", "corrected, steered"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for comparison in comparisons:
        cells = [
            comparison.name.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;"),
            comparison.right_answer,
            str(comparison.n),
            percent(comparison.refused_plain),
            percent(comparison.refused_steered),
            points(comparison.difference),
            p_text(comparison.p_value, comparison.n),
            percent(comparison.removed),
            _unscored(comparison),
        ]
        if corrected:
            cells += [percent(comparison.corrected_plain), percent(comparison.corrected_steered)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_console(comparisons: Sequence[Comparison], title: str | None = None) -> Table:
    """The same as a rich table that fits 80 columns: below each estimate its interval in points, rounded outwards."""
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.caption, table.caption_justify = "below each figure its 95% interval; p: McNemar's exact test", "left"
    table.add_column("prompts", overflow="fold", min_width=13)
    for name in ("n", "plain\nrefused", "steered\nrefused", "difference\n(points)", "p", "removed", "un-\nscored"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, comparison in enumerate(comparisons):
        starts_harmful = number > 0 and comparison.harmful and not comparisons[number - 1].harmful
        if starts_harmful:
            table.add_section()
        # Text, not str: a name from a user's file is never read as markup.
        table.add_row(
            Text(comparison.name).append(f"\n{comparison.right_answer}", style="dim"),
            str(comparison.n),
            _stacked(comparison.refused_plain, percent(comparison.refused_plain, limits=False)),
            _stacked(comparison.refused_steered, percent(comparison.refused_steered, limits=False)),
            _stacked(comparison.difference, points(comparison.difference, limits=False), "+"),
            p_text(comparison.p_value, comparison.n),
            _stacked(comparison.removed, percent(comparison.removed, limits=False)),
            _unscored(comparison),
        )
    return table


def _stacked(interval: Interval | None, estimate: str, sign: str = "") -> Text:
    text = Text(estimate)
    if interval is not None and interval.defined:
        low, high = outwards(interval)
        text.append(f"\n{low:{sign}d} to {high:{sign}d}", style="dim")
    return text


def outwards(interval: Interval) -> tuple[int, int]:
    """The limits of a share in whole percent, rounded away from the estimate."""
    return math.floor(round(100 * interval.low, 6)), math.ceil(round(100 * interval.high, 6))
