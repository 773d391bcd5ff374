"""Applying a landscape, or another method, to a model."""

from elsteer.steering.attach import Move, Steering

__all__ = ["Move", "Steering"]
