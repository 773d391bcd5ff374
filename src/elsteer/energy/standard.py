"""Sums over a layer's training states, in float64 by parts: mean and scale, and weighted sums."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["standardised", "weighted_sums"]

_ROWS_AT_ONCE = 4096  # a float64 copy of all states would be twice as large as they are


def standardised(states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and scale (), the root mean square of states (N, d) minus the mean, over all coordinates; float32."""
    parts = states.split(_ROWS_AT_ONCE)
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(states)
    squares = torch.stack([(part.double() - mean).square().sum() for part in parts]).sum()
    return mean.float(), (squares / states.numel()).sqrt().clamp_min(1e-8).float()


def weighted_sums(weights: Tensor, states: Tensor) -> Tensor:
    """weights (k, N) times states (N, d): (k, d) in float64."""
    parts = zip(weights.double().split(_ROWS_AT_ONCE, dim=1), states.split(_ROWS_AT_ONCE), strict=True)
    return torch.stack([some @ part.double() for some, part in parts]).sum(dim=0)
