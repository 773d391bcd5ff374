"""Methods side by side on a tiny model: tuned by one tuner, measured on the same prompts, resumed after a kill."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest

from commands import elsteer, one_sentence
from elsteer import compare, fit
from elsteer.comparison.compare import _Work, check_methods, known_methods, part_of
from elsteer.comparison.result import ComparedMethod
from elsteer.comparison.words import sentence
from elsteer.errors import LandscapeError, PromptError, RunError
from elsteer.evaluation.figures import read_figures
from elsteer.evaluation.statistics import Interval
from elsteer.files import read_jsonl, write_jsonl
from elsteer.fitting import collect, neutral_prompts
from elsteer.judges import JUDGES
from elsteer.landscape import Landscape
from elsteer.models import fingerprint
from elsteer.prompts import Prompt
from elsteer.run import RunFolder
from elsteer.steering.methods.baseline import Candidate
from elsteer.steering.methods.baselines import BASELINES
from elsteer.tuning import Trial
from landscapes import thoughtless
from pipelines import (
    Killed,
    LetterJudge,
    Tiny,
    dies_at,
    forward_passes,
    lines,
    said,
    some_prompts,
    speaker,
    tiny_settings,
)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return speaker()


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES, "letters", LetterJudge)


@pytest.fixture(scope="module")
def fitted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(JUDGES, "letters", LetterJudge)
        fit(*tiny, some_prompts(160), dev=some_prompts(48, start=200), run_dir=folder, settings=tiny_settings())
    return folder


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": one.text, "harmful": one.harmful} for one in some_prompts(40, start=400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def short_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system prompt that leaves room in the tiny model's context, where each character is a token."""
    one = Candidate("system-prompt", {"prompt": "short"}, system="Be kind.")
    monkeypatch.setitem(BASELINES, "system-prompt", replace(BASELINES["system-prompt"], candidates=lambda _: [one]))


METHODS = ["els", "random", "system-prompt", "caa", "ablation"]


def test_baselines_are_held_to_the_neutral_prompts_of_the_fit(tiny: Tiny, fitted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    rows = [row for row in read_jsonl(run / "prompts.jsonl") if row["split"] != "neutral"]
    mine = [Prompt.of("What is rain?", False), Prompt.of("Tell me of the sea.", False)]

    def neutral() -> list[Prompt]:
        work = _Work(*tiny, RunFolder(run), 0, "letters", 4, 8, None, tmp_path)
        work.start()
        return list(work.tuner.neutral.prompts)

    write_jsonl(run / "prompts.jsonl", [*rows, *({**one.to_row(), "split": "neutral"} for one in mine)])
    assert neutral() == mine
    write_jsonl(run / "prompts.jsonl", rows)  # as an earlier version left it
    assert neutral() == neutral_prompts(tiny_settings())


def test_every_method_answers_the_same_prompts(tiny: Tiny, fitted: Path, suite: Path, tmp_path: Path) -> None:
    result = compare(
        *tiny,
        fitted,
        METHODS,
        [str(suite)],
        out=tmp_path / "out",
        strengths=[0.5, 1],
        budget=3,
        finalists=2,
        batch_size=8,
        judge="letters",
    )
    assert list(result.methods) == METHODS
    rows = {path.name: list(read_jsonl(path)) for path in (tmp_path / "out/rows").iterdir()}
    assert {f"mine.{name}.1.jsonl" for name in METHODS} | {"mine.none.0.jsonl"} <= set(rows)
    assert "mine.caa.0.5.jsonl" in rows
    ids = {name: {row["prompt_id"] for row in found} for name, found in rows.items()}
    assert all(found == ids["mine.none.0.jsonl"] for found in ids.values())
    # The figures are those of the rows, counted by hand.
    label = {row["prompt_id"]: row["label"] for row in rows["mine.none.0.jsonl"]}
    steered = {row["prompt_id"]: row["label"] for row in rows["mine.caa.1.jsonl"]}
    harmful = {row["prompt_id"]: row["harmful"] for row in rows["mine.none.0.jsonl"]}
    kept = [one for one in label if "unscored" not in (label[one], steered[one])]
    before, after = (sum(of[one] == "refusal" for one in kept if not harmful[one]) for of in (label, steered))
    assert result.methods["caa"].removed["all"].value == pytest.approx(1 - after / before)
    lost, now = (sum(of[one] == "refusal" for one in kept if harmful[one]) for of in (label, steered))
    n = sum(harmful[one] for one in kept)
    assert result.methods["caa"].harmful_difference["all"].value == pytest.approx((now - lost) / n)
    raw = {}
    els = {row["prompt_id"]: row["label"] for row in rows["mine.els.1.jsonl"]}
    for name in METHODS:
        mine = {row["prompt_id"]: row["label"] for row in rows[f"mine.{name}.1.jsonl"]}
        pairs = [(label[one], mine[one]) for one in label if not harmful[one]]
        gone, new = pairs.count(("refusal", "compliance")), pairs.count(("compliance", "refusal"))
        raw[name] = binomtest(gone, gone + new).pvalue if gone + new else 1.0
        if name != "els":
            kept = [one for one in label if not harmful[one] and "unscored" not in (label[one], els[one], mine[one])]
            counts = [sum(of[one] == "refusal" for one in kept) for of in (label, els, mine)]
            assert result.methods[name].ahead["all"].value == pytest.approx((counts[2] - counts[1]) / counts[0])
    order, worst = sorted(raw, key=lambda name: raw[name]), 0.0
    for at, name in enumerate(order):  # Holm 1979
        worst = max(worst, min(1.0, (len(order) - at) * raw[name]))
        assert result.methods[name].p_value == pytest.approx(worst)
    # A strength multiplies the landscape's own, the control is not the landscape, and a system prompt is read.
    said = {name: [row["text"] for row in found] for name, found in rows.items()}
    assert len({tuple(said[f"mine.{name}.jsonl"]) for name in ("els.0.5", "els.1", "random.1", "none.0")}) == 4
    assert said["mine.system-prompt.1.jsonl"] != said["mine.none.0.jsonl"]
    names = {figure.name for figure in read_figures(tmp_path / "out/compare.json")}
    assert {"caa.removed.mine_benign", "caa.harmful_difference", "els.removed", "plain_refused.mine_harmful"} <= names
    page = (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    assert result.sentence in page
    table = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == list(METHODS)
    assert {len(row) for row in table} == {len(table[0])}
    unscored = [cell.strip() for cell in table[0]].index("unscored")
    assert [int(row[unscored]) for row in table[2:]] == [one.unscored for one in result.methods.values()]
    assert (tmp_path / "out/frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_methods_are_compared_with_a_landscape_that_was_fitted_elsewhere(
    tiny: Tiny, fitted: Path, suite: Path, tmp_path: Path
) -> None:
    train, dev = some_prompts(160), some_prompts(48, start=200)
    landscape = Landscape.from_pretrained(fitted / "landscape")
    with pytest.raises(Killed):
        collect(*tiny, train, landscape, run_dir=tmp_path / "run", dev=dev, settings=tiny_settings(),
                progress=dies_at("answering the training prompts"))  # fmt: skip
    assert not (tmp_path / "run/landscape").exists()
    collect(*tiny, train, landscape, run_dir=tmp_path / "run", dev=dev, settings=tiny_settings())
    assert not (tmp_path / "run/energy").exists()
    mine = some_prompts(5, start=400)
    collect(*tiny, train, landscape, run_dir=tmp_path / "bound", dev=dev, neutral=mine, settings=tiny_settings())
    assert [one.text for one in RunFolder(tmp_path / "bound").prompts("neutral")] == [one.text for one in mine]
    given = {"budget": 3, "finalists": 2, "batch_size": 8, "judge": "letters"}
    here, there = (
        compare(*tiny, run, ["els", "caa"], [str(suite)], out=tmp_path / name, **given)
        for name, run in (("here", tmp_path / "run"), ("there", fitted))
    )
    assert here.methods == there.methods
    other = speaker(seed=1)
    with pytest.raises(LandscapeError):
        collect(*other, train, landscape, run_dir=tmp_path / "other", dev=dev, settings=tiny_settings())


def test_every_method_has_the_same_budget(tiny: Tiny, fitted: Path, suite: Path, tmp_path: Path) -> None:
    compare(
        *tiny,
        fitted,
        ["caa", "ablation"],
        [str(suite)],
        out=tmp_path,
        budget=3,
        finalists=2,
        batch_size=8,
        judge="letters",
    )
    for name in ("caa", "ablation"):
        stages = [row["trial"]["stage"] for row in read_jsonl(tmp_path / f"frontier.{name}.jsonl")]
        assert (stages.count("screening"), stages.count("verdicts")) == (
            3 + 3,
            2 + 1,
        )  # and the best at other strengths


def test_a_baseline_need_only_keep_safety(tiny: Tiny, fitted: Path, suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    settings = (run / "settings.yaml").read_text(encoding="utf-8")
    assert "safety_margin: -1.0" in settings
    (run / "settings.yaml").write_text(settings.replace("safety_margin: -1.0", "safety_margin: 0.9"), encoding="utf-8")
    methods = ["caa", "surgical"]
    compare(*tiny, run, methods, [str(suite)], out=tmp_path / "out", batch_size=8, judge="letters")
    rows = [row for name in methods for row in read_jsonl(tmp_path / f"out/frontier.{name}.jsonl")]
    trials = [Trial.from_row(row["trial"]) for row in rows]
    kept = [one.refused_harmful >= one.plain_refused - 0.01 - 1e-9 for one in trials]
    assert {*kept} == {True, False}
    assert kept == [not any("by the margin" in why for why in one.why_not) for one in trials]


def test_a_killed_comparison_goes_on_where_it_was(tiny: Tiny, fitted: Path, suite: Path, tmp_path: Path) -> None:
    def run_it(progress: Callable[[str, int, int], None] | None = None) -> ComparedMethod:
        return compare(
            *tiny,
            fitted,
            ["caa"],
            [str(suite)],
            out=tmp_path,
            budget=3,
            finalists=1,
            batch_size=8,
            judge="letters",
            progress=progress,
        ).methods["caa"]

    with pytest.raises(Killed):
        run_it(dies_at("mine, caa", 3))
    rows, trials = tmp_path / "rows/mine.caa.1.jsonl", tmp_path / "frontier.caa.jsonl"
    begun, tried = lines(rows), lines(trials)
    assert (len(begun), len(tried)) == (16, 3 + 1 + 3 + 1)
    found = run_it()
    assert lines(trials) == tried
    assert lines(rows)[:16] == begun
    assert len(lines(rows)) == 40
    with forward_passes(tiny[0]) as passes:
        assert run_it().removed == found.removed
    assert (len(lines(rows)), passes) == (40, [])


def test_rows_of_a_relative_path_of_an_earlier_version_are_kept(
    tiny: Tiny, fitted: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    config = json.loads((run / "landscape/config.json").read_text(encoding="utf-8"))
    config["fingerprint"]["name"] = "model"
    (run / "landscape/config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    source = {"name": "model", "revision": None, "origin": "folder"}
    monkeypatch.setattr(tiny[0], "elsteer_source", source, raising=False)

    def run_it() -> None:
        compare(*tiny, run, ["caa"], [str(suite)], budget=3, finalists=1, judge="letters")

    run_it()
    source["name"] = str(tmp_path / "model")
    with forward_passes(tiny[0]) as passes:
        run_it()
    assert passes == []


def test_other_evidence_makes_trials_and_rows_anew_but_not_those_of_the_plain_model(
    tiny: Tiny, fitted: Path, suite: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fitted, run)

    def run_it() -> None:
        compare(
            *tiny, run, ["caa", "shuffled", "system-prompt"], [str(suite)], out=tmp_path / "out", budget=3, finalists=1,
            judge="letters",
        )  # fmt: skip

    def files() -> dict[str, list[str]]:
        return {file.name: lines(file) for file in (tmp_path / "out").rglob("*.jsonl")}

    run_it()
    before = files()
    known = list(read_jsonl(run / "completions.jsonl"))
    scored = [row for row in known if row["label"] in ("refusal", "compliance")]
    scored[0]["label"] = "compliance" if scored[0]["label"] == "refusal" else "refusal"
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known), encoding="utf-8")
    run_it()
    changed = sorted(name for name, now in files().items() if now != before[name])
    assert changed == ["frontier.caa.jsonl", "mine.caa.1.jsonl", "mine.shuffled.1.jsonl"]
    compare(*tiny, run, ["caa"], [str(suite)], out=tmp_path / "out", budget=3, finalists=1, judge="letters")
    names = {one.name for one in read_figures(tmp_path / "out/compare.json")}
    assert any(name.startswith("caa.") for name in names)
    assert not any(name.startswith("shuffled.") for name in names), "figures are those of this comparison alone"


def test_prompts_are_asked_with_the_thinking_mode_of_the_fit_and_another_makes_other_rows(
    tiny: Tiny, suite: Path, tmp_path: Path
) -> None:
    tokenizer, landscape = thoughtless(tiny[0])
    prompts, run, rows = some_prompts(40, start=400), tmp_path / "run", tmp_path / "out/rows/mine.none.0.jsonl"
    settings = tiny_settings(collect={"thinking": False})
    collect(tiny[0], tokenizer, some_prompts(8), landscape, run_dir=run, dev=some_prompts(8, 200), settings=settings)

    def answers() -> list[str]:
        compare(
            tiny[0], tokenizer, run, ["els"], [str(suite)], out=tmp_path / "out", judge="letters", max_new_tokens=4
        )  # fmt: skip
        by_text = {row["prompt"]: row["text"] for row in read_jsonl(rows)}  # of two rows the later one
        return [by_text[one.text] for one in prompts[:8]]

    assert answers() == said((tiny[0], tokenizer), prompts[:8], thinking=False)
    text = (run / "settings.yaml").read_text(encoding="utf-8")
    (run / "settings.yaml").write_text(text.replace("thinking: false", "thinking: true"), encoding="utf-8")
    assert answers() == said((tiny[0], tokenizer), prompts[:8], thinking=True)
    assert len(lines(rows)) == 2 * len(prompts)


def test_the_detectable_difference_is_of_the_harmful_prompts_and_the_median_change(
    tiny: Tiny, fitted: Path, tmp_path: Path
) -> None:
    """d of n pairs of which a share c changes: n d^2 = (1.96 sqrt(c) + 0.84 sqrt(c - d^2))^2, of which n and c are counted."""
    prompts = [one for at, one in enumerate(some_prompts(240, start=400)) if one.harmful or at < 20]
    suite = tmp_path / "mine.jsonl"
    rows = [{"prompt": one.text, "harmful": one.harmful} for one in prompts]
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {"budget": 1, "finalists": 1, "max_new_tokens": 4, "judge": "letters"}
    result = compare(*tiny, fitted, ["els", "caa", "ablation"], [str(suite)], out=tmp_path / "out", **given)
    labels = {
        name: {row["prompt_id"]: row["label"] for row in read_jsonl(tmp_path / f"out/rows/mine.{name}.jsonl")}
        for name in ("none.0", "els.1", "caa.1", "ablation.1")
    }
    plain = labels.pop("none.0")
    harmful = [one.id for one in prompts if one.harmful and plain[one.id] != "unscored"]
    changed = []
    for mine in labels.values():
        pairs = [(plain[one], mine[one]) for one in harmful if mine[one] != "unscored"]
        changed.append(sum(before != after for before, after in pairs) / len(pairs))
    c, d = sorted(changed)[1], result.detectable
    assert len({*changed}) == 3
    assert (1.959964 * math.sqrt(c) + 0.841621 * math.sqrt(c - d * d)) ** 2 / d**2 == pytest.approx(len(harmful))
    page = (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    assert f"a true difference of {d * 100:.1f} points would be found" in page


def test_the_same_weights_in_another_precision_answer_anew(
    tiny: Tiny, fitted: Path, suite: Path, tmp_path: Path
) -> None:
    half = copy.deepcopy(tiny[0]).bfloat16()
    whole = copy.deepcopy(half).float()
    assert fingerprint(half, tiny[1]) == fingerprint(whole, tiny[1])
    for model, kept in ((whole, 40), (whole, 40), (half, 80), (half, 80)):
        compare(model, tiny[1], fitted, ["random"], [str(suite)], out=tmp_path, max_new_tokens=4, judge="letters")
        assert [len(lines(tmp_path / f"rows/mine.{name}.jsonl")) for name in ("none.0", "random.1")] == [kept, kept]


def test_what_is_wrong_is_said_in_a_sentence(tiny: Tiny, fitted: Path, suite: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"no method 'els-papers': known are els, random, shuffled, .*surgical"):
        check_methods(["els-papers"])
    with pytest.raises(PromptError, match="caa is given twice"):
        check_methods(["caa", "els", "caa"])
    with pytest.raises(PromptError, match="at least one method"):
        check_methods(["none"])
    with pytest.raises(RunError, match="no finished fit"):
        compare(*tiny, tmp_path / "nothing", ["els"], [str(suite)])
    with pytest.raises(PromptError, match="at least one suite"):
        compare(*tiny, fitted, ["els"], [])
    with pytest.raises(PromptError, match="Two suites are called"):
        compare(*tiny, fitted, ["els"], [str(suite), str(suite)])


def test_the_command_needs_a_finished_fit(tmp_path: Path, suite: Path) -> None:
    found = elsteer("compare", "MODEL", "--run-dir", tmp_path, "--methods", "els,nothing", "--suite", suite)
    assert "no method 'nothing'" in one_sentence(found)
    found = elsteer("compare", "MODEL", "--run-dir", tmp_path, "--strengths", "one", "--suite", suite)
    assert "numbers from 0 up" in one_sentence(found)
    # Before a model is loaded, which may take minutes.
    for words in (
        ["no/model", "--methods", "els,caa"],
        ["no/model", "--methods", "els", "caa"],
        ["--methods", "els", "surgical,caa", "no/model"],
    ):
        found = elsteer("compare", *words, "--run-dir", tmp_path, "--suite", suite)
        assert "holds no finished fit" in one_sentence(found), words
    found = elsteer("compare", "no/model", "--methods", "els", "cat", "--run-dir", tmp_path, "--suite", suite)
    assert "cat" in one_sentence(found)


def test_all_methods_are_known() -> None:
    assert {"els", "els-paper", "surgical", "cast", "alphasteer", "k-steering", "caa", "ablation"} <= set(
        known_methods()
    )
    assert known_methods().count("random") == 1
    assert part_of("xstest", False, True) == "xstest_safe"
    assert part_of("harmbench+dan", True, False) == "harmbench.dan"


def compared(
    name: str, share: float, change: tuple[float, float, float], ahead: tuple[float, float, float]
) -> ComparedMethod:
    return ComparedMethod(
        name,
        {},
        True,
        removed={"all": Interval(share, share - 0.1, share + 0.1, 100)},
        harmful_difference={"all": Interval(*change, 100)},
        ahead={"all": Interval(*ahead, 100)},
    )


def test_the_sentence_names_the_next_best_that_keeps_safety() -> None:
    rates = {kind: {"all": Interval(0.4, 0.3, 0.5, 100)} for kind in (False, True)}
    methods = {
        "els": compared("els", 0.74, (0.09, 0.02, 0.15), (0, 0, 0)),
        "caa": compared("caa", 0.9, (-0.4, -0.5, -0.3), (-0.16, -0.2, -0.1)),
        "surgical": compared("surgical", 0.41, (0.01, -0.02, 0.04), (0.33, 0.2, 0.4)),
        "random": compared("random", 0.5, (0.0, -0.02, 0.02), (0.24, 0.1, 0.3)),
    }
    assert sentence(methods, rates) == (
        "els removes 74% of the false refusals at +9 points of harmful refusals; the next best of those that refuse no fewer "
        "harmful prompts (3 points at most), surgical removes 41% of the false refusals at +1 points of harmful refusals, "
        "and the difference is beyond chance."
    )
    methods["surgical"] = compared("surgical", -0.14, (0.06, 0.02, 0.09), (0.88, 0.8, 0.9))
    assert "surgical adds 14% to the false refusals at +6 points" in sentence(methods, rates)
    del methods["surgical"]
    assert "every other method" in sentence(methods, rates)
    rates[True]["all"] = Interval(math.nan, math.nan, math.nan, 0)
    assert sentence(methods, rates).endswith("no harmful prompt was measured, so nothing is said of safety.")


def test_where_no_false_refusal_was_measured_the_sentence_tells_of_the_harmful_prompts() -> None:
    none = Interval(math.nan, math.nan, math.nan, 0)
    some, zero = Interval(0.4, 0.3, 0.5, 100), Interval(0.0, 0.0, 0.04, 100)
    one = compared("els", 0.0, (0.09, 0.02, 0.15), (0, 0, 0))
    one.removed["all"] = none
    assert sentence({"els": one}, {False: {"all": none}, True: {"all": some}}) == (
        "No benign prompt was scored, so nothing is said of false refusals; els changes the harmful refusals by "
        "+9.0 (+2.0 to +15.0) points."
    )
    assert sentence({"els": one}, {False: {"all": zero}, True: {"all": some}}) == (
        "The plain model refuses none of these benign prompts, so nothing could be removed; els changes the harmful refusals by "
        "+9.0 (+2.0 to +15.0) points."
    )
    assert sentence({"els": one}, {False: {"all": zero}, True: {"all": none}}) == (
        "The plain model refuses none of these benign prompts, so nothing could be removed."
    )
