"""What steering adds to the time of decoding, measured so finely that a busy machine does not hide it.

Two greedy answers to the same prompts go in lockstep, one plain and one steered: each token's passes run one right after the
other, in turns, so that whatever else the machine does meets both. Shapes: R repeats, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from elsteer.evaluation.statistics import Interval
from elsteer.models import accepts, cache_argument
from elsteer.steering import Steering

__all__ = ["decode_times", "time_ratio"]

_WARM_UP = 4  # tokens that are not timed, before the others


def decode_times(
    model: PreTrainedModel,
    steering: Steering,
    ids: Tensor,
    mask: Tensor,
    *,
    tokens: int,
    repeats: int,
    static: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Seconds of each pass (R, T), plain and steered, of answers to left-padded prompts ids (B, P) with mask (B, P).

    The first pass runs the prompt, and is the one that a window of 0 steers. static: with a static cache.
    progress(done, total): repeats.
    """
    switches = {"plain": steering.disable, "steered": steering.enable}
    times = {side: torch.zeros(repeats, tokens) for side in switches}
    lengths = mask.sum(dim=1)
    with torch.inference_mode():
        for turn in range(-1, repeats):
            if progress is not None:
                progress(max(0, turn), repeats)
            answers = {side: _Answer(model, ids, mask, tokens, static) for side in switches}
            for at in range(tokens if turn >= 0 else min(tokens, _WARM_UP)):
                for side in sorted(switches, reverse=bool((turn + at) % 2)):
                    switches[side]()
                    with steering.prompts(lengths):
                        spent = answers[side].step()
                    if turn >= 0:
                        times[side][turn, at] = spent
    steering.enable()
    if progress is not None:
        progress(repeats, repeats)
    return times["plain"], times["steered"]


def time_ratio(plain: Tensor, steered: Tensor, seed: int = 0) -> Interval:
    """Steered over plain time of whole answers, of times (R, T), with its 95% bootstrap interval; n: pairs of passes.

    The median ratio of the first passes, which run the prompt, and that of all others count by their share of the plain time.
    """
    first, rest = ((steered[:, part] / plain[:, part]).log().flatten() for part in (slice(1), slice(1, None)))
    share = plain[:, 0].median() / (plain[:, 0].median() + plain[:, 1:].median(dim=0).values.sum())

    def value(first: Tensor, rest: Tensor) -> float:
        return float(share * _middle(first) + (1 - share) * _middle(rest))

    generator = torch.Generator().manual_seed(seed)

    def drawn(part: Tensor) -> Tensor:
        return part[torch.randint(max(1, len(part)), (len(part),), generator=generator)]

    found = torch.tensor([value(drawn(first), drawn(rest)) for _ in range(2000)])
    low, high = found.quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval.around(value(first, rest), low, high, plain.numel())


def _middle(logs: Tensor) -> Tensor:
    return logs.median().exp() if len(logs) else logs.new_zeros(())


class _Answer:
    """Greedy answers, a token of each prompt per `step`."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, tokens: int, static: bool) -> None:
        self.model, self.ids, self.mask = model, ids, mask.long()
        room = ids.shape[1] + tokens
        cache = StaticCache(config=model.config, max_cache_len=room) if static else DynamicCache(config=model.config)
        self.options: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
        if accepts(model, "logits_to_keep"):
            self.options["logits_to_keep"] = 1

    def step(self) -> float:
        """Seconds of the pass that makes the next token."""
        extra = {}
        if accepts(self.model, "position_ids"):
            extra["position_ids"] = (self.mask.cumsum(dim=1) - 1).clamp_min(0)[:, -self.ids.shape[1] :]
        start = time.perf_counter()
        said = self.model(input_ids=self.ids, attention_mask=self.mask, **extra, **self.options)
        self.ids = said.logits[:, -1].argmax(dim=-1, keepdim=True)
        if self.ids.is_cuda:
            torch.cuda.synchronize()
        spent = time.perf_counter() - start
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return spent
