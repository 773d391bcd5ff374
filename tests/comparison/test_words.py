"""A comparison in words, on a terminal and as a picture: nothing is lost on the way."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from elsteer import show
from elsteer.comparison.compare import known_methods
from elsteer.comparison.picture import _COLOURS, _MARKERS
from elsteer.comparison.result import ComparedMethod, ComparisonResult
from elsteer.comparison.words import markdown, points
from elsteer.evaluation.statistics import Interval, paired_difference, removed, wilson


def result() -> ComparisonResult:
    plain, steered = [True] * 60 + [False] * 40, [True] * 10 + [False] * 90
    methods = {
        name: ComparedMethod(
            name,
            {"strength": 1.0},
            number % 2 == 0,
            removed={"all": removed(plain, steered), "xstest_safe": removed(plain, steered)},
            harmful_difference={
                "all": paired_difference(plain, steered),
                "harmbench": paired_difference(plain, steered),
            },
            p_value=2.6e-9,
            ahead={} if name == "els" else {"all": Interval(0.5, 0.4, 0.6, 100)},
        )
        for number, name in enumerate(("els", "els-paper-small", "system-prompt"))
    }
    rates = {"all": wilson(60, 100), "xstest_safe": wilson(60, 100)}
    harm = {"all": wilson(60, 100), "harmbench": wilson(60, 100)}
    return ComparisonResult(methods, rates, harm, 0.03, "A sentence.", Path())


def test_the_console_table_is_whole_at_80_columns() -> None:
    out = io.StringIO()
    show.comparison(result(), Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for part in ("els-paper-small", "system-prompt", "-59.1 to -39.2", "+50.0", "2.6e-09", "not met"):
        assert part in text, text


def test_the_page_tells_what_its_p_value_is_of() -> None:
    head, _, row = markdown(result(), ["xstest"]).splitlines()[6:9]
    names, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, row))
    assert cells[names.index("p of that (Holm)")] == "2.6e-09"
    assert names[names.index("p of that (Holm)") - 1] == "removed, all"


def test_an_interval_tells_on_which_side_of_zero_it_ends() -> None:
    assert points(Interval(0.04, -0.0013, 0.08, 100)) == "+4.0 (-0.1 to +8.0)"


def test_every_method_has_a_colour_and_a_marker_of_its_own_and_none_is_the_plain_models() -> None:
    assert len(set(_COLOURS)) >= len(known_methods())
    assert len(set(_MARKERS)) >= len(known_methods())
    assert "*" not in _MARKERS
