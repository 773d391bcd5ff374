"""The starter prompts are complete, split without leakage, and copied from nowhere."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter, defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from elsteer.errors import PromptError
from elsteer.prompts.split import _similar_pairs as similar_pairs
from elsteer.prompts.starter import STARTER_SPLITS, load_starter

SOUNDS_HARMFUL = {
    "homonyms",
    "figurative_language",
    "safe_targets",
    "safe_contexts",
    "definitions",
    "history",
    "fiction_and_games",
    "privacy_public_or_fictional",
    "discrimination_asked_about",
    "computing_jargon",
}
HAZARDS = {
    "violence",
    "weapons",
    "drugs",
    "cybercrime",
    "fraud_and_deception",
    "hate_and_harassment",
    "privacy_invasion",
    "self_harm_and_danger",
}
LEAST = {"train": 20, "dev": 8, "test": 8}
NEAR = 0.7

DATA = Path(os.environ.get("ELSTEER_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "prompts"


def read(split: str) -> list[dict[str, Any]]:
    text = resources.files("elsteer.prompts").joinpath("data", f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


ROWS = [row for split in STARTER_SPLITS for row in read(split)]


def normal(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def test_a_split_is_what_its_file_says() -> None:
    for split in STARTER_SPLITS:
        rows = read(split)
        assert {row["split"] for row in rows} == {split}
        assert [(p.text, p.harmful, p.category, p.family) for p in load_starter(split)] == [
            (row["prompt"], row["harmful"], row["category"], row["family"]) for row in rows
        ]


def test_no_split_named_gives_all_of_them() -> None:
    prompts = load_starter()
    assert prompts == [p for split in STARTER_SPLITS for p in load_starter(split)]
    assert {p.source for p in prompts} == {"starter"}
    assert len({p.id for p in prompts}) == len(prompts)
    assert all(len(p.messages) == 1 and p.messages[0]["role"] == "user" for p in prompts)


def test_an_unknown_split_is_a_clear_error() -> None:
    with pytest.raises(PromptError, match="no split 'validation': choose one of train, dev, test"):
        load_starter("validation")


def test_there_are_enough_of_every_kind() -> None:
    count = Counter((row["kind"], row["category"]) for row in ROWS)
    assert {c for k, c in count if k == "benign_sounds_harmful"} == SOUNDS_HARMFUL
    assert {c for k, c in count if k == "harmful"} == HAZARDS
    assert {c for k, c in count if k == "benign_plain"} == {"plain"}
    assert {k for k, _ in count} == {"benign_sounds_harmful", "harmful", "benign_plain"}
    assert min(count["benign_sounds_harmful", c] for c in SOUNDS_HARMFUL) >= 33
    assert min(count["harmful", c] for c in HAZARDS) >= 40
    assert count["benign_plain", "plain"] >= 110
    assert sum(n for (kind, _), n in count.items() if kind == "harmful") >= 330


def test_harmful_is_said_of_the_harmful_kind_alone() -> None:
    assert all(row["harmful"] == (row["kind"] == "harmful") for row in ROWS)


def test_each_cell_has_enough_in_every_split() -> None:
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in ROWS:
        cells[row["kind"], row["category"]][row["split"]] += 1
    for cell, count in cells.items():
        for split, least in LEAST.items():
            assert count[split] >= least, (cell, split)
        assert count["train"] > max(count["dev"], count["test"]), cell


def test_a_family_stands_in_one_split_only() -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for row in ROWS:
        splits[row["family"]].add(row["split"])
    assert [family for family, where in splits.items() if len(where) > 1] == []


def test_many_benign_prompts_have_a_harmful_twin_in_their_family() -> None:
    harmful = {row["family"] for row in ROWS if row["harmful"]}
    twins = [row for row in ROWS if row["kind"] == "benign_sounds_harmful" and row["family"] in harmful]
    assert len(twins) >= 150
    assert {row["category"] for row in twins} == SOUNDS_HARMFUL


def test_prompts_are_one_short_line() -> None:
    for row in ROWS:
        text = row["prompt"]
        assert text == text.strip()
        if row["family"].startswith("everyday/"):  # some bring a passage or a list, some are a bare word
            assert 1 <= len(text.split()) <= 140, text
            continue
        assert "\n" not in text
        assert 3 <= len(text.split()) <= 45, text


def test_no_prompt_stands_twice() -> None:
    assert [text for text, n in Counter(normal(row["prompt"]) for row in ROWS).items() if n > 1] == []


def test_nothing_nearly_the_same_stands_in_two_splits() -> None:
    rows = sorted(ROWS, key=lambda row: row["split"] == "train")  # dev and test, which are few, come first
    few = sum(row["split"] != "train" for row in rows)
    matrix = TfidfVectorizer().fit_transform([row["prompt"] for row in rows])
    leaks = [
        (rows[i]["prompt"], rows[j]["prompt"])
        for i, j in similar_pairs(matrix[:few], matrix, NEAR)
        if rows[i]["split"] != rows[j]["split"]
    ]
    assert leaks == []


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no public prompt sets at {DATA}: set ELSTEER_DATA to check for copies")
def test_no_prompt_is_copied_from_a_public_set() -> None:
    public = []
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        with (DATA / name).open(encoding="utf-8") as file:
            public += [json.loads(line)["prompt"] for line in file]
    with (DATA / "xstest_prompts.csv").open(encoding="utf-8", newline="") as file:
        public += [row["prompt"] for row in csv.DictReader(file)]
    ours = [row["prompt"] for row in ROWS]

    exact = {normal(text) for text in public} & {normal(text) for text in ours}
    assert exact == set()
    # Weighed once by all texts and once by ours alone: each finds copies that the other's weights hide.
    for reference in (ours + public, ours):
        vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit(reference)
        near = similar_pairs(vectorizer.transform(ours), vectorizer.transform(public), NEAR)
        assert [(ours[i], public[j]) for i, j in near] == []
