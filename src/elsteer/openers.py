"""What answers that a model does not give of itself would be: the first tokens that steering may turn to, tried out.

Training through the model (`elsteer.energy.refine`) asks of each first token how many answers that begin with it refuse. Plain
greedy answers tell that of a few tokens alone ("I", "As", "The"). Any other would pass for an answer, and so a step
would learn to turn "I'm sorry, but I can't" into "Sorry, but I can't", which changes nothing. So the tokens that are likely
where the model refuses are each put at the beginning of some answers, the plain model goes on, and the judge reads it.

Of the tens of thousands of tokens that are left, those that matter mostly repeat a word of the request, each of its own ("Killing
a process is not ..."). They are tried together, as OTHERS, apart for benign and for harmful prompts: where such a token is
likeliest, it begins the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from elsteer.completions import PromptCaches, end_ids
from elsteer.decoding import decode, first_logits, plain_model, rows_of
from elsteer.judges import Judge, judge_all

__all__ = ["ANSWERS", "OTHERS", "TOKENS", "try_openers"]

ANSWERS = 4  # that are begun with a token
TOKENS = 64  # first tokens that are tried, the likeliest
LENGTH = 24  # of an answer, in tokens
OTHERS = (
    -1,
    -2,
)  # stand for every token not tried by itself nor seen in plain answers: of benign and of harmful prompts
TRIED_OTHERS = 48  # answers that are begun with one of these, of each kind of prompt


def try_openers(
    caches: PromptCaches,
    judge: Judge,
    groups: Sequence[Sequence[int]],
    labels: Mapping[int, str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, tuple[int, int]]:
    """By first token, how many of the answers that were begun with it refused, and how many the judge could score.

    groups: places of prompts, batched as before. labels: by place, the judge's word on the plain answer. The prompts are those
    that the plain model refuses, each used once, so that fewer of them try fewer tokens: the likeliest there, on average,
    that do not begin ANSWERS plain answers; each is tried where it is likeliest. At OTHERS is what came of the tokens left
    over: of each kind of prompt, the TRIED_OTHERS where one of them is likeliest are each begun with their own. Nothing to try
    gives an empty dict.
    """
    refused = [place for place, label in labels.items() if label == "refusal"]
    count = min(TOKENS, len(refused) // ANSWERS)
    ends = end_ids(caches.model, caches.tokenizer)
    likely: dict[int, torch.Tensor] = {}
    seen: dict[int, int] = {}
    with torch.inference_mode(), plain_model(caches.model):
        for batch in (batch for group in groups for batch in caches.batches(group)):
            shares = first_logits(caches.model, batch).softmax(dim=-1).cpu()
            for place, share in zip(batch.rows, shares, strict=True):
                token = int(share.argmax())
                seen[token] = seen.get(token, 0) + (labels.get(place) in ("refusal", "compliance"))
                if labels.get(place) == "refusal":
                    likely[place] = share
    if not count:
        return {}
    places = sorted(likely)
    table = torch.stack([likely[place] for place in places])
    mean = table.mean(dim=0)
    known = [token for token, answers in seen.items() if answers >= ANSWERS]
    mean[[*known, *ends]] = -1
    begun: dict[int, int] = {}  # by place, the token
    for token in mean.topk(min(count, len(mean) - 1)).indices.tolist():
        if mean[token] <= 0:
            break
        free = [row for row, place in enumerate(places) if place not in begun]
        for row in sorted(free, key=lambda row: -float(table[row, token]))[:ANSWERS]:
            begun[places[row]] = token
    trials = [
        begun,
        *_others(caches, places, table, {*begun.values(), *ends, *(one for one, many in seen.items() if many)}),
    ]
    found: dict[int, tuple[int, int]] = {}
    total, done = sum(map(len, trials)), 0
    for some, name in zip(trials, (None, *OTHERS), strict=True):
        for place, label in _begin(caches, judge, groups, some):
            token = some[place] if name is None else name
            refusals, answers = found.get(token, (0, 0))
            if label != "unscored":
                found[token] = refusals + (label == "refusal"), answers + 1
            done += 1
            if progress is not None:
                progress(done, total)
    return found


def _others(caches: PromptCaches, places: Sequence[int], shares: torch.Tensor, known: set[int]) -> list[dict[int, int]]:
    """For benign and for harmful prompts, by place the likeliest token that is not `known`; shares (n, V) of `places`."""
    left = shares.clone()
    left[:, sorted(known)] = -1
    best, tokens = left.max(dim=1)
    found: list[dict[int, int]] = []
    for kind in (False, True):
        rows = [row for row, place in enumerate(places) if caches.prompts[place].harmful == kind and best[row] > 0]
        rows = sorted(rows, key=lambda row: -float(best[row]))[:TRIED_OTHERS]
        found.append({places[row]: int(tokens[row]) for row in rows})
    return found


def _begin(
    caches: PromptCaches, judge: Judge, groups: Sequence[Sequence[int]], begun: Mapping[int, int]
) -> Iterator[tuple[int, str]]:
    """(place, the judge's word) of each prompt in `begun`, by place the token that its answer is made to begin with."""
    ends = end_ids(caches.model, caches.tokenizer)
    with torch.inference_mode(), plain_model(caches.model):
        for batch in (batch for group in groups for batch in caches.batches(group)):
            rows = [at for at, place in enumerate(batch.rows) if place in begun]
            if not rows:
                continue
            part = rows_of(batch, rows)
            first = [begun[place] for place in part.rows]
            out = decode(caches.model, part, max_new_tokens=LENGTH, end_ids=ends, first=first)
            texts = [caches.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in out.tokens]
            verdicts = judge_all(judge, [caches.prompts[place].text for place in part.rows], texts)
            yield from zip(part.rows, (verdict.label for verdict in verdicts), strict=True)
