"""The figures file: what is written can be read, merged and shown, and nothing that was not measured gets in."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import pytest

from elsteer.errors import RunError
from elsteer.evaluation.figures import Figure, figures_markdown, machine, read_figures, write_figures
from elsteer.evaluation.statistics import Interval, wilson


def figure(name: str = "removed.xstest_safe", value: float = 0.61, **more: Any) -> Figure:
    return Figure(name, value, "elsteer evaluate x", 0, "org/model", "2 cores", **more)


def test_the_file_has_the_one_format(tmp_path: Path) -> None:
    write_figures(tmp_path / "main.json", [figure(low=0.52, high=0.69, n=250), figure("demo.seconds", 412.0)])
    assert json.loads((tmp_path / "main.json").read_text()) == {
        "figures": [
            {
                "name": "demo.seconds",
                "value": 412.0,
                "command": "elsteer evaluate x",
                "seed": 0,
                "model": "org/model",
                "machine": "2 cores",
            },
            {
                "name": "removed.xstest_safe",
                "value": 0.61,
                "low": 0.52,
                "high": 0.69,
                "n": 250,
                "command": "elsteer evaluate x",
                "seed": 0,
                "model": "org/model",
                "machine": "2 cores",
            },
        ]
    }


def test_a_second_command_adds_its_figures_and_replaces_its_own(tmp_path: Path) -> None:
    path = tmp_path / "results" / "main.json"
    write_figures(path, [figure("b", 1.0), figure("c", 2.0)])
    write_figures(path, [figure("a", 3.0), figure("c", 4.0)])
    assert [(one.name, one.value) for one in read_figures(path)] == [("a", 3.0), ("b", 1.0), ("c", 4.0)]
    write_figures(path, [figure("d", 5.0)], only=True)
    assert [one.name for one in read_figures(path)] == ["d"]


def test_an_interval_becomes_a_figure_with_its_n() -> None:
    made = Figure.of("harmful_difference", wilson(3, 10), "c", 1, "m", "x", note="judge rules")
    assert (made.value, made.n, made.note) == (0.3, 10, "judge rules")
    assert made.low == wilson(3, 10).low


@pytest.mark.parametrize(
    "bad",
    [
        {"value": math.nan},
        {"value": math.inf},
        {"value": True},
        {"low": 0.1},
        {"low": 0.7, "high": 0.8},
        {"low": math.nan, "high": 0.8},
        {"name": ""},
    ],
)
def test_what_was_not_measured_is_no_figure(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="figure"):
        figure(**bad)
    with pytest.raises(ValueError, match="finite"):
        Figure.of("removed.x", Interval.undefined(3), "c", 0, "m", "x")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"figures": 3}',
        '{"figures": [3]}',
        '{"figures": [{"name": "a", "value": "high", "command": "", "seed": 0, "model": "", "machine": ""}]}',
        '{"figures": [{"name": "a", "value": NaN, "command": "", "seed": 0, "model": "", "machine": ""}]}',
        '{"figures": [{"name": "a"}]}',
        '{"figures": [{"name": "a", "value": 1, "command": "", "seed": 0, "model": "", "machine": "", "host": "x"}]}',
    ],
)
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "main.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"main\.json"):
        write_figures(path, [figure()])
    assert path.read_text() == text


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run the command"):
        read_figures(tmp_path / "none.json")


def test_the_page_shows_each_figure_with_interval_goal_and_command() -> None:
    page = figures_markdown(
        [figure(low=0.52, high=0.69, n=1250, note="test split | judge rules"), figure("demo.seconds", 412.04)],
        {"removed.xstest_safe": "at least 0.55", "decode.overhead": "at most 0.05"},
        title="Main",
        about="Of the small model.",
    )
    assert page.startswith("# Main\n\nOf the small model.\n\n| figure |")
    assert "| `removed.xstest_safe` | 0.610 | 0.520 to 0.690 | 1,250 | at least 0.55 | 0 | [1] |" in page
    assert "test split \\| judge rules" in page
    assert "| `decode.overhead` | not measured |" in page
    assert "| `demo.seconds` | 412.0 |" in page
    assert page.count("elsteer evaluate x") == 1
    assert "Model: org/model" in page


def test_a_page_without_goals_has_no_goal_column() -> None:
    assert "goal" not in figures_markdown([figure()])


def test_the_machine_is_described_without_its_name() -> None:
    assert "core" in machine()
    assert "torch" in machine()
    assert not platform.node() or platform.node() not in machine()
