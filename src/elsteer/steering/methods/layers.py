"""What the baselines share: which layers to steer, lengths and strengths.

A baseline steers one block or a band of blocks. A band's moves add up in the residual stream, so each of its m layers gets
1/m of the setting, and one grid serves both. Lengths are in units of a layer's spread (`OutcomeMeans.spread`), the root mean
square distance of its states from their mean, as eta is.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EVERY_TOKEN", "band", "bands", "choices", "layer_at", "per_row", "singles", "unit"]

EVERY_TOKEN = 4096  # a window longer than any answer: every generated token is moved
TINY = 1e-12


def layer_at(share: float, depth: int) -> int:
    """The block at that share of the depth, one of 0 to depth - 1."""
    return min(depth - 1, max(0, round(share * depth)))


def singles(depth: int, shares: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7)) -> list[tuple[int, ...]]:
    """One block each; shares that fall on one block give it once."""
    return [(layer,) for layer in dict.fromkeys(layer_at(share, depth) for share in shares)]


def band(depth: int, start: float, end: float) -> tuple[int, ...]:
    """The blocks from share `start` of the depth up to, not including, share `end`; at least one."""
    first = layer_at(start, depth)
    return tuple(range(first, max(first + 1, min(depth, round(end * depth)))))


def bands(depth: int) -> list[tuple[int, ...]]:
    """The middle and the upper middle, and both together."""
    found = [band(depth, 0.4, 0.6), band(depth, 0.55, 0.8), band(depth, 0.4, 0.8)]
    return list(dict.fromkeys(found))


def choices(depth: int) -> list[tuple[int, ...]]:
    """Single blocks, then bands, none twice."""
    return list(dict.fromkeys([*singles(depth), *bands(depth)]))


def unit(vector: Tensor) -> Tensor:
    """vector (..., d) over its length; zero stays zero."""
    return vector / vector.norm(dim=-1, keepdim=True).clamp_min(TINY)


def per_row(strength: Tensor | float, states: Tensor) -> Tensor | float:
    """A strength of (n,) as a column (n, 1) beside states (n, d), in float32 on their device; a number as it is."""
    if isinstance(strength, torch.Tensor) and strength.dim() == 1:
        return strength.to(states.device, torch.float32)[:, None]
    return strength
