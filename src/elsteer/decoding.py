"""Batched greedy decoding over prompt caches that can be used again.

The chat prefix that all prompts share goes through the model once (`SharedPrefix`); the rest of each prompt but its last
token goes through once per batch (`prefill`); everything after that (`decode`) starts from the prompt's last token, which
is the first one that steering may move. So plain and steered runs, and all trials of a tuner, share one prefill.

Shapes: B rows, P columns of a batch's prompts (left part shared, then pads, then the rows' own tokens), T new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from elsteer.errors import ModelError, SteeringError
from elsteer.models import accepts, cache_argument, cache_made, decoder_of
from elsteer.states import mapped_tensor

__all__ = [
    "STEERED",
    "TOKENS_ON_A_GPU",
    "TOKENS_PER_BATCH",
    "Decoded",
    "PromptBatch",
    "SharedPrefix",
    "batches",
    "decode",
    "first_logits",
    "mapped",
    "plain_model",
    "prefill",
    "refuse_steered",
    "score",
    "share_prefix",
]

_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)  # layers whose update makes new tensors
STEERED = "_elsteer_steering"  # the decoder's attribute that holds the handle attached to it

LOGITS_BYTES = 1 << 27
TOKENS_PER_BATCH = 4096  # columns x rows of one prefill; keeps activations small on small machines
TOKENS_ON_A_GPU = 65_536  # the same where small batches leave an accelerator idle


class Attached(Protocol):
    """What decoding needs of a steering handle: the place of the prompts' ends, told before each forward pass."""

    def prompts(self, lengths: Tensor, rows: Tensor | None = None) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class SharedPrefix:
    """Token ids that all prompts begin with and their key-value cache (one row); `cache` is None where sharing is unsafe."""

    ids: list[int]
    cache: Any | None


@dataclass
class PromptBatch:
    """Prompts whose tokens but the last are in `cache`.

    rows: their places in the caller's list, B of them; mask: (B, P) bool, False at pads; last: (B, 1) the last prompt token.
    cache: P - 1 columns, or None where every prompt has a single token.
    """

    rows: list[int]
    mask: Tensor
    last: Tensor
    cache: Any | None

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds."""
        layers = [] if self.cache is None else self.cache.layers
        return sum(
            t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values) if t is not None
        )


@dataclass
class Decoded:
    """What one batch gave. `tokens[i]` are row i's new tokens without the end token; `ended[i]`: it came to its own end."""

    tokens: list[list[int]]
    ended: list[bool]
    first_logits: Tensor | None = None


def share_prefix(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> SharedPrefix:
    """The longest prefix common to all `rows` (at most their shortest length - 1), and its cache, computed once."""
    shortest = min(rows, key=len)
    length = 0
    while length < len(shortest) - 1 and all(row[length] == shortest[length] for row in rows):
        length += 1
    ids = list(shortest[:length])
    if length == 0 or not _can_share(model):
        return SharedPrefix([], None)
    with torch.inference_mode(), plain_model(model):
        out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, **_one_logit(model))
    cache = cache_made(out)
    return SharedPrefix(ids, cache) if _plain(cache) else SharedPrefix([], None)


def batches(rows: Sequence[Sequence[int]], batch_size: int, *, tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Places of rows of similar length, longest first (so that memory runs out at once or never)."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    at = 0
    while at < len(order):
        size = max(1, min(batch_size, tokens // max(1, len(rows[order[at]]))))
        yield order[at : at + size]
        at += size


def prefill(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], places: list[int], shared: SharedPrefix
) -> PromptBatch:
    """Run the prompts at `places` of `rows` (token ids) through the model, all but their last token."""
    device, start = model.device, len(shared.ids)
    own = [list(rows[place][start:]) for place in places]
    width = max(len(ids) for ids in own)
    ids = torch.tensor([[0] * (width - len(o)) + o for o in own], device=device)
    real = torch.tensor([[0] * (width - len(o)) + [1] * len(o) for o in own], device=device, dtype=torch.bool)
    mask = torch.cat([real.new_ones(len(places), start), real], dim=1)
    cache = expand(shared.cache, len(places)) if shared.cache is not None else None
    if width > 1:
        with torch.inference_mode(), plain_model(model):
            out = _forward(model, ids[:, :-1], mask[:, :-1], cache)
        cache = cache_made(out)
        if not all(
            hasattr(layer, "keys") and not hasattr(layer, "recurrent_states") for layer in getattr(cache, "layers", ())
        ):
            raise ModelError(
                f"{type(model).__name__} keeps states beside keys and values (linear attention or a state-space layer), which "
                "elsteer cannot take rows out of: choose a model with attention in every block."
            )
    return PromptBatch(list(places), mask, ids[:, -1:], cache)


def decode(
    model: PreTrainedModel,
    batch: PromptBatch,
    *,
    max_new_tokens: int,
    end_ids: set[int],
    decided: Callable[[int, list[int]], bool] | None = None,
    steering: Attached | None = None,
    on_step: Callable[[int, list[int]], None] | None = None,
    first: Sequence[int] | None = None,
) -> Decoded:
    """Greedy decoding from the prompts' last tokens; a row stops at an end token, when `decided(i, tokens)` or at the limit.

    i counts the rows of the batch. The batch's cache is left as it was. Without `steering` the model runs plain, even with
    something attached to it. `on_step(t, alive)` is called after forward pass t (0 is the prompt's last token) with the
    batch rows that took part, in the order of the pass: for state capture. first: each row's first new token, given.
    Rows that have stopped leave the batch, so that the rest runs faster.
    """
    count = len(batch.rows)
    done = Decoded([[] for _ in range(count)], [False] * count)
    alive = list(range(count))
    cache, mask, ids = clone(batch.cache), batch.mask, batch.last
    lengths = mask.sum(dim=1)
    opened: list[Tensor] = []
    with torch.inference_mode(), plain_model(model) if steering is None else nullcontext():
        for step in range(max_new_tokens):
            rows = torch.tensor([batch.rows[i] for i in alive])
            with nullcontext() if steering is None else steering.prompts(lengths, rows):
                out = _forward(model, ids, mask, cache)
            if on_step is not None:
                on_step(step, alive)
            cache = cache_made(out)
            logits = out.logits[:, -1].float()
            if step == 0:
                opened.append(logits)
            chosen = logits.argmax(dim=-1)
            if step == 0 and first is not None:
                chosen = chosen.new_tensor(list(first))
            keep: list[int] = []
            for at, (i, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
                if token in end_ids:
                    done.ended[i] = True
                    continue
                done.tokens[i].append(token)
                if decided is None or not decided(i, done.tokens[i]):
                    keep.append(at)
            if not keep or step == max_new_tokens - 1:
                break
            if len(keep) < len(alive):
                index = torch.tensor(keep)
                cache.batch_select_indices(index)  # on the CPU: its layers may lie on several devices
                index = index.to(mask.device)
                mask, lengths, chosen = mask[index], lengths[index], chosen[index]
                alive = [alive[at] for at in keep]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            ids = chosen[:, None]
    done.first_logits = opened[0] if opened else None
    return done


def rows_of(batch: PromptBatch, chosen: Sequence[int]) -> PromptBatch:
    """The batch of these rows alone, each as often as it is named, with a cache of its own."""
    index = torch.tensor(list(chosen))
    cache = clone(batch.cache)
    if cache is not None:
        cache.batch_select_indices(index)
    index = index.to(batch.mask.device)
    return PromptBatch([batch.rows[at] for at in chosen], batch.mask[index], batch.last[index], cache)


def first_logits(model: PreTrainedModel, batch: PromptBatch) -> Tensor:
    """Logits (B, vocabulary) float32 of each row's first new token. The batch's cache is left as it was.

    It runs as the caller set autograd, and with whatever hooks the model has: for training through the model.
    """
    return _forward(model, batch.last, batch.mask, clone(batch.cache)).logits[:, -1].float()


def score(
    model: PreTrainedModel,
    batch: PromptBatch,
    answers: Sequence[Sequence[int]],
    *,
    steering: Attached | None = None,
    most_bytes: int = LOGITS_BYTES,
) -> Iterator[Tensor]:
    """Logits (len(answer), vocabulary) float32 of each row's given answer, row after row, from after the prompts' caches.

    `answers[i]` belongs to batch row i, none empty; position t predicts answer token t, so the first comes from the
    prompt's last token. The batch's cache is left as it was. Rows pass the model together while their logits take no more
    than `most_bytes`: those of a whole batch would be the most memory that a fit needs.
    """
    device, lengths = batch.mask.device, batch.mask.sum(dim=1)
    width = max(len(answer) for answer in answers)
    each = width * model.get_output_embeddings().weight.shape[0] * model.dtype.itemsize
    count = max(1, most_bytes // each)
    for start in range(0, len(answers), count):
        part = answers[start : start + count]
        width = max(len(answer) for answer in part)
        padded = torch.tensor([[*a[:-1], *[0] * (width - len(a))] for a in part], device=device, dtype=torch.long)
        real = torch.tensor(
            [[1] * (len(a) - 1) + [0] * (width - len(a)) for a in part], device=device, dtype=torch.bool
        )
        at = slice(start, start + count)
        ids = torch.cat([batch.last[at], padded], dim=1)
        mask = torch.cat([batch.mask[at], real.reshape(len(part), width - 1)], dim=1)
        cache = clone(batch.cache)
        if cache is not None and len(part) < len(answers):
            cache.batch_select_indices(torch.arange(start, start + len(part)))
        known = plain_model(model) if steering is None else steering.prompts(lengths[at], torch.tensor(batch.rows[at]))
        with torch.inference_mode(), known:
            logits = _forward(model, ids, mask, cache, every_logit=True).logits
        for row, answer in enumerate(part):
            yield logits[row, : len(answer)].float()


def mapped(batch: PromptBatch, path: Path) -> PromptBatch:
    """The batch with its cache in a new file at `path`, mapped: memory holds what is in use, the disk the rest.

    The file's name is gone when this returns, so that nothing is left of it once the batch is let go. Caches that are not on
    the CPU or of a kind that changes in place stay as they are. Raises RunError when the disk is full.
    """
    layers = [] if batch.cache is None else batch.cache.layers
    if not layers or not all(type(layer) in _GROWING and layer.keys.device.type == "cpu" for layer in layers):
        return batch
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    room = mapped_tensor((sum(one.numel() for one in tensors),), tensors[0].dtype, path)
    with suppress(OSError):  # a system that keeps the files that are in use deletes it with its folder
        path.unlink()
    parts = room.split([one.numel() for one in tensors])
    stored = [part.view(one.shape).copy_(one) for part, one in zip(parts, tensors, strict=True)]
    cache: Any = clone(batch.cache)
    for layer, keys, values in zip(cache.layers, stored[::2], stored[1::2], strict=True):
        layer.keys, layer.values = keys, values
    return replace(batch, cache=cache)


def clone(cache: Any | None) -> Any | None:
    """A cache that can grow by itself. Tensors are shared: dynamic layers append by concatenation, never in place."""
    if cache is None:
        return None
    if type(cache) is DynamicCache and all(type(layer) in _GROWING for layer in cache.layers):
        new = copy.copy(cache)
        new.layers = [copy.copy(layer) for layer in cache.layers]
        return new
    return copy.deepcopy(cache)


def expand(cache: Any, rows: int) -> Any:
    """One row's cache for `rows` rows, without a copy until it grows."""
    new: Any = clone(cache)
    for layer in new.layers:
        layer.keys = layer.keys.expand(rows, *layer.keys.shape[1:])
        layer.values = layer.values.expand(rows, *layer.values.shape[1:])
    return new


def _plain(cache: Any) -> bool:
    """Whether its layers only ever concatenate, and hold all columns."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def refuse_steered(decoder: nn.Module) -> None:
    """Raises SteeringError where a handle is attached to a model's decoder (`decoder_of`)."""
    if getattr(decoder, STEERED, None) is not None:
        raise SteeringError("This model is steered already: call .remove() on the first handle before attaching again.")


@contextmanager
def plain_model(model: PreTrainedModel) -> Iterator[None]:
    """The model unsteered while open, whatever is attached to it: the prompts' caches must not depend on the steering."""
    handle = getattr(decoder_of(model), STEERED, None)
    if handle is None:
        yield
        return
    enabled, handle.enabled = handle.enabled, False
    try:
        yield
    finally:
        handle.enabled = enabled


def _can_share(model: PreTrainedModel) -> bool:
    # Sliding windows and recurrent states depend on absolute columns or are changed in place: those models prefill in full.
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(model.config.get_text_config(), "sliding_window", None)


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any | None, *, every_logit: bool = False) -> Any:
    positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    extra: dict[str, Any] = {} if every_logit else _one_logit(model)
    if accepts(model, "position_ids"):
        extra["position_ids"] = positions
    extra[cache_argument(model)] = cache
    return model(input_ids=ids, attention_mask=mask.long(), use_cache=True, **extra)


def _one_logit(model: PreTrainedModel) -> dict[str, Any]:
    return {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
