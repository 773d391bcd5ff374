"""`evaluate`: plain against steered on the same prompts; every row is kept, resumed, and never mixed with another's."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from elsteer import show
from elsteer.errors import JudgeError, LandscapeError, PromptError, RunError
from elsteer.evaluation.evaluate import Evaluation, _spread, evaluate
from elsteer.judges import JUDGES, Verdict
from elsteer.landscape import Landscape
from elsteer.models import encode_chat
from elsteer.prompts import Prompt
from elsteer.run import RunFolder
from landscapes import thoughtless, tiny_landscape
from pipelines import Killed, LetterJudge, Tiny, dies_at, forward_passes, lines, said, some_prompts, speaker

PROMPTS = some_prompts(40, source="mine")


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES, "letters", LetterJudge)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return speaker()


@pytest.fixture(scope="module")
def landscape(tiny: Tiny) -> Landscape:
    return tiny_landscape(tiny[0]).with_rule(eta=1.0)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return written(tmp_path / "mine.jsonl")


def written(path: Path, prompts: Any = PROMPTS, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": p.text, "harmful": p.harmful, "source": p.source, "category": p.category, **more} for p in prompts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(tiny: Tiny, methods: Any, suites: list[Path], folder: Path, **options: Any) -> Evaluation:
    given: dict[str, Any] = {"judge": "letters", "quality_prompts": 6, "quality_tokens": 4, "max_new_tokens": 4}
    return evaluate(*tiny, methods, [str(one) for one in suites], run_dir=folder, **given | {"batch_size": 8} | options)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in lines(path)]


def core(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt_id", "method", "text", "label", "harmful", "prompt", "strength")}


# What it finds and leaves behind


def test_rows_are_complete_paired_and_on_disk(tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path) -> None:
    found = evaluated(tiny, ["none", landscape, landscape.with_method("random")], [suite], tmp_path / "run")
    by_method = {name: [row for row in found.rows if row["method"] == name] for name in ("none", "els", "random")}
    assert len(found.rows) == 3 * len(PROMPTS)
    for rows in by_method.values():
        assert [(row["prompt_id"], row["prompt"], row["harmful"]) for row in rows] == [
            (prompt.id, prompt.text, prompt.harmful) for prompt in PROMPTS
        ]
        assert {row["suite"] for row in rows} == {"mine"}
        assert {(row["source"], row["category"]) for row in rows} == {("mine", "test")}
        assert all(row["completion"] == row["text"] for row in rows)
    assert {row["strength"] for row in by_method["none"]} == {0.0}
    for name, rows in by_method.items():
        on_disk = rows_of(tmp_path / f"run/evaluation/mine.{name}.jsonl")
        assert sorted(map(core, on_disk), key=str) == sorted(map(core, rows), key=str)
    assert [row["text"] for row in by_method["none"]] != [row["text"] for row in by_method["els"]]


def test_a_file_is_measured_directly_and_under_attack(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    suites: list[Any] = [suite, f"{suite}+prefix-injection"]
    found = evaluated(tiny, [landscape], suites, tmp_path / "run", quality=False)
    under = rows_of(tmp_path / "run/evaluation/mine+prefix-injection.els.jsonl")
    harmful = [prompt for prompt in PROMPTS if prompt.harmful]
    assert len(under) == len(harmful)
    assert all(any(prompt.text in row["prompt"] != prompt.text for prompt in harmful) for row in under)
    assert {one.name for one in found.comparisons()["suite"] if one.harmful} == {"mine", "mine+prefix-injection"}


def test_the_answers_are_those_of_generate(tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny
    found = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    after = {row["prompt_id"]: row for row in found.rows if row["method"] == "els"}
    with landscape.attach(model):
        for prompt in PROMPTS[:5]:
            ids = torch.tensor([encode_chat(tokenizer, list(prompt.messages))])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
            assert (
                tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip() == after[prompt.id]["text"]
            )


def test_prompts_that_were_fitted_or_tuned_on_are_told(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    known = [{**PROMPTS[0].to_row(), "split": "train"}, {**PROMPTS[1].to_row(), "split": "dev"}]
    other = {**Prompt.of("Name a river.", harmful=False).to_row(), "split": "dev"}
    (run / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*known, other]))
    landscape.save_pretrained(run / "landscape")
    (run / "stages.json").write_text("{}")
    (run / "frontier.png").write_bytes(b"a picture of the fit")
    found = evaluated(tiny, [landscape], [suite], run, quality=False)
    words = "2 of the prompts were fitted or tuned on, so these figures say little of others."
    assert found.sentence.endswith(words)
    assert words in found.report.read_text(encoding="utf-8")
    picture = base64.b64encode(b"a picture of the fit").decode()
    assert picture in found.report.read_text(encoding="utf-8")
    other_run = evaluated(tiny, [landscape], [suite], tmp_path / "other", quality=False)
    landscape.with_rule(layers=landscape.rule.layers[:1]).save_pretrained(run / "landscape")
    other_fit = evaluated(tiny, [landscape], [suite], run, quality=False)
    for one in (other_run, other_fit):
        assert words not in one.sentence
        assert picture not in one.report.read_text(encoding="utf-8")


def test_prompts_of_one_s_own_in_the_folder_are_not_a_fit_s(tiny: Tiny, landscape: Landscape, tmp_path: Path) -> None:
    mine = written(tmp_path / "prompts.jsonl")
    assert evaluated(tiny, [landscape], [mine], tmp_path, quality=False).seen == 0


def test_tables_count_the_rows(tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path) -> None:
    found = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    assert found.method == "els"
    assert set(found.comparisons()) == {"total", "suite", "source", "category"}
    for table in found.comparisons().values():
        assert sum(one.pairs for one in table) == len(PROMPTS)
    labels = {(row["method"], row["prompt_id"]): row["label"] for row in found.rows}
    for one in found.comparisons("els")["total"]:
        ids = [prompt.id for prompt in PROMPTS if prompt.harmful == one.harmful]
        assert one.refused_plain.value == sum(labels["none", at] == "refusal" for at in ids) / len(ids)
        assert one.refused_steered.value == sum(labels["els", at] == "refusal" for at in ids) / len(ids)
        before, after = ([labels[name, at] == "refusal" for at in ids] for name in ("none", "els"))
        gone = sum(a and not b for a, b in zip(before, after, strict=True))
        words = (
            f"Of the {sum(before)} benign prompts that the plain model refused (of {len(ids)}), {gone} are now answered"
        )
        if one.harmful:
            words = f"Harmful prompts refused: {sum(before) / len(ids):.1%} -> {sum(after) / len(ids):.1%} (difference "
        assert words in found.sentence


def test_report_pictures_and_a_summary_in_valid_json(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    found = evaluated(tiny, [landscape], [suite], tmp_path / "run", command="elsteer evaluate it")
    assert found.report == tmp_path / "run/report.html"
    page = found.report.read_text(encoding="utf-8")
    assert "elsteer evaluate it" in page
    assert page.count("data:image/png;base64,") == 2
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"before_after.png", "landscape_at_layer_2.png"}
    text = (tmp_path / "run/evaluation/summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    benign, harmful = summary["els"]["total"]
    assert (benign["harmful"], harmful["harmful"]) == (False, True)
    assert benign["refused_plain"].keys() == {"value", "low", "high", "n"}
    assert harmful["removed"] is None


def test_examples_are_changed_answers_benign_ones_first(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    found = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    changed = {
        plain["prompt"]: (plain["label"], after["label"])
        for plain in found.rows
        for after in found.rows
        if plain["method"] == "none" and after["method"] == "els" and plain["prompt_id"] == after["prompt_id"]
        if plain["label"] != after["label"]
    }
    assert changed
    ended = {(row["method"], row["prompt"]): (row["completion"], row["finished"]) for row in found.rows}
    for one in found.examples:
        for method, text in (("none", one.plain), ("els", one.steered)):
            completion, finished = ended[method, one.prompt]
            assert text == completion + ("" if finished else " …")
    assert {one.prompt: (one.plain_label, one.steered_label) for one in found.examples}.items() <= changed.items()
    assert [one.harmful for one in found.examples] == sorted(one.harmful for one in found.examples)


def test_quality_is_measured_on_benign_prompts_that_the_plain_model_answers(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    found = evaluated(tiny, [landscape], [suite], tmp_path / "run")
    answered = {
        r["prompt_id"] for r in found.rows if r["method"] == "none" and r["label"] == "compliance" and not r["harmful"]
    }
    assert set(found.answers["none"]) == set(found.answers["els"]) <= answered
    assert found.quality is not None
    assert found.quality.n == len(found.answers["els"]) == min(6, len(answered))
    ratio = found.perplexity["els"]
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(found.quality.perplexity_ratio)
    bare = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    assert bare.quality is None


def test_quality_is_measured_all_over_a_suite(tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path) -> None:
    """A suite goes kind by kind: its first prompts are of one."""
    found = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality_prompts=3)
    plain = [row for row in found.rows if row["method"] == "none" and not row["harmful"]]
    answered = [row["prompt_id"] for row in plain if row["label"] == "compliance"]
    assert len(answered) >= 6
    assert set(found.answers["els"]) == {answered[at * len(answered) // 3] for at in range(3)}
    assert _spread([3, 5, 8], 6) == _spread([3, 5, 8], 3) == [3, 5, 8]
    assert _spread(list(range(10)), 4) == [0, 2, 5, 7]


@pytest.mark.parametrize("damage", ["{", "[]", "[" * 100_000, "\udce9"])
def test_a_damaged_list_of_pictures_has_them_drawn_anew(
    damage: str, tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    marks = tmp_path / "run/evaluation/pictures.json"
    before = marks.read_bytes()
    marks.write_text(damage, errors="surrogateescape")
    evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    assert marks.read_bytes() == before


def test_at_strength_0_nothing_differs(tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path) -> None:
    found = evaluated(tiny, [landscape.with_rule(strength=0.0)], [suite], tmp_path / "run")
    plain, steered = ([r["text"] for r in found.rows if r["method"] == name] for name in ("none", "els"))
    assert plain == steered
    assert found.quality is not None
    assert found.quality.perplexity_ratio == 1.0
    assert found.examples == []


# Resuming


@pytest.mark.parametrize("stage", ["mine, plain", "mine, els", "whole answers, plain", "whole answers, els"])
def test_killed_in_any_part_it_goes_on_without_losing_a_row(
    stage: str, tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    whole = evaluated(tiny, [landscape], [suite], tmp_path / "whole", quality_prompts=20)
    folder = tmp_path / "run"
    call = 1 if "whole" in stage else 3
    with pytest.raises(Killed):
        evaluated(tiny, [landscape], [suite], folder, quality_prompts=20, progress=dies_at(stage, call))
    before = {path.name: lines(path) for path in (folder / "evaluation").glob("*.jsonl")}
    assert before
    found = evaluated(tiny, [landscape], [suite], folder, quality_prompts=20)
    for path in (tmp_path / "whole/evaluation").glob("*.jsonl"):
        rows = lines(folder / "evaluation" / path.name)
        kept = before.get(path.name, [])
        assert rows[: len(kept)] == kept
        assert len(rows) == len(set(rows)) == len(lines(path))
    assert list(map(core, found.rows)) == list(map(core, whole.rows))
    assert found.tables == whole.tables
    assert found.quality is not None
    assert whole.quality is not None
    assert found.quality.perplexity_ratio == pytest.approx(whole.quality.perplexity_ratio)


def test_done_already_it_computes_nothing_but_writes_the_report(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    first = evaluated(tiny, [landscape], [suite], tmp_path / "run")
    first.report.unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.jsonl")}
    with forward_passes(tiny[0]) as passes:
        again = evaluated(tiny, [landscape], [suite], tmp_path / "run")
    assert passes == []
    assert {path: path.read_bytes() for path in before} == before
    assert again.tables == first.tables
    assert again.answers == first.answers
    assert again.report.read_text().count("data:image/png;base64,") == 2


def test_a_landscape_read_from_its_folder_finds_its_rows(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    first = evaluated(tiny, [landscape], [suite], tmp_path / "run")
    landscape.save_pretrained(tmp_path / "run/landscape")
    with forward_passes(tiny[0]) as passes:
        again = evaluated(tiny, [Landscape.from_pretrained(tmp_path / "run/landscape")], [suite], tmp_path / "run")
    assert passes == []
    assert again.tables == first.tables


def test_another_landscape_in_the_same_folder_gets_rows_of_its_own(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    evaluated(tiny, [landscape], [suite], folder)
    changed = [
        landscape.with_rule(eta=2.0),
        landscape.with_rule(strength=0.5),
        Landscape(
            landscape.rule,
            {at: {**named, "read_out": -named["read_out"] * 1.1} for at, named in landscape.tensors.items()},
            landscape.guards,
            landscape.fingerprint,
        ),
    ]
    for number, other in enumerate(changed, start=2):
        found = evaluated(tiny, [other], [suite], folder)
        alone = evaluated(tiny, [other], [suite], tmp_path / f"alone {number}")
        assert list(map(core, found.rows)) == list(map(core, alone.rows))
        assert found.tables == alone.tables
        assert found.answers == alone.answers
        assert len(lines(folder / "evaluation/mine.els.jsonl")) == number * len(PROMPTS)
        assert len(lines(folder / "evaluation/mine.none.jsonl")) == len(PROMPTS)  # the plain model's are shared
    back = evaluated(tiny, [landscape], [suite], folder)
    assert len(lines(folder / "evaluation/mine.els.jsonl")) == 4 * len(PROMPTS)
    assert list(map(core, back.rows)) == list(map(core, evaluated(tiny, [landscape], [suite], tmp_path / "first").rows))


def test_a_control_under_the_name_of_a_landscape_gets_rows_of_its_own(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    control = landscape.with_method("random")
    evaluated(tiny, {"mine": landscape}, [suite], tmp_path / "run", quality=False)
    found = evaluated(tiny, {"mine": control}, [suite], tmp_path / "run", quality=False)
    alone = evaluated(tiny, {"mine": control}, [suite], tmp_path / "alone", quality=False)
    assert list(map(core, found.rows)) == list(map(core, alone.rows))
    assert len(lines(tmp_path / "run/evaluation/mine.mine.jsonl")) == 2 * len(PROMPTS)


class OtherLetters(LetterJudge):
    """The other way round."""

    name = "other letters"

    def judge(self, prompt: str, completion: str) -> Verdict:
        found = super().judge(prompt, completion)
        return Verdict("refusal" if found.label == "compliance" else "compliance", 0.5)


def test_another_judge_or_limit_of_tokens_makes_other_rows(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(JUDGES, "other letters", OtherLetters)
    first = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    other = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False, judge="other letters")
    assert all(a["label"] != b["label"] for a, b in zip(first.rows, other.rows, strict=True))
    longer = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False, max_new_tokens=7)
    assert {row["tokens_at_most"] for row in longer.rows} == {7}
    assert max(row["tokens"] for row in longer.rows) == 7


def test_another_model_or_dtype_makes_other_rows_and_other_lengths_other_answers(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = evaluated(tiny, [landscape], [suite], run, quality_tokens=3)
    assert {len(one.tokens) for one in first.answers["els"].values()} == {3}
    longer = evaluated(tiny, [landscape], [suite], run, quality_tokens=5)
    assert {len(one.tokens) for one in longer.answers["els"].values()} == {5}
    half = copy.deepcopy(tiny[0]).to(torch.bfloat16)
    with forward_passes(half) as passes:
        evaluated((half, tiny[1]), [landscape], [suite], run, quality=False)
    assert sum(passes) > 0  # nothing of float32 stands for it
    other = speaker(seed=1)
    fingerprint = tiny_landscape(other[0]).fingerprint
    elsewhere = Landscape(landscape.rule, landscape.tensors, landscape.guards, fingerprint)
    told = evaluated(other, [elsewhere], [suite], run, quality=False)
    assert [row["text"] for row in told.rows] != [row["text"] for row in longer.rows]


def test_a_system_prompt_of_the_fit_is_used_and_makes_other_plain_rows(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    system = {"settings": {"collect": {"system": "YOU WRECK EVERYTHING, ALWAYS, AT ONCE", "thinking": None}}}
    first = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    told = evaluated(tiny, [landscape.with_provenance(**system)], [suite], tmp_path / "run", quality=False)
    assert [row["text"] for row in first.rows] != [row["text"] for row in told.rows]
    plain = next(row for row in told.rows if row["method"] == "none")
    model, tokenizer = tiny
    ids = encode_chat(tokenizer, list(PROMPTS[0].messages), system="YOU WRECK EVERYTHING, ALWAYS, AT ONCE")
    made = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).strip() == plain["text"]


def test_prompts_are_asked_with_the_thinking_mode_of_the_fit(tiny: Tiny, suite: Path, tmp_path: Path) -> None:
    tokenizer, landscape = thoughtless(tiny[0], eta=1.0)
    tiny = tiny[0], tokenizer
    found = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False, limit=8)
    plain = {row["prompt"]: row["text"] for row in found.rows if row["method"] == "none"}
    prompts = [one for one in PROMPTS if one.text in plain]
    answers = [plain[one.text] for one in prompts]
    assert answers == said(tiny, prompts, thinking=False)
    assert answers != said(tiny, prompts), "the mode must make a difference here"


def test_a_prompt_rewritten_under_its_old_id_is_answered_anew(tiny: Tiny, landscape: Landscape, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"id": f"row {at}", "prompt": p.text, "harmful": p.harmful} for at, p in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated(tiny, [landscape], [path], tmp_path / "run", quality=False)
    rows[0]["prompt"] = "Please draw a wholly different picture"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluated(tiny, [landscape], [path], tmp_path / "run", quality=False)
    alone = evaluated(tiny, [landscape], [path], tmp_path / "alone", quality=False)
    assert list(map(core, found.rows)) == list(map(core, alone.rows))
    assert found.rows[0]["prompt_id"].startswith("row 0")
    assert len(lines(tmp_path / "run/evaluation/mine.none.jsonl")) == len(PROMPTS) + 1


def test_a_limit_draws_by_seed_and_a_larger_one_adds_rows(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    few = evaluated(tiny, [landscape], [suite], tmp_path / "run", limit=10, quality=False)
    assert len(few.rows) == 20
    with forward_passes(tiny[0]) as passes:
        again = evaluated(tiny, [landscape], [suite], tmp_path / "run", limit=10, quality=False)
    assert [row["prompt_id"] for row in again.rows] == [row["prompt_id"] for row in few.rows]
    assert passes == []
    other = evaluated(tiny, [landscape], [suite], tmp_path / "other", limit=10, seed=5, quality=False)
    assert {row["prompt_id"] for row in other.rows} != {row["prompt_id"] for row in few.rows}
    evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    assert len(lines(tmp_path / "run/evaluation/mine.els.jsonl")) == len(PROMPTS)


# Uncommon suites


def test_suites_of_one_kind_each_and_unscored_answers(
    tiny: Tiny, landscape: Landscape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benign = written(tmp_path / "benign.jsonl", [prompt for prompt in PROMPTS if not prompt.harmful])
    harmful = written(tmp_path / "harmful.jsonl", [prompt for prompt in PROMPTS if prompt.harmful])
    found = evaluated(tiny, [landscape], [benign, harmful], tmp_path / "both")
    assert [(one.name, one.harmful) for one in found.comparisons()["suite"]] == [("benign", False), ("harmful", True)]
    only = evaluated(tiny, [landscape], [harmful], tmp_path / "one")
    assert only.quality is None  # no benign prompt to be answered
    assert "harmful" in only.sentence.lower()

    class Silent(LetterJudge):
        name = "silent"

        def judge(self, prompt: str, completion: str) -> Verdict:
            return Verdict("unscored", 0.5)

    monkeypatch.setitem(JUDGES, "silent", Silent)
    none = evaluated(tiny, [landscape], [benign, harmful], tmp_path / "none", judge="silent")
    assert {one.n for one in none.comparisons()["total"]} == {0}
    assert all(math.isnan(one.difference.value) for one in none.comparisons()["total"])
    json.loads((tmp_path / "none/evaluation/summary.json").read_text(), parse_constant=pytest.fail)
    assert none.report.exists()


def test_a_landscape_of_the_first_layer_has_no_picture_and_is_evaluated(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    """There the states of all prompts' last token are one and the same, and span no plane."""
    rule = landscape.with_rule(layers=(1,)).rule
    tensors, guards = {0: landscape.tensors[1]}, {0: landscape.guards[1]}
    first = Landscape(type(rule)((0,), rule.eta, 1, 1), tensors, guards, landscape.fingerprint)
    found = evaluated(tiny, [first], [suite], tmp_path / "run", quality=False)
    assert found.report.exists()
    assert not list((tmp_path / "run").glob("landscape_at*.png"))


def test_several_landscapes_of_one_method_go_by_names_of_their_own(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    half = landscape.with_rule(eta=landscape.rule.eta / 2)
    found = evaluated(tiny, {"whole": landscape, "half of it": half}, [suite], tmp_path / "run", quality=False)
    assert list(found.tables) == ["whole", "half of it"]
    alone = evaluated(tiny, [half], [suite], tmp_path / "alone", quality=False)
    labels = [row["label"] for row in found.rows if row["method"] == "half of it"]
    assert labels == [row["label"] for row in alone.rows if row["method"] == "els"]


# What is wrong is said


def test_what_cannot_be_evaluated_is_said_before_anything_is_computed(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path
) -> None:
    twin = written(tmp_path / "other/mine.jsonl")
    another = tiny_landscape().with_rule(eta=1.0)
    another.fingerprint = type(another.fingerprint)(**{**another.fingerprint.to_dict(), "vocab_size": 7})
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (["none"], [suite], PromptError, "at least one landscape"),
        ([landscape, landscape], [suite], PromptError, "each method once"),
        ([landscape, "random"], [suite], PromptError, "'random' is no landscape"),
        ({"els": landscape, "half": "els"}, [suite], PromptError, "'els' is no landscape"),
        ({"els/half": landscape}, [suite], PromptError, "cannot be called 'els/half'"),
        ({"none": landscape}, [suite], PromptError, "cannot be called 'none'"),
        ({}, [suite], PromptError, "at least one landscape"),
        ([landscape], [], PromptError, "at least one suite"),
        ([landscape], [suite, twin], PromptError, "Two suites are called 'mine'"),
        ([landscape], [suite, tmp_path / "nowhere.jsonl"], PromptError, "nowhere"),
        ([landscape], ["xstest", "xstest-safe"], PromptError, "xstest-safe is a part of xstest"),
        ([landscape], ["xstest-unsafe+dan", "xstest+dan"], PromptError, r"xstest-unsafe\+dan is a part of xstest\+dan"),
        ([another], [suite], LandscapeError, "vocabulary"),
    ]
    with forward_passes(tiny[0]) as passes:
        for methods, suites, kind, says in cases:
            with pytest.raises(kind, match=says):
                evaluated(tiny, methods, suites, tmp_path / "run")
        with RunFolder(tmp_path / "run").owned(), pytest.raises(RunError, match="Another process"):
            evaluated(tiny, [landscape], [suite], tmp_path / "run")
    assert passes == []
    assert not (tmp_path / "run/evaluation").exists()


# The judge's error, and harm


def test_rates_are_corrected_by_the_judge_s_error_on_labels(
    tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten refusals by people's word the letters judge finds eight, of ten compliances all."""
    monkeypatch.setattr(LetterJudge, "early", False, raising=False)  # as one that takes its time
    said = [("zebra", True)] * 8 + [("apple", True)] * 2 + [("apple", False)] * 10
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"completion": text, "label": one}) + "\n" for text, one in said))
    found = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False, judge_labels=[labels])
    (judge,) = found.judge_accuracy
    assert (judge.name, judge.labels) == ("letters", "labels")
    assert (judge.refusals_found, judge.refusals, judge.compliances_found, judge.compliances) == (8, 10, 10, 10)
    for one in found.comparisons()["total"]:
        assert one.corrected_plain is not None
        assert one.corrected_plain.value == pytest.approx(min(1.0, one.refused_plain.value / 0.8))
    assert "labels" in found.report.read_text()
    kept = lines(tmp_path / "run/evaluation/labels.jsonl")
    assert len(kept) == 2, "an answer that is there twice is asked about once"
    with pytest.MonkeyPatch.context() as patch:  # what was said of the labels is not asked again
        patch.setattr("elsteer.evaluation.correction.judge_all", None)
        again = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False, judge_labels=[labels])
    assert again.judge_accuracy == [judge]
    plain = evaluated(tiny, [landscape], [suite], tmp_path / "run", quality=False)
    assert plain.judge_accuracy == []
    assert all(one.corrected_plain is None for one in plain.comparisons()["total"])


class HarmJudge(LetterJudge):
    """Also says how harmful an answer is: by its second letter; a third of the answers it cannot read."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def harms(self, prompts: list[str], completions: list[str]) -> list[float | None]:
        self.asked += completions
        return [None if len(text) < 2 or ord(text[1]) % 3 == 0 else ord(text[1]) % 2 for text in completions]


def test_harm_of_the_answers_to_harmful_prompts(tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path) -> None:
    judge = HarmJudge()
    options: dict[str, Any] = {"judge": judge, "harm": True, "quality": False}
    found = evaluated(tiny, [landscape], [suite], tmp_path / "run", **options)
    harmful = [row for row in found.rows if row["harmful"]]
    assert sorted(judge.asked) == sorted(row["completion"] for row in harmful)
    by = {
        name: {row["prompt_id"]: judge.harms([""], [row["completion"]])[0] for row in harmful if row["method"] == name}
        for name in ("none", "els")
    }
    pairs = [(by["none"][one], by["els"][one]) for one in by["none"] if None not in (by["none"][one], by["els"][one])]
    assert 0 < len(pairs) < len(by["none"])
    harm = found.harm["els"]
    assert harm.difference.n == len(pairs)
    assert harm.plain.value == pytest.approx(sum(float(a or 0) for a, _ in pairs) / len(pairs))
    assert harm.difference.value == pytest.approx(sum(float(b or 0) - float(a or 0) for a, b in pairs) / len(pairs))
    assert "harm of the answers" in found.report.read_text()
    judge.asked.clear()
    assert evaluated(tiny, [landscape], [suite], tmp_path / "run", **options).harm == found.harm
    assert judge.asked == [], "what is on disk is not asked again"
    assert harm.difference.low < harm.difference.value < harm.difference.high, (
        "of a yes or no few pairs are never certain"
    )
    assert {row["whole"] for row in found.rows} == {True}, "no answer was cut where its verdict was clear"
    with pytest.raises(JudgeError, match="letters cannot tell how harmful"):
        evaluated(tiny, [landscape], [suite], tmp_path / "run", harm=True)


def test_harm_is_told_of_whole_answers(tiny: Tiny, landscape: Landscape, suite: Path, tmp_path: Path) -> None:
    """Where a verdict is decided early the answer ends, but not where its harm is asked for."""

    class Early(HarmJudge):
        def decided(self, prompt: str, partial: str) -> Verdict | None:
            return self.judge(prompt, partial) if partial else None

    options: dict[str, Any] = {"judge": Early(), "quality": False, "max_new_tokens": 12}
    short = evaluated(tiny, [landscape], [suite], tmp_path / "run", **options)
    whole = evaluated(tiny, [landscape], [suite], tmp_path / "run", harm=True, **options)
    assert sum(row["tokens"] for row in short.rows) < sum(row["tokens"] for row in whole.rows)


def test_where_nothing_is_harmful_the_table_says_so(tiny: Tiny, landscape: Landscape, tmp_path: Path) -> None:
    benign = written(tmp_path / "benign.jsonl", [one for one in PROMPTS if not one.harmful])
    found = evaluated(tiny, [landscape], [benign], tmp_path / "run", judge=HarmJudge(), harm=True, quality=False)
    console = Console(file=io.StringIO(), width=200)
    show.evaluation(found, console)
    assert "(els): not measured" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "nan" not in console.file.getvalue()  # type: ignore[attr-defined]
