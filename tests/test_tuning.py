"""Tuning: the most answers to benign prompts among the settings that break no constraint, and why the others do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from elsteer import tuning
from elsteer.completions import Completion, PromptCaches, complete
from elsteer.evaluation.quality import Quality, answer_at_length, kl_to_plain, quality
from elsteer.judges import Verdict
from elsteer.landscape import Landscape
from elsteer.prompts import Prompt
from elsteer.settings import TuningSettings
from elsteer.tuning import ABOVE_KL, Trial, Tuner, bands
from landscapes import tiny_landscape
from pipelines import LetterJudge, Tiny, forward_passes, lines, some_prompts, speaker

RULE = {"benign_weight": 1.0, "layers": [1, 2], "eta": 0.1, "steps": 1, "window": 0, "gate": None, "guard": True}
DEV = some_prompts(24, source="one") + some_prompts(24, start=100, source="two")
DESIRABLE_STATES = torch.randn(20, 4, 32, generator=torch.Generator().manual_seed(5))
STRICT = TuningSettings(
    etas=(0.5, 1.0),
    steps=(1,),
    windows=(0,),
    gates=(None,),
    guards=(True,),
    tokens=4,
    safety_margin=0.02,
    safety_weighted=-1,
    worst_source=-0.02,
)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return speaker()


@pytest.fixture(scope="module")
def plain(tiny: Tiny) -> list[Completion]:
    return complete(PromptCaches(*tiny, DEV), LetterJudge(), max_new_tokens=4)


def tuner_of(
    tiny: Tiny,
    plain: list[Completion],
    path: Path,
    settings: TuningSettings = STRICT,
    kind: type[Tuner] = Tuner,
    dev: list[Prompt] = DEV,
    **options: Any,
) -> Tuner:
    neutral = PromptCaches(*tiny, [Prompt.of("What time is it?", False), Prompt.of("Sing.", False)])
    judge = options.pop("judge", LetterJudge())
    small = tiny_landscape(tiny[0])
    tensors = {layer: small.tensors[1 + layer % 2] for layer in range(4)}
    guards = {layer: small.guards[1 + layer % 2] for layer in range(4)}
    return kind(
        {1.0: Landscape(small.rule, tensors, guards, small.fingerprint)},
        PromptCaches(*tiny, dev),
        plain,
        neutral,
        judge,
        DESIRABLE_STATES,
        settings,
        path / "frontier.jsonl",
        **options,
    )


class Scripted(Tuner):
    """Measures nothing: what a rule does is told by `does`, (answered benign, refused harmful, perplexity ratio)."""

    does: Callable[[dict[str, Any]], tuple[float, float, float]]

    def _screened(self, rule: dict[str, Any]) -> Trial:
        return self._told(rule, "screening")

    def _judged(self, rule: dict[str, Any]) -> Trial:
        return self._told(rule, "verdicts")

    def _told(self, rule: dict[str, Any], stage: str) -> Trial:
        answered, refused, _ = self.does(rule)
        short = refused < 0.5 + self.settings.safety_margin
        return Trial(rule, stage, answered, refused, 0.5, 0.5, why_not=["margin"] if short else [])

    def _checked(self, trial: Trial) -> Trial:
        ratio = self.does(trial.rule)[2]
        why_not = [] if ratio <= self.settings.perplexity_ratio else ["perplexity ratio above its bound"]
        return replace(trial, stage="quality", perplexity_ratio=ratio, why_not=why_not)


def scripted(
    tiny: Tiny,
    plain: list[Completion],
    path: Path,
    does: Callable[[dict[str, Any]], tuple[float, float, float]],
    **changes: Any,
) -> Scripted:
    settings = TuningSettings.model_validate({**STRICT.model_dump(), "band_share": 0.25, "finalists": 4, **changes})
    found = tuner_of(tiny, plain, path, settings, Scripted)
    assert isinstance(found, Scripted)
    found.does = does
    return found


def unmoved(tuner: Scripted) -> Scripted:
    """The same where the landscape has no layers to move the bands to."""
    tuner.bases = {1.0: SimpleNamespace(tensors={})}  # type: ignore[dict-item]
    return tuner


AUROCS = {1.0: {0: 0.5, 1: 0.7, 2: 0.8, 3: 0.7}}


def whole_way(rule: dict[str, Any]) -> float:
    return float(rule["eta"] * rule["steps"])


# Layers


def test_bands_are_contiguous_from_a_quarter_of_the_depth_up() -> None:
    found = bands(24, dict.fromkeys(range(24), 0.7), 0.33)
    assert found == [tuple(range(start, start + 8)) for start in (6, 8, 10, 12, 14, 16)]


def test_bands_whose_energies_know_nothing_are_left_out() -> None:
    knows = {layer: 0.75 if layer >= 14 else 0.5 for layer in range(24)}
    assert bands(24, knows, 0.33) == [tuple(range(start, start + 8)) for start in (10, 12, 14, 16)]
    assert bands(24, {layer: 0.5 + layer / 1000 for layer in range(24)}, 0.33) == [tuple(range(16, 24))]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 24])
@pytest.mark.parametrize("share", [0.01, 0.33, 0.8, 0.9, 1.0])
def test_any_share_of_any_depth_gives_a_band(depth: int, share: float) -> None:
    found = bands(depth, dict.fromkeys(range(depth), 0.7), share)
    assert found
    for band in found:
        assert len(band) == max(1, round(share * depth))
        assert 0 <= band[0] <= band[-1] < depth


# Rows


@pytest.mark.parametrize(
    "trial",
    [
        Trial(RULE, "screening", 0.5, 0.25, 0.5, 0.5, why_not=["margin"]),
        Trial({**RULE, "gate": 0.25}, "quality", 0.1 + 0.2, 1 / 3, 0.5, 0.5, -0.05, 0.1, 3, 1.01, 0.0, 0.01),
        Trial(RULE, "verdicts", 0.5, math.nan, 0.5, math.nan, 0.0, math.nan, 9, math.nan),
        Trial(RULE, "screening", 0.5, 0.25, 0.5, 0.5, kl=math.nan, why_not=[ABOVE_KL]),
    ],
)
def test_a_trial_read_again_is_the_one_that_was_written(trial: Trial) -> None:
    row = json.loads(json.dumps(trial.to_row(), allow_nan=False))
    found = Trial.from_row(row)
    assert repr(replace(found, perplexity_ratio=0)) == repr(replace(trial, perplexity_ratio=0))  # repr: NaN equals NaN
    assert found.to_row() == trial.to_row()


def test_what_was_removed_is_net_and_relative_to_the_false_refusals() -> None:
    assert Trial(RULE, "verdicts", 0.8, 1, 0.6, 1).removed == pytest.approx(0.5)
    assert Trial(RULE, "verdicts", 0.4, 1, 0.6, 1).removed == pytest.approx(-0.5)
    assert Trial(RULE, "verdicts", 1, 1, 1, 1).removed == 0


# Constraints


def rates(tuner: Tuner, refused: list[float], plain: list[float], scored: np.ndarray[Any, Any] | None = None) -> Trial:
    """refused, plain: shares of the 24 harmful prompts of source one, of two, and of all benign ones."""

    def spread(shares: list[float]) -> np.ndarray[Any, Any]:
        found = np.zeros(len(tuner.dev.prompts))
        groups = [
            [at for at, p in enumerate(tuner.dev.prompts) if p.harmful and p.source == source]
            for source in ("one", "two")
        ]
        groups.append([at for at, p in enumerate(tuner.dev.prompts) if not p.harmful])
        for share, group in zip(shares, groups, strict=True):
            found[group[: round(share * len(group))]] = 1
        return found

    return tuner._trial(RULE, "verdicts", spread(refused), spread(plain), scored)


@pytest.fixture
def wide(tiny: Tiny, tmp_path: Path) -> Tuner:
    dev = some_prompts(100, source="one") + some_prompts(100, start=300, source="two")
    plain = [Completion(p.id, "a", 1, False, "compliance", 0, "") for p in dev]
    return tuner_of(tiny, plain, tmp_path, dev=dev)


def test_harmful_refusals_must_rise_by_the_margin(wide: Tuner) -> None:
    kept = rates(wide, [0.5, 0.5, 0.1], [0.5, 0.5, 0.4])
    assert kept.why_not == ["harmful refusals not above the plain model's by the margin"]
    assert not kept.feasible
    more = rates(wide, [0.54, 0.5, 0.1], [0.5, 0.5, 0.4])
    assert more.feasible
    assert (more.answered_benign, more.plain_answered) == (0.9, 0.6)
    assert (more.refused_harmful, more.plain_refused) == (0.52, 0.5)
    assert more.removed == pytest.approx(0.75)


def test_rounding_does_not_decide_about_the_margin(wide: Tuner) -> None:
    for share in range(0, 49, 2):
        assert rates(wide, [(2 * share + 4) / 100, 0.0, 0.0], [2 * share / 100, 0.0, 0.0]).feasible, share


OF_TWO = 1.3867989725109946  # standard errors, of two sources: P(Z < 1.3868) = .9172 = .8413**.5, and P(Z < 1) = .8413


def test_harmful_refusals_must_not_fall_on_one_source(wide: Tuner) -> None:
    wide.settings = wide.settings.model_copy(update={"refusal_level": 0.0, "worst_source": -0.05})
    trial = rates(wide, [0.9, 0.44, 0.1], [0.5, 0.5, 0.4])  # 3 of 25 refused ones are lost, 25 answered ones stay
    assert trial.worst_source == pytest.approx(
        -0.06 + OF_TWO * 0.5 * math.sqrt((4 / 27 * 23 / 27 + 1 / 27 * 26 / 27) / 27), abs=1e-9
    )
    assert trial.feasible
    assert rates(wide, [0.9, 0.36, 0.1], [0.5, 0.5, 0.4]).why_not == ["harmful refusals fall on two"]
    wide.settings = wide.settings.model_copy(update={"worst_source": 0.0})
    assert rates(wide, [0.9, 0.44, 0.1], [0.5, 0.5, 0.4]).why_not == ["harmful refusals fall on two"]


def test_the_prompts_under_attack_are_named_as_one_source(wide: Tuner) -> None:
    wide.dev.prompts[:] = [
        replace(one, source="two+dan", id=f"{at}+dan") if one.source == "two" else one
        for at, one in enumerate(wide.dev.prompts)
    ]
    plain = np.where(wide.harmful, 1.0, 0.0)
    attacked = np.array([one.source == "two+dan" for one in wide.dev.prompts])
    trial = wide._trial(RULE, "verdicts", np.where(attacked, 0.0, plain), plain)
    assert "harmful refusals fall on prompts under attack" in trial.why_not


def test_a_gain_in_all_must_be_sure_once_it_is_weighted(wide: Tuner) -> None:
    """Seldom refused prompts gain much, and many of the refused ones are lost: more refusals, and no safety."""
    wide.settings = wide.settings.model_copy(update={"safety_weighted": 0.0, "worst_source": -1.0})
    places = np.flatnonzero(wide.harmful)
    assert len(places) == 100
    plain, refused = np.zeros(len(wide.harmful)), np.zeros(len(wide.harmful))
    plain[places[:20]] = 1.0
    refused[places[4:50]] = 1.0  # 4 of 20 lost, 30 of 80 gained
    trial = wide._trial(RULE, "verdicts", refused, plain)
    assert trial.refused_harmful - trial.plain_refused == pytest.approx(0.26)
    assert trial.weighted < 0.8 * -0.2 + 0.2 * 30 / 80
    assert trial.why_not == ["harmful refusals, weighted, may fall"]
    refused[places[:4]] = 1.0
    sure = wide._trial(RULE, "verdicts", refused, plain)
    assert 0 < sure.weighted < 0.2 * 30 / 80
    assert sure.feasible


def weighted(tuner: Tuner, refused: np.ndarray[Any, Any], plain: np.ndarray[Any, Any], errors: float) -> float:
    return tuner._weighted(refused, plain, np.arange(len(plain)), errors)


def test_prompts_that_are_seldom_refused_cannot_hide_what_they_lose(wide: Tuner) -> None:
    plain, refused = np.zeros(50), np.zeros(50)
    plain[:20] = 1.0  # the plain model refuses 40%, steered 14 of these and 20 of the others
    refused[:14] = 1.0
    refused[20:40] = 1.0
    assert weighted(wide, refused, plain, 0) == pytest.approx(0.8 * 0.7 + 0.2 * 20 / 30 - 0.8)
    wide.settings = wide.settings.model_copy(update={"refusal_level": 0.0})
    assert weighted(wide, refused, plain, 0) == pytest.approx(14 / 50)


def test_the_error_of_a_weighted_change_is_that_of_drawing_the_prompts_again(wide: Tuner) -> None:
    generator = np.random.default_rng(0)
    plain = (generator.random(400) < 0.6).astype(float)
    refused = np.where(generator.random(400) < 0.15, 1 - plain, plain)
    refused_rows, answered_rows = np.flatnonzero(plain == 1), np.flatnonzero(plain == 0)
    drawn = []
    for _ in range(2000):
        rows = np.concatenate([generator.choice(part, len(part)) for part in (refused_rows, answered_rows)])
        drawn.append(weighted(wide, refused[rows], plain[rows], 0))
    error = weighted(wide, refused, plain, 1) - weighted(wide, refused, plain, 0)
    assert error == pytest.approx(float(np.std(drawn)), rel=0.1)
    few = weighted(wide, plain[:10], plain[:10], 1)
    assert few > 0.05  # ten prompts that all stayed prove little


def test_a_source_of_few_prompts_decides_nothing(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    trial = rates(tuner_of(tiny, plain, tmp_path), [1.0, 0.0, 0.0], [0.5, 0.4, 0.0])
    assert trial.worst_source == 0.0
    assert trial.feasible


@pytest.mark.parametrize(("count", "falls"), [(19, False), (20, True)])
def test_a_source_of_twenty_harmful_prompts_is_looked_at(count: int, falls: bool, tiny: Tiny, tmp_path: Path) -> None:
    dev = some_prompts(100, source="one") + some_prompts(2 * count, start=300, source="two")
    completions = [Completion(p.id, "a", 1, False, "compliance", 0, "") for p in dev]
    trial = rates(tuner_of(tiny, completions, tmp_path, dev=dev), [1.0, 0.0, 0.0], [0.5, 1.0, 0.5])
    assert ("harmful refusals fall on two" in trial.why_not) == falls


def test_a_source_is_looked_at_whatever_answers_could_be_scored(tiny: Tiny, tmp_path: Path) -> None:
    """Of 20 prompts one is unscored and ten are answered: 19 would pass for too few to look at."""
    dev = some_prompts(100, source="one") + some_prompts(40, start=300, source="two")
    completions = [Completion(p.id, "a", 1, False, "compliance", 0, "") for p in dev]
    tuner = tuner_of(tiny, completions, tmp_path, dev=dev)
    scored = np.ones(len(dev), dtype=bool)
    scored[next(at for at, one in enumerate(dev) if one.harmful and one.source == "two")] = False
    trial = rates(tuner, [1.0, 0.5, 0.0], [0.5, 1.0, 0.5], scored)
    assert "harmful refusals fall on two" in trial.why_not


def test_quality_is_looked_at_all_over_the_dev_prompts(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = some_prompts(40, source="one") + some_prompts(40, start=300, source="two")
    completions = [Completion(p.id, "a", 1, False, "compliance", 0, "") for p in dev]
    looked: list[str] = []
    monkeypatch.setattr(
        tuning, "quality", lambda before, after, ids: looked.extend(ids) or Quality(1.0, 0.1, 0.1, len(ids))
    )
    tuner_of(tiny, completions, tmp_path, dev=dev)._quality(Trial(RULE, "verdicts", 0.9, 0.9, 0.5, 0.5))
    sources = {one.id: one.source for one in dev}
    assert {sources[one] for one in looked} == {"one", "two"}


def test_where_no_harmful_prompt_was_scored_nothing_is_feasible(wide: Tuner, tmp_path: Path) -> None:
    """A rate of nothing is NaN, and no comparison with it says no."""
    trial = rates(wide, [1.0, 1.0, 0.0], [0.5, 0.5, 0.5], ~wide.harmful)
    assert math.isnan(trial.refused_harmful)
    assert trial.why_not == ["no prompt of one kind could be scored"]
    wide._tried(RULE, "verdicts", lambda rule: trial)
    [line] = lines(tmp_path / "frontier.jsonl")
    assert json.loads(line, parse_constant=pytest.fail)["trial"]["refused_harmful"] is None
    fine = rates(wide, [1.0, 1.0, 0.0], [0.5, 0.5, 0.5])
    assert wide._ranked([trial, fine]) == [fine, trial]
    unsafe = replace(fine, answered_benign=0.9, refused_harmful=0.1, why_not=["margin"])
    garbled = replace(trial, answered_benign=1.0)  # every answer to a harmful prompt
    assert garbled.removed > unsafe.removed
    assert wide._ranked([garbled, unsafe]) == [unsafe, garbled], "what safety lost is not known, so it is not nothing"


class Fussy(LetterJudge):
    """Cannot score a tenth of the steered answers."""

    calls = 0

    def judge(self, prompt: str, completion: str) -> Verdict:
        self.calls += 1
        return Verdict("unscored", 0.5) if self.calls % 10 == 0 else super().judge(prompt, completion)


def test_more_unscored_answers_break_a_constraint(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    fussy = tuner_of(tiny, plain, tmp_path, judge=Fussy())._judged(RULE)
    assert fussy.unscored == 4
    assert "more unscored answers" in fussy.why_not
    assert "more unscored answers" not in tuner_of(tiny, plain, tmp_path)._judged(RULE).why_not


@pytest.mark.parametrize(("before", "after", "more"), [(0, 2, False), (0, 3, True), (5, 7, False), (5, 8, True)])
def test_as_many_answers_as_the_plain_models_and_a_hundredth_may_be_unscored(
    before: int, after: int, more: bool, tiny: Tiny, tmp_path: Path
) -> None:
    class Mute(LetterJudge):
        """Cannot score the first answers."""

        left = after

        def judge(self, prompt: str, completion: str) -> Verdict:
            self.left -= 1
            return Verdict("unscored", 0.5) if self.left >= 0 else Verdict("compliance", 0.0)

    dev = some_prompts(200)
    labels = ["unscored"] * before + ["compliance"] * (len(dev) - before)
    plain = [Completion(p.id, "a", 1, False, label, 0, "") for p, label in zip(dev, labels, strict=True)]
    trial = tuner_of(tiny, plain, tmp_path, dev=dev, judge=Mute())._judged(RULE)
    assert trial.unscored == after
    assert ("more unscored answers" in trial.why_not) == more


def test_prompts_whose_plain_answer_could_not_be_scored_are_in_no_rate(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    odd = [replace(one, label="unscored") if at % 3 == 0 else one for at, one in enumerate(plain)]
    trial = tuner_of(tiny, odd, tmp_path)._judged({**RULE, "eta": 1e-9})
    counted = [one.label for at, one in enumerate(plain) if at % 3 and not DEV[at].harmful]
    expected = counted.count("compliance") / len(counted)
    assert trial.plain_answered == trial.answered_benign == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "steered", "kl", "says"),
    [
        (1.0, 0.1, 0.0, []),
        (1.09, 0.1, 0.0, ["perplexity ratio above its bound"]),
        (math.nan, 0.1, 0.0, ["perplexity ratio above its bound"]),
        (1.0, 0.9, 0.0, ["more degenerate answers"]),
        (1.0, 0.15, 0.0, []),  # fewer than chance gives
        (1.0, 0.0, 0.05, ["KL above its bound"]),
        (1.0, 0.0, math.nan, ["KL above its bound"]),
    ],
)
def test_answers_that_got_worse_break_a_constraint(
    ratio: float,
    steered: float,
    kl: float,
    says: list[str],
    tiny: Tiny,
    plain: list[Completion],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "quality", lambda before, after, ids: Quality(ratio, 0.1, steered, len(ids)))
    monkeypatch.setattr(tuning, "kl_to_plain", lambda *args, **options: {"a": kl, "b": kl})
    good = Trial(RULE, "verdicts", 0.9, 0.9, 0.5, 0.5, unscored=2)
    found = tuner_of(tiny, plain, tmp_path)._quality(good)
    assert found.why_not == says
    assert (found.stage, found.unscored, found.degenerate) == ("quality", 2, pytest.approx(steered - 0.1))
    assert good.why_not == []  # the row of the pass before stays as it was
    for line in lines(tmp_path / "frontier.jsonl"):
        json.loads(line, parse_constant=pytest.fail)


def test_quality_on_more_prompts_is_measured_anew_and_beside_the_verdicts_that_were_there(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    given = {**STRICT.model_dump(), "quality_tokens": 6}
    few, more = (TuningSettings.model_validate({**given, "quality_prompts": n}) for n in (4, 100))
    assert few.measuring() == more.measuring()
    good = Trial(RULE, "verdicts", 0.9, 0.9, 0.5, 0.5)
    first = tuner_of(tiny, plain, tmp_path, few)
    first._quality(good)
    second = tuner_of(tiny, plain, tmp_path, more)
    second._quality(good)
    answered = [at for at, one in enumerate(plain) if one.label == "compliance" and not DEV[at].harmful]
    assert len(first._plain_answers) == 4 < len(second._plain_answers) == len(answered)
    assert len(second.trials) == 2
    assert tuner_of(tiny, plain, tmp_path, few)._quality(good) == first._quality(good)


def test_the_prompts_of_the_quality_pass_are_spread_over_all_kinds(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    answered = [at for at, one in enumerate(plain) if one.label == "compliance" and not DEV[at].harmful]
    count = len(answered) - 1  # more than half of them
    settings = TuningSettings.model_validate({**STRICT.model_dump(), "quality_tokens": 4, "quality_prompts": count})
    tuner = tuner_of(tiny, plain, tmp_path, settings)
    tuner._quality(Trial(RULE, "verdicts", 0.9, 0.9, 0.5, 0.5))
    measured = [at for at in answered if DEV[at].id in tuner._plain_answers]
    assert len(measured) == count
    assert measured[-1] == answered[-1], "the last kind is measured, too"


# Choosing


def test_the_most_answers_among_the_safe_settings_win(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        if whole_way(rule) == 2.0:
            return 0.99, 0.4, 1.0  # answers everything, harmful requests too
        return 0.5 + whole_way(rule) / 4 + rule["layers"][0] / 100, 0.6, 1.0

    found = scripted(tiny, plain, tmp_path, does, etas=(0.2, 1.0, 2.0)).search(AUROCS)
    assert found is not None
    assert (found.rule["layers"], found.rule["eta"], found.stage) == ([3], 1.0, "quality")


def test_of_equals_the_safer_one_wins(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return (0.801, 0.6, 1.0) if whole_way(rule) == 1.0 else (0.799, 0.7, 1.0)

    found = unmoved(scripted(tiny, plain, tmp_path, does)).search(AUROCS)
    assert found is not None
    assert found.refused_harmful == 0.7


def test_where_the_best_spoils_answers_the_next_is_taken(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return (0.9, 0.6, 1.5) if whole_way(rule) == 1.0 else (0.7, 0.6, 1.0)

    tuner = unmoved(scripted(tiny, plain, tmp_path, does))
    found = tuner.search(AUROCS)
    assert found is not None
    assert found.rule["eta"] == 0.5
    checked = [trial for trial in tuner.trials.values() if trial.stage == "quality"]
    assert {trial.rule["eta"]: trial.feasible for trial in checked} == {1.0: False, 0.5: True}


def test_what_spoils_answers_is_tried_again_with_a_shorter_way(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        way = whole_way(rule)
        return 0.6 + way / 10, 0.6, 1.0 if way < 0.3 else 1.5

    tuner = unmoved(scripted(tiny, plain, tmp_path, does, etas=(0.5,)))
    found = tuner.search(AUROCS)
    assert found is not None
    assert found.rule["eta"] == pytest.approx(0.5 * 0.75**2)
    ways = {trial.rule["eta"] for trial in tuner.trials.values() if trial.stage == "verdicts"}
    assert sorted(ways) == pytest.approx([0.28125, 0.375, 0.5])


@pytest.mark.parametrize(
    ("knows", "moved"), [({0: 0.5, 1: 0.3, 2: 0.8, 3: 0.7}, (1, 2)), ({0: 0.5, 1: 0.8, 2: 0.7, 3: 0.3}, (2, 3))]
)
def test_the_best_bands_are_tried_one_layer_earlier_and_later(
    knows: dict[int, float], moved: tuple[int, int], tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    tuner = scripted(tiny, plain, tmp_path, lambda rule: (0.9, 0.6, 1.0), etas=(0.5,), band_share=0.5, bands=1)
    tuner.search({1.0: knows})
    assert moved not in bands(4, knows, 0.5), "it knows too little for the first pass"
    bands_tried = {tuple(trial.rule["layers"]) for trial in tuner.trials.values() if trial.stage == "screening"}
    assert moved in bands_tried
    assert all(layer in tuner.bases[1.0].tensors for band in bands_tried for layer in band)


def test_where_no_finalist_keeps_safety_the_safest_others_are_judged(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return (0.9, 0.6, 1.0) if whole_way(rule) == 1.0 else (0.7, 0.7, 1.0)

    tuner = unmoved(scripted(tiny, plain, tmp_path, does, finalists=1))
    told = tuner._judged

    def judged(rule: dict[str, Any]) -> Trial:  # the first token promised too much
        found = told(rule)
        return replace(found, refused_harmful=0.4, why_not=["margin"]) if whole_way(rule) == 1.0 else found

    tuner._judged = judged  # type: ignore[method-assign]
    found = tuner.search(AUROCS)
    assert found is not None
    assert found.feasible
    assert whole_way(found.rule) == 0.5
    assert [one.stage for one in tuner.trials.values()].count("verdicts") == 2


def test_the_safest_is_not_judged_where_its_kl_is_above_the_bound(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    """The finalist keeps no safety; of the two others the safer one talks otherwise on everyday prompts."""
    does = {1.0: (0.9, 0.6, 1.0), 0.5: (0.8, 0.8, 1.0), 0.25: (0.7, 0.7, 1.0)}
    options: dict[str, Any] = {"etas": (0.25, 0.5, 1.0), "finalists": 1, "bands": 1}
    tuner = unmoved(scripted(tiny, plain, tmp_path, lambda rule: does[whole_way(rule)], **options))
    screened, told = tuner._screened, tuner._judged

    def moves(rule: dict[str, Any]) -> Trial:
        return replace(screened(rule), why_not=[tuning.ABOVE_KL] if whole_way(rule) == 0.5 else [])

    def judged(rule: dict[str, Any]) -> Trial:
        return replace(told(rule), why_not=["margin"] if whole_way(rule) == 1.0 else [])

    tuner._screened, tuner._judged = moves, judged  # type: ignore[method-assign]
    found = tuner.search({1.0: {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.7}})
    assert found is not None
    assert whole_way(found.rule) == 0.25


def test_a_safer_weight_that_the_screening_passed_over_is_judged_where_no_finalist_keeps_safety(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    """The first tokens of every weight seem safe, so that all bands to refine are of the highest, which in truth is not."""

    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return 0.6 + rule["benign_weight"] / 20, 0.9 - rule["benign_weight"] / 20, 1.0

    tuner = unmoved(scripted(tiny, plain, tmp_path, does, etas=(0.5, 1.0), finalists=2, bands=1))
    tuner.bases = dict.fromkeys((1.0, 2.0, 4.0), tuner.bases[1.0])
    told = tuner._judged

    def judged(rule: dict[str, Any]) -> Trial:
        found = told(rule)
        return replace(found, refused_harmful=0.4, why_not=["margin"]) if rule["benign_weight"] > 1 else found

    tuner._judged = judged  # type: ignore[method-assign]
    found = tuner.search({weight: {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.7} for weight in tuner.bases})
    assert found is not None
    assert found.rule["benign_weight"] == 1.0


def test_the_safest_weights_are_tried_at_every_length_where_no_finalist_keeps_safety(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    """The length of the screening is above the bound on the KL, and the shorter one was tried of two unsafe weights alone.

    Of the two safe ones that which answers more is judged first: the verdicts so far let expect that it is safe, too.
    """

    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return 0.6 + rule["benign_weight"] / 20, 0.9 - rule["benign_weight"] / 20, 1.0

    tuner = unmoved(scripted(tiny, plain, tmp_path, does, etas=(0.5, 1.0), finalists=3, bands=2))
    tuner.bases = dict.fromkeys((1.0, 2.0, 5.0, 6.0), tuner.bases[1.0])
    screened, told = tuner._screened, tuner._judged

    def moves(rule: dict[str, Any]) -> Trial:
        above = whole_way(rule) == 1.0
        kl = tuner.settings.kl * (1.5 if above else 0.9)
        return replace(screened(rule), kl=kl, why_not=[tuning.ABOVE_KL] if above else [])

    def judged(rule: dict[str, Any]) -> Trial:
        found = told(rule)
        return replace(found, refused_harmful=0.5, why_not=["margin"]) if rule["benign_weight"] > 2 else found

    tuner._screened, tuner._judged = moves, judged  # type: ignore[method-assign]
    found = tuner.search({weight: {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.7} for weight in tuner.bases})
    assert found is not None
    assert (found.rule["benign_weight"], whole_way(found.rule)) == (2.0, 0.5)


def test_it_is_not_shortened_for_ever(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    tuner = scripted(tiny, plain, tmp_path, lambda rule: (0.9, 0.6, 1.5), etas=(0.5,), finalists=2)
    assert tuner.search(AUROCS) is None
    assert sum(trial.stage == "verdicts" for trial in tuner.trials.values()) == 2 + 2


def test_settings_must_remove_more_than_least_removed(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return 0.6, 0.6, 1.0

    assert scripted(tiny, plain, tmp_path / "a", does, least_removed=0.2).search(AUROCS) is None
    assert scripted(tiny, plain, tmp_path / "b", does, least_removed=0.1).search(AUROCS) is not None


def test_one_that_removes_too_little_hides_none_that_removes_more(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    """Within a point the safer one comes first, and may be the one that is not enough."""

    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return (0.6449, 0.6, 1.0) if rule["eta"] == 0.5 else (0.6390, 0.7, 1.0)

    tuner = unmoved(scripted(tiny, plain, tmp_path, does, etas=(0.5, 1.0), least_removed=0.285))
    found = tuner.search(AUROCS)
    assert found is not None
    assert found.rule["eta"] == 0.5


@pytest.mark.parametrize(("answered", "refused", "ratio"), [(0.9, 0.5, 1.0), (0.5, 0.9, 1.0), (0.9, 0.9, 2.0)])
def test_unsafe_useless_or_spoiling_settings_are_none(
    answered: float, refused: float, ratio: float, tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    assert scripted(tiny, plain, tmp_path, lambda rule: (answered, refused, ratio)).search(AUROCS) is None


def test_gates_steps_and_windows_are_tried_on_the_best(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return 0.6 + rule["window"] / 100 + (rule["gate"] or 0) / 10 + rule["layers"][0] / 1000, 0.6, 1.0

    options = {"windows": (0, 3), "gates": (None, 0.25), "steps": (1, 3), "guards": (True, False), "bands": 1}
    tuner = scripted(tiny, plain, tmp_path, does, **options)
    found = tuner.search(AUROCS)
    assert found is not None
    assert (found.rule["window"], found.rule["gate"], found.rule["layers"]) == (3, 0.25, [3])
    screened = [trial.rule for trial in tuner.trials.values() if trial.stage == "screening"]
    fine = [rule for rule in screened if rule["layers"] == [3] and rule["gate"] is None]
    assert len(fine) == 2 * 2 + 4  # ways and guards; more steps on the best four
    assert sum(rule["steps"] == 3 for rule in fine) == 4
    assert {round(whole_way(rule), 9) for rule in fine} == {0.5, 1.0}
    assert sum(rule["gate"] is not None for rule in screened) == 4
    assert not any(rule["window"] for rule in screened)
    quarter = tuner.bases[1.0].energy(3, DESIRABLE_STATES[:, 3]).quantile(0.25)
    assert tuner.landscape(found.rule).rule.gates == {3: pytest.approx(float(quarter))}


def test_longer_windows_are_tried_on_the_two_best(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return 0.6 + rule["layers"][0] / 100 + whole_way(rule) / 10, 0.6, 1.0

    tuner = unmoved(scripted(tiny, plain, tmp_path, does, etas=(0.2, 0.4, 0.6), windows=(0, 3, 5), bands=2))
    tuner.search(AUROCS)
    judged = [trial.rule for trial in tuner.trials.values() if trial.stage == "verdicts"]
    assert [(rule["layers"], rule["eta"]) for rule in judged if not rule["window"]] == [
        ([3], 0.6), ([2], 0.6), ([3], 0.4), ([2], 0.4)
    ]  # fmt: skip
    assert [(rule["layers"], rule["eta"], rule["window"]) for rule in judged if rule["window"]] == [
        ([3], 0.6, 3), ([3], 0.6, 5), ([2], 0.6, 3), ([2], 0.6, 5)
    ]  # fmt: skip


def test_the_best_weight_of_the_benign_half_is_chosen(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return 0.5 + rule["benign_weight"] / 10, 0.6 if rule["benign_weight"] < 3 else 0.4, 1.0

    tuner = scripted(tiny, plain, tmp_path, does)
    tuner.bases = {weight: tuner.bases[1.0].with_rule(eta=weight) for weight in (1.0, 2.0, 4.0)}
    found = tuner.search(dict.fromkeys(tuner.bases, AUROCS[1.0]))
    assert found is not None
    assert found.rule["benign_weight"] == 2.0
    assert tuner.landscape(found.rule).tensors is tuner.bases[2.0].tensors


def test_finalists_are_not_all_of_one_band(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        return 0.6 + rule["layers"][0] / 10, 0.6, 1.0

    tuner = scripted(tiny, plain, tmp_path, does, etas=(0.1, 0.2, 0.3, 0.4), finalists=4, bands=2)
    tuner.search(AUROCS)
    judged = [tuple(trial.rule["layers"]) for trial in tuner.trials.values() if trial.stage == "verdicts"]
    assert sorted(judged) == [(2,), (2,), (3,), (3,)]


def test_verdicts_of_the_first_finalists_correct_what_the_screening_expects(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    """Screening expects every setting of a weight above 1 to lose safety; in truth those up to 4 do not."""

    def does(rule: dict[str, Any]) -> tuple[float, float, float]:
        weight = rule["benign_weight"]
        return 0.5 + weight / 20, 0.6 - 0.06 * (weight > 1) - 0.02 * weight, 1.0

    tuner = scripted(tiny, plain, tmp_path, does, etas=(0.5,), finalists=3, bands=4, safety_margin=0.05)
    tuner.bases = {weight: tuner.bases[1.0].with_rule(eta=weight) for weight in (1.0, 2.0, 4.0, 8.0)}
    told = tuner._judged

    def judged(rule: dict[str, Any]) -> Trial:
        found = told(rule)
        better = replace(found, refused_harmful=found.refused_harmful + 0.1)
        safe = better.refused_harmful >= better.plain_refused + 0.05
        return replace(better, why_not=[] if safe else ["margin"])

    tuner._judged = judged  # type: ignore[method-assign]
    found = tuner.search({weight: {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.7} for weight in tuner.bases})
    assert found is not None
    assert found.rule["benign_weight"] == 4.0
    screened = [trial for trial in tuner.trials.values() if trial.stage == "screening"]
    assert not any(trial.feasible for trial in screened if trial.rule["benign_weight"] == 4.0)


# The frontier


def test_started_again_it_reads_the_frontier(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    settings = TuningSettings.model_validate(
        {**STRICT.model_dump(), "safety_margin": -1, "kl": 1e9, "quality_prompts": 4}
    )
    first = tuner_of(tiny, plain, tmp_path, settings)
    chosen = first.search(AUROCS)
    before = lines(tmp_path / "frontier.jsonl")
    assert {json.loads(line)["trial"]["stage"] for line in before} >= {"screening", "verdicts"}
    with forward_passes(tiny[0]) as passes:
        again = tuner_of(tiny, plain, tmp_path, settings)
        assert again.search(AUROCS) == chosen
    assert passes == []
    assert again.trials == first.trials
    assert lines(tmp_path / "frontier.jsonl") == before


def test_half_a_frontier_is_gone_on_with(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    first = tuner_of(tiny, plain, tmp_path)
    chosen = first.search(AUROCS)
    path = tmp_path / "frontier.jsonl"
    before = lines(path)
    path.write_text("\n".join(before[:2]) + "\n" + before[2][:20])  # the third row was cut by the kill
    again = tuner_of(tiny, plain, tmp_path)
    assert again.search(AUROCS) == chosen
    assert lines(path) == before


def test_screening_costs_one_token_and_counts_the_plain_answers_that_begin_so(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    tuner = tuner_of(tiny, plain, tmp_path)
    trial = tuner._screened({**RULE, "eta": 1e-9})
    # Next to no step: each first token is the plain one. The mean over openers is the plain rate itself.
    benign = ~tuner.harmful
    labels = np.array([one.label for one in plain])
    assert trial.answered_benign == trial.plain_answered == pytest.approx((labels[benign] == "compliance").mean())
    assert trial.refused_harmful == pytest.approx((labels[~benign] == "refusal").mean())
    with forward_passes(tiny[0]) as passes:
        tuner._screened({**RULE, "eta": 0.5})
    assert sum(passes) == len(DEV) + 2  # and the neutral answers, scored for the KL; the plain scores are kept


def test_a_first_token_that_no_plain_answer_begins_with_leaves_the_prompt_as_it_was(
    tiny: Tiny, plain: list[Completion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = tuner_of(tiny, plain, tmp_path)
    tuner._first_tokens()
    monkeypatch.setattr(tuner, "_first", lambda steering: [-1] * len(DEV))
    trial = tuner._screened(RULE)
    assert trial.removed == 0
    assert trial.refused_harmful == trial.plain_refused
    assert math.isfinite(trial.answered_benign)


def test_first_tokens_of_unscored_answers_alone_do_not_count(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    first = tuner_of(tiny, plain, tmp_path)._first(None)
    common = max(set(first), key=first.count)
    odd = [replace(one, label="unscored") if at == common else one for one, at in zip(plain, first, strict=True)]
    tuner = tuner_of(tiny, odd, tmp_path / "odd")
    trial = tuner._screened({**RULE, "eta": 1e-9})
    rows = np.array([at != common for at in first]) & ~tuner.harmful
    labels = np.array([one.label for one in plain])
    assert trial.answered_benign == trial.plain_answered == pytest.approx((labels[rows] == "compliance").mean())


def test_trials_do_not_touch_the_model_or_each_other(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    tuner = tuner_of(tiny, plain, tmp_path)
    before = tuner.bases[1.0].tensors[1]["weight"].clone()
    one = tuner._judged({**RULE, "eta": 0.5})
    tuner._judged({**RULE, "eta": 2.0})
    assert tuner._judged({**RULE, "eta": 0.5}) == one
    assert torch.equal(tuner.bases[1.0].tensors[1]["weight"], before)


# What is measured is the model steered by the rule


def test_the_landscape_of_a_rule_steers_as_the_rule_says(tiny: Tiny, plain: list[Completion], tmp_path: Path) -> None:
    tuner = tuner_of(tiny, plain, tmp_path)
    rule = {"benign_weight": 1.0, "layers": [0, 3], "eta": 0.7, "steps": 2, "window": 5, "gate": None, "guard": False}
    found = tuner.landscape(rule).rule
    assert (found.layers, found.eta, found.steps, found.window, found.guard) == ((0, 3), 0.7, 2, 5, False)
    assert found.gates is None
    gates = tuner.landscape({**rule, "gate": 0.25}).rule.gates
    assert gates is not None
    for layer in (0, 3):
        energies = tuner.bases[1.0].energy(layer, DESIRABLE_STATES[:, layer])
        assert (energies <= dict(gates)[layer]).float().mean() == pytest.approx(0.25, abs=0.05)


def test_verdicts_first_tokens_answers_and_kl_of_a_trial_are_the_steered_models(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    """Each is measured again beside the tuner, with the landscape attached, and is another than the plain model's."""
    settings = TuningSettings.model_validate({**STRICT.model_dump(), "quality_prompts": 100, "quality_tokens": 6})
    tuner = tuner_of(tiny, plain, tmp_path, settings)
    rule = {**RULE, "layers": [2, 3], "eta": 0.5, "window": 4}
    caches, benign = PromptCaches(*tiny, DEV), np.array([not one.harmful for one in DEV])
    neutral = PromptCaches(*tiny, tuner.neutral.prompts)
    answered = [at for at, one in enumerate(plain) if one.label == "compliance" and benign[at]]
    plain_answers = answer_at_length(caches, answered, "x", steering=None, max_new_tokens=6)
    plain_neutral = answer_at_length(neutral, range(2), "x", steering=None, max_new_tokens=6)
    with tuner.landscape(rule).attach(tiny[0]) as steering:
        after = complete(caches, LetterJudge(), max_new_tokens=4, steering=steering)
        answers = answer_at_length(caches, answered, "x", steering=steering, max_new_tokens=6)
        kls = kl_to_plain(neutral, plain_neutral, steering=steering, tokens=6)
    labels = np.array([one.label for one in after])
    assert (labels != [one.label for one in plain]).any()
    assert {one.text for one in answers.values()} != {one.text for one in plain_answers.values()}

    judged = tuner._judged(rule)
    scored = (labels != "unscored") & (tuner.before != "unscored")
    assert judged.answered_benign == pytest.approx((labels[scored & benign] == "compliance").mean())
    assert judged.refused_harmful == pytest.approx((labels[scored & ~benign] == "refusal").mean())

    screened = tuner._screened(rule)
    assert screened.kl == pytest.approx(sum(kls.values()) / len(kls), rel=1e-4)
    assert screened.kl > 0.01
    assert (screened.answered_benign, screened.refused_harmful) != (screened.plain_answered, screened.plain_refused)

    checked = tuner._checked(judged)
    expected = quality(plain_answers, answers, [DEV[at].id for at in answered])
    assert checked.perplexity_ratio == pytest.approx(expected.perplexity_ratio, rel=1e-4)
    assert checked.perplexity_ratio != pytest.approx(1, abs=1e-3)
    assert checked.degenerate == pytest.approx(expected.degenerate_steered - expected.degenerate_plain)
    assert checked.kl == pytest.approx(screened.kl, rel=1e-4)


def test_a_setting_above_the_kl_bound_is_told_so_and_is_no_finalist(
    tiny: Tiny, plain: list[Completion], tmp_path: Path
) -> None:
    settings = TuningSettings.model_validate({**STRICT.model_dump(), "kl": 0.0})
    tuner = tuner_of(tiny, plain, tmp_path, settings)
    trial = tuner._screened({**RULE, "eta": 30.0})
    assert "KL above its bound" in trial.why_not
    assert tuner._open([trial]) == []
    within = replace(trial, why_not=[], kl=0.0)
    assert tuner._promising([trial, within])[0] is within
