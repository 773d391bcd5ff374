"""Whether the answers stay answers: perplexity of steered answers under the plain model, degenerate ones, KL on neutral prompts.

Perplexity of an answer is exp of the plain model's mean negative log-likelihood of its tokens after the prompt. KL is
KL(plain || steered) of the next-token distributions along the plain model's own answer, in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elsteer.completions import PromptCaches, end_ids
from elsteer.decoding import PromptBatch, decode, score
from elsteer.files import append_jsonl, read_rows
from elsteer.judges.degenerate import degeneration
from elsteer.run import without_nan
from elsteer.steering import Steering

__all__ = ["Answer", "Quality", "answer_at_length", "kl_of_logits", "kl_to_plain", "quality"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A full-length answer, and why it is degenerate (else "").

    nll: mean negative log-likelihood of its tokens under the plain model, in nats; NaN for an answer without any token.
    """

    prompt_id: str
    method: str
    text: str
    tokens: list[int]
    nll: float
    degenerate: str


@dataclass(frozen=True, slots=True)
class Quality:
    """perplexity_ratio: exp(mean over prompts of nll steered - nll plain); the shares of degenerate answers; n prompts."""

    perplexity_ratio: float
    degenerate_plain: float
    degenerate_steered: float
    n: int


def answer_at_length(
    caches: PromptCaches,
    places: Sequence[int],
    method: str,
    *,
    steering: Steering | None,
    max_new_tokens: int = 64,
    path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answer]:
    """Answer the prompts at `places` without early stop and score each answer under the plain model.

    steering: attached to the model, or None for the plain model; the scoring pass runs plain in any case.
    """
    known = {one.prompt_id: one for one in read_rows(path, _answer)} if path is not None else {}
    todo = [place for place in places if caches.prompts[place].id not in known]
    ends = end_ids(caches.model, caches.tokenizer)
    finished = len(places) - len(todo)
    for batch in caches.batches(todo):
        out = decode(caches.model, batch, max_new_tokens=max_new_tokens, end_ids=ends, steering=steering)
        nlls = _nll(caches, batch, out.tokens)
        fresh = []
        for place, tokens, nll in zip(batch.rows, out.tokens, nlls, strict=True):
            text = str(caches.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            fresh.append(Answer(caches.prompts[place].id, method, text, tokens, nll, degeneration(text) or ""))
        if path is not None:
            append_jsonl(path, [without_nan(asdict(one)) for one in fresh])
        known.update((one.prompt_id, one) for one in fresh)
        finished += len(fresh)
        if progress is not None:
            progress(finished, len(places))
    return known


def quality(plain: dict[str, Answer], steered: dict[str, Answer], ids: Sequence[str]) -> Quality:
    """Compare the answers to the prompts `ids`. A steered answer without any token counts as degenerate, not in the ratio."""
    pairs = [(plain[one], steered[one]) for one in ids]
    logs = [after.nll - before.nll for before, after in pairs if math.isfinite(before.nll) and math.isfinite(after.nll)]
    return Quality(
        math.exp(sum(logs) / len(logs)) if logs else math.nan,
        sum(bool(before.degenerate) for before, _ in pairs) / max(1, len(pairs)),
        sum(bool(after.degenerate) for _, after in pairs) / max(1, len(pairs)),
        len(pairs),
    )


def kl_to_plain(
    caches: PromptCaches,
    answers: dict[str, Answer],
    *,
    steering: Steering,
    tokens: int = 32,
    plain: dict[tuple[int, ...], list[Tensor]] | None = None,
) -> dict[str, float]:
    """Mean KL(plain || steered) per token, in nats, of each prompt of `caches`, along the plain `answers`' first `tokens`.

    plain: keeps the plain logits, in float16, for the next call with the same tokens.
    """
    found = {}
    for batch in caches.batches():
        given = [answers[caches.prompts[place].id].tokens[:tokens] or [0] for place in batch.rows]
        key = tuple(batch.rows)
        if plain is not None and key not in plain:
            plain[key] = [one.half() for one in score(caches.model, batch, given)]
        before = score(caches.model, batch, given) if plain is None else (one.float() for one in plain[key])
        after = score(caches.model, batch, given, steering=steering)
        for place, p, q in zip(batch.rows, before, after, strict=True):
            found[caches.prompts[place].id] = float(kl_of_logits(p, q))
    return found


def _answer(row: dict[str, Any]) -> Answer:
    return Answer(**{**row, "nll": math.nan if row["nll"] is None else row["nll"]})


def kl_of_logits(plain: Tensor, steered: Tensor) -> Tensor:
    """Mean KL(plain || steered) in nats of next-token logits (tokens, V) each."""
    p, q = plain.log_softmax(dim=-1), steered.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).mean()


def _nll(caches: PromptCaches, batch: PromptBatch, answers: Sequence[list[int]]) -> list[float]:
    given = [tokens or [0] for tokens in answers]
    values = []
    for tokens, logits in zip(given, score(caches.model, batch, given), strict=True):
        logs = logits.log_softmax(dim=-1)
        values.append(-float(logs.gather(1, torch.tensor(tokens, device=logs.device)[:, None]).mean()))
    return [value if tokens else math.nan for value, tokens in zip(values, answers, strict=True)]
