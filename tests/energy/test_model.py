"""Many energy models as one module: the same energies as each by itself, dropout in training only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elsteer.energy.descent import Descent
from elsteer.energy.model import EnergyModels, energy_of


def made(hidden: tuple[int, ...] = (8,), layer_norm: bool = True, dropout: float = 0.0) -> EnergyModels:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = EnergyModels([3, 5, 6], 24, width=12, hidden=hidden, layer_norm=layer_norm, dropout=dropout)
        for parameter in models.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    models.standardise(states_of(50, seed=9))
    return models.eval()


def states_of(rows: int, seed: int = 1) -> Tensor:
    return 3.0 * torch.randn(rows, 3, 24, generator=torch.Generator().manual_seed(seed)) + 2.0


@pytest.mark.parametrize("hidden", [(), (8,), (8, 4)])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_batched_module_gives_the_energies_that_steer(hidden: tuple[int, ...], layer_norm: bool) -> None:
    models, states = made(hidden, layer_norm), states_of(7)
    with torch.no_grad():
        energies = models(states)
    assert energies.shape == (7, 3)
    for at in range(3):
        tensors = models.tensors_of(at)
        assert ("norm_weight" in tensors) == layer_norm
        z = ((states[:, at] - tensors["mean"]) / tensors["scale"]) @ tensors["weight"].T + tensors["bias"]
        torch.testing.assert_close(energy_of(tensors, z), energies[:, at], rtol=1e-5, atol=1e-5)
        descent = Descent(tensors, eta=0.1, steps=1)
        torch.testing.assert_close(descent.energy(states[:, at]), energies[:, at], rtol=1e-4, atol=1e-5)


def test_standardised_states_have_mean_zero_and_root_mean_square_one() -> None:
    models, states = made(), states_of(50, seed=9)
    x = (states - models.mean) / models.scale[:, None]
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(3, 24), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.square().mean(dim=(0, 2)).sqrt(), torch.ones(3))


@pytest.mark.parametrize("hidden", [(), (8,), (8, 4)])
def test_dropout_is_off_outside_training(hidden: tuple[int, ...]) -> None:
    models, states = made(hidden, dropout=0.5), states_of(7)
    with torch.no_grad():
        assert torch.equal(models(states), models(states))
        models.train()
        assert not torch.equal(models(states), models(states))  # and on in it, whatever the depth
        steered = Descent(models.tensors_of(1), eta=0.1, steps=3)
        assert torch.equal(steered.delta(states[:, 1]), steered.delta(states[:, 1]))


def test_the_tensors_of_a_layer_are_copies() -> None:
    models = made()
    models.tensors_of(0)["weight"].zero_()
    assert float(models.weight[0].detach().abs().sum()) > 0
