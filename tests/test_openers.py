"""First tokens that plain answers do not begin with: what answers that are made to begin with them would be."""

from __future__ import annotations

import pytest
import torch

from elsteer.completions import PromptCaches, complete, end_ids
from elsteer.decoding import decode, rows_of
from elsteer.energy.refine import _refusing
from elsteer.judges import Verdict
from elsteer.openers import ANSWERS, try_openers
from pipelines import LETTERS, LetterJudge, Tiny, some_prompts, speaker

PROMPTS = some_prompts(80)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return speaker()


class OddJudge(LetterJudge):
    """An answer that begins with every other letter is a refusal."""

    def judge(self, prompt: str, completion: str) -> Verdict:
        found = super().judge(prompt, completion)
        if found.label == "unscored":
            return found
        return Verdict("refusal", 1.0, "") if ord(completion[0]) % 2 else Verdict("compliance", 0.0, "")


def judged(tiny: Tiny) -> tuple[PromptCaches, dict[int, str], list[str]]:
    caches = PromptCaches(*tiny, PROMPTS, batch_size=16)
    plain = complete(caches, LetterJudge(), max_new_tokens=4)
    return caches, {at: one.label for at, one in enumerate(plain)}, [one.text[:1] for one in plain]


def test_answers_begin_with_the_given_token_and_go_on_as_the_plain_model_does(tiny: Tiny) -> None:
    model, tokenizer = tiny
    [batch] = PromptCaches(model, tokenizer, PROMPTS[:6]).batches()
    part = rows_of(batch, [4, 1])
    assert part.rows == [batch.rows[4], batch.rows[1]]
    first = [tokenizer.convert_tokens_to_ids("q"), tokenizer.convert_tokens_to_ids("b")]
    out = decode(model, part, max_new_tokens=5, end_ids=end_ids(model, tokenizer), first=first)
    for place, token, tokens in zip(part.rows, first, out.tokens, strict=True):
        ids = PromptCaches(model, tokenizer, PROMPTS[:6]).ids[place] + [token]
        wanted = [token]
        with torch.inference_mode():
            while len(wanted) < 5:
                next_one = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                if next_one in end_ids(model, tokenizer):
                    break
                wanted.append(next_one)
                ids = [*ids, next_one]
        assert tokens == wanted


def test_tokens_that_no_plain_answer_begins_with_are_tried_where_the_model_refuses(tiny: Tiny) -> None:
    caches, labels, letters = judged(tiny)
    groups = [list(range(40)), list(range(40, 80))]
    found = try_openers(caches, OddJudge(), groups, labels)
    refused = sum(label == "refusal" for label in labels.values())
    assert 3 < len(found) <= refused // ANSWERS
    assert sum(answers for _, answers in found.values()) <= refused
    for token, (refusals, answers) in found.items():
        text = tiny[1].decode([token]).strip()
        assert letters.count(text) < ANSWERS  # what plain answers begin with needs no trial
        assert 0 <= answers <= ANSWERS
        if text in LETTERS:  # the judge goes by the first letter
            assert refusals == (answers if ord(text) % 2 else 0)
    assert {refusals > 0 for refusals, answers in found.values() if answers} == {True, False}


def test_where_too_few_are_refused_nothing_is_tried(tiny: Tiny) -> None:
    caches, labels, _ = judged(tiny)
    few = [at for at, label in labels.items() if label == "refusal"][: ANSWERS - 1]
    assert try_openers(caches, LetterJudge(), [few], dict.fromkeys(few, "refusal")) == {}


def test_what_was_tried_counts_with_what_was_seen(tiny: Tiny) -> None:
    caches, labels, letters = judged(tiny)
    batches = list(caches.batches())
    words = [labels[at] for at in range(len(PROMPTS))]
    before = _refusing(tiny[0], batches, words, {})
    seen = tiny[1].convert_tokens_to_ids(letters[0])
    unseen = next(token for token in range(len(before)) if token != seen and before[token] == 0)
    after = _refusing(tiny[0], batches, words, {unseen: (3, 4), seen: (1, 1)})
    assert float(after[unseen]) == pytest.approx(3 / 5)
    count, refused = letters.count(letters[0]), letters.count(letters[0]) * (letters[0] > "m")
    assert float(after[seen]) == pytest.approx((refused + 1) / (count + 2))
    same = [token for token in range(len(before)) if token not in (seen, unseen)]
    assert torch.equal(after[same], before[same])
