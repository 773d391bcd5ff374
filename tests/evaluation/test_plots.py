"""The pictures: PNG bytes for every shape of data a run can bring, the same bytes for the same numbers."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from test_tables import rows_of

from elsteer.evaluation.plots import before_after_picture, frontier_picture, landscape_axes, landscape_picture
from elsteer.evaluation.tables import compare

OUTCOMES = ["helpful", "safe_refusal", "false_refusal", "jailbreak"]


def states_of(outcomes: list[str], width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(outcomes), width, generator=generator) * 0.1
    for row, outcome in enumerate(outcomes):
        states[row, 0] += 3.0 if outcome in ("false_refusal", "safe_refusal") else 0.0
        states[row, 1] += 2.0 if outcome in ("safe_refusal", "jailbreak") else 0.0
    return states


def energy(states: torch.Tensor) -> torch.Tensor:
    return states.square().sum(-1)


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return np.asarray(imread(io.BytesIO(png), format="png"))


def test_the_axes_point_from_helpful_to_false_refusal_and_from_benign_to_harmful() -> None:
    axes, names = landscape_axes(states_of(OUTCOMES * 20), OUTCOMES * 20)
    assert axes @ axes.T == pytest.approx(torch.eye(2).numpy(), abs=1e-5)
    assert float(axes[0, 0]) > 0.98
    assert float(axes[1, 1]) > 0.98
    assert "refused" in names[0]
    assert "harmful" in names[1]


@pytest.mark.parametrize("present", [["helpful"], ["helpful", "false_refusal"], ["jailbreak"], OUTCOMES[:2]])
def test_missing_outcomes_fall_back_to_the_directions_of_most_variance(present: list[str]) -> None:
    outcomes = present * 10
    axes, names = landscape_axes(states_of(outcomes), outcomes)
    assert axes @ axes.T == pytest.approx(torch.eye(2).numpy(), abs=1e-5)
    assert "variance" in names[0] or "variance" in names[1]
    pixels(landscape_picture(states_of(outcomes), outcomes, energy, dpi=40))


def test_two_groups_that_differ_in_one_way_name_that_way_once() -> None:
    outcomes = ["helpful", "safe_refusal"] * 10
    axes, names = landscape_axes(states_of(outcomes), outcomes)
    assert "harmful" in names[1]
    assert "variance" in names[0]
    assert float(axes[1, 0]) == pytest.approx(3 / 13**0.5, abs=0.02)


def test_identical_states_span_no_plane() -> None:
    with pytest.raises(ValueError, match="no plane"):
        landscape_picture(torch.ones(4, 3), OUTCOMES, energy)


def test_the_landscape_is_drawn_with_paths_and_with_axes_of_ones_own() -> None:
    outcomes = OUTCOMES * 15
    states = states_of(outcomes)
    paths = torch.stack([states[:5], states[:5] + 0.3, states[:5] + 0.6], dim=1)
    plain = landscape_picture(states, outcomes, energy, dpi=40)
    drawn = landscape_picture(states, outcomes, energy, paths, dpi=40)
    own = landscape_picture(states, outcomes, energy, paths, axes=torch.tensor([[1.0] * 8, [1.0] + [0.0] * 7]), dpi=40)
    assert pixels(plain).shape[2] == 4
    assert len({plain, drawn, own}) == 3
    with pytest.raises(ValueError, match="no plane"):
        landscape_picture(states, outcomes, energy, axes=torch.ones(2, 8))


def test_the_energy_is_asked_about_points_of_the_plane_through_the_mean() -> None:
    outcomes, asked = OUTCOMES * 15, []
    states = states_of(outcomes)

    def watched(points: torch.Tensor) -> torch.Tensor:
        asked.append(points)
        return energy(points)

    landscape_picture(states, outcomes, watched, dpi=40)
    axes, _ = landscape_axes(states, outcomes)
    from_mean = torch.cat(asked) - states.mean(0)
    assert from_mean == pytest.approx(((from_mean @ axes.T) @ axes).numpy(), abs=1e-4)


def test_a_flat_energy_a_path_that_does_not_move_and_no_path_are_drawn_too() -> None:
    outcomes = OUTCOMES * 5
    states = states_of(outcomes)
    still = states[:3, None].expand(-1, 4, -1)
    pixels(landscape_picture(states, outcomes, lambda points: torch.zeros(len(points)), still, dpi=40))
    pixels(landscape_picture(states, outcomes, energy, torch.empty(0, 4, 8), dpi=40))


def trial(benign: float, harmful: float, **more: Any) -> dict[str, Any]:
    return {
        "compliance_benign": benign,
        "refusal_harmful": harmful,
        "label": "step 0.08",
        "chosen": False,
        "feasible": True,
        "method": "els",
        **more,
    }


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0.5, 0.6)],
        [trial(1.0, 1.0, chosen=True), trial(0.0, 0.0, feasible=False), trial(0.7, 0.7, method="caa")],
    ],
)
def test_the_frontier_is_drawn_for_none_one_and_extreme_trials(trials: list[dict[str, Any]]) -> None:
    pixels(frontier_picture(trials, (0.5, 0.6), dpi=40))


def test_before_and_after_is_drawn_for_one_kind_of_prompt_or_both() -> None:
    benign = compare(rows_of("rrcc", "cccc"), "els")
    harmful = compare(rows_of("rrrc", "ccrc", harmful=True), "els")
    small, large = (pixels(before_after_picture(group, dpi=40)) for group in (benign, benign + harmful))
    assert large.shape[0] > small.shape[0]


def test_groups_without_a_scored_pair_are_left_out_and_none_at_all_is_an_error() -> None:
    scored, unscored = compare(rows_of("rc", "cc"), "els"), compare(rows_of("uu", "uu", suite="x"), "els")
    assert before_after_picture(scored + unscored, dpi=40) == before_after_picture(scored, dpi=40)
    with pytest.raises(ValueError, match="no group"):
        before_after_picture(unscored)


def test_a_name_of_dollars_and_a_long_one_are_drawn() -> None:
    small = pixels(before_after_picture(compare(rows_of("rc", "cc", suite="x"), "els"), title="$x_{", dpi=40))
    for name in ("cost$5_x^{$", "n" * 300):
        drawn = pixels(before_after_picture(compare(rows_of("rc", "cc", suite=name), "els"), title="a$b_{$", dpi=40))
        assert drawn.shape == small.shape


def test_drawing_leaves_matplotlibs_global_state_alone() -> None:
    before_after_picture(compare(rows_of("rc", "cc"), "els"), dpi=40)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
