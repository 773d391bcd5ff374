"""What answers that a model does not give of itself would be: the first tokens that steering may turn to, tried out.

Training through the model (`elsteer.energy.refine`) asks of each first token how many answers that begin with it refuse. Plain
greedy answers tell that of a few tokens alone ("I", "As", "The"). Any other would pass for an answer, and so a step
would learn to turn "I'm sorry, but I can't" into "Sorry, but I can't", which changes nothing. So the tokens that are likely
where the model refuses are each put at the beginning of some answers, the plain model goes on, and the judge reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from elsteer.completions import PromptCaches, end_ids
from elsteer.decoding import decode, first_logits, plain_model, rows_of
from elsteer.judges import Judge, judge_all

__all__ = ["ANSWERS", "TOKENS", "try_openers"]

ANSWERS = 4  # that are begun with a token
TOKENS = 64  # first tokens that are tried, the likeliest
LENGTH = 24  # of an answer, in tokens


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
    that do not begin ANSWERS plain answers; each is tried where it is likeliest. Nothing to try gives an empty dict.
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
    found: dict[int, tuple[int, int]] = {}
    done = 0
    for batch in (batch for group in groups for batch in caches.batches(group)):
        rows = [at for at, place in enumerate(batch.rows) if place in begun]
        if not rows:
            continue
        part = rows_of(batch, rows)
        out = decode(
            caches.model, part, max_new_tokens=LENGTH, end_ids=ends, first=[begun[place] for place in part.rows]
        )
        texts = [caches.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in out.tokens]
        verdicts = judge_all(judge, [caches.prompts[place].text for place in part.rows], texts)
        for place, verdict in zip(part.rows, verdicts, strict=True):
            refusals, answers = found.get(begun[place], (0, 0))
            if verdict.label != "unscored":
                found[begun[place]] = refusals + (verdict.label == "refusal"), answers + 1
        done += len(rows)
        if progress is not None:
            progress(done, len(begun))
    return found
