"""What the first token says of an answer: learned from whole answers, told only where it is sure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elsteer.completions import Completion, PromptCaches, complete
from elsteer.fitting import fit
from elsteer.glimpse import LEAST, FirstTokenJudge
from elsteer.judges import JUDGES, Verdict
from elsteer.prompts import Prompt
from elsteer.run import RunFolder
from elsteer.training import shuffled_control
from pipelines import Killed, LetterJudge, Tiny, dies_at, forward_passes, lines, some_prompts, speaker, tiny_settings

TRAIN, DEV = some_prompts(80), some_prompts(48, start=200)
NEUTRAL = [Prompt.of("What is the time?", False), Prompt.of("Tell me of the sea.", False)]


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return speaker()


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES, "letters", LetterJudge)


def answers(text: str, label: str, count: int) -> list[Completion]:
    return [Completion(f"{text}{at}", text, 3, False, label, 0.0, "") for at in range(count)]


def fitted(tiny: Tiny, folder: Path, full: int = 40, training: dict[str, Any] | None = None, **options: Any) -> Any:
    tuning = {"etas": [0.3, 0.9, 2.0]}
    settings = tiny_settings(tuning=tuning, collect={"full_answers": full}, training=training or {})
    return fit(*tiny, TRAIN, dev=DEV, neutral=NEUTRAL, run_dir=folder, settings=settings, **options)


def test_only_tokens_that_decide_are_learned(tiny: Tiny) -> None:
    mixed = answers("kno", "refusal", 9) + answers("kay", "compliance", 1)
    judge = FirstTokenJudge.learn(
        tiny[1],
        answers("no way", "refusal", LEAST)
        + answers("yes", "compliance", 23)
        + answers("yet", "refusal", 1)
        + answers("rare", "compliance", LEAST - 1)
        + answers("zzz", "unscored", 9)
        + mixed,
    )
    assert judge.sure == {"n": ("refusal", 1.0), "y": ("compliance", 23 / 24)}
    assert judge.judge("", "nnn") == Verdict("refusal", 1.0, "first token 'n'")
    assert judge.judge("", "y").label == "compliance"
    assert judge.judge("", "y").score == pytest.approx(1 / 24)
    assert {judge.judge("", text).label for text in ("k", "r", "z", "x", "")} == {"unscored"}


def test_a_fit_answers_a_part_in_full_and_the_verdicts_are_those_of_whole_answers(tiny: Tiny, tmp_path: Path) -> None:
    found = fitted(tiny, tmp_path)
    assert len(lines(tmp_path / "completions.jsonl")) == 40
    assert len(lines(tmp_path / "glimpses.jsonl")) == 40
    # The letters' judge looks at the first letter, so one token tells what a whole answer would.
    whole = {one.prompt_id: one.label for one in complete(PromptCaches(*tiny, TRAIN), LetterJudge(), max_new_tokens=4)}
    run = RunFolder(tmp_path)
    told = {row["prompt_id"]: row["label"] for row in map(json.loads, lines(run / "glimpses.jsonl"))}
    sure = {key: label for key, label in told.items() if label != "unscored"}
    assert len(sure) > 30
    assert sure == {key: whole[key] for key in sure}
    assert sum(found.provenance["outcomes"].values()) == 40 + len(sure)
    assert shuffled_control(tmp_path, found).method == "shuffled"


def test_killed_between_the_first_tokens_it_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fitted(tiny, tmp_path, progress=dies_at("first tokens", 3))
    before = lines(tmp_path / "glimpses.jsonl")
    assert 0 < len(before) < 40
    fitted(tiny, tmp_path)
    assert lines(tmp_path / "glimpses.jsonl")[: len(before)] == before
    with forward_passes(tiny[0]) as passes:
        fitted(tiny, tmp_path)
    assert passes == []


def test_with_more_prompts_the_first_tokens_are_kept_and_judged_again(tiny: Tiny, tmp_path: Path) -> None:
    def run(folder: Path, prompts: list[Prompt]) -> dict[str, tuple[str, str]]:
        settings = tiny_settings(tuning={"etas": [0.3, 0.9, 2.0]}, collect={"full_answers": 40})
        fit(*tiny, prompts, dev=DEV, neutral=NEUTRAL, run_dir=folder, settings=settings)
        rows = [json.loads(line) for line in lines(folder / "glimpses.jsonl")]
        return {row["prompt_id"]: (row["label"], row["reason"]) for row in rows}

    first = run(tmp_path / "grown", TRAIN)
    with forward_passes(tiny[0]) as all_passes:
        whole = run(tmp_path / "whole", more := [*TRAIN, *some_prompts(24, start=400)])
    with forward_passes(tiny[0]) as passes:
        grown = run(tmp_path / "grown", more)
    assert set(grown) >= set(first) | set(whole)
    assert {key: grown[key] for key in whole} == whole
    assert len(passes) < len(all_passes)


def test_training_through_the_model_sees_so_many_prompts_those_answered_in_full_among_them(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def kept(_model: Any, batches: Any, *_rest: Any, **_options: Any) -> list[float]:
        seen.append(sorted(row for batch in batches for row in batch.rows))
        return []

    monkeypatch.setattr("elsteer.fitting.refine", kept)
    read_again: list[str] = []
    fitted(
        tiny,
        tmp_path,
        training={"refine_epochs": 1, "refine_prompts": 50},
        progress=lambda stage, _done, _total: read_again.append(stage),
    )
    [rows] = seen
    ids = {one.id: place for place, one in enumerate(TRAIN)}
    assert len(rows) == len(set(rows)) == 50
    assert {ids[json.loads(line)["prompt_id"]] for line in lines(tmp_path / "completions.jsonl")} < set(rows)
    assert len(lines(tmp_path / "glimpses.jsonl")) == 40  # the readers are fitted on all of them
    assert "reading the training prompts again" not in read_again  # their prefill was kept


def test_whoever_wants_whole_answers_gets_them(tiny: Tiny, tmp_path: Path) -> None:
    fitted(tiny, tmp_path, full=80)
    assert len(lines(tmp_path / "completions.jsonl")) == 80
    assert not (tmp_path / "glimpses.jsonl").exists()
