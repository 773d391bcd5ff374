"""Whether answers stay answers: perplexity under the plain model, degenerate ones, KL on neutral prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from elsteer.completions import PromptCaches, end_ids
from elsteer.evaluation.quality import Answer, answer_at_length, kl_to_plain, quality
from elsteer.landscape import Landscape
from elsteer.models import encode_chat
from landscapes import tiny_landscape
from pipelines import Killed, Tiny, dies_at, forward_passes, lines, some_prompts, speaker

PROMPTS = some_prompts(12)
IDS = [prompt.id for prompt in PROMPTS]
PLACES = range(len(PROMPTS))


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return speaker()


@pytest.fixture(scope="module")
def landscape(tiny: Tiny) -> Landscape:
    return tiny_landscape(tiny[0])


def caches_of(tiny: Tiny) -> PromptCaches:
    return PromptCaches(*tiny, PROMPTS, batch_size=5)


def test_at_strength_0_the_ratio_is_exactly_1_and_the_kl_exactly_0(tiny: Tiny, landscape: Landscape) -> None:
    caches = caches_of(tiny)
    plain = answer_at_length(caches, PLACES, "none", steering=None, max_new_tokens=6)
    with landscape.attach(tiny[0], 0.0) as steering:
        steered = answer_at_length(caches, PLACES, "els", steering=steering, max_new_tokens=6)
        kl = kl_to_plain(caches, plain, steering=steering)
    found = quality(plain, steered, IDS)
    assert found.perplexity_ratio == 1.0
    assert found.degenerate_plain == found.degenerate_steered
    assert found.n == len(PROMPTS)
    assert kl == dict.fromkeys(IDS, 0.0)


def test_steered_the_kl_is_above_0_and_grows_with_the_strength(tiny: Tiny, landscape: Landscape) -> None:
    caches = caches_of(tiny)
    plain = answer_at_length(caches, PLACES, "none", steering=None, max_new_tokens=6)
    means = []
    for strength in (0.05, 0.2, 0.8):
        with landscape.attach(tiny[0], strength) as steering:
            found = kl_to_plain(caches, plain, steering=steering)
        assert all(value > 0 for value in found.values())
        means.append(sum(found.values()) / len(found))
    assert means == sorted(means)


def test_kl_is_the_mean_over_the_answers_tokens(tiny: Tiny, landscape: Landscape) -> None:
    """Against a plain loop without caches, batches or pads; the window of 1 ends after the first answer token."""
    model, tokenizer = tiny
    answer = Answer(IDS[0], "none", "abc", [97, 98, 99], 0.0, "")
    one = PromptCaches(model, tokenizer, PROMPTS[:1])
    ids = encode_chat(tokenizer, list(PROMPTS[0].messages))
    whole = torch.tensor([[*ids, *answer.tokens[:-1]]])
    with torch.inference_mode():
        p = model(whole).logits[0, len(ids) - 1 :].double().log_softmax(dim=-1)
        with landscape.attach(model) as steering:
            with steering.prompts(torch.tensor([len(ids)])):
                q = model(whole).logits[0, len(ids) - 1 :].double().log_softmax(dim=-1)
            found = kl_to_plain(one, {IDS[0]: answer}, steering=steering)
    assert found[IDS[0]] == pytest.approx(float((p.exp() * (p - q)).sum(dim=-1).mean()), rel=1e-4)


def test_nll_is_the_plain_models_own_even_of_steered_answers(tiny: Tiny, landscape: Landscape) -> None:
    model, tokenizer = tiny
    with landscape.attach(model, 3.0) as steering:
        found = answer_at_length(caches_of(tiny), [0, 7], "els", steering=steering, max_new_tokens=6)
    assert set(found) == {IDS[0], IDS[7]}
    for place in (0, 7):
        one = found[IDS[place]]
        ids = encode_chat(tokenizer, list(PROMPTS[place].messages))
        with torch.inference_mode():
            logs = model(torch.tensor([[*ids, *one.tokens]])).logits[0, len(ids) - 1 : -1].double().log_softmax(dim=-1)
        assert one.nll == pytest.approx(-float(logs[range(len(one.tokens)), one.tokens].mean()), rel=1e-4)
        assert one.text == tokenizer.decode(one.tokens).strip()


def test_a_handle_that_was_switched_off_stays_off(tiny: Tiny, landscape: Landscape) -> None:
    caches = caches_of(tiny)
    plain = answer_at_length(caches, [0], "none", steering=None, max_new_tokens=3)
    with landscape.attach(tiny[0]) as steering:
        steering.disable()
        answer_at_length(caches, [0], "els", steering=steering, max_new_tokens=3)
        kl_to_plain(caches_of(tiny), plain | dict.fromkeys(IDS, plain[IDS[0]]), steering=steering)
        assert not steering.enabled


def test_killed_it_goes_on_with_the_answers_that_are_there(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    word = dies_at("", 1)
    with pytest.raises(Killed):
        answer_at_length(
            caches_of(tiny),
            PLACES,
            "none",
            steering=None,
            max_new_tokens=4,
            path=path,
            progress=lambda a, b: word("", a, b),
        )
    assert len(lines(path)) == 5  # one batch
    with forward_passes(tiny[0]) as passes:
        found = answer_at_length(caches_of(tiny), PLACES, "none", steering=None, max_new_tokens=4, path=path)
    assert passes
    assert len(lines(path)) == len(PROMPTS)
    with forward_passes(tiny[0]) as passes:
        again = answer_at_length(caches_of(tiny), PLACES, "none", steering=None, max_new_tokens=4, path=path)
    assert passes == []
    assert again == found
    assert set(found) == set(IDS)


def test_an_answer_without_a_token_is_degenerate_and_in_no_ratio(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row says null, for JSON has no NaN; read again it is the same answer."""
    path = tmp_path / "answers.jsonl"
    every = set(range(320)) | end_ids(*tiny)
    monkeypatch.setattr("elsteer.evaluation.quality.end_ids", lambda model, tokenizer: every)
    found = answer_at_length(caches_of(tiny), [0], "none", steering=None, path=path)
    assert found[IDS[0]].tokens == []
    assert found[IDS[0]].degenerate == "empty"
    assert math.isnan(found[IDS[0]].nll)
    [row] = [json.loads(line, parse_constant=pytest.fail) for line in lines(path)]
    assert row["nll"] is None
    again = answer_at_length(caches_of(tiny), [0], "none", steering=None, path=path)
    assert math.isnan(again[IDS[0]].nll)
    good = Answer(IDS[0], "none", "yes", [1], 2.0, "")
    fine = Answer("x", "none", "yes", [1], 1.0, "")
    better = Answer("x", "els", "yes", [1], 1.5, "")
    both = quality({IDS[0]: good, "x": fine}, {IDS[0]: again[IDS[0]], "x": better}, [IDS[0], "x"])
    assert both.perplexity_ratio == pytest.approx(math.exp(0.5))
    assert (both.degenerate_plain, both.degenerate_steered, both.n) == (0.0, 0.5, 2)


def test_of_nothing_there_is_no_ratio() -> None:
    found = quality({}, {}, [])
    assert math.isnan(found.perplexity_ratio)
    assert (found.degenerate_plain, found.degenerate_steered, found.n) == (0.0, 0.0, 0)
