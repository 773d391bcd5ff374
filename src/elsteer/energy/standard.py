"""Mean and scale of a layer's training states."""

from __future__ import annotations

from torch import Tensor

__all__ = ["standardised"]


def standardised(states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and scale (), the root mean square of states (N, d) minus the mean, over all coordinates; float32."""
    rows = states.double()
    mean = rows.mean(dim=0)
    return mean.float(), (rows - mean).square().mean().sqrt().clamp_min(1e-8).float()
