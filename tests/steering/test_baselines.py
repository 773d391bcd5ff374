"""The baselines: each formula against a hand-computed case, and every kind of candidate on a tiny model."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elsteer.completions import read_completions
from elsteer.errors import ElsteerError, NothingHelps, RunError
from elsteer.files import read_jsonl
from elsteer.fitting import fit
from elsteer.judges import JUDGES
from elsteer.models import encode_chat
from elsteer.prompts import Prompt
from elsteer.steering.evidence import OUTCOMES, Evidence
from elsteer.steering.methods.ablation import RemoveDirection, refusal_direction
from elsteer.steering.methods.alphasteer import NullSpaceMap, null_space_reader
from elsteer.steering.methods.baseline import Candidate
from elsteer.steering.methods.baselines import BASELINES, get_baseline
from elsteer.steering.methods.caa import CAA, AddVector
from elsteer.steering.methods.cast import ConditionalAdd, best_threshold, condition
from elsteer.steering.methods.els_paper import PaperNetwork, PaperSteps, els_paper, train_network
from elsteer.steering.methods.k_steering import ClassifierSteps, _signs, train_classifier
from elsteer.steering.methods.layers import band, choices, per_row, singles
from elsteer.steering.methods.surgical import false_refusal_direction
from pipelines import LetterJudge, some_prompts, speaker, tiny_settings
from slow import inputs_of_blocks
from tiny import tiny_model

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
DEPTH, SIZE = 4, 32  # of the tiny model


class _States:
    """Stands for a state store: (n, depth, d) in memory."""

    def __init__(self, states: Tensor) -> None:
        self.states, self.reads = states, 0

    def read(self, ids: list[str], tokens: int, layers: slice) -> tuple[Tensor, None]:
        self.reads += 1
        return self.states[:, layers][:, None], None


def toy(by_outcome: dict[str, list[list[float]]], folder: Path | None = None) -> Evidence:
    """Evidence of one layer: states by outcome."""
    rows = [(OUTCOMES[name], state) for name, states in by_outcome.items() for state in states]
    states = torch.tensor([state for _, state in rows])[:, None]
    return _evidence(states, [kind for kind, _ in rows], folder)


def _evidence(states: Tensor, kinds: list[tuple[bool, bool]], folder: Path | None = None) -> Evidence:
    harmful, refused = (torch.tensor([kind[at] for kind in kinds]) for at in (0, 1))
    ids = [str(at) for at in range(len(kinds))]
    return Evidence(harmful, refused, states.shape[1], 0, _States(states), ids, folder)  # type: ignore[arg-type]


def synthetic(each: int = 40, depth: int = DEPTH, size: int = SIZE, folder: Path | None = None) -> Evidence:
    """Harm along the first coordinate, refusal along the second, in noise."""
    kinds = [kind for kind in OUTCOMES.values() for _ in range(each)]
    states = torch.randn(len(kinds), depth, size, generator=torch.Generator().manual_seed(0))
    for at in (0, 1):
        states[:, :, at] += 4 * torch.tensor([kind[at] for kind in kinds])[:, None]
    return _evidence(states, kinds, folder)


# The evidence


def test_means_by_outcome_and_spread() -> None:
    evidence = toy({"helpful": [[0, 0], [2, 0]], "false_refusal": [[1, 4]], "safe_refusal": [[1, -4]]})
    means = evidence.means(0)
    torch.testing.assert_close(means.of("helpful"), torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(means.of("helpful", "false_refusal"), torch.tensor([1.0, 4 / 3], dtype=torch.float64))
    assert means.spread == pytest.approx(math.sqrt((1 + 1 + 16 + 16) / 4))
    with pytest.raises(RunError, match="No training prompt has the outcome jailbreak"):
        means.of("jailbreak")
    evidence.means(0)
    assert evidence._store.reads == 1  # type: ignore[attr-defined]


def test_the_evidence_of_a_run_is_its_training_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES, "letters", LetterJudge)
    model, tokenizer = speaker()
    with contextlib.suppress(NothingHelps):
        fit(model, tokenizer, some_prompts(120), run_dir=tmp_path / "run", settings=tiny_settings())
    evidence = Evidence.of_run(tmp_path / "run")
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "run" / "prompts.jsonl") if row["split"] == "train"}
    known = read_completions(tmp_path / "run" / "glimpses.jsonl") | read_completions(
        tmp_path / "run" / "completions.jsonl"
    )
    ids = list(evidence._ids)
    assert set(ids) == {one for one in rows if known[one].label != "unscored"}
    assert evidence.harmful.tolist() == [rows[one]["harmful"] for one in ids]
    assert evidence.refused.tolist() == [known[one].label == "refusal" for one in ids]
    assert evidence.depth == model.config.num_hidden_layers
    assert evidence.folder == tmp_path / "run" / "baselines"
    ids_of = encode_chat(
        tokenizer, list(Prompt.from_row({k: v for k, v in rows[ids[3]].items() if k != "split"}).messages)
    )
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids_of]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(evidence.states(2)[3], hidden[2][0, -1], rtol=1e-2, atol=1e-2)
    with pytest.raises(RunError, match=r"settings\.yaml"):
        Evidence.of_run(tmp_path)


def test_outcomes_are_told_apart() -> None:
    evidence = toy({name: [[float(at)]] for at, name in enumerate(OUTCOMES)})
    for at, name in enumerate(OUTCOMES):
        assert evidence.rows(name).nonzero()[:, 0].tolist() == [at]
    assert evidence.harmful.tolist() == [False, False, True, True]
    assert evidence.refused.tolist() == [False, True, True, False]


def test_the_digest_is_of_the_verdicts_too() -> None:
    one, other = toy({"helpful": [[1.0]]}), toy({"false_refusal": [[1.0]]})
    assert one.digest() == toy({"helpful": [[1.0]]}).digest() != other.digest()


# Layers and strengths


def test_layer_choices() -> None:
    assert singles(24, (0.5, 0.6)) == [(12,), (14,)]
    assert band(24, 0.4, 0.8) == tuple(range(10, 19))
    assert band(2, 0.9, 0.95) == (1,)
    assert all(layers and max(layers) < depth for depth in (1, 2, 3, 24, 80) for layers in choices(depth))
    assert len(set(choices(24))) == len(choices(24)) == 7


def test_a_strength_per_row_is_a_column() -> None:
    assert per_row(0.5, torch.zeros(2, 3)) == 0.5
    column = per_row(torch.tensor([1.0, 2.0]), torch.zeros(2, 3))
    assert torch.equal(column * torch.ones(2, 3), torch.tensor([[1.0] * 3, [2.0] * 3]))


# The formulas


def test_caa_adds_the_mean_difference() -> None:
    evidence = toy({"helpful": [[0, 0], [2, 0]], "false_refusal": [[1, 3], [1, 5]]})
    spread = math.sqrt((1 + 4 + 1 + 4 + 1 + 9) / 4)  # of the mean (1, 2)
    candidate = next(one for one in CAA.candidates(evidence) if one.settings["alpha"] == 0.5)
    added = candidate.moves[0].delta(torch.randn(3, 2), torch.tensor([1.0, 0.0, 2.0]))
    expected = torch.tensor([[0, -0.5 * spread], [0, 0], [0, -spread]])
    close(added, expected)


def test_a_band_shares_the_length_among_its_layers() -> None:
    evidence = synthetic()
    for candidate in CAA.candidates(evidence):
        total = sum(move.vector.norm().item() / evidence.means(at).spread for at, move in candidate.moves.items())  # type: ignore[attr-defined]
        assert total == pytest.approx(candidate.settings["alpha"], rel=1e-5)


def test_ablation_takes_the_direction_out() -> None:
    states = torch.tensor([[3.0, 4.0], [1.0, -2.0]])
    whole = RemoveDirection(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(states + whole.delta(states), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    half = RemoveDirection(torch.tensor([0.6, 0.8]), 0.5)
    torch.testing.assert_close(half.delta(states[:1]), torch.tensor([[-1.5, -2.0]]))  # r . h = 5
    torch.testing.assert_close(half.delta(states, 2.0), RemoveDirection(torch.tensor([0.6, 0.8])).delta(states))
    from_one = RemoveDirection(torch.tensor([0.0, 1.0]), origin=1.0)
    torch.testing.assert_close(states + from_one.delta(states), torch.tensor([[3.0, 1.0], [1.0, 1.0]]))


def test_the_refusal_direction_is_between_answered_harmless_and_refused_harmful() -> None:
    evidence = toy(
        {"helpful": [[0, 1]], "false_refusal": [[9, 2]], "safe_refusal": [[3, 5], [3, 5]], "jailbreak": [[3, 9]]}
    )
    torch.testing.assert_close(refusal_direction(evidence, 0), torch.tensor([0.6, 0.8], dtype=torch.float64))


@pytest.mark.parametrize(("part", "expected"), [(1.0, [0.0, 1.0]), (0.0, [0.6, 0.8]), (0.5, [0.3, 0.8])])
def test_surgical_leaves_true_refusals_alone(part: float, expected: list[float]) -> None:
    evidence = toy({"helpful": [[1, 1]], "false_refusal": [[4, 5]], "safe_refusal": [[6, 1]]})  # f = (3, 4), t = (1, 0)
    found = false_refusal_direction(evidence, 0, part)
    torch.testing.assert_close(found, F.normalize(torch.tensor(expected, dtype=torch.float64), dim=0))


def test_cast_adds_by_the_condition() -> None:
    move = ConditionalAdd(
        torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), 0.5, torch.tensor([0.0, 1.0]), torch.tensor([7.0, 0.0])
    )
    states = torch.tensor([[3.0, 0.0], [-2.0, 0.0], [1.0, 5.0]])  # cosines 1, -1, 0
    torch.testing.assert_close(move.similarity(states), torch.tensor([1.0, -1.0, 0.0]))
    added = move.delta(states, torch.tensor([1.0, 1.0, 2.0]))
    torch.testing.assert_close(added, torch.tensor([[7.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))


def test_the_condition_is_the_principal_component_of_pairs() -> None:
    states = torch.tensor([[4.0, 1.0], [4.0, -1.0], [0.0, 1.0], [0.0, -1.0]])
    harmful = torch.tensor([True, True, False, False])
    centre, way, threshold = condition(states, harmful)
    assert -0.5 < threshold < 0.5
    torch.testing.assert_close(centre, torch.tensor([2.0, 0.0], dtype=torch.float64))
    close(way, torch.tensor([1.0, 0.0], dtype=torch.float64))
    close(condition(states, ~harmful)[1], -way)
    pairs = torch.stack([(a - b) / 2 for a in states[:2] for b in states[2:]]).double()
    by_pairs = torch.linalg.eigh(pairs.T @ pairs)[1][:, -1]
    assert abs(float(by_pairs @ way)) == pytest.approx(1)


def test_the_threshold_has_the_best_f1() -> None:
    positive = torch.tensor([True, False, True, True, False])
    scores = torch.tensor([0.9, 0.1, 0.7, 0.2, 0.5])
    threshold, f1 = best_threshold(scores, positive)
    assert (threshold, f1) == (pytest.approx(0.15), pytest.approx(6 / 7))  # 0.8 and less elsewhere
    apart = best_threshold(torch.tensor([0.9, 0.8, 0.3, 0.2]), torch.tensor([True, True, False, False]))
    assert apart == (pytest.approx(0.55), pytest.approx(1.0))
    tied = best_threshold(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([True, False, False]))
    assert tied[0] < 0.5  # equal scores are not told apart
    assert tied[1] == pytest.approx(0.5)


def test_the_condition_is_the_component_that_tells() -> None:
    """Topics vary most, along the second coordinate; harm is along the first, where the mean difference points too."""
    states = torch.tensor([[x + 0.1 * y, y] for x in (0.0, 2.0) for y in (-9.0, -3.0, 3.0, 9.0)])
    harmful = states[:, 0] - 0.1 * states[:, 1] > 1
    for kind in ("principal", "mean", "linear"):
        centre, way, threshold = condition(states, harmful, kind)
        assert float(way[0]) > 0.9
        move = ConditionalAdd(centre, way, threshold, torch.zeros(2), torch.ones(2))
        moved = move.delta(states)[:, 0] > 0
        assert kind == "mean" or torch.equal(moved, harmful)


def test_fishers_discriminant() -> None:
    """The covariances within the classes are diag(1, 4) each, and the means differ by (2, 2): S^-1 (2, 2) is along (4, 1)."""
    noise = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]])
    states, harmful = torch.cat([noise + 2, noise]), torch.tensor([True] * 4 + [False] * 4)
    way = condition(states, harmful, "linear")[1]
    expected = torch.tensor(
        [2 / (2 + 0.05), 2 / (8 + 0.05)], dtype=torch.float64
    )  # the ridge: 1% of the mean of 2 and 8
    torch.testing.assert_close(way, expected / expected.norm())


def test_cast_calls_a_share_of_the_rightly_refused_benign() -> None:
    evidence = synthetic(depth=1)
    for candidate in get_baseline("cast").candidates(evidence):
        share, move = candidate.settings["called_benign"], candidate.moves[0]
        assert isinstance(move, ConditionalAdd)
        called = move.similarity(evidence.states(0)[evidence.rows("safe_refusal")]) <= move.threshold
        assert share is None or float(called.float().mean()) == pytest.approx(share, abs=1 / 40)


def test_alphasteer_adds_its_two_maps_each_times_its_strength() -> None:
    evidence = synthetic(depth=1)
    found = {
        (one.settings["answer"], one.settings["refuse"], one.settings["dropped"]): one.moves[0]
        for one in get_baseline("alphasteer").candidates(evidence)
    }
    states = evidence.states(0)[:9]
    # Of a shallow model the two bands are one.
    answer, refuse, both = (found[at].delta(states) for at in ((4.0, 0.0, 0.6), (0.0, 2.0, 0.6), (4.0, 2.0, 0.6)))
    close(answer + refuse, both, rtol=1e-4, atol=1e-4)
    close(found[2.0, 0.0, 0.6].delta(states) * 2, answer, rtol=1e-4, atol=1e-4)


def test_k_steering_goes_from_false_refusals_to_answers() -> None:
    """Along the second coordinate, of refusing, and not along the first, of harm; the four labels at once say less of it."""
    evidence = synthetic(each=200, depth=1)
    falsely = evidence.states(0)[evidence.rows("false_refusal")]
    found = [one for one in get_baseline("k-steering").candidates(evidence) if one.settings["alpha"] == 0.5]
    along = {one.settings["labels"]: one.moves[0].delta(falsely).mean(dim=0) for one in found}
    assert along["answer"][1] < -1
    assert along["answer"][1] < 3 * along["answer"][0].abs().neg()


def test_alphasteer_reads_in_the_null_space() -> None:
    kept = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [4.0, 0.0]])  # second moments along the first coordinate alone
    moved = torch.tensor([[3.0, 2.0], [1.0, 2.0]])
    read = null_space_reader(kept, moved, dropped=0.5, ridge=1e-9)
    close(read, torch.tensor([0.0, 0.5], dtype=torch.float64))
    damped = null_space_reader(kept, moved, dropped=0.5, ridge=0.25)
    close(damped, torch.tensor([0.0, 2 / (4 + 0.25 * 4)], dtype=torch.float64))
    move = NullSpaceMap(read[None], torch.tensor([[3.0, -3.0]]))
    close(move.delta(moved), torch.tensor([[3.0, -3.0]]).expand(2, 2))
    assert move.delta(kept).abs().max() < 1e-5


def test_alphasteer_agrees_with_ridge_regression_on_the_whole_map() -> None:
    generator = torch.Generator().manual_seed(0)
    kept, moved = (torch.randn(50, 4, generator=generator, dtype=torch.float64) + shift for shift in (0, 2))
    target = torch.tensor([1.0, 2.0, 0.0, -1.0], dtype=torch.float64)
    inside = torch.linalg.eigh(kept.T @ kept)[1][:, :2]
    projector = inside @ inside.T
    h = projector @ moved.T
    weight = 0.1 * float(((moved @ inside).square().mean(dim=0)).mean()) * len(moved)
    damped = h @ h.T + weight * projector  # of W P, so that the penalty is within P too
    whole = target[:, None].expand(-1, 50) @ h.T @ torch.linalg.pinv(damped, rtol=1e-10) @ projector
    found = torch.outer(target, null_space_reader(kept, moved, 0.5, 0.1))
    torch.testing.assert_close(found, whole)


def test_k_steering_follows_the_gradient() -> None:
    down, shift = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0]]), torch.tensor([0.0, 0.0, -100.0])
    move = ClassifierSteps(down, shift, torch.tensor([1.0, 1.0, 9.0]), length=2.0, steps=1)
    states = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])  # both units on; the first; none
    expected = torch.tensor([[-1.2, -1.6], [-2.0, 0.0], [0.0, 0.0]])
    close(move.delta(states), expected)
    close(move.delta(states, torch.tensor([1.0, 0.5, 1.0]))[1], torch.tensor([-1.0, 0.0]))


@pytest.mark.parametrize("steps", [1, 3])
def test_k_steering_equals_autograd(steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    down, shift, slopes = (torch.randn(*size, generator=generator) for size in ((8, 4), (8,), (8,)))
    move = ClassifierSteps(down, shift, slopes, length=1.5, steps=steps)
    states = torch.randn(6, 4, generator=generator)
    torch.testing.assert_close(states + move.delta(states), _by_autograd(move.loss, states, 1.5 / steps, steps))


def test_the_classifier_learns_and_is_the_same_again() -> None:
    evidence = synthetic(each=120, depth=1)
    classes = torch.arange(4).repeat_interleave(120)
    trained = [train_classifier(evidence.states(0), classes, 4, seed=0) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
    down, shift, out, bias = trained[0]
    logits = F.relu(evidence.states(0) @ down.T + shift) @ out.T + bias
    assert (logits.argmax(dim=1) == classes).float().mean() > 0.85  # 1/4 by chance


@pytest.mark.parametrize("steps", [1, 3])
def test_the_published_energy_equals_autograd(steps: int) -> None:
    evidence = synthetic(depth=1, size=6)
    undesirable = evidence.harmful != evidence.refused
    tensors, _ = train_network(evidence.states(0), undesirable, widths=(8, 5, 4), epochs=2)
    network = PaperNetwork(tensors)
    states = evidence.states(0)[:7]
    layers: list[nn.Module] = []
    for at, (into, out) in enumerate(((6, 8), (8, 5), (5, 4))):
        linear, norm = nn.Linear(into, out), nn.LayerNorm(out)
        linear.load_state_dict({"weight": tensors[f"weight.{at}"], "bias": tensors[f"bias.{at}"]})
        norm.load_state_dict({"weight": tensors[f"norm_weight.{at}"], "bias": tensors[f"norm_bias.{at}"]})
        layers += [linear, norm, nn.SiLU()]
    last = nn.Linear(4, 1)
    last.load_state_dict({"weight": tensors["weight.3"], "bias": tensors["bias.3"]})
    reference = nn.Sequential(*layers, last)
    close(network.energy(states), reference(states)[:, 0].detach())
    move = PaperSteps(network, eta=0.4, steps=steps)
    moved = states + move.delta(states)
    torch.testing.assert_close(
        moved, _by_autograd(lambda x: reference(x)[:, 0], states, 0.4, steps), rtol=1e-4, atol=1e-5
    )
    assert (network.energy(moved) < network.energy(states)).all()


def test_the_published_energy_learns_what_is_undesirable() -> None:
    evidence = synthetic(each=100, depth=1, size=4)
    benign = ~evidence.harmful
    states, undesirable = evidence.states(0)[benign], evidence.refused[benign]
    tensors, score = train_network(states, undesirable, widths=(32, 16), epochs=20, rate=1e-2)
    assert score > 0.95
    energies = PaperNetwork(tensors).energy(states)
    assert energies[undesirable].mean() > energies[~undesirable].mean()
    again, _ = train_network(states, undesirable, widths=(32, 16), epochs=20, rate=1e-2)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_a_layer_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = els_paper("small", (8, 4), epochs=1)
    states = torch.randn(5, SIZE)
    first = small.candidates(synthetic(folder=tmp_path))
    assert len(list((tmp_path / "small").iterdir())) == DEPTH

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr("elsteer.steering.methods.els_paper.train_network", never)
        second = small.candidates(synthetic(folder=tmp_path))
        with pytest.raises(AssertionError, match="trained again"):
            small.candidates(synthetic(each=39, folder=tmp_path))  # of other evidence
    for one, other in zip(first, second, strict=True):
        assert one.settings == other.settings
        assert all(torch.equal(move.delta(states), other.moves[at].delta(states)) for at, move in one.moves.items())
    (tmp_path / "small" / "0.safetensors").write_bytes(b"cut")
    with pytest.raises(RunError, match="damaged"):
        small.candidates(synthetic(folder=tmp_path))


# What the candidates do to states whose first coordinate tells harm and whose second tells refusal


def _of(name: str, evidence: Evidence, **settings: object) -> Candidate:
    return next(
        one
        for one in get_baseline(name).candidates(evidence)
        if all(one.settings[key] == value for key, value in settings.items())
    )


def test_alphasteers_map_to_answers_moves_false_refusals_towards_answers_and_leaves_true_refusals() -> None:
    evidence = synthetic(each=200, depth=1, size=6)
    move = _of("alphasteer", evidence, answer=4.0, refuse=0.0, dropped=0.6).moves[0]
    moved = {name: move.delta(evidence.states(0)[evidence.rows(name)]).mean(dim=0) for name in OUTCOMES}
    assert moved["false_refusal"][1] < -2
    assert moved["safe_refusal"].norm() < moved["false_refusal"].norm() / 3


def test_alphasteers_map_to_refusals_moves_harmful_prompts_towards_them_and_leaves_benign_ones() -> None:
    evidence = synthetic(each=200, depth=1, size=6)
    move = _of("alphasteer", evidence, answer=0.0, refuse=4.0, dropped=0.6).moves[0]
    moved = {name: move.delta(evidence.states(0)[evidence.rows(name)]).mean(dim=0) for name in OUTCOMES}
    assert moved["jailbreak"][1] > 2
    assert moved["helpful"].norm() < moved["jailbreak"].norm() / 3


def test_cast_adds_compliance_to_benign_states_and_refusal_to_harmful_ones() -> None:
    evidence = synthetic(each=200, depth=1)
    move = _of("cast", evidence, condition="linear", called_benign=0.1, refuse=0.5).moves[0]
    assert isinstance(move, ConditionalAdd)
    states, spread = evidence.states(0), evidence.means(0).spread
    benign, harmful = (move.delta(states[evidence.harmful == harm])[:, 1] for harm in (False, True))
    assert (benign < -spread).double().mean() > 0.9
    assert (harmful > 0.3 * spread).double().mean() > 0.8


def test_surgical_from_the_answers_mean_leaves_it_and_takes_false_refusals_there() -> None:
    evidence = toy({"helpful": [[1, 1]], "false_refusal": [[4, 5]], "safe_refusal": [[6, 1]]})
    means = torch.tensor([[1.0, 1.0], [4.0, 5.0]])
    mean = _of("surgical", evidence, kind="local", origin="mean", **{"lambda": 1.0}).moves[0].delta(means)
    close(mean, torch.tensor([[0.0, 0.0], [0.0, -4.0]]))  # w = (0, 1)
    zero = _of("surgical", evidence, kind="local", origin="zero", **{"lambda": 1.0}).moves[0].delta(means)
    close(zero, torch.tensor([[0.0, -1.0], [0.0, -5.0]]))


def test_k_steering_avoids_and_reaches_the_labels_it_says() -> None:
    names = ["helpful", "false_refusal", "safe_refusal", "jailbreak"]
    close(_signs(names, "answer"), torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    close(_signs(names, "both"), torch.tensor([-0.5, 0.5, -0.5, 0.5]))
    close(_signs(["helpful", "false_refusal", "safe_refusal"], "both"), torch.tensor([-0.5, 1.0, -0.5]))


def test_the_published_energy_steers_the_layers_that_tell_and_goes_down_what_is_undesirable() -> None:
    kinds = [OUTCOMES["helpful"]] * 400 + [OUTCOMES["false_refusal"]] * 400
    states = torch.randn(800, 8, 6, generator=torch.Generator().manual_seed(1))
    states[400:, 5, 1] += 4  # the other layers are noise
    found = els_paper("small", (16, 8), epochs=60).candidates(_evidence(states, kinds))
    few = min(found, key=lambda one: len(one.settings["layers"]))
    assert 5 in few.settings["layers"]
    move = few.moves[5]
    assert isinstance(move, PaperSteps)
    energies = move.network.energy(states[:, 5])
    assert energies[400:].mean() > energies[:400].mean()
    assert move.delta(states[400:, 5])[:, 1].mean() < 0


# The registry


def test_an_unknown_name_is_told_the_known_ones() -> None:
    assert get_baseline("caa") is BASELINES["caa"]
    assert all(name == one.name and one.title for name, one in BASELINES.items())
    with pytest.raises(ElsteerError, match=r"'caaa'.*none, system-prompt, caa"):
        get_baseline("caaa")


def candidates_of(name: str) -> list[Candidate]:
    if name.startswith("els-paper"):
        return els_paper(name, (16, 8), epochs=1).candidates(synthetic())
    return get_baseline(name).candidates(synthetic())


@pytest.mark.parametrize("name", list(BASELINES))
def test_candidates_are_few_named_and_told_apart(name: str) -> None:
    found = candidates_of(name)
    assert 1 <= len(found) <= 24
    assert all(one.method == name for one in found)
    assert len({repr(sorted(one.settings.items())) for one in found}) == len(found)
    states = torch.randn(5, SIZE)
    with torch.inference_mode():
        for one in found:
            for move in one.moves.values():
                delta = move.delta(states.bfloat16(), torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0]))
                assert delta.dtype == torch.float32
                assert delta.shape == states.shape
                assert bool(torch.isfinite(delta).all())
                assert not bool(delta[1].any())


@pytest.mark.parametrize("name", list(BASELINES))
def test_strength_0_is_the_plain_model_and_others_are_not(name: str) -> None:
    model = tiny_model()
    ids = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(0))

    def logits() -> Tensor:
        with torch.inference_mode():
            made: Tensor = model(input_ids=ids).logits
        return made

    with inputs_of_blocks(model) as states:
        plain = logits()
    for candidate in candidates_of(name):
        with candidate.attach(model) as steering:
            if not candidate.moves:
                assert steering is None
                continue
            assert steering is not None
            # Each prompt's last token moves, unless a condition holds it in every layer.
            due = torch.stack([move.delta(states[at][0][:, -1]).any(dim=1) for at, move in candidate.moves.items()])
            assert torch.equal((logits()[:, -1] != plain[:, -1]).any(dim=1), due.any(dim=0))
            assert due.any(dim=0).all() or candidate.settings.get("refuse") == 0.0
            steering.strength = 0.0
            assert torch.equal(logits(), plain)
        with candidate.scaled(0).attach(model) as steering:
            assert steering is None
            assert torch.equal(logits(), plain)
    if candidate.method == "cast":
        held = ConditionalAdd(torch.zeros(SIZE), torch.ones(SIZE), 2.0, torch.ones(SIZE), torch.zeros(SIZE))
        with Candidate("cast", {}, {1: held}).attach(model):  # no cosine is above 2: all benign
            assert not torch.equal(logits()[:, -1], plain[:, -1])
    assert torch.equal(logits(), plain)


def test_a_vector_moves_the_window_alone() -> None:
    model = tiny_model()
    ids = torch.randint(0, 256, (1, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with Candidate("caa", {}, {1: AddVector(torch.ones(SIZE))}).attach(model):
            steered = model(input_ids=ids).logits
    assert torch.equal(plain[:, :-1], steered[:, :-1])
    assert not torch.equal(plain[:, -1], steered[:, -1])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("caa", "No training prompt has the outcome false_refusal, which this method learns from"),
        ("ablation", "No training prompt has the outcome safe_refusal, which this method learns from"),
        ("surgical", "No training prompt has the outcome false_refusal, which this method learns from"),
        ("cast", "No training prompt has the outcome false_refusal, which this method learns from"),
        (
            "alphasteer",
            "No training prompt has the outcome safe_refusal or false_refusal, which this method learns from",
        ),
        ("k-steering", "k-steering learns from answers and from false refusals, and the training prompts lack one"),
        ("els-paper", "els-paper needs 5 desirable and 5 undesirable answers at least"),
    ],
)
def test_what_cannot_be_learned_is_one_sentence(name: str, said: str) -> None:
    with pytest.raises(RunError, match=rf"^{said}[^.]*\.$"):
        get_baseline(name).candidates(toy({"helpful": [[1.0, 2.0], [3.0, 1.0]]}))


def test_system_prompts_are_six_and_ask_for_both() -> None:
    found = get_baseline("system-prompt").candidates(synthetic())
    assert len({one.system for one in found}) == 6
    for one in found:
        assert one.system is not None
        assert not one.moves
        assert "harmless" in one.system or "directly and completely" in one.system
        assert any(word in one.system for word in ("efuse", "decline", "can't help"))


def _by_autograd(energy: object, states: Tensor, length: float, steps: int) -> Tensor:
    h = states
    for _ in range(steps):
        h = h.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(h).sum(), h)  # type: ignore[operator]
        h = h - length * gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return h.detach()
