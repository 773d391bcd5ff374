"""`els`: K normalised steps down the layer's energy, in closed form. Source: arXiv 2510.08646; `elsteer.energy.descent`."""

from __future__ import annotations

from torch import Tensor

from elsteer.energy.descent import Descent
from elsteer.steering.rule import SteeringRule

__all__ = ["els"]


def els(layer: int, tensors: dict[str, Tensor], guard: Tensor | None, rule: SteeringRule) -> Descent:
    """The descent of one layer: its energy model's tensors, its guarded directions (d, k) or None, and the rule."""
    kept = guard if rule.guard else None
    return Descent(tensors, eta=rule.eta, steps=rule.steps, gate=rule.gate(layer), guard=kept)
