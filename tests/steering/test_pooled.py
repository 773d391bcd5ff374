"""Steps by the mean of u over the steered blocks so far: each row and token by its own, in every way that a model runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elsteer.energy.descent import Descent
from elsteer.steering import Steering
from elsteer.steering.methods.random import RandomMove
from slow import pad, slow_generate, slow_logits
from tiny import FAMILIES, tiny_model

PROMPTS = [[5, 9, 33, 71, 12], [40, 41], [7, 88, 21, 3, 3, 60, 61, 90, 14]]


def moves_of(*layers: int, pooled: bool = True) -> dict[int, Descent]:
    """Product energies whose u differ between blocks."""
    found = {}
    for layer in layers:
        generator = torch.Generator().manual_seed(layer)
        tensors: dict[str, Tensor] = {
            "weight": torch.randn(2, 32, generator=generator),
            "bias": torch.randn(2, generator=generator),
            "mean": torch.zeros(32),
            "scale": torch.tensor(1.5),
        }
        if pooled:
            tensors["pooled"] = torch.tensor(1.0)
        guard = torch.nn.functional.normalize(tensors["weight"][:1].T, dim=0)
        found[layer] = Descent(tensors, eta=0.4, steps=1, guard=guard)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_follows_each_row(family: str) -> None:
    model, moves = tiny_model(family), moves_of(1, 2, 3)
    inputs = pad(PROMPTS)
    with Steering(model, moves, window=2):
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    found = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert found == [slow_generate(model, moves, prompt, 6, 2, ends=()) for prompt in PROMPTS]


def test_it_is_the_mean_that_decides() -> None:
    model, prompt = tiny_model(), PROMPTS[0]
    ids = torch.tensor([prompt])
    logits = {}
    for pooled in (False, True):
        with Steering(model, moves_of(1, 2, pooled=pooled), window=0), torch.no_grad():
            logits[pooled] = model(ids).logits[0, -1]
    assert not torch.allclose(logits[True], logits[False], atol=1e-3)
    for layers in ((1,), (2,)):  # of one block, the mean is its own, whatever was steered in the pass before
        with Steering(model, moves_of(*layers), window=0), torch.no_grad():
            model(ids)
            one = model(ids).logits[0, -1]
        with Steering(model, moves_of(*layers, pooled=False), window=0), torch.no_grad():
            torch.testing.assert_close(one, model(ids).logits[0, -1])


def test_compiled_into_one_graph() -> None:
    model, moves, prompt = tiny_model(num_hidden_layers=2), moves_of(0, 1), PROMPTS[2]
    runner = torch.compile(model, backend="aot_eager", fullgraph=True)
    with Steering(model, moves, window=2), torch.no_grad():
        found = runner(input_ids=torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(found, slow_logits(model, moves, prompt, len(prompt) - 1, 2), atol=1e-4, rtol=0)


def test_the_random_control_moves_as_far() -> None:
    moves = moves_of(1)
    control = RandomMove(moves[1], 1)
    states, due = torch.randn(5, 32), torch.linspace(-1, 1, 5)
    assert control.pooled
    torch.testing.assert_close(control.due(states), moves[1].due(states))
    length = moves[1].delta(states, due=due).norm(dim=1)
    torch.testing.assert_close(control.delta(states, due=due).norm(dim=1), length)
