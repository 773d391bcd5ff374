"""The registry of methods, and the random control."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elsteer.steering.methods import METHODS, RandomMove
from elsteer.steering.rule import SteeringRule
from landscapes import tiny_landscape

STATES = torch.randn(30, 32, generator=torch.Generator().manual_seed(0)) * 0.7


@pytest.mark.parametrize("strength", [1.0, 0.5, torch.linspace(0, 1, 30)])
@pytest.mark.parametrize("guard", [True, False])
def test_the_control_moves_each_state_as_far_as_els_does(strength: torch.Tensor | float, guard: bool) -> None:
    landscape = tiny_landscape().with_rule(guard=guard)
    els = landscape.move(1).delta(STATES, strength)
    control = landscape.with_method("random").move(1).delta(STATES, strength)
    torch.testing.assert_close(control.norm(dim=-1), els.norm(dim=-1))
    assert torch.cosine_similarity(control, els)[1:].abs().max() < 0.9


def test_all_states_go_the_same_way_and_always_will() -> None:
    move = tiny_landscape(method="random").move(1)
    ways = nn.functional.normalize(move.delta(STATES), dim=-1)
    torch.testing.assert_close(ways, ways[:1].expand_as(ways))
    again = tiny_landscape(method="random").move(1)
    assert torch.equal(again.delta(STATES), move.delta(STATES))


def test_layers_and_seeds_have_directions_of_their_own() -> None:
    landscape = tiny_landscape()
    directions = [RandomMove(landscape.descent(1), layer, seed).direction for layer in (1, 2) for seed in (0, 1)]
    for at, one in enumerate(directions):
        assert abs(float(one.norm()) - 1) < 1e-6
        assert all(abs(float(one @ other)) < 0.7 for other in directions[:at])


def test_what_the_gate_holds_stays() -> None:
    landscape = tiny_landscape()
    energies = landscape.energy(1, STATES)
    tau = float(energies.median())
    gated = landscape.with_rule(steps=1, gates={1: tau, 2: tau}).with_method("random")
    moved = gated.move(1).delta(STATES).norm(dim=-1) > 0
    assert torch.equal(moved, energies > tau)
    assert 0 < int(moved.sum()) < len(STATES)


def test_els_without_the_guard_moves_along_it_too() -> None:
    landscape = tiny_landscape()
    basis = landscape.guards[1]
    assert (landscape.move(1).delta(STATES) @ basis).abs().max() < 1e-5
    assert (landscape.with_rule(guard=False).move(1).delta(STATES) @ basis).abs().max() > 1e-3


def test_a_new_method_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(nn.Module):
        def delta(self, states: torch.Tensor, strength: torch.Tensor | float = 1.0) -> torch.Tensor:
            return torch.zeros_like(states)

    monkeypatch.setitem(METHODS, "still", lambda layer, tensors, guard, rule: Still())
    assert not tiny_landscape(method="still").move(1).delta(STATES).any()


def test_a_rule_survives_json() -> None:
    rule = SteeringRule((3, 12), 0.08, 3, 2, gates={3: -1.5, 12: 0.0}, guard=False, strength=0.5)
    assert SteeringRule.from_dict(rule.to_dict()) == rule
