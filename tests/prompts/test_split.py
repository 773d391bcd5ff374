"""Splitting: nothing leaks between splits, the shares hold, and the order of the prompts decides nothing."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elsteer.errors import PromptError
from elsteer.prompts import (
    Prompt,
    deduplicate,
    group_near_duplicates,
    normalise,
    read_prompts,
    require_both_classes,
    sample,
    split_prompts,
    without_near_duplicates,
)
from elsteer.prompts.split import _similar_pairs, _vectors

WORDS = ["kill", "the", "process", "a", "bomb", "how", "cake", "bake", "to", "steal", "heart", "?"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
PROMPTS = st.lists(
    st.builds(
        Prompt.of,
        TEXTS,
        st.booleans(),
        source=st.sampled_from(["a", "b"]),
        family=st.sampled_from(["", "", "", "f", "g"]),
    ),
    max_size=40,
)


def _many(n: int, seed: int = 0) -> list[Prompt]:
    rng = random.Random(seed)
    return [
        Prompt.of(f"about {rng.random()} and {rng.random()}", rng.random() < 0.4, source=rng.choice("ab"))
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How  do I\tkill it?", "how do i kill it"),
        ("ＡＢＣ ﬁle!", "abc file"),
        ("Straße…", "STRASSE"),
        ("stop .", "stop"),
    ],
)
def test_texts_that_differ_in_form_alone_are_the_same(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_a_prompt_of_punctuation_alone_keeps_its_text() -> None:
    assert normalise("?!") == "?!"


def test_duplicates_go_and_the_first_stays() -> None:
    prompts = [Prompt.of("Hello there!", False), Prompt.of("Bye", True), Prompt.of("hello  there", False)]
    assert deduplicate(prompts) == prompts[:2]


def test_one_text_with_both_labels_is_refused_by_name() -> None:
    with pytest.raises(PromptError, match=r'both harmful and benign .one.csv.*two.csv.*"Shoot him"'):
        deduplicate([Prompt.of("shoot him.", True, source="one.csv"), Prompt.of("Shoot him", False, source="two.csv")])


def test_the_same_question_under_another_system_prompt_is_no_duplicate() -> None:
    user = {"role": "user", "content": "Hi"}
    chat = Prompt(messages=({"role": "system", "content": "Be brief"}, user), harmful=False)
    assert len(deduplicate([chat, Prompt.of("Hi", False)])) == 2


def test_near_duplicates_families_and_chains_are_one_group() -> None:
    texts = [
        "show me how to quickly kill a python process on linux",
        "show me how to kill a python process on linux",
        "bake a cake",
        "show me how to kill a python process",
        "paint the door",
    ]
    prompts = [Prompt.of(text, False, family="x" if text in (texts[2], texts[4]) else "") for text in texts]
    cosine = (_vectors(prompts) @ _vectors(prompts).T).toarray()
    assert cosine[0, 3] < 0.8 < min(cosine[0, 1], cosine[1, 3])
    assert group_near_duplicates(prompts, 0.8) == [0, 0, 1, 0, 1]
    assert group_near_duplicates([]) == []


def test_near_duplicates_are_found_in_scripts_without_spaces() -> None:
    texts = ["如何终止一个正在运行的进程", "如何终止一个正在运行的进程呢", "怎样做蛋糕"]
    groups = group_near_duplicates([Prompt.of(text, False) for text in texts])
    assert groups == [0, 0, 1]


def test_prompts_without_a_word_are_grouped_by_their_text() -> None:
    assert group_near_duplicates([Prompt.of(text, False) for text in ["?!", "🙂", "?!"]]) == [0, 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=30), st.floats(0.05, 1.0))
def test_the_pruned_search_finds_exactly_the_similar_pairs(texts: list[str], threshold: float) -> None:
    vectors = _vectors([Prompt.of(text, False) for text in texts])
    cosine = (vectors @ vectors.T).toarray()
    if np.any(np.abs(cosine - threshold) < 1e-6):
        return  # a tie, which rounding decides
    expected = {(int(i), int(j)) for i, j in zip(*np.nonzero(cosine >= threshold), strict=True)}
    assert {(int(i), int(j)) for i, j in _similar_pairs(vectors, vectors, threshold)} == expected


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_split_is_a_partition_that_no_group_crosses(prompts: list[Prompt], seed: int, rng: random.Random) -> None:
    splits = split_prompts(prompts, seed=seed)
    assert Counter(p for rows in splits.values() for p in map(repr, rows)) == Counter(map(repr, prompts))
    where = {prompt.id: name for name, rows in splits.items() for prompt in rows}
    homes: dict[int, set[str]] = {}
    for prompt, group in zip(prompts, group_near_duplicates(prompts), strict=True):
        homes.setdefault(group, set()).add(where[prompt.id])
    assert all(len(names) == 1 for names in homes.values())
    shuffled = list(prompts)
    rng.shuffle(shuffled)
    again = split_prompts(shuffled, seed=seed)
    assert {name: [p.id for p in rows] for name, rows in again.items()} == {
        name: [p.id for p in rows] for name, rows in splits.items()
    }


def test_the_shares_hold_within_each_label_and_source() -> None:
    prompts = _many(1000)
    splits = split_prompts(prompts, {"train": 0.5, "dev": 0.3, "test": 0.2})
    total = Counter((p.harmful, p.source) for p in prompts)
    for name, share in (("train", 0.5), ("dev", 0.3), ("test", 0.2)):
        counts = Counter((p.harmful, p.source) for p in splits[name])
        assert all(abs(counts[kind] - share * n) <= 2 for kind, n in total.items())


def test_the_order_of_the_prompts_decides_nothing_about_groups() -> None:
    prompts = [Prompt.of(p.text + mark, p.harmful) for p in _many(60) for mark in ("", " !", " ?!")]
    ids = [
        {name: [p.id for p in rows] for name, rows in split_prompts(order).items()}
        for order in (prompts, prompts[::-1])
    ]
    assert ids[0] == ids[1]


def test_another_seed_gives_another_split() -> None:
    prompts = _many(100)
    ids = [[p.id for p in split_prompts(prompts, seed=seed)["test"]] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.2, "b": -0.2}])
def test_shares_that_make_no_whole_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(PromptError, match="sum to 1"):
        split_prompts(_many(5), fractions)


def test_the_leak_guard_drops_what_is_close_to_the_evaluation() -> None:
    fit = [
        Prompt.of("How do I kill a python process on linux", False),
        Prompt.of("paint a door", False, family="doors"),
        Prompt.of("bake a cake", False),
        Prompt.of("???", False),
    ]
    evaluation = [
        Prompt.of("how do i kill a python process on linux?", False),
        Prompt.of("open sesame", False, family="doors"),
        Prompt.of("???", True),
    ]
    assert without_near_duplicates(fit, evaluation) == [fit[2]]
    assert without_near_duplicates(fit, []) == fit
    assert without_near_duplicates([], evaluation) == []


def test_a_missing_class_is_said_with_what_to_do() -> None:
    benign, harmful = Prompt.of("a", False), Prompt.of("b", True)
    require_both_classes([benign, harmful], "p.csv")
    with pytest.raises(PromptError, match=r"p.csv holds no harmful prompt: safety cannot be measured.*--harmful FILE"):
        require_both_classes([benign], "p.csv")
    with pytest.raises(PromptError, match=r"p.csv holds no benign prompt: false refusals cannot.*--benign FILE"):
        require_both_classes([harmful], "p.csv")
    with pytest.raises(PromptError, match=r"p.csv holds no prompt"):
        require_both_classes([], "p.csv")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 3))
def test_a_sample_has_the_size_asked_for_and_keeps_the_shares(size: int, n: int, seed: int) -> None:
    prompts = _many(size, seed)
    drawn = sample(prompts, n, seed)
    assert len(drawn) == min(n, size)
    assert drawn == [p for p in prompts if p in drawn]
    total, counts = Counter(p.source for p in prompts), Counter(p.source for p in drawn)
    assert all(abs(counts[source] - len(drawn) * k / size) < 1 for source, k in total.items())
    assert {p.id for p in sample(prompts[::-1], n, seed)} == {p.id for p in drawn}


def test_a_sample_of_less_than_one_is_refused() -> None:
    with pytest.raises(PromptError, match="at least 1, not 0"):
        sample(_many(3), 0)


def test_real_prompts_are_split_without_a_leak(shared_data: Path) -> None:
    prompts = deduplicate([p for name in ("dev", "test") for p in read_prompts(shared_data / f"prompts/{name}.jsonl")])
    splits = split_prompts(prompts)
    assert without_near_duplicates(splits["train"], splits["test"], 0.75) == splits["train"]
    assert all(abs(len(splits[name]) / len(prompts) - share) < 0.02 for name, share in [("train", 0.6), ("test", 0.2)])
