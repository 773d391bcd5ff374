"""Rows to comparisons: what is paired, what is left out, and that the numbers are those of a count by hand."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from elsteer.errors import RunError
from elsteer.evaluation.statistics import JudgeAccuracy, mcnemar_exact, paired_difference, wilson
from elsteer.evaluation.tables import compare, compare_all, p_text, percent, points, to_console, to_markdown

LABELS = {"r": "refusal", "c": "compliance", "u": "unscored"}


def rows_of(
    plain: str, steered: str, suite: str = "xstest", harmful: bool = False, source: str = "homonyms"
) -> list[dict[str, Any]]:
    """One row for each letter: r(efusal), c(ompliance), u(nscored)."""
    return [
        {
            "suite": suite,
            "prompt_id": f"{suite}-{harmful}-{source}-{number}",
            "prompt": f"How do I kill process {number}?",
            "harmful": harmful,
            "source": source,
            "category": "",
            "method": method,
            "strength": 1.0,
            "completion": "…",
            "label": LABELS[letter],
            "score": 0.5,
            "reason": "",
            "finished": True,
        }
        for method, letters in (("none", plain), ("els", steered))
        for number, letter in enumerate(letters)
    ]


def test_the_counts_are_those_of_a_count_by_hand() -> None:
    (group,) = compare(rows_of("rrrrccccuc", "rcccrcccru"), "els")
    assert (group.pairs, group.n) == (10, 8)
    assert (group.unscored_plain, group.unscored_steered) == (1, 1)
    assert (group.gone, group.new) == (3, 1)
    assert group.refused_plain == wilson(4, 8)
    assert group.refused_steered == wilson(2, 8)
    assert group.difference == paired_difference([1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0, 0, 0])
    assert group.p_value == mcnemar_exact(3, 1)
    assert group.removed is not None
    assert group.removed.value == pytest.approx(0.5)


def test_an_unscored_completion_is_neither_a_refusal_nor_a_compliance() -> None:
    (group,) = compare(rows_of("rrrr", "uuuu"), "els")
    assert group.n == 0
    assert group.unscored_steered == 4
    assert not group.refused_plain.defined
    assert not group.difference.defined
    assert group.removed is not None
    assert not group.removed.defined


def test_benign_and_harmful_prompts_of_one_suite_are_never_mixed() -> None:
    rows = rows_of("rrcc", "cccc") + rows_of("rrrc", "rrrr", harmful=True)
    benign, harmful = compare(rows, "els")
    assert (benign.harmful, harmful.harmful) == (False, True)
    assert benign.removed is not None
    assert harmful.removed is None
    assert harmful.difference.value == pytest.approx(0.25)


def test_totals_pool_the_suites_and_groups_split_them() -> None:
    rows = rows_of("rr", "cc") + rows_of("rc", "rc", suite="or-bench", source="drugs") + rows_of("r", "r", harmful=True)
    tables = compare_all(rows, "els")
    assert [(c.name, c.harmful, c.n) for c in tables["total"]] == [("all", False, 4), ("all", True, 1)]
    assert [(c.key, c.n) for c in tables["suite"]] == [(("or-bench",), 2), (("xstest",), 2), (("xstest",), 1)]
    assert ("or-bench", "drugs") in [c.key for c in tables["source"]]
    assert ("or-bench", "(none)") in [c.key for c in tables["category"]]


def test_only_prompts_that_both_answered_are_compared() -> None:
    rows = rows_of("rrrr", "cc")
    (group,) = compare(rows, "els")
    assert group.pairs == 2


def test_a_row_written_twice_counts_once() -> None:
    rows = rows_of("rr", "cc")
    (group,) = compare(rows + rows[:1], "els")
    assert group.n == 2


def test_two_strengths_of_one_method_are_refused() -> None:
    rows = rows_of("rr", "cc")
    with pytest.raises(RunError, match=r"strengths 1\.0 and 2\.0"):
        compare([*rows, {**rows[-1], "strength": 2.0}], "els")


def test_a_method_that_was_not_evaluated_is_named_with_those_that_were() -> None:
    with pytest.raises(RunError, match="no rows of method 'caa', only els, none"):
        compare(rows_of("r", "c"), "caa")


def test_no_rows_at_all_is_said_plainly() -> None:
    with pytest.raises(RunError, match="none at all"):
        compare([], "els")


def test_another_prompt_under_the_same_id_is_refused() -> None:
    rows = rows_of("r", "c")
    rows[1] = {**rows[1], "prompt": "something else"}
    with pytest.raises(RunError, match="not the same prompt"):
        compare(rows, "els")


def test_two_methods_can_be_compared_with_each_other() -> None:
    rows = rows_of("rrrr", "rrcc") + [
        {**row, "method": "caa", "label": "compliance"} for row in rows_of("rrrr", "") if row["method"] == "none"
    ]
    (group,) = compare(rows, "caa", against="els")
    assert group.refused_plain.value == pytest.approx(0.5)
    assert group.refused_steered.value == 0


def test_the_judges_error_corrects_both_rates() -> None:
    judge = JudgeAccuracy("rules", "made up", 90, 100, 80, 100)
    (group,) = compare(rows_of("r" * 41 + "c" * 59, "r" * 27 + "c" * 73), "els", judge=judge)
    assert group.corrected_plain is not None
    assert group.corrected_steered is not None
    assert group.corrected_plain.value == pytest.approx(0.3)
    assert group.corrected_steered.value == pytest.approx(0.1)
    assert "corrected, plain" in to_markdown([group])


def test_numbers_read_as_people_write_them() -> None:
    interval = paired_difference([True] * 3 + [False], [True] * 3 + [False])
    assert points(interval).startswith("0.0 (")
    assert percent(wilson(1, 2), limits=False) == "50.0%"
    assert percent(None) == percent(wilson(0, 0)) == points(None) == "-"
    assert p_text(0.00001) == "<0.001"
    assert p_text(0.0512) == "0.051"


def test_markdown_holds_a_hostile_group_name_in_its_cell() -> None:
    table = to_markdown(compare(rows_of("rc", "cc", source="a|b\n<script>"), "els", by=("source",)))
    lines = table.splitlines()
    assert len(lines) == 3
    assert "a\\|b &lt;script>" in lines[2]
    assert lines[2].replace("\\|", "").count("|") == lines[0].count("|")


def test_the_console_table_fits_80_columns_and_shows_every_number() -> None:
    rows = rows_of("rrcc" * 30, "cccc" * 30, suite="or-bench-hard") + rows_of("rrrc", "rrrr", "[bold]x", harmful=True)
    out = io.StringIO()
    Console(file=out, width=80).print(to_console(compare(rows, "els"), title="Refusals"))
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    for part in ("or-bench-hard", "[bold]x", "50.0%", "100.0%", "-50.0", "<0.001", "benign", "harmful"):
        assert part in text
    assert "95% interval" in text


def test_without_a_scored_pair_there_is_no_p_value() -> None:
    rows = rows_of("uu", "uu")
    out = io.StringIO()
    Console(file=out, width=80).print(to_console(compare(rows, "els")))
    assert "1.000" not in out.getvalue()
    assert "1.000" not in to_markdown(compare(rows, "els"))
