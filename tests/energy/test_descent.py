"""The closed-form descent against autograd and against the loop written out on the states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elsteer.energy.descent import Descent
from elsteer.energy.model import EnergyModels, energy_of, slope_of

SHAPES = st.fixed_dictionaries(
    {
        "hidden_size": st.integers(3, 40),
        "width": st.integers(2, 24),
        "hidden": st.lists(st.integers(1, 12), max_size=2).map(tuple),
        "layer_norm": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


def made(hidden_size: int, width: int, hidden: tuple[int, ...], layer_norm: bool, seed: int) -> dict[str, Tensor]:
    """One layer's energy model with nothing at its initial value, and a mean and a scale like real states'."""
    generator = torch.Generator().manual_seed(seed)
    models = EnergyModels([0], hidden_size, width=width, hidden=hidden, layer_norm=layer_norm)
    with torch.no_grad():
        for tensor in models.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
        models.norm_weight.add_(1.0)
    models.mean.copy_(torch.randn(1, hidden_size, generator=generator))
    models.scale.fill_(2.5)
    return models.tensors_of(0)


def states_like(tensors: dict[str, Tensor], rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    d = tensors["weight"].shape[1]
    return tensors["mean"] + tensors["scale"] * torch.randn(rows, d, generator=generator)


def energy_on(tensors: dict[str, Tensor], states: Tensor) -> Tensor:
    """E(h) written out once more with torch's own layers, in the dtype of `states`."""
    cast = {name: tensor.to(states.dtype) for name, tensor in tensors.items()}
    x = (states - cast["mean"]) / cast["scale"]
    u = x @ cast["weight"].T + cast["bias"]
    if "norm_weight" in cast:
        u = torch.nn.functional.layer_norm(u, u.shape[-1:], cast["norm_weight"], cast["norm_bias"], 1e-5)
    a = torch.nn.functional.silu(u)
    at = 0
    while f"hidden_weights.{at}" in cast:
        a = torch.nn.functional.silu(a @ cast[f"hidden_weights.{at}"].T + cast[f"hidden_biases.{at}"])
        at += 1
    return a @ cast["read_out"]


def by_autograd(
    tensors: dict[str, Tensor],
    states: Tensor,
    eta: float,
    steps: int,
    strength: Tensor | float = 1.0,
    gate: float | None = None,
    guard: Tensor | None = None,
) -> Tensor:
    """K normalised gradient steps on the states themselves, in float64: what `Descent.delta` must equal."""
    h = states.double()
    d = h.shape[1]
    keep = torch.eye(d, dtype=h.dtype)
    if guard is not None:
        keep = keep - guard.double() @ guard.double().T
    length = torch.as_tensor(eta * float(tensors["scale"]) * d**0.5 * strength, dtype=h.dtype).expand(len(h))[:, None]
    for _ in range(steps):
        h = h.detach().requires_grad_()
        energy = energy_on(tensors, h)
        (gradient,) = torch.autograd.grad(energy.sum(), h)
        gradient = gradient @ keep
        step = length * gradient / gradient.norm(dim=-1, keepdim=True)
        if gate is not None:
            step = torch.where((energy > gate)[:, None], step, 0.0)
        h = h - step
    return (h - states.double()).detach().float()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def orthonormal(d: int, k: int, seed: int = 3) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed)))[0]


@given(SHAPES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_slope_is_the_gradient_of_the_energy(shape: dict) -> None:
    tensors = made(**shape)
    z = torch.randn(7, shape["width"], generator=torch.Generator().manual_seed(shape["seed"]), requires_grad=True)
    energy, slope = slope_of(tensors, z)
    (wanted,) = torch.autograd.grad(energy_of(tensors, z).sum(), z)
    torch.testing.assert_close(energy, energy_of(tensors, z))
    # Rows of 2 or 3 numbers through LayerNorm can have a slope that is nothing but rounding: hence the floor.
    floor = 1e-6 * float(tensors["read_out"].norm())
    assert float((slope - wanted).detach().norm()) <= 1e-5 * float(wanted.norm()) + floor


@given(SHAPES, st.integers(0, 2), st.booleans(), st.integers(1, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_descent_equals_gradient_steps_on_the_states(shape: dict, guarded: int, gated: bool, steps: int) -> None:
    shape = {**shape, "width": shape["width"] + 6, "hidden_size": shape["hidden_size"] + 4}
    tensors = made(**shape)
    states = states_like(tensors, 6, shape["seed"])
    guard = orthonormal(shape["hidden_size"], guarded) if guarded else None
    energies = energy_on(tensors, states).sort().values
    gate = float((energies[2] + energies[3]) / 2) if gated else None
    strength = torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0, -0.5])
    # A step that crosses a bend is sensitive to rounding: small steps, so that both ways see the same energy.
    descent = Descent(tensors, eta=0.01, steps=steps, gate=gate, guard=guard)
    wanted = by_autograd(tensors, states, 0.01, steps, strength, gate, guard)
    assert relative(descent.delta(states, strength), wanted) < 2e-4


@pytest.mark.parametrize("hidden", [(), (16,), (16, 8)])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("guarded", [0, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_descent_is_exact_at_real_shapes(hidden: tuple[int, ...], layer_norm: bool, guarded: int, gated: bool) -> None:
    tensors = made(256, 64, hidden, layer_norm, 1)
    states = states_like(tensors, 8)
    guard = orthonormal(256, guarded) if guarded else None
    energies = energy_on(tensors, states).sort().values
    gate = float((energies[3] + energies[4]) / 2) if gated else None
    strength = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.25, 1.0, 1.0])
    descent = Descent(tensors, eta=0.05, steps=3, gate=gate, guard=guard)
    wanted = by_autograd(tensors, states, 0.05, 3, strength, gate, guard)
    assert relative(descent.delta(states, strength), wanted) < 1e-5


def test_guarded_coordinates_do_not_change() -> None:
    tensors, guard = made(64, 32, (16,), True, 2), orthonormal(64, 3)
    states = states_like(tensors, 10)
    delta = Descent(tensors, eta=0.1, steps=3, guard=guard).delta(states)
    free = Descent(tensors, eta=0.1, steps=3).delta(states)
    assert float((free @ guard).abs().max()) > 1e-2  # without the guard they would
    assert float((delta @ guard).abs().max()) < 1e-5 * float(delta.norm(dim=1).max())


def test_guard_without_directions_is_no_guard() -> None:
    tensors = made(16, 8, (4,), True, 2)
    states = states_like(tensors, 3)
    plain = Descent(tensors, eta=0.1, steps=2).delta(states)
    assert torch.equal(Descent(tensors, eta=0.1, steps=2, guard=torch.zeros(16, 0)).delta(states), plain)


def test_every_step_has_the_length_eta_in_units_of_the_state_norm() -> None:
    tensors = made(64, 32, (16,), True, 5)
    states = states_like(tensors, 10)
    for strength in (1.0, 0.5):
        delta = Descent(tensors, eta=0.07, steps=1).delta(states, strength)
        wanted = 0.07 * strength * 2.5 * 64**0.5
        torch.testing.assert_close(delta.norm(dim=1), torch.full((10,), wanted), rtol=1e-4, atol=0)


def test_gated_rows_stay_exactly() -> None:
    tensors = made(32, 16, (8,), True, 4)
    states = states_like(tensors, 12)
    energies = Descent(tensors, eta=0.1, steps=3).energy(states)
    gate = float(energies.sort().values[6])  # one row lies at the gate itself: it stays too
    delta = Descent(tensors, eta=0.1, steps=3, gate=gate).delta(states)
    stays = energies <= gate
    assert int(stays.sum()) == 7
    assert torch.equal(delta[stays], torch.zeros_like(delta[stays]))
    assert bool((delta[~stays].norm(dim=1) > 0).all())


def test_strength_zero_moves_nothing_at_all() -> None:
    tensors = made(32, 16, (8,), True, 4)
    states, descent = states_like(tensors, 4), Descent(tensors, eta=0.1, steps=3)
    assert torch.equal(descent.delta(states, 0.0), torch.zeros(4, 32))
    mixed = descent.delta(states, torch.tensor([0.0, 1.0, 0.0, 2.0]))
    assert torch.equal(mixed[[0, 2]], torch.zeros(2, 32))
    torch.testing.assert_close(mixed[1], descent.delta(states, 1.0)[1])
    torch.testing.assert_close(mixed[3], descent.delta(states, 2.0)[3])


def test_a_flat_energy_moves_nothing_and_makes_no_nan() -> None:
    tensors = made(16, 8, (4,), True, 1)
    tensors["read_out"] = torch.zeros_like(tensors["read_out"])
    delta = Descent(tensors, eta=0.1, steps=3).delta(states_like(tensors, 5))
    assert torch.equal(delta, torch.zeros_like(delta))


def test_descent_goes_downhill() -> None:
    tensors = made(64, 32, (16,), True, 6)
    states, descent = states_like(tensors, 32), Descent(tensors, eta=0.02, steps=3)
    assert bool((descent.energy(states + descent.delta(states)) < descent.energy(states)).all())


def test_the_path_ends_where_the_step_ends() -> None:
    tensors = made(32, 16, (8,), True, 7)
    states, guard = states_like(tensors, 5), orthonormal(32, 1)
    descent = Descent(tensors, eta=0.05, steps=4, gate=0.0, guard=guard)
    path = descent.path(states, 0.5)
    assert path.shape == (5, 5, 32)
    assert torch.equal(path[0], states)
    torch.testing.assert_close(path[-1], states + descent.delta(states, 0.5))


def test_descent_runs_where_autograd_cannot() -> None:
    tensors = made(32, 16, (8,), True, 7)
    states, descent = states_like(tensors, 5), Descent(tensors, eta=0.05, steps=3)
    wanted = descent.delta(states)
    with torch.inference_mode():
        assert torch.equal(descent.delta(states.clone()), wanted)
    assert not wanted.requires_grad


def test_energy_of_a_descent_is_the_models_energy() -> None:
    tensors = made(48, 16, (8, 4), True, 8)
    states = states_like(tensors, 9)
    torch.testing.assert_close(
        Descent(tensors, eta=0.1, steps=1).energy(states), energy_on(tensors, states), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_computed_in_float32(dtype: torch.dtype) -> None:
    tensors = made(32, 16, (8,), True, 9)
    states, descent = states_like(tensors, 4).to(dtype), Descent(tensors, eta=0.05, steps=2)
    delta = descent.delta(states)
    assert delta.dtype == torch.float32
    assert torch.equal(delta, descent.delta(states.float()))
