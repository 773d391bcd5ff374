"""What a landscape can move states by. A new method is one file here and one line in METHODS."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from elsteer.steering.attach import Move
from elsteer.steering.methods.els import els
from elsteer.steering.methods.random import RandomMove, random_direction
from elsteer.steering.rule import SteeringRule

__all__ = ["METHODS", "Method", "RandomMove"]

# (layer, the tensors of its energy model, its guarded directions (d, k) or None, the rule) to what moves its states.
Method = Callable[[int, dict[str, Tensor], Tensor | None, SteeringRule], Move]

METHODS: dict[str, Method] = {
    "els": els,
    "random": random_direction,
    "shuffled": els,  # the control: the same step on energies that were trained on shuffled outcomes
}
