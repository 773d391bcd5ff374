"""The time that steering adds, on times that are known and on a tiny model that really runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from elsteer.evaluation import overhead
from elsteer.evaluation.overhead import decode_times, time_ratio
from elsteer.steering import Steering
from slow import energy_moves, pad
from tiny import tiny_model

PROMPTS = [[5, 9, 33, 71, 12], [40, 41]]


def test_the_ratio_of_known_times() -> None:
    """The prompt's pass takes a third of the plain time and twice as long steered, the others as long: 4/3 in all."""
    plain = torch.tensor([[2.0, 1.0, 1.0, 1.0, 1.0]]).repeat(3, 1)
    steered = plain.clone()
    steered[:, 0] *= 2
    found = time_ratio(plain, steered)
    assert (found.value, found.n) == (pytest.approx(4 / 3), 15)
    assert found.low == found.high == pytest.approx(4 / 3)


def test_bursts_and_slow_spells_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = 1 + 0.2 * torch.rand(4, 50, generator=generator)
    steered = plain * 1.01
    plain[1], steered[1] = 2 * plain[1], 2 * steered[1]  # a spell that both meet
    steered[2, 7] *= 30  # a burst that one meets
    found = time_ratio(plain, steered)
    assert found.value == pytest.approx(1.01, abs=1e-4)
    assert found.low <= found.value <= found.high < 1.02


def test_one_token_is_the_prompts_pass_alone() -> None:
    assert time_ratio(torch.ones(2, 1), 3 * torch.ones(2, 1)).value == pytest.approx(3)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("static", [False, True])
def test_both_sides_answer_as_they_should(family: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain answers are `generate`'s, steered ones those of steered `generate`: what is timed is what runs."""
    model, inputs = tiny_model(family), pad(PROMPTS)
    answers: list[list[Tensor]] = []

    class Kept(overhead._Answer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.made: list[Tensor] = []
            answers.append(self.made)

        def step(self) -> float:
            spent = super().step()
            self.made.append(self.ids)
            return spent

    def generated() -> Tensor:
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]

    monkeypatch.setattr(overhead, "_Answer", Kept)
    wanted = [generated()]
    with Steering(model, energy_moves(), window=0) as steering:
        wanted.append(generated())
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        times = decode_times(model, steering, ids, mask, tokens=5, repeats=1, static=static)
        assert steering.enabled
    assert not torch.equal(*wanted)
    assert [torch.cat(made, dim=1).tolist() for made in answers[-2:]] == [one.tolist() for one in wanted]
    assert all(one.shape == (1, 5) and bool((one > 0).all()) for one in times)
