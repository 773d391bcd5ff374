"""A handle among several threads: calls of generate wait for each other, passes of one's own that overlap are refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from elsteer.errors import SteeringError
from elsteer.models import decoder_blocks
from elsteer.steering import Steering
from slow import energy_moves, pad, slow_generate, slow_logits
from tiny import tiny_model

PROMPTS = [[5, 9, 33, 71, 12], [40, 41], [7, 88, 21, 3, 3, 60, 61, 90, 14], [101]]


def test_generations_of_several_threads_are_each_steered() -> None:
    model, moves = tiny_model(), energy_moves()
    asked = PROMPTS * 4

    def new(prompt: list[int]) -> list[int]:
        return model.generate(**pad([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()

    plain = [new(prompt) for prompt in asked]
    with Steering(model, moves, window=2), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(new, asked))
    assert found == [slow_generate(model, moves, prompt, 6, 2) for prompt in asked]
    assert found != plain


class Halt:
    """Halts the first pass of one thread at a block, until told to go on."""

    def __init__(self) -> None:
        self.there, self.go = threading.Event(), threading.Event()

    def __call__(self, module: Any, args: Any) -> None:
        if not self.there.is_set():
            self.there.set()
            assert self.go.wait(60)


@pytest.mark.parametrize("ends_first", [False, True])
def test_a_pass_that_another_threads_pass_cut_into_is_an_error(ends_first: bool) -> None:
    model, moves, halt = tiny_model(), energy_moves(), Halt()
    ids = torch.tensor([PROMPTS[0]])
    with Steering(model, moves, window=0) as steering, ThreadPoolExecutor(1) as pool:
        decoder_blocks(model)[1].register_forward_pre_hook(halt)
        first = pool.submit(model, ids)
        assert halt.there.wait(60)
        if ends_first:  # the other pass is over before the first one goes on
            found: Tensor = model(ids).logits
            torch.testing.assert_close(found[0], slow_logits(model, moves, PROMPTS[0], 4, 0), atol=1e-4, rtol=0)
        else:
            steering._before(model.model, (ids,), {})
        halt.go.set()
        with pytest.raises(SteeringError, match="Two threads"):
            first.result()


def test_a_pass_beside_a_generation_is_an_error_and_the_generation_goes_on() -> None:
    model, moves, halt = tiny_model(), energy_moves(), Halt()
    with Steering(model, moves, window=2), ThreadPoolExecutor(1) as pool:
        handle = decoder_blocks(model)[1].register_forward_pre_hook(halt)
        first = pool.submit(model.generate, **pad([PROMPTS[0]]), max_new_tokens=6, do_sample=False)
        assert halt.there.wait(60)
        with pytest.raises(SteeringError, match="Two threads"):
            model(torch.tensor([PROMPTS[1]]))
        halt.go.set()
        assert first.result()[0, 5:].tolist() == slow_generate(model, moves, PROMPTS[0], 6, 2)
        handle.remove()


def test_passes_of_several_threads_at_strength_0_are_the_plain_models() -> None:
    model, halt = tiny_model(), Halt()
    ids = torch.tensor([PROMPTS[0]])
    plain = model(ids).logits
    with Steering(model, energy_moves(), window=0, strength=0.0), ThreadPoolExecutor(1) as pool:
        decoder_blocks(model)[1].register_forward_pre_hook(halt)
        first = pool.submit(model, ids)
        assert halt.there.wait(60)
        assert torch.equal(model(ids).logits, plain)
        halt.go.set()
        assert torch.equal(first.result().logits, plain)
