"""What tuning chooses for a baseline: the same bounds as for a landscape, but that it need only keep safety."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elsteer.comparison.tune import _BaselineTuner, _key
from elsteer.completions import Completion, PromptCaches, complete
from elsteer.landscape import Landscape
from elsteer.prompts import Prompt
from elsteer.settings import TuningSettings
from elsteer.steering.methods.baseline import Candidate
from elsteer.steering.methods.caa import AddVector
from elsteer.tuning import Trial, Tuner
from landscapes import tiny_landscape
from pipelines import LetterJudge, Tiny, forward_passes, some_prompts, speaker

DEV = some_prompts(40)
SETTINGS = TuningSettings(safety_margin=-0.01, worst_source=-0.02)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return speaker()


def tuner_of(tiny: Tiny, path: Path, candidates: list[Candidate], kind: type[_BaselineTuner]) -> _BaselineTuner:
    small = tiny_landscape(tiny[0])
    plain: list[Completion] = complete(PromptCaches(*tiny, DEV), LetterJudge(), max_new_tokens=4)
    neutral = PromptCaches(*tiny, [Prompt.of("What time is it?", False)])
    bases = {1.0: Landscape(small.rule, small.tensors, small.guards, small.fingerprint)}
    caches = PromptCaches(*tiny, DEV)
    shared = Tuner(bases, caches, plain, neutral, LetterJudge(), None, SETTINGS, path / "fit.jsonl")
    return kind(shared, candidates, path / "frontier.jsonl", finalists=3)


def vectors(*alphas: float) -> list[Candidate]:
    return [Candidate("caa", {"alpha": alpha}, {1: AddVector(torch.ones(32))}) for alpha in alphas]


class Scripted(_BaselineTuner):
    """Measures nothing: by alpha times strength, what is answered of benign and refused of harmful prompts.

    Between two of `does`, in proportion.
    """

    does: dict[float, tuple[float, float]]

    def _screened(self, rule: dict[str, Any]) -> Trial:
        return self._told(rule, "screening")

    def _judged(self, rule: dict[str, Any]) -> Trial:
        return self._told(rule, "verdicts")

    def _told(self, rule: dict[str, Any], stage: str) -> Trial:
        at, points = rule["alpha"] * rule["strength"], sorted(self.does)
        answered, refused = (float(np.interp(at, points, [self.does[one][side] for one in points])) for side in (0, 1))
        why_not = ["margin"] if refused < 0.49 - 1e-9 else []
        return Trial(rule, stage, answered, refused, 0.5, 0.5, kl=0.0, why_not=why_not)


def chosen(tiny: Tiny, path: Path, does: dict[float, tuple[float, float]], *alphas: float) -> tuple[float, bool]:
    tuner = tuner_of(tiny, path, vectors(*alphas), Scripted)
    assert isinstance(tuner, Scripted)
    tuner.does = does
    found = tuner.choose()
    return found.candidate.settings["alpha"] * found.candidate.strength, found.feasible


def test_of_those_that_keep_the_bounds_the_one_that_answers_most(tiny: Tiny, tmp_path: Path) -> None:
    assert chosen(tiny, tmp_path, {1.0: (0.6, 0.49), 2.0: (0.7, 0.5), 2.5: (0.9, 0.1)}, 1, 2, 2.5) == (2.0, True)


@pytest.mark.parametrize("refused", [0.485, 0.1])
def test_one_that_adds_false_refusals_does_not_stand_for_a_method_that_removes_some(
    tiny: Tiny, tmp_path: Path, refused: float
) -> None:
    does = {0.5: (0.4, 0.6), 1.4: (0.4, 0.6), 2.0: (0.6, refused), 2.8: (0.6, 0.05)}
    assert chosen(tiny, tmp_path, does, 1, 2) == (2.0, False)


def test_the_best_is_tried_at_other_strengths_too(tiny: Tiny, tmp_path: Path) -> None:
    """None keeps the bounds, and less of the best does; one keeps them, and more of it does, too."""
    less = {0.5: (0.6, 0.5), 0.7: (0.65, 0.45), 1.0: (0.7, 0.4), 2.0: (0.8, 0.1)}
    assert chosen(tiny, tmp_path, less, 1, 2) == (0.5, True)
    rows = (tmp_path / "frontier.jsonl").read_text().splitlines()
    assert len(rows) == 2 + 2 + 3 + 1
    assert chosen(tiny, tmp_path, {9.0: (0.0, 0.0)}, 1, 2) == (0.5, True), "read again, nothing is measured"
    (tmp_path / "more").mkdir()
    assert chosen(tiny, tmp_path / "more", {1.0: (0.6, 0.5), 1.4: (0.8, 0.5)}, 1) == (1.4, True)


def test_other_strengths_are_tried_of_the_one_that_removes_and_not_of_the_one_that_is_merely_safe(
    tiny: Tiny, tmp_path: Path
) -> None:
    """One adds false refusals and keeps the bounds; less of the other keeps them and removes some."""
    does = {0.3: (0.4, 0.7), 1.0: (0.4, 0.7), 2.0: (0.6, 0.495), 4.0: (0.7, 0.47), 5.6: (0.75, 0.3)}
    assert chosen(tiny, tmp_path, does, 0.3, 4) == (2.0, True)


def test_settings_that_differ_in_the_window_alone_are_one_finalist(tiny: Tiny, tmp_path: Path) -> None:
    """And the best of them is judged with both windows."""
    moves = {1: AddVector(torch.ones(32))}
    candidates = [
        Candidate("caa", {"alpha": alpha, "window": window}, moves, window)
        for alpha in (1.0, 2.0, 3.0)
        for window in (0, 3)
    ]
    tuner = tuner_of(tiny, tmp_path, candidates, Scripted)
    assert isinstance(tuner, Scripted)
    tuner.does, tuner.settings = {1.0: (0.6, 0.5), 3.0: (0.8, 0.5)}, tuner.settings.model_copy(update={"finalists": 2})
    found = tuner.choose()
    judged = [
        (one.rule["alpha"] * one.rule["strength"], one.rule["window"])
        for one in found.trials
        if one.stage == "verdicts"
    ]
    assert judged == [(3.0, 0), (2.0, 0), (3.0, 3), (pytest.approx(4.2), 0)]


def test_a_system_prompt_may_change_how_everything_is_said(tiny: Tiny, tmp_path: Path) -> None:
    """The KL bounds what moves states."""
    asked, moved = Candidate("system-prompt", {"prompt": "short"}, system="Help."), vectors(1.0)[0]
    tuner = tuner_of(tiny, tmp_path, [asked, moved], _BaselineTuner)
    for candidate, expected in ((asked, []), (moved, ["KL above its bound"])):
        rule = json.loads(_key(candidate))
        first, whole = (Trial(rule, stage, 0.9, 0.5, 0.5, 0.5, kl=9.0) for stage in ("screening", "verdicts"))
        tuner._bound_kl([first], [whole])
        assert whole.why_not == expected


def test_a_baseline_that_changes_nothing_keeps_safety_and_a_landscape_must_do_more(tiny: Tiny, tmp_path: Path) -> None:
    tuner = tuner_of(tiny, tmp_path, vectors(1.0), _BaselineTuner)
    refused = np.array([one.label == "refusal" for one in tuner.plain], dtype=float)
    assert tuner._trial({}, "verdicts", refused, refused).why_not == []
    assert tuner.shared._trial({}, "verdicts", refused, refused).why_not == ["harmful refusals, weighted, may fall"]
    lost = refused.copy()
    lost[tuner.harmful] = 0.0
    assert tuner._trial({}, "verdicts", lost, refused).why_not


def test_settings_that_differ_in_the_window_alone_share_their_first_tokens(tiny: Tiny, tmp_path: Path) -> None:
    moves = {1: AddVector(torch.ones(32))}
    candidates = [
        Candidate("caa", {"alpha": alpha, "window": window}, moves, window, strength=alpha)
        for alpha in (1.0, 2.0)
        for window in (0, 3)
    ]
    tuner = tuner_of(tiny, tmp_path, candidates, _BaselineTuner)
    rules = [json.loads(key) for key in tuner.candidates]
    tuner._take_over()
    counts = []
    for rule in rules:
        with forward_passes(tiny[0]) as rows:
            tuner._screen([rule])
        counts.append(rows.count(len(DEV)))
    assert counts[1] < counts[0]
    assert counts[3] < counts[2]
    assert len(tuner.firsts) == 2
    (tmp_path / "alone").mkdir()
    alone = tuner_of(tiny, tmp_path / "alone", candidates[1:2], _BaselineTuner)
    assert [one.to_row() for one in alone._screen([rules[1]])] == [one.to_row() for one in tuner._screen([rules[1]])]
