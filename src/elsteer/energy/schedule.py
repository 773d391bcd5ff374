"""The learning rate of all trainings here: one cycle (Smith and Topin 2017, arXiv 1708.07120)."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

__all__ = ["one_cycle"]


def one_cycle(optimiser: Optimizer, peak: float | list[float], steps: int) -> OneCycleLR:
    """A rate that rises to `peak` (of each parameter group) over a tenth of the `steps`, and falls over the rest."""
    # A tenth of ten steps is a rise of no length, which OneCycleLR divides by.
    return OneCycleLR(optimiser, peak, total_steps=steps, pct_start=0.11 if steps == 10 else 0.1)
