"""Capability: plain against steered on questions with a known right answer, and on neutral prompts."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import elsteer.commands.capability as command_module
from commands import elsteer, one_sentence, save_tiny
from elsteer.completions import PromptCaches, end_ids
from elsteer.decoding import decode
from elsteer.errors import ModelError, PromptError, SteeringError
from elsteer.evaluation import capability as module
from elsteer.evaluation.capability import TASKS, Paired, _by_likelihood, _identity, capability
from elsteer.evaluation.capability_data import LETTERS, Choices, Fact, load_choices, load_facts
from elsteer.evaluation.figures import read_figures
from elsteer.evaluation.quality import Answer, kl_to_plain
from elsteer.evaluation.statistics import mcnemar_exact, paired_difference, wilson
from elsteer.landscape import Landscape
from elsteer.models import encode_chat
from elsteer.steering.methods.baseline import Candidate
from landscapes import tiny_landscape
from pipelines import Killed, Tiny, dies_at, forward_passes, lines, some_prompts
from tiny import tiny_model, tiny_tokenizer

STRENGTH = 8.0  # far enough that random energies change answers


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return tiny_model(max_position_embeddings=512), tiny_tokenizer()


@pytest.fixture(scope="module")
def landscape(tiny: Tiny) -> Landscape:
    return tiny_landscape(tiny[0])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with 24 MMLU questions, one of them of the dev split, 5 of ARC and 6 of TruthfulQA."""
    folder = tmp_path / "data" / "capability"
    folder.mkdir(parents=True)
    mmlu = [
        {
            "split": "dev" if i == 3 else "test",
            "subject": "tiny_things",
            "question": f"What is thing {i}?",
            "choices": [f"one {i}", "two", "three", "four"],
            "answer": str(i % 4),
        }
        for i in range(24)
    ]
    (folder / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mmlu), encoding="utf-8")
    arc: list[dict[str, Any]] = [
        {"id": str(i), "question": f"Why {i}?", "answer": "B", "A": "x", "B": "y", "C": "z", "label": ["A", "B", "C"]}
        for i in range(4)
    ]
    arc.append({"id": "4", "question": "How?", "answer": "2", "1": "x", "2": "y", "label": ["1", "2"]})
    (folder / "arc_challenge_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in arc), encoding="utf-8")
    truth = [
        {"question": f"Is it {i}?", "mc1_targets": {"no": 0, f"yes, {i}": 1, **{"x" * k: 0 for k in range(1, 1 + i)}}}
        for i in range(6)
    ]
    (folder / "truthfulqa_mc.json").write_text(json.dumps(truth), encoding="utf-8")
    return folder.parent


# The questions


def test_of_mmlu_only_the_test_split_is_read_and_the_prompt_holds_subject_and_letters(data: Path) -> None:
    items = load_choices("mmlu", data_dir=data)
    assert len(items) == 23
    assert items[0] == Choices("What is thing 0?", ("one 0", "two", "three", "four"), 0, "tiny things")
    assert items[0].prompt.text == (
        "The following is a multiple choice question about tiny things. Answer with the letter of the right choice only."
        "\n\nWhat is thing 0?\nA. one 0\nB. two\nC. three\nD. four"
    )


def test_arc_with_numbers_for_labels_gets_letters(data: Path) -> None:
    last = load_choices("arc", data_dir=data)[-1]
    assert (last.choices, last.answer) == (("x", "y"), 1)
    assert last.prompt.text.endswith("How?\nA. x\nB. y")


def test_of_truthfulqa_the_prompt_is_the_question_alone(data: Path) -> None:
    item = load_choices("truthfulqa", data_dir=data)[2]
    assert item.choices == ("no", "yes, 2", "x", "xx")
    assert item.answer == 1
    assert item.prompt.text == "Is it 2?"


def test_the_rows_of_the_hub_have_their_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "cais/mmlu": {"subject": "a_b", "question": "q", "choices": ["1", "2", "3", "4"], "answer": 2},
        "allenai/ai2_arc": {"question": "q", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"},
        "truthfulqa/truthful_qa": {"question": "q", "mc1_targets": {"choices": ["1", "2"], "labels": [0, 1]}},
    }
    asked = []

    def hub(name: str, *, config: str, split: str, revision: str) -> list[tuple[str, dict[str, Any]]]:
        asked.append((name, config, split, len(revision)))
        return [("row 1", rows[name])]

    monkeypatch.setattr("elsteer.evaluation.capability_data.hub_rows", hub)
    monkeypatch.delenv("ELSTEER_DATA", raising=False)
    found = [load_choices(name)[0] for name in ("mmlu", "arc", "truthfulqa")]
    assert [one.answer for one in found] == [2, 1, 1]
    assert asked == [
        ("cais/mmlu", "all", "test", 40),
        ("allenai/ai2_arc", "ARC-Challenge", "test", 40),
        ("truthfulqa/truthful_qa", "multiple_choice", "validation", 40),
    ]


def test_a_limit_draws_by_seed_and_a_larger_one_holds_the_smaller(data: Path) -> None:
    few, more, other = (
        {one.question for one in load_choices("mmlu", data_dir=data, limit=limit, seed=seed)}
        for limit, seed in ((5, 0), (12, 0), (5, 1))
    )
    assert (len(few), len(more)) == (5, 12)
    assert few < more
    assert few != other


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"question": "q", "choices": ["1", "2"], "answer": "2"}, "subject"),
        ({"subject": "s", "question": "q", "choices": ["1", "2"], "answer": "2"}, "none of its 2 choices"),
        ({"subject": "s", "question": "q", "choices": "AB", "answer": "1"}, "list"),
        ({"subject": "s", "question": "q", "choices": ["1", "2"], "answer": math.inf}, "infinity"),
        ("no object", "row 2"),
    ],
)
def test_a_row_that_is_no_question_is_named(data: Path, row: Any, word: str) -> None:
    path = data / "capability" / "mmlu.jsonl"
    path.write_text(path.read_text(encoding="utf-8").split("\n")[0] + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(PromptError, match=r"mmlu\.jsonl, row 2 is no question of MMLU") as caught:
        load_choices("mmlu", data_dir=data)
    assert word in str(caught.value)


def test_a_file_that_is_nested_without_end_is_said(data: Path) -> None:
    (data / "capability" / "mmlu.jsonl").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(PromptError, match=r"mmlu\.jsonl cannot be read"):
        load_choices("mmlu", data_dir=data)


def test_a_separator_within_a_text_ends_no_line(data: Path) -> None:
    path = data / "capability" / "mmlu.jsonl"
    row = {"subject": "s", "question": "a\u2028b", "choices": ["1", "2"], "answer": "1"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_choices("mmlu", data_dir=data)[0].question == "a\u2028b"


# The facts


def test_the_facts_are_many_each_once_and_no_question_gives_its_answer_away() -> None:
    facts = load_facts()
    assert len(facts) >= 160
    assert max(Counter(one.question for one in facts).values()) == 1
    assert len({one.kind for one in facts}) >= 7
    assert [one.question for one in facts if one.right(one.prompt.text)] == []
    assert all(one.answers and all(answer.strip() == answer != "" for answer in one.answers) for one in facts)


def test_an_answer_is_right_where_an_accepted_one_stands_in_it_as_a_word() -> None:
    fact = Fact("q", ("7", "Seven", "New Delhi", "#", "H₂O"), "k")
    assert all(map(fact.right, ("It is 7.", "SEVEN!", "new delhi", "a # sign", "**7**", "H2O", "7")))
    assert not any(map(fact.right, ("17", "It is 70", "7th", "seventeen", "", "Delhi", "new\ndelhi")))


# The scores


def plain_scores(tiny: Tiny, item: Choices) -> list[float]:
    """Log-likelihood of each choice's letter, by a forward pass of the whole prompt without any cache."""
    model, tokenizer = tiny
    ids = torch.tensor([encode_chat(tokenizer, list(item.prompt.messages))])
    with torch.inference_mode():
        logs = model(input_ids=ids).logits[0, -1].log_softmax(dim=-1)
    return [
        float(logs[tokenizer(one, add_special_tokens=False)["input_ids"][0]]) for one in LETTERS[: len(item.choices)]
    ]


def test_by_letter_the_plain_choice_is_the_one_of_a_full_pass(
    tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path
) -> None:
    capability(*tiny, landscape, ["mmlu", "arc"], out=tmp_path, data_dir=data, batch_size=5)
    for task in ("mmlu", "arc"):
        items = {one.prompt.id: one for one in load_choices(task, data_dir=data)}
        rows = [json.loads(line) for line in lines(tmp_path / "capability" / f"{task}.jsonl")]
        assert {row["id"] for row in rows} == set(items)
        for row in rows:
            scores = plain_scores(tiny, items[row["id"]])
            assert row["plain"] == max(range(len(scores)), key=scores.__getitem__)
            assert row["answer"] == items[row["id"]].answer


def test_by_letter_the_steered_choice_is_the_one_of_a_full_steered_pass(
    tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path
) -> None:
    model, _ = tiny
    capability(*tiny, landscape, ["mmlu"], out=tmp_path, data_dir=data, strength=STRENGTH)
    items = {one.prompt.id: one for one in load_choices("mmlu", data_dir=data)}
    rows = [json.loads(line) for line in lines(tmp_path / "capability" / "mmlu.jsonl")]
    assert any(row["plain"] != row["steered"] for row in rows)
    with landscape.attach(model, STRENGTH):
        for row in rows:
            scores = plain_scores(tiny, items[row["id"]])  # the pass ends with the prompt's last token
            assert row["steered"] == max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.parametrize("strength", [None, STRENGTH])
def test_by_likelihood_the_choice_is_the_one_of_full_passes(
    tiny: Tiny, landscape: Landscape, data: Path, strength: float | None
) -> None:
    model, tokenizer = tiny
    items = load_choices("truthfulqa", data_dir=data)
    caches = PromptCaches(model, tokenizer, [one.prompt for one in items], batch_size=4)
    answers = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in one.choices] for one in items]
    expected = []
    for place, row in enumerate(answers):
        sums = []
        for ids in row:
            given, length = torch.tensor([caches.ids[place] + ids]), torch.tensor([len(caches.ids[place])])
            with torch.inference_mode():
                if strength is None:
                    logits = model(input_ids=given).logits[0]
                else:
                    with landscape.attach(model, strength) as steering, steering.prompts(length):
                        logits = model(input_ids=given).logits[0]
            logs = logits.log_softmax(dim=-1)[int(length) - 1 : -1]
            sums.append(float(logs.gather(1, torch.tensor(ids)[:, None]).sum()))
        expected.append(max(range(len(sums)), key=sums.__getitem__))
    found = {}
    for batch in caches.batches():
        given_rows = [answers[place] for place in batch.rows]
        if strength is None:
            chosen = _by_likelihood(model, batch, given_rows, None)
        else:
            with landscape.attach(model, strength) as steering:
                chosen = _by_likelihood(model, batch, given_rows, steering)
        found.update(zip(batch.rows, chosen, strict=True))
    assert [found[place] for place in range(len(items))] == expected
    assert len(set(expected)) > 1


def test_pairs_give_the_statistics_of_hand_made_ones() -> None:
    plain, steered = [True] * 6 + [False] * 4, [True] * 3 + [False] * 3 + [True] + [False] * 3
    found = Paired.of(plain, steered)
    assert (found.plain, found.steered) == (wilson(6, 10), wilson(4, 10))
    assert found.difference == paired_difference(plain, steered)
    assert found.difference.value == pytest.approx(-0.2)
    assert found.p == mcnemar_exact(3, 1) == pytest.approx(0.625)
    assert found.n == 10


# The whole


def test_at_strength_0_nothing_differs(tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path) -> None:
    prompts = some_prompts(6)
    found = capability(
        *tiny, landscape, out=tmp_path, data_dir=data, strength=0.0, limit=8, neutral=prompts, max_new_tokens=6
    )
    assert set(found.choices) == {"mmlu", "arc", "truthfulqa"}
    for pair in (*found.choices.values(), found.facts, found.degenerate):
        assert pair is not None
        assert (pair.difference.value, pair.p) == (0.0, 1.0)
    assert found.kl is not None
    assert found.lengths is not None
    assert (found.kl.value, found.kl.n, found.lengths.ratio.value) == (0.0, 6, 1.0)


def test_the_figures_have_the_names_and_numbers_of_what_was_found(
    tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model knows no fact: accept what it says to every other question.
    facts = [replace(one, answers=("never said",)) for one in load_facts(limit=12)]
    plain = plain_answers(tiny, facts)
    facts = [replace(one, answers=(plain[i],)) if i % 2 and plain[i] else one for i, one in enumerate(facts)]
    monkeypatch.setattr(module, "load_facts", lambda **_: facts)
    found = capability(
        *tiny,
        landscape,
        out=tmp_path,
        data_dir=data,
        strength=STRENGTH,
        neutral=some_prompts(6),
        max_new_tokens=6,
        command="elsteer capability X",
    )
    figures = {one.name: one for one in read_figures(tmp_path / "capability.json")}
    assert {
        "capability.mmlu_difference",
        "capability.arc_difference",
        "capability.truthfulqa_difference",
        "capability.facts_kept",
        "capability.kl_neutral",
        "capability.length_ratio",
    } <= set(figures)
    rows = [json.loads(line) for line in lines(tmp_path / "capability" / "facts.jsonl")]
    known = [row for row in rows if row["plain_right"]]
    assert 0 < len(known) < len(rows)
    kept = wilson(sum(row["steered_right"] for row in known), len(known))
    assert found.facts_kept == kept
    assert (figures["capability.facts_kept"].value, figures["capability.facts_kept"].n) == (kept.value, kept.n)
    assert figures["capability.kl_neutral"].value > 0
    assert figures["capability.mmlu_difference"].n == 23
    assert figures["capability.mmlu_difference"].command == "elsteer capability X"
    mmlu = [json.loads(line) for line in lines(tmp_path / "capability" / "mmlu.jsonl")]
    right = {side: [row[side] == row["answer"] for row in mmlu] for side in ("plain", "steered")}
    difference = sum(right["steered"]) / 23 - sum(right["plain"]) / 23
    assert figures["capability.mmlu_difference"].value == pytest.approx(difference)
    assert figures["capability.mmlu_difference"].low == found.choices["mmlu"].difference.low


def plain_answers(tiny: Tiny, facts: list[Fact]) -> list[str]:
    """The whole greedy answer of the plain model to each question."""
    model, tokenizer = tiny
    caches = PromptCaches(model, tokenizer, [one.prompt for one in facts])
    texts = [""] * len(facts)
    for batch in caches.batches():
        out = decode(model, batch, max_new_tokens=24, end_ids=end_ids(model, tokenizer))
        for place, tokens in zip(batch.rows, out.tokens, strict=True):
            texts[place] = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return texts


def test_kl_lengths_and_degenerate_answers_are_those_of_the_rows(
    tiny: Tiny, landscape: Landscape, tmp_path: Path
) -> None:
    prompts = some_prompts(7)
    found = capability(
        *tiny, landscape, ["kl"], out=tmp_path, strength=STRENGTH, neutral=prompts, max_new_tokens=5, batch_size=3
    )
    rows = {row["id"].split("-")[0]: row for row in map(json.loads, lines(tmp_path / "capability" / "kl.jsonl"))}
    caches = PromptCaches(*tiny, prompts)
    plain = {}
    for batch in caches.batches():
        out = decode(tiny[0], batch, max_new_tokens=5, end_ids=end_ids(*tiny))
        for place, tokens in zip(batch.rows, out.tokens, strict=True):
            plain[prompts[place].id] = Answer(prompts[place].id, "none", "", tokens, 0.0, "")
    with landscape.attach(tiny[0], STRENGTH) as steering:
        expected = kl_to_plain(caches, plain, steering=steering, tokens=5)
    assert {one: row["kl"] for one, row in rows.items()} == pytest.approx(expected, rel=1e-3)
    assert {one: row["plain_tokens"] for one, row in rows.items()} == {one: len(a.tokens) for one, a in plain.items()}
    assert found.kl is not None
    assert found.kl.value == pytest.approx(sum(expected.values()) / 7, rel=1e-3)
    assert found.lengths is not None
    assert found.lengths.plain == pytest.approx(sum(row["plain_tokens"] for row in rows.values()) / 7)
    assert found.lengths.steered == pytest.approx(sum(row["steered_tokens"] for row in rows.values()) / 7)


def test_plain_and_steered_share_one_prefill(tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path) -> None:
    with forward_passes(tiny[0]) as rows:
        capability(*tiny, landscape, ["mmlu"], out=tmp_path, data_dir=data, limit=12)
    assert rows == [1, 12, 12, 12]  # the shared beginning, the prompts, the last token plain and steered


def test_a_killed_run_goes_on_and_gives_the_same(tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path) -> None:
    whole = capability(*tiny, landscape, ["mmlu"], out=tmp_path / "a", data_dir=data, batch_size=4)
    with pytest.raises(Killed):
        capability(
            *tiny, landscape, ["mmlu"], out=tmp_path / "b", data_dir=data, batch_size=4, progress=dies_at("MMLU", 4)
        )
    path = tmp_path / "b" / "capability" / "mmlu.jsonl"
    before = lines(path)
    assert 0 < len(before) < 23
    again = capability(*tiny, landscape, ["mmlu"], out=tmp_path / "b", data_dir=data, batch_size=4)
    assert lines(path)[: len(before)] == before
    assert again == whole
    with forward_passes(tiny[0]) as rows:
        assert capability(*tiny, landscape, ["mmlu"], out=tmp_path / "b", data_dir=data) == whole
    assert rows == []


def test_rows_of_a_relative_path_of_an_earlier_version_are_kept(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    source = {"name": "model", "revision": "0" * 64, "origin": "folder"}
    monkeypatch.setattr(tiny[0], "elsteer_source", source, raising=False)
    landscape = tiny_landscape(tiny[0])
    capability(*tiny, landscape, ["mmlu"], out=tmp_path, data_dir=data)
    source["name"] = str(tmp_path / "model")
    with forward_passes(tiny[0]) as rows:
        capability(*tiny, landscape, ["mmlu"], out=tmp_path, data_dir=data)
    assert rows == []


def test_another_strength_or_rule_makes_the_rows_anew(
    tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path
) -> None:
    model = tiny[0]
    others = [landscape.with_rule(eta=0.31), landscape.with_rule(steps=1)]
    others += [one.with_method("random") for one in (landscape, *others)]
    identities = []
    for one, strength in ((landscape, 1.0), (landscape, 1.0), (landscape, 0.5), *((other, 1.0) for other in others)):
        with one.attach(model, strength) as steering:
            identities.append(json.dumps(_identity(steering)))
    assert identities[0] == identities[1]
    assert len(set(identities)) == len(identities) - 1
    for strength in (0.0, STRENGTH):
        capability(*tiny, landscape, ["mmlu"], out=tmp_path, data_dir=data, strength=strength)
        rows = [json.loads(line) for line in lines(tmp_path / "capability" / "mmlu.jsonl")]
        assert len(rows) == 23
        assert any(row["plain"] != row["steered"] for row in rows) == bool(strength)


def test_another_dtype_makes_the_rows_anew_and_leaves_no_figure_of_the_one_before(data: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(max_position_embeddings=512), tiny_tokenizer()
    landscape = tiny_landscape(model)
    capability(model, tokenizer, landscape, ["mmlu"], out=tmp_path, data_dir=data)
    before = lines(tmp_path / "capability" / "mmlu.jsonl")
    capability(model, tokenizer, landscape, ["kl"], out=tmp_path, neutral=some_prompts(3), max_new_tokens=4)
    names = {one.name for one in read_figures(tmp_path / "capability.json")}
    assert {"capability.mmlu_difference", "capability.kl_neutral"} <= names, "a further task leaves the others"
    with forward_passes(model.to(torch.bfloat16)) as rows:
        capability(model, tokenizer, landscape, ["mmlu"], out=tmp_path, data_dir=data)
    assert rows
    assert len(lines(tmp_path / "capability" / "mmlu.jsonl")) == len(before)
    names = {one.name for one in read_figures(tmp_path / "capability.json")}
    assert "capability.mmlu_difference" in names
    assert "capability.kl_neutral" not in names


@pytest.mark.parametrize("task", ["mmlu", "truthfulqa"])
def test_a_right_answer_that_was_mended_counts(
    task: str, tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path
) -> None:
    capability(*tiny, landscape, [task], out=tmp_path / "a", data_dir=data, strength=STRENGTH)
    if task == "mmlu":
        path = data / "capability" / "mmlu.jsonl"
        rows = [json.loads(line) for line in lines(path)]
        path.write_text("".join(json.dumps({**row, "answer": "0"}) + "\n" for row in rows), encoding="utf-8")
    else:
        path = data / "capability" / "truthfulqa_mc.json"
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            row["mc1_targets"] = {text: int(at == 0) for at, text in enumerate(row["mc1_targets"])}
        path.write_text(json.dumps(rows), encoding="utf-8")
    found = capability(*tiny, landscape, [task], out=tmp_path / "a", data_dir=data, strength=STRENGTH)
    afresh = capability(*tiny, landscape, [task], out=tmp_path / "b", data_dir=data, strength=STRENGTH)
    assert found.choices == afresh.choices


def test_choices_that_were_mended_are_scored_anew(tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path) -> None:
    capability(*tiny, landscape, ["truthfulqa"], out=tmp_path / "a", data_dir=data, strength=STRENGTH)
    path = data / "capability" / "truthfulqa_mc.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        targets = list(row["mc1_targets"].values())
        row["mc1_targets"] = {f"{'so ' * (len(targets) - at)}{at}": right for at, right in enumerate(targets)}
    path.write_text(json.dumps(rows), encoding="utf-8")
    found = capability(*tiny, landscape, ["truthfulqa"], out=tmp_path / "a", data_dir=data, strength=STRENGTH)
    afresh = capability(*tiny, landscape, ["truthfulqa"], out=tmp_path / "b", data_dir=data, strength=STRENGTH)
    assert found.choices == afresh.choices
    with forward_passes(tiny[0]) as passes:
        capability(*tiny, landscape, ["truthfulqa"], out=tmp_path / "a", data_dir=data, strength=STRENGTH)
    assert passes == []


def test_another_prompt_under_the_same_id_is_another_prompt(tiny: Tiny, landscape: Landscape, tmp_path: Path) -> None:
    prompts = [replace(one, id=f"{at}") for at, one in enumerate(some_prompts(6))]
    others = [replace(one, id=f"{at}") for at, one in enumerate(prompts[3:])]
    given: dict[str, Any] = {"strength": STRENGTH, "max_new_tokens": 5}
    capability(*tiny, landscape, ["kl"], out=tmp_path / "a", neutral=prompts[:3], **given)
    found = capability(*tiny, landscape, ["kl"], out=tmp_path / "a", neutral=others, **given)
    assert found.kl == capability(*tiny, landscape, ["kl"], out=tmp_path / "b", neutral=others, **given).kl


@pytest.mark.parametrize("task", ["mmlu", "arc", "truthfulqa"])
def test_likelihoods_that_are_no_numbers_choose_nothing(task: str, tiny: Tiny, data: Path, tmp_path: Path) -> None:
    broken = tiny_landscape(tiny[0]).with_rule(strength=9e29)
    with pytest.raises(SteeringError, match="The steered model gives likelihoods that are no numbers: its strength"):
        capability(*tiny, broken, [task], out=tmp_path, data_dir=data)


def test_distributions_that_are_no_numbers_have_no_kl(tiny: Tiny, tmp_path: Path) -> None:
    """Whether they were measured just now or are read again."""
    broken = tiny_landscape(tiny[0]).with_rule(strength=9e29)
    for _ in range(2):
        with pytest.raises(SteeringError, match="no finite distribution on 2 of 2 neutral prompts: its strength"):
            capability(*tiny, broken, ["kl"], out=tmp_path, neutral=some_prompts(2), max_new_tokens=4)


def test_a_method_that_is_no_landscape_is_measured_too(
    tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path
) -> None:
    moves = {layer: landscape.move(layer) for layer in landscape.rule.layers}
    candidate = Candidate("els", {}, moves, landscape.rule.window, strength=STRENGTH)
    same = capability(*tiny, landscape, ["mmlu"], out=tmp_path / "a", data_dir=data, strength=STRENGTH)
    assert capability(*tiny, candidate, ["mmlu"], out=tmp_path / "b", data_dir=data) == same
    plain = capability(*tiny, Candidate("none", {}), ["mmlu", "kl"], out=tmp_path / "c", data_dir=data, limit=4)
    assert plain.choices["mmlu"].difference.value == 0.0
    assert plain.kl is not None
    assert plain.kl.value == 0.0


def test_bad_input_is_one_sentence(tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no task 'mlu'"):
        capability(*tiny, landscape, ["mlu"], out=tmp_path)
    with pytest.raises(PromptError, match="at least one task"):
        capability(*tiny, landscape, [], out=tmp_path)
    with pytest.raises(PromptError, match="no neutral prompt"):
        capability(*tiny, landscape, ["kl"], out=tmp_path, neutral=[])
    with pytest.raises(PromptError, match="at least 1"):
        capability(*tiny, landscape, ["mmlu"], out=tmp_path, data_dir=data, limit=0)
    with pytest.raises(PromptError, match="at least 1, not -1"):
        capability(*tiny, landscape, ["kl"], out=tmp_path, limit=-1)
    with pytest.raises(SteeringError, match="system prompt"):
        capability(*tiny, Candidate("s", {}, system="Be kind."), ["mmlu"], out=tmp_path, data_dir=data)
    with pytest.raises(SteeringError, match="Only a landscape"):
        capability(*tiny, Candidate("s", {}), ["mmlu"], out=tmp_path, data_dir=data, strength=1.0)


def test_a_tokenizer_without_letters_is_refused(
    tiny: Tiny, landscape: Landscape, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ids", lambda tokenizer, text: [1, 2])
    with pytest.raises(ModelError, match="no single token for the letter A"):
        capability(*tiny, landscape, ["mmlu"], out=tmp_path, data_dir=data)


# The command


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with a tiny model and its landscape."""
    folder = save_tiny(tmp_path / "model")
    model = tiny_model(max_position_embeddings=512)
    tiny_landscape(model).save_pretrained(tmp_path / "run" / "landscape")
    return folder


def test_the_command_prints_a_table_and_writes_the_figures(saved: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = ("capability", run / "landscape", "--model", saved, "--data-dir", data, "--limit", "4", "--batch-size", "4")
    result = elsteer(*asked, "--strength", "8", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output
    for word in ("MMLU, right", "ARC-Challenge, right", "TruthfulQA MC1, right", "facts, right", "degenerate", "95%"):
        assert word in result.stdout
    assert "nats per token" in result.stdout
    assert "times as long" in result.stdout
    figures = read_figures(run / "capability.json")
    assert {one.n for one in figures if one.name.endswith("_difference")} == {4}
    assert figures[0].command.startswith("elsteer capability ")
    again = elsteer(*asked, "--strength", "8", "--max-new-tokens", "4")
    assert again.stdout == result.stdout


def test_neutral_prompts_of_a_file_are_taken(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "neutral.txt").write_text("Name a tree.\nName a river.\n", encoding="utf-8")
    result = elsteer(
        *("capability", tmp_path / "run" / "landscape", "--model", saved, "--task", "kl"),
        *("--neutral", tmp_path / "neutral.txt", "--out", tmp_path / "out", "--max-new-tokens", "4"),
    )
    assert result.exit_code == 0, result.output
    assert "On 2 neutral prompts" in result.stdout
    assert len(lines(tmp_path / "out" / "capability" / "kl.jsonl")) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--task", "gsm8k"), "gsm8k"),
        (("--task", "mmlu", "--data-dir", "/nowhere/at/all"), "data folder"),
        (("--task", "kl", "--neutral", "nowhere.txt"), "nowhere.txt"),
        (("--task", "kl", "--strength", "-1"), "negative"),
        (("--task", "kl", "--limit", "0"), "limit"),
    ],
)
def test_bad_options_are_one_sentence(saved: Path, tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    result = elsteer("capability", tmp_path / "run" / "landscape", "--model", saved, "--out", tmp_path / "out", *words)
    assert expected in one_sentence(result)


def test_the_tasks_of_the_command_are_those_of_the_function() -> None:
    assert command_module._TASKS == TASKS
