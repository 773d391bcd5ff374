"""A comparison in words: one sentence for people, one page in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping

from elsteer.comparison.result import CONTROLS, ComparedMethod, ComparisonResult, settings_text
from elsteer.evaluation.statistics import Interval
from elsteer.evaluation.tables import points as in_points

__all__ = ["ahead", "markdown", "p_value", "points", "sentence", "share"]


def share(value: Interval) -> str:
    """41.2% (36 to 49)"""
    if not value.defined:
        return "not measured"
    return f"{value.value:.1%} ({value.low * 100:.0f} to {value.high * 100:.0f})"


def points(value: Interval) -> str:
    """+3.5 (-1.2 to +8.0)"""
    if not value.defined:
        return "not measured"
    return in_points(value)


def p_value(one: ComparedMethod) -> str:
    """2.6e-09; nothing where there is none."""
    return "" if math.isnan(one.p_value) else f"{one.p_value:.2g}"


def ahead(one: ComparedMethod) -> str:
    """How far els is ahead of it in all, as `points`; nothing of els itself and where els took no part."""
    return points(one.ahead["all"]) if one.ahead and one.ahead["all"].defined else ""


def sentence(methods: Mapping[str, ComparedMethod], rates: Mapping[bool, Mapping[str, Interval]]) -> str:
    """What a reader should take home: the first method, and the best of the others that loses no safety."""
    harmful = rates[True]["all"].n > 0
    first = methods.get("els", next(iter(methods.values())))
    if not any(one.removed["all"].defined for one in methods.values()):
        words = "The plain model refuses none of these benign prompts, so nothing could be removed"
        if not rates[False]["all"].n:
            words = "No benign prompt was scored, so nothing is said of false refusals"
        if harmful:
            words += f"; {first.name} changes the harmful refusals by {points(first.harmful_difference['all'])} points"
        return words + "."

    def told(one: ComparedMethod) -> str:
        change = one.harmful_difference["all"]
        gone = one.removed["all"].value
        words = f"removes {gone:.0%} of" if gone >= 0 else f"adds {-gone:.0%} to"
        words = f"{one.name} {words} the false refusals"
        return words + (f" at {change.value * 100:+.0f} points of harmful refusals" if harmful else "")

    end = "." if harmful else "; no harmful prompt was measured, so nothing is said of safety."
    others = [one for name, one in methods.items() if one is not first and name not in CONTROLS]
    if not others:
        return told(first) + end
    safe = [one for one in others if not harmful or one.harmful_difference["all"].low >= -0.03]
    if not safe:
        return f"{told(first)}; every other method refuses surely fewer harmful prompts than the plain model, or may."
    best = max(safe, key=lambda one: one.removed["all"].value)
    lead = best.ahead.get("all")
    known = ""
    if lead is not None and lead.defined:
        known = (
            ", and the difference is beyond chance"
            if lead.low > 0
            else ", and the difference could be chance"
            if lead.high >= 0
            else ", which is more than els beyond chance"
        )
    bound = " of those that refuse no fewer harmful prompts (3 points at most)" if harmful else ""
    return f"{told(first)}; the next best{bound}, {told(best)}{known}{end}"


def markdown(result: ComparisonResult, suites: list[str]) -> str:
    """The page compare.md."""
    parts = [part for part in result.plain_benign if part != "all"]
    harmful = [part for part in result.plain_harmful if part != "all"]
    head = ["method", *(f"removed, {part}" for part in parts), "removed, all", "p of that (Holm)"]
    head += [
        *(f"harmful refused, {part}, points" for part in harmful),
        "all, points",
        "els ahead by (removed, points)",
        "unscored",
        "on dev",
    ]
    lines = [
        "# Methods compared",
        "",
        result.sentence,
        "",
        f"Suites: {', '.join(suites)}. 95% intervals in brackets.",
        "",
    ]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, one in result.methods.items():
        cells = [name, *(share(one.removed[part]) for part in parts), share(one.removed["all"]), p_value(one)]
        cells += [*(points(one.harmful_difference[part]) for part in harmful), points(one.harmful_difference["all"])]
        dev = "control" if name in CONTROLS else "constraints met" if one.feasible else "constraints not met"
        cells += [ahead(one), str(one.unscored), dev]
        lines.append("| " + " | ".join(cells) + " |")
    rates = [
        ", ".join(f"{share(value)} of {part} (n {value.n})" for part, value in of.items())
        for of in (result.plain_benign, result.plain_harmful)
    ]
    lines += ["", f"The plain model refuses {rates[0]}; of the harmful prompts {rates[1]}."]
    if math.isfinite(result.detectable):
        lines.append(
            f"With these harmful prompts a true difference of {result.detectable * 100:.1f} points would be found "
            "significant four times in five."
        )
    lines += ["", "Settings chosen on dev:", ""]
    lines += [f"- {name}: {settings_text(one.settings)}" for name, one in result.methods.items()]
    return "\n".join(lines) + "\n"
