"""`random`: the negative control. Each state moves as far as `els` would move it, but in a direction that means nothing.

    delta(h) = |delta_els(h)| u,     u a unit vector drawn once per layer from a normal distribution with a fixed seed

A state that the gate holds stays. What this control does to refusals, any push of that length does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elsteer.energy.descent import Descent
from elsteer.steering.methods.els import els
from elsteer.steering.rule import SteeringRule

__all__ = ["RandomMove", "random_direction"]


class RandomMove(nn.Module):
    """The length of `descent`'s step along one fixed random direction of (d,); `seed` and `layer` decide which."""

    direction: Tensor

    def __init__(self, descent: Descent, layer: int, seed: int = 0) -> None:
        super().__init__()
        self.descent, self.context_blocks, self.pooled = descent, descent.context_blocks, descent.pooled
        # Drawn on the CPU in float64, so that the direction is the same on every device.
        generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
        drawn = torch.randn(descent.down.shape[1], generator=generator, dtype=torch.float64)
        self.register_buffer("direction", (drawn / drawn.norm()).float().to(descent.down.device))

    @property
    def context_query(self) -> Tensor:
        """That of `descent`."""
        return self.descent.context_query

    @property
    def context_mean(self) -> Tensor:
        """That of `descent`."""
        return self.descent.context_mean

    def due(self, states: Tensor, context: Tensor | None = None) -> Tensor:
        """As of `descent`."""
        return self.descent.due(states, context)

    def delta(
        self,
        states: Tensor,
        strength: Tensor | float = 1.0,
        context: Tensor | None = None,
        due: Tensor | None = None,
    ) -> Tensor:
        """What to add to states (n, d), float32; strength: one number or (n,); context, due: as for `descent`."""
        return self.descent.delta(states, strength, context, due).norm(dim=-1, keepdim=True) * self.direction


def random_direction(layer: int, tensors: dict[str, Tensor], guard: Tensor | None, rule: SteeringRule) -> RandomMove:
    """The control of one layer; see `els` for the arguments."""
    return RandomMove(els(layer, tensors, guard, rule), layer)
