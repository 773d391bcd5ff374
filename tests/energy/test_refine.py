"""Training through the model: the steps that are trained are those that a landscape makes, and they do what is asked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from elsteer.completions import Batches, PromptCaches
from elsteer.decoding import PromptBatch, first_logits
from elsteer.energy.context import attend, values_of
from elsteer.energy.descent import Descent
from elsteer.energy.refine import (
    AS_TRAINED,
    SteeredProducts,
    _kind_weights,
    _losses,
    _moving,
    _Plain,
    _refusing,
    refine,
)
from elsteer.energy.tensors import check_tensors
from elsteer.errors import RunError
from elsteer.models import hidden_size, num_layers
from elsteer.prompts import Prompt
from elsteer.settings import TrainingSettings
from elsteer.training import _guard
from pipelines import Tiny, some_prompts, speaker
from tiny import FAMILIES

LAYERS, SIZE = (1, 2), 32
PROMPTS = some_prompts(40)
HARMFUL = torch.tensor([one.harmful for one in PROMPTS])


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return speaker()


def products(
    seed: int = 0,
    units: int = 0,
    values: list[Tensor] | None = None,
    sharpness: float = 0.0,
    pooled: bool = False,
) -> SteeredProducts:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        layer: {
            "weight": torch.randn(2, SIZE, generator=generator) / SIZE**0.5,
            "bias": torch.randn(2, generator=generator),
            "mean": torch.randn(SIZE, generator=generator),
            "scale": torch.tensor(1.3),
        }
        for layer in LAYERS
    }
    harm = {layer: torch.randn(SIZE, generator=generator) for layer in LAYERS}
    reader = torch.randn(len(LAYERS), SIZE, generator=generator), torch.randn(len(LAYERS), generator=generator)
    found = SteeredProducts(tensors, harm, reader=reader, sharpness=sharpness, pooled=pooled)
    if values is not None:
        found.see(values, (0, 1), heads=2)
    if units:
        count = 20 if values is None else len(values)
        states = torch.randn(count, len(LAYERS), SIZE, generator=generator)
        found.add_units(states, torch.arange(count) % 2 == 0, units, epochs=1)
    return found


def some_values(count: int = 12) -> list[Tensor]:
    """Of prompts of 1 to 5 tokens before the last one."""
    generator = torch.Generator().manual_seed(7)
    return [3 * torch.randn(1 + place % 5, 6, generator=generator) + 1 for place in range(count)]


def batches_of(tiny: Tiny) -> list[PromptBatch]:
    return list(PromptCaches(*tiny, PROMPTS, batch_size=16).batches())


def labels_of(tiny: Tiny, batches: list[PromptBatch]) -> list[str | None]:
    """Tokens of an even number begin refusals."""
    found: list[str | None] = [None] * len(PROMPTS)
    with torch.inference_mode():
        for batch in batches:
            for place, token in zip(batch.rows, first_logits(tiny[0], batch).argmax(dim=-1).tolist(), strict=True):
                found[place] = "compliance" if token % 2 else "refusal"
    return found


@pytest.mark.parametrize("units", [0, 5])
@pytest.mark.parametrize("values", [None, some_values()], ids=["alone", "in context"])
@pytest.mark.parametrize("sharpness", [0.0, 1.5])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_landscape_makes_the_step_that_was_trained(
    units: int, values: list[Tensor] | None, sharpness: float, pooled: bool
) -> None:
    states = torch.randn(12, len(LAYERS), SIZE, generator=torch.Generator().manual_seed(2))
    kinds = torch.tensor([False, True]).repeat(6)
    verdicts = torch.tensor([False, False, True, True]).repeat(3)
    trained = products(units=units, values=values, sharpness=sharpness, pooled=pooled)
    with torch.no_grad():
        trained.due[:, SIZE:] += torch.randn(
            len(LAYERS), trained.due.shape[1] - SIZE, generator=torch.Generator().manual_seed(3)
        )
        trained.log_length += torch.tensor([0.3, -0.4])
        trained.turn += 0.1 * torch.randn(trained.turn.shape, generator=torch.Generator().manual_seed(1))
        if sharpness:
            trained.read += 0.1 * torch.randn(trained.turn.shape, generator=torch.Generator().manual_seed(4))
            trained.read_offset += torch.tensor([0.1, -0.2])
    found = trained.tensors(states, kinds, verdicts)
    moves, dues = trained.moves(torch.arange(12)), []
    for at, layer in enumerate(LAYERS):
        check_tensors(layer, found[layer], SIZE)
        guard = _guard(trained.harm[at], found[layer])
        descent = Descent(found[layer], eta=AS_TRAINED, steps=1, guard=guard)
        context = None
        if values is not None:
            kept = torch.arange(5) < torch.tensor([len(values[place]) for place in range(12)])[:, None]
            padded = torch.nn.utils.rnn.pad_sequence([values[place] for place in range(12)], batch_first=True)
            context = attend(padded, kept, descent.context_query, descent.context_mean)
        dues.append(descent.due(states[:, at], context))
        assert descent.pooled == pooled
        due = torch.stack(dues).mean(dim=0) if pooled else None
        step = descent.delta(states[:, at], 1.0, context, due)
        moved = moves[layer](states[:, at]).detach()
        torch.testing.assert_close(step, moved, rtol=1e-4, atol=1e-5)
        if values is not None:
            assert descent.context_blocks == (0, 1)
            assert not torch.allclose(
                descent.delta(states[:, at], due=due if due is None else descent.due(states[:, at])), step, atol=1e-3
            )


def test_a_step_leaves_what_the_guard_holds() -> None:
    trained = products()
    states = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(3))
    for at, layer in enumerate(LAYERS):
        step = trained.moves()[layer](states)
        for held in (trained.harm[at], trained.due[at]):
            torch.testing.assert_close(step @ held, torch.zeros(5), atol=1e-4, rtol=0)


def test_hidden_units_learn_what_a_line_cannot() -> None:
    """Harmful where one coordinate is far from 0 on either side: no direction tells it."""
    states = torch.randn(600, 1, SIZE, generator=torch.Generator().manual_seed(4)).repeat(1, len(LAYERS), 1)
    states[:, :, 0] *= 4
    harmful = states[:, 0, 0].abs() > 2.7
    found = products()

    def share() -> float:
        with torch.no_grad():
            x = (states - found.mean) / found.scale[:, None]
            return float(((found._due(x) > 0) == harmful[:, None]).float().mean(dim=0).min())

    assert share() < 0.65
    told: list[tuple[int, int]] = []
    found.add_units(states, harmful, 16, epochs=150, progress=lambda done, total: told.append((done, total)))
    assert share() > 0.85
    assert told[-1] == (150, 150)


def test_where_steps_go_by_the_mean_so_far_a_block_learns_what_those_before_miss() -> None:
    """The last block alone sees a second sign, one that counts more: the others' share in the mean stands against it."""
    states = torch.randn(600, len(LAYERS), SIZE, generator=torch.Generator().manual_seed(6))
    one, other = (torch.randn(600, generator=torch.Generator().manual_seed(seed)) for seed in (10, 11))
    states[:, :, 0], states[:, -1, 1] = one[:, None], other
    harmful = one + 2 * other > 0
    losses = {}
    for pooled in (False, True):
        found = products(pooled=pooled)
        found.add_units(states, harmful, 4, epochs=300)
        with torch.no_grad():
            u = found._due((states - found.mean) / found.scale[:, None]).mean(dim=1)
        losses[pooled] = float(torch.nn.functional.binary_cross_entropy_with_logits(u, harmful.float()))
    assert losses[True] < 0.8 * losses[False]


def test_u_times_a_gain_is_0_where_it_was() -> None:
    found, x = products(units=5), torch.randn(7, len(LAYERS), SIZE, generator=torch.Generator().manual_seed(3))
    before = found._due(x)
    found.times(2.0)
    torch.testing.assert_close(found._due(x), 2 * before)


def test_units_learn_from_the_context_what_the_state_does_not_say() -> None:
    """One token of many tells the kind: a mean would hardly show it, a query finds it."""
    kinds, generator = torch.arange(300) % 2 == 0, torch.Generator().manual_seed(7)
    values = [torch.randn(20 + place % 9, 6, generator=generator) for place in range(300)]
    for place, tokens in enumerate(values):
        tokens[place % 13, 2] += 8.0
        tokens[place % 13, 3] += 4.0 if kinds[place] else -4.0
    found = products()
    found.see(values, (0, 1), heads=2)
    states = torch.randn(300, len(LAYERS), SIZE, generator=generator)
    start = found.query.clone()
    found.add_units(states, kinds, 8, epochs=120)
    with torch.no_grad():
        x = (states - found.mean) / found.scale[:, None]
        right = ((found._due(x, found.contexts(torch.arange(300))) > 0) == kinds[:, None]).float().mean(dim=0)
    assert float(right.min()) > 0.85  # of .5 by chance
    assert not torch.allclose(found.query, start, atol=0.1)


def test_contexts_do_not_depend_on_the_other_prompts_and_one_of_a_single_token_is_of_zeros() -> None:
    values = [torch.zeros(0, 6), *some_values(39)]
    found = products(values=values)
    places = torch.tensor([7, 0, *range(12, 40), 3])
    with torch.no_grad():
        found.query.normal_(generator=torch.Generator().manual_seed(1))
        alone = torch.cat([found.contexts(torch.tensor([place])) for place in places.tolist()])
        torch.testing.assert_close(found.contexts(places), alone)
    assert alone.shape == (31, 12)
    assert not alone[1].any()
    assert float(alone[0].abs().min()) > 0


@pytest.mark.parametrize("units", [0, 5])
@pytest.mark.parametrize("due", [False, True])
def test_the_loss_falls_and_no_weight_of_the_model_changes(tiny: Tiny, units: int, due: bool) -> None:
    model = tiny[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    batches = batches_of(tiny)
    by_place = {row: one for batch in batches for row, one in zip(batch.rows, values_of(batch, (0, 1)), strict=True)}
    values = [by_place[row] for row in range(len(PROMPTS))] if units else None
    trained, told = products(units=units, values=values), []
    first = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    losses = refine(
        model,
        batches,
        HARMFUL,
        labels_of(tiny, batches),
        trained,
        TrainingSettings(refine_epochs=6, refine_rate=3e-3, refine_due=due),
        progress=lambda done, total: told.append((done, total)),
    )
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, first[name])}
    of_due = {"due", *(("units", "thresholds", "bend") if units else ())}
    assert changed == {"turn", "offset", "log_length"} | (of_due if due else set())
    for name in changed:  # in 18 steps of AdamW, none above the peak of the rate
        peak = 3e-3 * (10 if name in ("offset", "log_length") else 1)
        assert 2 * peak < float((trained.state_dict()[name] - first[name]).abs().max()) < 18 * peak, name
    assert told[-1] == (6 * len(batches), 6 * len(batches))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_trains_the_same_and_another_one_otherwise(tiny: Tiny) -> None:
    batches = batches_of(tiny)
    labels = labels_of(tiny, batches)
    found = []
    for seed in (3, 3, 5):
        trained = products()
        start = trained.turn.detach().clone()
        refine(tiny[0], batches, HARMFUL, labels, trained, TrainingSettings(refine_epochs=1), seed=seed)
        assert not torch.equal(trained.turn, start)
        found.append(trained.turn.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]), "the batches come in another order"


def test_hooks_are_gone_after_an_error(tiny: Tiny) -> None:
    def fails(states: Tensor) -> Tensor:
        raise ValueError("no")

    batch = batches_of(tiny)[0]
    wanted = first_logits(tiny[0], batch)
    with pytest.raises(ValueError, match="no"), _moving(tiny[0], {1: fails}):
        first_logits(tiny[0], batch)
    torch.testing.assert_close(first_logits(tiny[0], batch), wanted)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_way_out(tiny: Tiny) -> None:
    batches = batches_of(tiny)
    trained = products()
    with torch.no_grad():
        trained.offset.fill_(float("nan"))
    with pytest.raises(RunError, match="refine-rate"):
        refine(tiny[0], batches, HARMFUL, labels_of(tiny, batches), trained, TrainingSettings(refine_epochs=1))


def test_a_prompt_with_the_right_verdict_asks_for_no_change() -> None:
    """Token 0 refuses. By hand: a benign prompt that never refuses has q = p, so its own logits lose nothing."""
    refusing = torch.tensor([1.0, 0.0, 0.0, 0.0])
    sure = torch.tensor([[-20.0, 1.0, 0.5, -30.0], [20.0, 1.0, 0.5, -30.0]])  # answers; refuses
    plain = _Plain.of(sure, refusing)
    harmful = torch.tensor([False, True])
    right = _losses(plain, plain.seen_by(sure), harmful, refusing, 0.1)[0]
    wrong = _losses(plain, plain.seen_by(sure), ~harmful, refusing, 0.1)[0]
    torch.testing.assert_close(right, torch.zeros(2), atol=1e-3, rtol=0)
    assert float(wrong.min()) > 1


def test_the_losses_are_those_of_a_count_by_hand() -> None:
    """p = (.8, .2), of which the first token refuses half the time; steered (.4, .6); stay .1.

    Benign: q ~ (.8 * .5^4, .2) = (.2, .8), right .6. Harmful: q is all on the first token, right .4.
    """
    refusing = torch.tensor([0.5, 0.0])
    plain = _Plain.of(torch.tensor([[0.8, 0.2]] * 2).log(), refusing)
    after = plain.seen_by(torch.tensor([[0.4, 0.6]] * 2).log())
    found, right = _losses(plain, after, torch.tensor([False, True]), refusing, 0.1)
    far = 0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.6)
    benign = 0.2 * math.log(0.2 / 0.4) + 0.8 * math.log(0.8 / 0.6) + 0.1 * 0.6 * far
    harmful = math.log(1 / 0.4) + 0.1 * 0.4 * far
    torch.testing.assert_close(right, torch.tensor([0.6, 0.4]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found, torch.tensor([benign, harmful]), atol=1e-3, rtol=0)


def test_the_benign_half_weighs_as_much_as_it_is_told_to() -> None:
    harmful = torch.tensor([True, False, False, False])
    weights = _kind_weights(harmful, 2.0)
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[1:].sum()) == pytest.approx(2 * float(weights[0]))


def test_training_weighs_the_benign_half_and_what_moves_prompts_that_are_right(tiny: Tiny) -> None:
    """The first step's loss, before anything is learned, by the settings that make it."""
    batches = batches_of(tiny)[:1]
    places = torch.tensor(batches[0].rows)
    labels = labels_of(tiny, batches_of(tiny))

    def loss(still: float, weight: float) -> float:
        settings = TrainingSettings(refine_epochs=1, refine_still=still)
        return refine(tiny[0], batches, HARMFUL, labels, products(), settings, benign_weight=weight)[0]

    refusing = _refusing(tiny[0], batches, labels, {})
    plain, trained = _Plain.of(first_logits(tiny[0], batches[0]), refusing), products()
    with torch.no_grad(), _moving(tiny[0], trained.moves(places)):
        after = plain.seen_by(first_logits(tiny[0], batches[0]))
    harmful = HARMFUL[places]
    each, right = _losses(plain, after, harmful, refusing, TrainingSettings().refine_stay)
    of_harmful, of_benign = float(each[harmful].mean()), float(each[~harmful].mean())
    assert loss(0.0, 1.0) == pytest.approx((of_harmful + of_benign) / 2, rel=1e-3)
    assert loss(0.0, 3.0) == pytest.approx((of_harmful + 3 * of_benign) / 4, rel=1e-3)
    moved = right * torch.stack(trained.pushes).square().mean(dim=0)
    still = float(moved[harmful].mean() + moved[~harmful].mean()) / 2
    assert loss(2.0, 1.0) - loss(0.0, 1.0) == pytest.approx(2 * still, rel=1e-2)


def test_a_weight_moves_u_by_its_logarithm() -> None:
    found, x = products(units=5), torch.randn(7, len(LAYERS), SIZE, generator=torch.Generator().manual_seed(3))
    before = found._due(x)
    found.weigh(3.0)
    torch.testing.assert_close(found._due(x), before - math.log(3))
    found.weigh(1 / 3, gain=2.0)
    torch.testing.assert_close(found._due(x), before + math.log(3))


@pytest.mark.parametrize("values", [None, some_values()], ids=["alone", "in context"])
@pytest.mark.parametrize("units", [0, 5])
@pytest.mark.parametrize("sharpness", [0.0, 1.5])
def test_energies_that_are_gone_on_with_make_the_same_steps(
    values: list[Tensor] | None, units: int, sharpness: float
) -> None:
    states = torch.randn(12, len(LAYERS), SIZE, generator=torch.Generator().manual_seed(2))
    kinds, verdicts = torch.tensor([False, True]).repeat(6), torch.tensor([False, False, True, True]).repeat(3)
    trained = products(units=units, values=values, sharpness=sharpness, pooled=True)
    with torch.no_grad():
        trained.log_length += torch.tensor([0.3, -0.4])
        trained.due += 0.1 * torch.randn(trained.due.shape, generator=torch.Generator().manual_seed(3))
        trained.turn += 0.1 * torch.randn(trained.turn.shape, generator=torch.Generator().manual_seed(1))
    told = trained.tensors(states, kinds, verdicts)
    harm = {layer: _guard(trained.harm[at], told[layer])[:, 0] for at, layer in enumerate(LAYERS)}
    again = SteeredProducts.going_on(told, harm)
    if values is not None:
        again.see_again(told, values)
    before, after = (one.moves(torch.arange(12)) for one in (trained, again))
    for at, layer in enumerate(LAYERS):
        torch.testing.assert_close(after[layer](states[:, at]), before[layer](states[:, at]), rtol=1e-4, atol=1e-5)
    back = again.tensors(states, kinds, verdicts)
    assert {name: tensor.shape for name, tensor in back[1].items()} == {n: t.shape for n, t in told[1].items()}
    for layer in LAYERS:
        for name, tensor in told[layer].items():
            torch.testing.assert_close(back[layer][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_tokens_outside_the_likeliest_count_together() -> None:
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    plain = _Plain.of(logits, torch.zeros(2000))
    assert plain.logs.shape == (3, 257)
    torch.testing.assert_close(plain.logs.exp().sum(dim=1), torch.ones(3))
    torch.testing.assert_close(plain.seen_by(logits), plain.logs)


def test_of_more_prompts_than_memory_holds_a_sample_is_taken(tiny: Tiny) -> None:
    every = list(range(len(PROMPTS)))
    caches = PromptCaches(*tiny, PROMPTS, batch_size=4)
    whole = sum(batch.nbytes for batch in caches.in_memory([every]))
    for keep_bytes in (whole // 3, 1):
        small = PromptCaches(*tiny, PROMPTS, batch_size=4, keep_bytes=keep_bytes)
        rows = [row for batch in small.in_memory([every], seed=1) for row in batch.rows]
        assert 4 <= len(rows) <= len(PROMPTS) // 2
        assert len(set(rows)) == len(rows)


def test_those_answered_in_full_come_first_where_not_all_have_room(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    """Of them is made what a first token says: a sample of all would leave next to none of them."""
    full, rest = [3, 1, 8, 5], [at for at in range(len(PROMPTS)) if at not in (3, 1, 8, 5)]
    caches = PromptCaches(*tiny, PROMPTS, batch_size=4)
    whole = sum(batch.nbytes for batch in caches.in_memory([full, rest]))
    small = PromptCaches(*tiny, PROMPTS, batch_size=4, keep_bytes=whole // 2)
    rows = [row for batch in small.in_memory([full, rest], seed=1) for row in batch.rows]
    assert set(full) < set(rows) < set(range(len(PROMPTS)))
    assert f"sees {len(rows)} of {len(PROMPTS)} prompts" in caplog.text
    assert "--training-refine-memory" in caplog.text


def test_an_accelerator_prefills_again_what_has_no_room(tiny: Tiny) -> None:
    """As many prompts as there are, few of them kept, and the same training. (No accelerator is needed to say so.)"""
    every = list(range(len(PROMPTS)))
    caches = PromptCaches(*tiny, PROMPTS, batch_size=4)
    held = caches.in_memory([every])
    small = PromptCaches(*tiny, PROMPTS, batch_size=4, keep_bytes=held[0].nbytes)
    made = Batches(small, small._keys(every))
    assert [batch.rows for batch in made] == [batch.rows for batch in held]
    assert made[0] is made[0]
    assert made[1] is not made[1], "there is room for one"
    labels = labels_of(tiny, held)
    losses = [
        refine(tiny[0], batches, HARMFUL, labels, products(), TrainingSettings(refine_epochs=1), seed=3)
        for batches in (held, made)
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_what_fits_does_not_depend_on_what_ran_before(tiny: Tiny) -> None:
    """The longest prompts come first: a guess from their size alone left prompts out that fit."""
    prompts = [*some_prompts(8), *(Prompt.of(f"{one.text} {'so ' * 60}", one.harmful) for one in some_prompts(8, 50))]
    every = list(range(len(prompts)))
    caches = PromptCaches(*tiny, prompts, batch_size=4)
    whole = sum(batch.nbytes for batch in caches.in_memory([every]))
    fresh = PromptCaches(*tiny, prompts, batch_size=4, keep_bytes=int(1.1 * whole))
    assert sum(len(batch.rows) for batch in fresh.in_memory([every])) == len(prompts)


def test_what_is_in_memory_is_not_prefilled_again(tiny: Tiny) -> None:
    caches = PromptCaches(*tiny, PROMPTS, batch_size=8)
    groups = [list(range(16)), list(range(16, len(PROMPTS)))]
    first = {id(batch) for batch in caches.batches(groups[0])}
    list(caches.batches(range(20, 30)))  # an interrupted run grouped them otherwise
    found = caches.in_memory(groups)
    assert {id(batch) for batch in found} > first
    assert sorted(row for batch in found for row in batch.rows) == list(range(len(PROMPTS)))
    fresh = PromptCaches(*tiny, PROMPTS, batch_size=8).in_memory(groups)
    assert [batch.rows for batch in found] == [batch.rows for batch in fresh]
    told: list[tuple[int, int]] = []
    caches.in_memory(groups, progress=lambda done, total: told.append((done, total)))
    assert not told  # all are kept: there is nothing to wait for
    caches.forget()
    caches.in_memory(groups, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(PROMPTS), len(PROMPTS))
    assert len(told) == len(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_trained_through(family: str) -> None:
    model, tokenizer = speaker(family)
    size, depth = hidden_size(model), num_layers(model)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        depth - 2: {
            "weight": torch.randn(2, size, generator=generator) / size**0.5,
            "bias": torch.randn(2, generator=generator),
            "mean": torch.zeros(size),
            "scale": torch.tensor(1.0),
        }
    }
    trained = SteeredProducts(tensors, {depth - 2: torch.randn(size, generator=generator)})
    batches = list(PromptCaches(model, tokenizer, PROMPTS, batch_size=20).batches())
    before = trained.turn.detach().clone()
    settings = TrainingSettings(refine_epochs=1, refine_rate=1e-2)
    refine(model, batches, HARMFUL, labels_of((model, tokenizer), batches), trained, settings)
    assert not torch.equal(trained.turn.detach(), before)
