"""Training: separates what can be separated, the same for the same seed, keeps each layer's best epoch."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from elsteer.energy.descent import Descent
from elsteer.energy.train import (
    BENIGN_HARMFUL,
    _info_nce,
    _split,
    _ways,
    _with_counterparts,
    auroc,
    harm_direction,
    train,
)
from elsteer.errors import RunError
from elsteer.settings import TrainingSettings

FAST = TrainingSettings(energy="network", width=16, hidden=(8,), epochs=6, batch_per_outcome=16, learning_rate=1e-2)
NAMES = list(BENIGN_HARMFUL)


def synthetic(
    each: int = 60, size: int = 16, signal: tuple[float, ...] = (3.0, 3.0), seed: int = 0
) -> tuple[Tensor, list[str], list[str]]:
    """States (n, L, d): axis 0 tells undesirable ones, by `signal` of each layer, axis 1 harmful prompts."""
    generator = torch.Generator().manual_seed(seed)
    outcomes = [name for name in NAMES for _ in range(each)]
    states = torch.randn(len(outcomes), len(signal), size, generator=generator)
    for row, name in enumerate(outcomes):
        harmful, undesirable = BENIGN_HARMFUL[name]
        states[row, :, 0] += torch.tensor(signal) * undesirable
        states[row, :, 1] += 4.0 * harmful
    return states, outcomes, [str(row) for row in range(len(outcomes))]


def test_energies_are_higher_for_undesirable_states() -> None:
    states, outcomes, groups = synthetic(each=150)
    result = train(states, outcomes, groups, [4, 7], FAST.model_copy(update={"epochs": 15}))
    fresh, names, _ = synthetic(seed=1)  # not seen in training
    with torch.no_grad():
        energies = result.models(fresh)
    bad = torch.tensor([BENIGN_HARMFUL[name][1] == 1 for name in names])
    assert float(auroc(energies, bad).min()) > 0.95
    for one in result.auroc.values():
        assert min(one.values()) > 0.9
    assert set(result.auroc) == set(result.epochs) == {4, 7}
    assert result.counts == dict.fromkeys(NAMES, 150)


def test_steering_down_the_trained_energy_takes_undesirable_states_to_the_desirable_side() -> None:
    states, outcomes, groups = synthetic()
    models = train(states, outcomes, groups, [4, 7], FAST).models
    bad = torch.tensor([BENIGN_HARMFUL[name][1] == 1 for name in outcomes])
    delta = Descent(models.tensors_of(0), eta=0.3, steps=3).delta(states[bad, 0])
    assert float(delta[:, 0].mean()) < -1.0  # against the axis that tells them
    assert abs(float(delta[:, 1].mean())) < 0.3 * abs(float(delta[:, 0].mean()))  # not along what the request is


def test_counterparts_are_the_other_outcome_of_the_same_prompt() -> None:
    states = torch.tensor([[[0.0]], [[2.0]], [[10.0]], [[16.0]]])  # helpful, false refusal, safe refusal, jailbreak
    harmful, undesirable = torch.tensor([False, False, True, True]), torch.tensor([False, True, False, True])
    ways = _ways(states, harmful, undesirable)
    assert ways[:, 0, 0].tolist() == [2.0, 6.0]
    both, h, u = _with_counterparts(states, harmful, undesirable, 1.5 * ways)
    assert both[:, 0, 0].tolist() == [0.0, 2.0, 10.0, 16.0, 3.0, -1.0, 19.0, 7.0]
    assert h.tolist() == [False, False, True, True] * 2
    assert u.tolist() == [False, True, False, True, True, False, True, False]
    alone = _with_counterparts(states, harmful, undesirable, None)
    assert alone[0] is states


def test_the_same_seed_gives_the_same_models() -> None:
    states, outcomes, groups = synthetic(each=20)
    torch.manual_seed(1)
    one = train(states, outcomes, groups, [4, 7], FAST, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = train(states, outcomes, groups, [4, 7], FAST, seed=5)
    assert torch.equal(before, torch.get_rng_state())  # the caller's random numbers are left alone
    other = train(states, outcomes, groups, [4, 7], FAST, seed=6)
    pairs = zip(one.models.state_dict().values(), two.models.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert one.auroc == two.auroc
    assert not torch.equal(one.models.weight, other.models.weight)


def test_each_layer_has_the_weights_of_its_own_best_epoch() -> None:
    """Recomputed on the validation rows, the returned models' AUROC is the reported one, not the last epoch's."""
    states, outcomes, groups = synthetic(each=40, signal=(0.4, 0.7, 1.0))
    wild = FAST.model_copy(update={"learning_rate": 0.05, "epochs": 12, "dropout": 0.3})
    result = train(states, outcomes, groups, [1, 2, 3], wild, seed=2)
    rows = _split(groups, outcomes, wild.validation_share, torch.Generator().manual_seed(2))
    harmful = torch.tensor([BENIGN_HARMFUL[name][0] == 1 for name in outcomes])
    bad = torch.tensor([BENIGN_HARMFUL[name][1] == 1 for name in outcomes])
    assert not result.models.training
    with torch.no_grad():
        energies = result.models(states)
    for kind, chosen in (("all", rows), ("benign", rows & ~harmful), ("harmful", rows & harmful)):
        found = auroc(energies[chosen], bad[chosen])
        for at, layer in enumerate([1, 2, 3]):
            assert result.auroc[layer][kind] == pytest.approx(float(found[at]), abs=1e-6)
    assert len(set(result.epochs.values())) > 1
    assert min(result.epochs.values()) < 11


def test_training_stops_when_nothing_gets_better() -> None:
    states, outcomes, groups = synthetic(each=20, signal=(9.0, 9.0))
    told: list[tuple[int, int]] = []
    settings = FAST.model_copy(update={"patience": 2, "epochs": 30})
    result = train(states, outcomes, groups, [0, 1], settings, progress=lambda *at: told.append(at))
    assert len(told) <= max(result.epochs.values()) + 1 + 2 < 30
    assert told[-1][1] == 30


def test_layers_are_trained_independently() -> None:
    """A layer's gradient holds nothing of another layer's states."""
    states, outcomes, groups = synthetic(each=20)
    changed = states.clone()
    changed[:, 1] = torch.randn_like(changed[:, 1])
    settings = FAST.model_copy(update={"dropout": 0.0, "epochs": 2})
    one, two = (train(s, outcomes, groups, [0, 1], settings).models for s in (states, changed))
    torch.testing.assert_close(one.weight[0], two.weight[0])


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_that_of_scikit_learn(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    energies = torch.randn(101, 4, generator=generator)
    if ties:
        energies = energies.round()
    bad = torch.rand(101, generator=generator) < 0.3
    wanted = [roc_auc_score(bad.numpy(), energies[:, at].numpy()) for at in range(4)]
    assert auroc(energies, bad).tolist() == pytest.approx(wanted, abs=1e-6)


def test_an_offset_of_the_energies_means_nothing() -> None:
    energies = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    bad = torch.arange(50) % 3 == 0
    assert torch.equal(auroc(energies + 7.0, bad), auroc(energies, bad))


def test_auroc_without_one_of_the_kinds_is_unknown() -> None:
    assert all(math.isnan(x) for x in auroc(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool)).tolist())


def test_info_nce_is_the_formula_of_the_text() -> None:
    settings = FAST.model_copy(update={"across": 0.25, "temperature": 0.5})
    energies = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    harmful = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
    bad = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    terms = []
    for i in (~bad).nonzero()[:, 0].tolist():
        good = math.exp(-float(energies[i]) / 0.5)
        weight = [1.0 if harmful[i] == harmful[j] else 0.25 for j in range(8)]
        negatives = sum(weight[j] * math.exp(-float(energies[j]) / 0.5) for j in bad.nonzero()[:, 0].tolist())
        weigh = 1.0 if harmful[i] else 3.0
        terms.append((weigh, -weigh * math.log(good / (good + negatives))))
    wanted = sum(term for _, term in terms) / sum(weigh for weigh, _ in terms)
    assert float(_info_nce(energies, harmful, bad, settings, 3.0)) == pytest.approx(wanted, rel=1e-5)
    none = settings.model_copy(update={"across": 0.0})
    assert math.isfinite(float(_info_nce(energies, harmful, bad, none, 3.0)))


def test_rows_of_one_group_never_stand_on_both_sides() -> None:
    outcomes = NAMES * 25
    groups = [f"family {row // 5}" for row in range(100)]
    rows = _split(groups, outcomes, 0.2, torch.Generator().manual_seed(0))
    sides = {group: {bool(rows[at]) for at in range(100) if groups[at] == group} for group in groups}
    assert all(len(side) == 1 for side in sides.values())
    assert 0 < int(rows.sum()) <= 30


@pytest.mark.parametrize("seed", range(5))
def test_a_rare_outcome_stands_on_both_sides_whatever_the_seed(seed: int) -> None:
    outcomes = ["helpful"] * 100 + ["safe_refusal"] * 100 + ["false_refusal"] * 100 + ["jailbreak"] * 8
    groups = [str(row // 2) for row in range(len(outcomes))]
    rows = _split(groups, outcomes, 0.2, torch.Generator().manual_seed(seed))
    assert 0 < int(rows[-8:].sum()) < 8


def test_a_model_that_never_refuses_has_nothing_to_learn() -> None:
    states, outcomes, groups = synthetic(each=20)
    with pytest.raises(RunError, match="nothing to learn"):
        train(states, ["helpful" if o == "false_refusal" else o for o in outcomes], groups, [0, 1], FAST)
    with pytest.raises(RunError, match="jailbreak 0"):
        train(states, ["safe_refusal" if o == "jailbreak" else o for o in outcomes], groups, [0, 1], FAST)
    with pytest.raises(RunError, match="too rare to be split"):
        train(states, outcomes, [f"one family of {name}" for name in outcomes], [0, 1], FAST)


def test_product_energies_are_the_same_whether_states_come_at_once_or_by_layer() -> None:
    states, outcomes, groups = synthetic()
    product = TrainingSettings()
    asked: list[int] = []

    def layer(at: int) -> Tensor:
        asked.append(at)
        return states[:, at].float().clone()

    whole = train(states, outcomes, groups, [4, 7], product, benign_weight=2.0)
    by_layer = train(layer, outcomes, groups, [4, 7], product, benign_weight=2.0)
    assert asked == [0, 1]
    assert whole.auroc == by_layer.auroc
    for name, tensor in whole.models.state_dict().items():
        assert torch.equal(tensor, by_layer.models.state_dict()[name])
    with pytest.raises(TypeError, match="all layers at once"):
        train(layer, outcomes, groups, [4, 7], FAST)


def test_the_harm_direction_points_from_benign_to_harmful() -> None:
    states, outcomes, _ = synthetic(each=200)
    harmful = torch.tensor([BENIGN_HARMFUL[name][0] == 1 for name in outcomes])
    direction = harm_direction(states, harmful)
    torch.testing.assert_close(direction.norm(dim=-1), torch.ones(2))
    assert float(direction[:, 1].min()) > 0.95


def test_states_that_are_not_finite_are_told() -> None:
    states, outcomes, groups = synthetic(each=20)
    states[:, 1] = math.inf
    with pytest.raises(RunError, match="no finite energies in layer 7: set a lower learning rate"):
        train(states, outcomes, groups, [4, 7], FAST)
