"""The context of a state: what the model keeps of the prompt's other tokens.

A prompt's last token mostly says what the model is about to do; what the request is about is kept where its words are. The
key-value cache holds that: each block keeps a value vector of every token. The context of a row at block l is their mean,

    y_j = mean of block j's values over the prompt's tokens before the last one,      j = l - k, ..., l - 1

which costs nothing to compute beside the prompt itself, does not depend on steering (only later tokens are moved), and is
there whenever the last token is processed: in one pass, after chunks, or on a cache of an earlier turn. Energies that are
trained through the model read u of state and context together (`elsteer.energy.refine`).

Shapes: B rows, C columns of tokens, k blocks, e = key-value heads x head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from elsteer.errors import SteeringError

if TYPE_CHECKING:
    from elsteer.decoding import PromptBatch

__all__ = ["contexts_of", "prompt_context"]


def prompt_context(cache: Any, layer: int, blocks: int, columns: Tensor) -> Tensor:
    """(B, k, e) float32: the context at block `layer`, of the `blocks` before it; zeros for a row without a column.

    cache: the key-value cache, filled up to block `layer` - 1. columns: (B, C) bool, which of its columns are the prompt's
    tokens before the last one; columns that the cache has beyond these do not count.
    Raises SteeringError where the cache holds no values.
    """
    found = []
    for at in range(layer - blocks, layer):
        values = getattr(cache.layers[at], "values", None) if at < len(getattr(cache, "layers", ())) else None
        if not isinstance(values, Tensor) or values.dim() != 4 or hasattr(cache.layers[at], "_quantized_values"):
            raise SteeringError(
                "This landscape reads the key-value cache, and there is none of a kind that it knows in this forward pass: "
                "call the model with use_cache=True, and with no quantised or recurrent cache."
            )
        kept, count = columns.to(values.device), values.shape[2]
        # A sliding window keeps the last columns; a static cache has room behind them.
        kept = kept[:, -count:] if kept.shape[1] > count else F.pad(kept, (0, count - kept.shape[1]))
        share = kept.float() / kept.sum(dim=1, keepdim=True).clamp_min(1)
        found.append(torch.einsum("bc,bhce->bhe", share, values.float()).flatten(1).to(columns.device))
    return torch.stack(found, dim=1)


def contexts_of(
    batches: Sequence[PromptBatch], layers: Sequence[int], blocks: int, count: int
) -> tuple[Tensor, Tensor]:
    """Contexts (count, len(layers), k, e) of prefilled prompts by place, and which places the batches hold, (count,) bool."""
    found, known = torch.zeros(0), torch.zeros(count, dtype=torch.bool)
    for batch in batches:
        if batch.cache is None:
            continue
        columns = batch.mask[:, :-1]
        each = torch.stack([prompt_context(batch.cache, layer, blocks, columns) for layer in layers], dim=1).cpu()
        if not len(found):
            found = torch.zeros(count, *each.shape[1:])
        found[batch.rows], known[batch.rows] = each, True
    return found, known
