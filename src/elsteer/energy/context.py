"""The context of a state: what the model keeps of the prompt's other tokens, by attention with learned queries.

A prompt's last token mostly says what the model is about to do; what the request is about is kept where its words are, above
all where a jailbreak's text stands around it. The key-value cache holds that: each block keeps a value vector of every token.
H queries q each weigh the prompt's tokens j before the last one by the values y_j of the blocks `first` to `stop` - 1,

    context_h = sum_j softmax_j(q_h . y_j) y_j - mean,      y_j = the values of token j in these blocks, one after the other

(attention pooling, as in the attention probes of McKenzie et al. 2025, arXiv 2506.10805), which costs next to nothing
beside the prompt itself, does not depend on steering (only later tokens are moved), and is there whenever the last token is
processed: in one pass, after chunks, or on a cache of an earlier turn. Energies that are trained through the model read u of
state and context together, and the queries are trained with it (`elsteer.energy.refine`).

Shapes: B rows, T columns of tokens, H queries, C = blocks x key-value heads x head size. mean (C,) is that of the values of
the training prompts; a prompt of one token has a context of zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from elsteer.errors import SteeringError

if TYPE_CHECKING:
    from elsteer.decoding import PromptBatch

__all__ = ["attend", "prompt_context", "prompt_values", "values_of"]


def attend(values: Tensor, kept: Tensor, query: Tensor, mean: Tensor) -> Tensor:
    """(B, H, C) contexts of values (B, T, C); kept: (B, T) bool, which tokens count; query: (H, C); mean: (C,)."""
    scores = torch.einsum("btc,hc->bth", values, query)
    scores = scores.masked_fill(~kept[:, :, None], torch.finfo(scores.dtype).min)
    share = scores.softmax(dim=1)
    pooled = torch.einsum("bth,btc->bhc", share, values) - mean
    return pooled * kept.any(dim=1)[:, None, None]


def prompt_context(cache: Any, blocks: tuple[int, int], columns: Tensor, query: Tensor, mean: Tensor) -> Tensor:
    """(B, H, C) float32: the contexts of the rows of a key-value cache that is filled up to the last of the blocks.

    blocks: first and stop. columns: (B, T) bool, which columns are the prompt's tokens before the last one; columns that
    the cache has beyond these do not count. Raises SteeringError where the cache holds no values.
    """
    values, kept = prompt_values(cache, blocks, columns)
    return attend(values.float(), kept, query.to(values.device), mean.to(values.device)).to(columns.device)


def prompt_values(cache: Any, blocks: tuple[int, int], columns: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B, T, C) of the blocks first to stop - 1, and which of the columns count, (B, T) bool.

    Raises SteeringError where the cache holds no values.
    """
    found: list[Tensor] = []
    width, kept = columns.shape[1], columns
    for at in range(*blocks):
        values = getattr(cache.layers[at], "values", None) if at < len(getattr(cache, "layers", ())) else None
        if not isinstance(values, Tensor) or values.dim() != 4 or hasattr(cache.layers[at], "_quantized_values"):
            raise SteeringError(
                "This landscape reads the key-value cache, and there is none of a kind that it knows in this forward pass: "
                "call the model with use_cache=True, and with no quantised or recurrent cache."
            )
        flat = values.transpose(1, 2).flatten(2)[:, :width]  # a static cache has room behind the columns
        if (lost := width - flat.shape[1]) > 0:  # a sliding window keeps the last ones
            flat = F.pad(flat, (0, 0, lost, 0))
            kept = kept & (torch.arange(width, device=kept.device) >= lost)
        found.append(flat.to(found[0].device if found else flat.device))
    return torch.cat(found, dim=2), kept.to(found[0].device)


def values_of(batch: PromptBatch, blocks: tuple[int, int]) -> list[Tensor]:
    """By row of a prefilled batch, the values (T, C) of the prompt's tokens before the last one, on the CPU.

    Raises SteeringError where the cache holds no values.
    """
    if batch.cache is None:  # prompts of one token
        return [torch.zeros(0, 1)] * len(batch.rows)
    values, kept = prompt_values(batch.cache, blocks, batch.mask[:, :-1])
    return [one[real].cpu() for one, real in zip(values, kept, strict=True)]
