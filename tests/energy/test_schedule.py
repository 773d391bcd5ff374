"""The one-cycle learning rate."""

from __future__ import annotations

import pytest
import torch

from elsteer.energy.schedule import one_cycle


@pytest.mark.parametrize("steps", [2, 9, 10, 11, 20, 100])
def test_any_number_of_steps_can_be_taken_and_the_rate_ends_next_to_nothing(steps: int) -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = one_cycle(optimiser, 0.5, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if len(rates) < steps:
            schedule.step()
    assert max(rates) <= 0.5
    if steps >= 20:
        assert max(rates) == pytest.approx(0.5, rel=0.1)
        assert rates.index(max(rates)) < 0.4 * steps
    assert rates[-1] < 1e-3
