"""The product energy: its fit, its gradient, and the step that it steers by."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elsteer.energy.descent import Descent
from elsteer.energy.model import energy_of, slope_of
from elsteer.energy.product import ProductEnergies, held_slope
from elsteer.energy.tensors import check_tensors
from elsteer.errors import LandscapeError
from elsteer.training import _guard


def synthetic(each: int = 80, size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """States (n, 2, d), harmful (n,), refused (n,): axis 1 tells harmful prompts, axis 0 refusals, each in both layers."""
    generator = torch.Generator().manual_seed(seed)
    harmful = torch.tensor([False, False, True, True]).repeat_interleave(each)
    refused = torch.tensor([False, True, False, True]).repeat_interleave(each)
    states = torch.randn(4 * each, 2, size, generator=generator)
    states[:, :, 0] += 3.0 * refused[:, None]
    states[:, :, 1] += 4.0 * harmful[:, None]
    return states, harmful, refused


def fitted(**rest: float) -> ProductEnergies:
    models = ProductEnergies([4, 7], 12)
    models.fit(*synthetic(), **rest)  # type: ignore[arg-type]
    return models


def drawn(size: int, seed: int, units: int = 0, sharpness: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "weight": torch.randn(2 + units, size, generator=generator) / size**0.5,
        "bias": torch.randn(2 + units, generator=generator),
        "mean": torch.randn(size, generator=generator),
        "scale": torch.tensor(1.7),
    }
    if sharpness:
        tensors["sharpness"] = torch.tensor(sharpness)
        tensors["weight"] = torch.cat([tensors["weight"], torch.randn(1, size, generator=generator) / size**0.5])
        tensors["bias"] = torch.cat([tensors["bias"], torch.randn(1, generator=generator)])
    return tensors | ({"bend": torch.randn(units, generator=generator)} if units else {})


def guard_of(tensors: dict[str, Tensor], seed: int) -> Tensor:
    return _guard(torch.randn(len(tensors["mean"]), generator=torch.Generator().manual_seed(seed)), tensors)


def by_autograd(tensors: dict[str, Tensor], states: Tensor, eta: float, steps: int, guard: Tensor | None) -> Tensor:
    """Gradient steps on the states in float64, E written out: each divided by the greater of |P grad E| and |P W'_v|.

    With a guard, u and r are held, and each is divided by |P W'_v|.
    """
    one = {name: tensor.double() for name, tensor in tensors.items()}
    h = states.double()
    keep = torch.eye(h.shape[1], dtype=h.dtype)
    if guard is not None:
        keep = keep - guard.double() @ guard.double().T
    length = eta * float(tensors["scale"]) * h.shape[1] ** 0.5
    reach = (one["weight"][1] / one["scale"] @ keep).norm()
    for _ in range(steps):
        h = h.detach().requires_grad_()
        x = (h - one["mean"]) / one["scale"]
        z = x @ one["weight"].T + one["bias"]
        u = z[:, 0]
        if "bend" in one:
            inside = z[:, 2 : 2 + len(one["bend"])]
            u = u + (inside * torch.sigmoid(inside)) @ one["bend"]
        r = z[:, -1]
        if guard is not None:
            u, r = u.detach(), r.detach()
        energy = -torch.tanh(u) * z[:, 1]
        if "sharpness" in one:
            energy = energy * 2 / (1 + torch.exp(one["sharpness"] * torch.tanh(u) * r))
        gradient = torch.autograd.grad(energy.sum(), h)[0] @ keep
        longest = torch.zeros(1) if guard is not None else gradient.norm(dim=1, keepdim=True)
        h = h - length * gradient / torch.maximum(longest, reach)
    return (h - states.double()).detach().float()


def test_wanted_outcomes_have_low_energy() -> None:
    states, harmful, refused = synthetic(seed=1)  # not those that it was fitted on
    energies = fitted()(states)
    wanted = harmful == refused
    assert float(energies[wanted].mean()) < -0.3 < 0.3 < float(energies[~wanted].mean())


def test_a_state_is_read_as_due_and_as_refusing() -> None:
    states, harmful, refused = synthetic()
    models = fitted()
    for at in (0, 1):
        tensors = models.tensors_of(at)
        u, v = ((states[:, at] - tensors["mean"]) / tensors["scale"] @ tensors["weight"].T + tensors["bias"]).T
        assert float(((u > 0) == harmful).float().mean()) > 0.95
        sides = [v[(harmful == kind) & (refused == said)].mean() for kind in (False, True) for said in (False, True)]
        assert float(sides[0] + sides[2]) / 2 == pytest.approx(-0.5, abs=1e-4)
        assert float(sides[1] + sides[3]) / 2 == pytest.approx(0.5, abs=1e-4)


def test_a_higher_benign_weight_asks_for_more_harm_before_refusing_is_due() -> None:
    low, high = fitted(benign_weight=0.5, ridge=1.0), fitted(benign_weight=4.0, ridge=1.0)
    states, _, _ = synthetic()
    due = []
    for models in (low, high):
        tensors = models.tensors_of(0)
        u = (states[:, 0] - tensors["mean"]) / tensors["scale"] @ tensors["weight"][0] + tensors["bias"][0]
        due.append(int((u > 0).sum()))
    assert due[0] > due[1]


def test_the_same_states_give_the_same_energies() -> None:
    first, second = fitted(), fitted()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_states_that_are_all_the_same_give_no_nan() -> None:
    models = ProductEnergies([0], 6)
    _, harmful, refused = synthetic()
    models.fit(torch.ones(len(harmful), 1, 6), harmful, refused)
    tensors = models.tensors_of(0)
    check_tensors(0, tensors, 6)
    guard = _guard(torch.zeros(6), tensors)
    delta = Descent(tensors, eta=0.1, steps=1, guard=guard).delta(torch.ones(3, 6))
    assert bool(torch.isfinite(delta).all())


@given(st.integers(4, 40), st.integers(0, 5), st.sampled_from([0.0, 0.5, 8.0]), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_slope_is_the_gradient_of_the_energy(size: int, units: int, sharpness: float, seed: int) -> None:
    tensors = drawn(size, seed, units, sharpness)
    width = len(tensors["weight"])
    z = torch.randn(7, width, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    energy, slope = slope_of(tensors, z)
    (wanted,) = torch.autograd.grad(energy_of(tensors, z).sum(), z)
    torch.testing.assert_close(energy, energy_of(tensors, z))
    torch.testing.assert_close(slope, wanted)
    torch.testing.assert_close(held_slope(z, tensors.get("bend"), tensors.get("sharpness")), wanted[:, 1:2])


@given(
    st.integers(6, 300),
    st.integers(0, 6),
    st.sampled_from([0.0, 2.0]),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_descent_equals_gradient_steps_on_the_states(
    size: int, units: int, sharpness: float, guarded: bool, steps: int, seed: int
) -> None:
    tensors = drawn(size, seed, units, sharpness)
    guard = guard_of(tensors, seed) if guarded else None
    states = tensors["mean"] + 1.7 * torch.randn(6, size, generator=torch.Generator().manual_seed(seed + 1))
    found = Descent(tensors, eta=0.05, steps=steps, guard=guard).delta(states)
    wanted = by_autograd(tensors, states, 0.05, steps, guard)
    assert float((found - wanted).norm()) <= 2e-4 * float(wanted.norm())


def test_the_guarded_step_moves_towards_what_is_due_and_less_in_doubt() -> None:
    tensors = drawn(32, 3)
    guard = guard_of(tensors, 3)
    weight, scale = tensors["weight"], tensors["scale"]
    states = tensors["mean"] + scale * torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    u = (states - tensors["mean"]) / scale @ weight[0] + tensors["bias"][0]
    delta = Descent(tensors, eta=0.1, steps=1, guard=guard).delta(states)
    moved = delta / scale @ weight.T
    torch.testing.assert_close(moved[:, 0], torch.zeros(50), atol=1e-5, rtol=0)  # what is asked for stays
    assert torch.equal(moved[:, 1] > 0, u > 0)
    torch.testing.assert_close(delta.norm(dim=1), 0.1 * 1.7 * 32**0.5 * torch.tanh(u).abs(), rtol=1e-4, atol=1e-6)


def test_a_step_is_long_where_the_model_is_wrong_and_short_where_it_is_right() -> None:
    tensors = drawn(3, 0, sharpness=8.0) | {"mean": torch.zeros(3), "scale": torch.tensor(1.0), "bias": torch.zeros(3)}
    tensors["weight"] = torch.eye(3)  # u, v and r are the three coordinates
    guard = torch.tensor([[1.0], [0.0], [0.0]])
    # harmful and answered, harmful and refused, benign and refused, benign and answered, harmful and between the two
    states = torch.tensor([[3, 0, -0.5], [3, 0, 0.5], [-3, 0, 0.5], [-3, 0, -0.5], [3, 0, 0.0]])
    delta = Descent(tensors, eta=0.1, steps=1, guard=guard).delta(states)[:, 1] / (0.1 * 3**0.5)
    t = torch.tanh(torch.tensor(3.0))
    share = 2 / (1 + torch.exp(torch.tensor([-4.0, 4.0, -4.0, 4.0, 0.0]) * t))
    torch.testing.assert_close(delta, share * t * torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]))
    assert share[0] > 1.9
    assert share[1] < 0.1


@pytest.mark.parametrize("units", [0, 4])
def test_a_step_by_a_given_u(units: int) -> None:
    tensors = drawn(16, 2, units, sharpness=2.0)
    guard = guard_of(tensors, 2)
    states = tensors["mean"] + torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    one = Descent(tensors, eta=0.1, steps=1, guard=guard)
    assert not one.pooled
    given = torch.linspace(-2, 2, 6)
    told = {**tensors, "weight": tensors["weight"].clone(), "bias": tensors["bias"].clone()}
    told["weight"][0] = 0  # u is then the bias alone, the same for every state
    if units:
        told["bend"] = torch.zeros(units)
    for row, u in enumerate(given.tolist()):
        told["bias"][0] = u
        wanted = Descent(told, eta=0.1, steps=1, guard=guard).delta(states[row : row + 1])
        found = one.delta(states[row : row + 1], due=given[row : row + 1])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.delta(states, due=one.due(states)), one.delta(states), rtol=1e-4, atol=1e-6)
    assert Descent(tensors | {"pooled": torch.tensor(1.0)}, eta=0.1, steps=1, guard=guard).pooled
    assert not Descent(tensors | {"pooled": torch.tensor(1.0)}, eta=0.1, steps=1).pooled  # u is not held


def test_tensors_of_a_file_are_checked() -> None:
    tensors = drawn(8, 0)
    check_tensors(3, tensors, 8)
    check_tensors(3, drawn(8, 0, units=4), 8)
    check_tensors(3, drawn(8, 0, units=4, sharpness=8.0), 8)
    check_tensors(3, tensors | {"pooled": torch.tensor(1.0)}, 8)
    context = {
        "context_weight": torch.zeros(2, 3, 8),
        "context_query": torch.zeros(3, 8),
        "context_mean": torch.zeros(8),
        "context_blocks": torch.tensor([1.0, 3.0]),
    }
    check_tensors(3, tensors | context, 8)
    for damage in (
        {"weight": torch.zeros(3, 8)},
        {"bias": torch.zeros(3)},
        {"extra": torch.zeros(1)},
        {"sharpness": torch.tensor(8.0)},  # without the reader's row
        {"bend": torch.zeros(1)},
        {"pooled": torch.tensor(0.0)},
        {"context_weight": torch.zeros(2, 3, 8)},
        context | {"context_weight": torch.zeros(2, 3, 4)},
        context | {"context_query": torch.zeros(24)},
        context | {"context_mean": torch.zeros(3, 8)},
        context | {"context_blocks": torch.tensor([3.0, 3.0])},
        context | {"context_blocks": torch.tensor([2.0, 4.0])},  # layer 3 has 3 before it
        context | {"context_blocks": torch.tensor([0.0, 3.0])},  # 8 numbers of 3 blocks
        context | {"context_blocks": torch.tensor([0.0, 0.5])},
        context | {"context_blocks": torch.tensor([0.5, 1.5])},
        context | {"context_blocks": torch.tensor([0.0, math.inf])},
        context | {"context_blocks": torch.tensor([math.nan, 3.0])},
        {
            **context,
            "context_weight": torch.zeros(2, 3, 0),
            "context_query": torch.zeros(3, 0),
            "context_mean": torch.zeros(0),
        },
    ):
        with pytest.raises(LandscapeError, match="layer 3"):
            check_tensors(3, tensors | damage, 8)


@pytest.mark.parametrize("sharpness", [torch.tensor(0.0), torch.ones(2), torch.tensor(float("nan"))])
def test_a_sharpness_that_means_nothing_is_an_error(sharpness: Tensor) -> None:
    with pytest.raises(LandscapeError, match="harpness"):
        check_tensors(3, drawn(8, 0, units=4, sharpness=8.0) | {"sharpness": sharpness}, 8)


def test_the_guard_holds_the_harm_direction_and_what_is_due() -> None:
    tensors, direction = drawn(16, 5), torch.randn(16)
    guard = _guard(direction, tensors)
    assert guard.shape == (16, 2)
    for one in (direction, tensors["weight"][0]):
        torch.testing.assert_close(guard @ (guard.T @ one), one, rtol=1e-4, atol=1e-5)
