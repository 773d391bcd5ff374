"""The classifier judge: it learns, says the same after a round trip, and says what it lacks."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from commands import elsteer, one_sentence
from elsteer.errors import JudgeError
from elsteer.judges import get_judge
from elsteer.judges.agreement import LabelledCompletion, read_labels
from elsteer.judges.classifier import ClassifierJudge, cross_validated, left_out_by_model
from elsteer.judges.phrases import RULES

THINGS = ["kettle", "bridge", "garden", "lantern", "window", "pepper", "violin", "tractor", "harbour", "pillow"]


def rows(count: int = 60) -> list[LabelledCompletion]:
    """Refusals in words that no rule knows: the harbour is closed."""
    found = []
    for at in range(count):
        thing, refuses = THINGS[at % 10], at % 3 == 0
        text = f"The harbour is closed to the {thing} {at}." if refuses else f"Take the {thing} and turn it {at} times."
        found.append(LabelledCompletion(f"Tell me of the {thing} {at}", text, refuses, f"model {at % 2}"))
    return found


def test_it_learns_what_people_call_a_refusal(tmp_path: Path) -> None:
    judge = ClassifierJudge.train(rows())
    assert judge.judge("Tell me", "The harbour is closed to the kettle.").label == "refusal"
    assert judge.judge("Tell me", "Take the kettle and turn it twice.").label == "compliance"
    assert judge.judge("Tell me", "").label == "unscored"
    assert judge.judge("Take the kettle and turn it twice", "Take the kettle and turn it twice").label == "unscored"
    judge.save(tmp_path)
    again = ClassifierJudge.load(tmp_path)
    texts = [row.completion for row in rows()]
    assert again.scores(texts).tolist() == judge.scores(texts).tolist()


def test_what_is_left_out_was_not_learned() -> None:
    """Verdicts on a model whose words the others never used are not those of a classifier that has seen them."""
    strange = [
        LabelledCompletion(f"p{at}", f"zork {at}" if at % 2 else f"blarg {at}", bool(at % 2), "strange")
        for at in range(20)
    ]
    said = left_out_by_model([*rows(), *strange])[-20:]
    assert len(set(said)) == 1
    seen = ClassifierJudge.train([*rows(), *strange]).judge_many([""] * 20, [row.completion for row in strange])
    assert {one.label for one in seen} == {"refusal", "compliance"}


def test_folds_hold_each_prompt_once() -> None:
    said = cross_validated(rows(120), folds=3)
    assert [one == "refusal" for one in said] == [row.refusal for row in rows(120)]


@pytest.mark.parametrize("damage", ["json", "tensors", "rules", "nothing"])
def test_a_damaged_classifier_is_an_error(tmp_path: Path, damage: str) -> None:
    ClassifierJudge.train(rows()).save(tmp_path)
    about = tmp_path / "classifier.json"
    if damage == "json":
        about.write_text("{", encoding="utf-8")
    elif damage == "tensors":
        (tmp_path / "classifier.safetensors").write_bytes(b"1234")
    elif damage == "rules":
        about.write_text(json.dumps({**json.loads(about.read_text(encoding="utf-8")), "rules": []}), encoding="utf-8")
    else:
        about.unlink()
    with pytest.raises(JudgeError, match="train"):
        ClassifierJudge.load(tmp_path)


def test_too_few_labels_are_an_error() -> None:
    with pytest.raises(JudgeError, match="at least 20 refusals and 20 compliances, not 4 and 8"):
        ClassifierJudge.train(rows(12))


@pytest.mark.parametrize("words", [[""], [f"{chr(0x4E00 + at)}{chr(0x5E00 + at)}" for at in range(40)]])
def test_labels_that_share_no_words_are_an_error(words: list[str]) -> None:
    some = [LabelledCompletion("", words[at % len(words)], at % 2 == 0, "") for at in range(40)]
    with pytest.raises(JudgeError, match="no words in common"):
        ClassifierJudge.train(some)


def test_without_labels_the_judge_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ELSTEER_DATA", str(tmp_path))
    with pytest.raises(JudgeError, match="xstest_human"):
        get_judge("classifier")


def test_it_is_trained_at_first_use_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ELSTEER_DATA", str(tmp_path))
    (tmp_path / "judge").mkdir()
    for name in ("xstest_human", "wildguardtest_half"):
        lines = [
            json.dumps({"completion": r.completion, "label": "refusal" if r.refusal else "compliance"}) for r in rows()
        ]
        (tmp_path / f"judge/{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    first = get_judge("classifier").judge("", "The harbour is closed to the kettle.")
    monkeypatch.setattr(ClassifierJudge, "train", None)
    assert get_judge("classifier").judge("", "The harbour is closed to the kettle.") == first
    monkeypatch.delenv("ELSTEER_DATA")
    (tmp_path / "judge/xstest_human.jsonl").unlink()
    assert get_judge("classifier").judge("", "The harbour is closed to the kettle.") == first
    assert len(read_labels(tmp_path / "judge/wildguardtest_half.jsonl")) == 60
    assert re.fullmatch("classifier [0-9a-f]{8}", get_judge("classifier").name), "other labels are another judge"


def test_other_rules_are_another_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same names, too: what it has learned is of what they matched."""
    ClassifierJudge.train(rows()).save(tmp_path)
    changed = [replace(RULES[0], weight=RULES[0].weight + 0.1), *RULES[1:]]
    monkeypatch.setattr("elsteer.judges.phrases.RULES", changed)
    with pytest.raises(JudgeError, match="another version"):
        ClassifierJudge.load(tmp_path)


def test_train_and_use_from_the_command_line(tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    lines = [json.dumps({"prompt": r.prompt, "completion": r.completion, "label": r.refusal}) for r in rows()]
    labels.write_text("\n".join(lines), encoding="utf-8")
    trained = elsteer("judge", "--train", labels, "--out", tmp_path / "mine", "--agreement", labels)
    assert trained.exit_code == 0, trained.output
    assert "has learned from these very completions" in trained.stdout
    judge = get_judge(str(tmp_path / "mine"))
    assert judge.name.startswith("classifier ")
    assert judge.judge("", "The harbour is closed to the kettle.").label == "refusal"
    again = elsteer("judge", "--judge", tmp_path / "mine", "--agreement", labels)
    assert again.exit_code == 0
    assert "1.000" in again.stdout
    assert "--train" in one_sentence(elsteer("judge", "--out", tmp_path / "other", "--agreement", labels))
    assert "--agreement" in one_sentence(elsteer("judge"))
