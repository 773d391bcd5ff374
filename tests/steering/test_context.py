"""Energies that read the context: however the prompt reached the cache, each row is steered by its own prompt's values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from elsteer.completions import PromptCaches, complete
from elsteer.decoding import decode, first_logits, score
from elsteer.energy.context import prompt_context, prompt_values, values_of
from elsteer.energy.descent import Descent
from elsteer.errors import SteeringError
from elsteer.judges import get_judge
from elsteer.states import StateStore
from elsteer.steering import Steering
from pipelines import some_prompts, speaker
from slow import pad, slow_generate, slow_logits
from tiny import FAMILIES, tiny_model

PROMPTS = [[5, 9, 33, 71, 12], [40, 41], [7, 88, 21, 3, 3, 60, 61, 90, 14], [101]]
PROMPT = PROMPTS[2]
LAYER, BLOCKS = 3, (1, 3)


def plain_values(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """(T, C): the values of the prompt's tokens but the last, from a plain pass over that prompt alone."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
    found = [cache.layers[at].values[0, :, : len(ids) - 1] for at in range(*BLOCKS)]
    return torch.cat([each.transpose(0, 1).flatten(1) for each in found], dim=1)


def plain_context(model: PreTrainedModel, move: Descent, ids: Sequence[int]) -> Tensor:
    """(1, H, C), query by query and token by token."""
    values = plain_values(model, ids)
    if not len(values):
        return torch.zeros(1, *move.context_query.shape)
    rows = []
    for query in move.context_query:
        weights = torch.stack([torch.exp(query @ value) for value in values])
        rows.append(
            sum(w * value for w, value in zip(weights / weights.sum(), values, strict=True)) - move.context_mean
        )
    return torch.stack(rows)[None]


def reader(model: PreTrainedModel, eta: float = 0.5) -> Descent:
    """A product energy whose u is read off the context alone, so that steering follows it."""
    values = torch.cat([plain_values(model, one) for one in PROMPTS])
    generator = torch.Generator().manual_seed(1)
    scale, shape = float(values.std()), (2, values.shape[1])
    tensors = {
        "weight": torch.stack([torch.zeros(32), torch.randn(32, generator=generator)]),
        "bias": torch.zeros(2),
        "mean": torch.zeros(32),
        "scale": torch.tensor(1.5),
        "context_weight": torch.cat([torch.randn(1, *shape, generator=generator), torch.zeros(1, *shape)])
        / (4 * scale),
        "context_query": torch.randn(shape, generator=generator) / (2 * scale),
        "context_mean": values.mean(dim=0),
        "context_blocks": torch.tensor([float(each) for each in BLOCKS]),
    }
    return Descent(tensors, eta=eta, steps=1, guard=torch.eye(32)[:, :1])


class Told:
    """The same move for one prompt, its context given: what the slow reference steers by."""

    def __init__(self, move: Descent, context: Tensor) -> None:
        self.move, self.context = move, context

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        return self.move.delta(states, strength, self.context.expand(len(states), -1, -1))


def wanted(model: PreTrainedModel, move: Descent, prompts: Sequence[Sequence[int]], window: int = 2) -> list[list[int]]:
    return [slow_generate(model, {LAYER: Told(move, plain_context(model, move, p))}, p, 8, window) for p in prompts]


def made(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    out = model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False, **options})
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(258) + 1] if 258 in row else row for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_steered_as_its_rows_alone(family: str) -> None:
    model = tiny_model(family)
    move = reader(model)
    steps = torch.cat([Told(move, plain_context(model, move, p)).delta(torch.zeros(1, 32)) for p in PROMPTS[:3]])
    assert float((steps[0] - steps[1]).norm()) > 1e-3, "the prompts' contexts must make a difference here"
    with Steering(model, {LAYER: move}, window=2):
        assert made(model, pad(PROMPTS)) == wanted(model, move, PROMPTS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_pass_of_ones_own(side: str) -> None:
    model = tiny_model()
    move = reader(model)
    with Steering(model, {LAYER: move}, window=0), torch.no_grad():
        found = model(**pad(PROMPTS, side)).logits
    for row, prompt in enumerate(PROMPTS):
        at = -1 if side == "left" else len(prompt) - 1
        slow = slow_logits(model, {LAYER: Told(move, plain_context(model, move, prompt))}, prompt, len(prompt) - 1, 0)
        torch.testing.assert_close(found[row, at], slow[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 4}, {"num_beams": 1}],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "mistral"])
def test_however_the_cache_was_filled(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family)
    move = reader(model)
    with Steering(model, {LAYER: move}, window=2):
        assert made(model, pad(PROMPTS), **options) == wanted(model, move, PROMPTS)


def test_end_tokens_in_a_prompt_are_read_where_pads_are_end_tokens() -> None:
    model, prompt = tiny_model(), [*PROMPTS[0], 258, 258, 258, *PROMPTS[1]]
    model.generation_config.pad_token_id = 258
    move = reader(model)
    with Steering(model, {LAYER: move}, window=0):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    slow = slow_logits(model, {LAYER: Told(move, plain_context(model, move, prompt))}, prompt, len(prompt) - 1, 0)[-1]
    torch.testing.assert_close(out.logits[0][0], slow, atol=1e-4, rtol=0)


def test_a_cache_from_before_the_landscape_was_attached() -> None:
    model = tiny_model()
    move = reader(model)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        with torch.no_grad():
            model(torch.tensor([PROMPT[:5]]), past_key_values=cache, use_cache=True)
        with Steering(model, {LAYER: move}, window=2):
            assert made(model, pad([PROMPT]), past_key_values=cache) == wanted(model, move, [PROMPT])


def test_returned_sequences_and_beams_follow_their_row() -> None:
    model = tiny_model()
    move = reader(model)
    two = [PROMPT, PROMPTS[0]]
    with Steering(model, {LAYER: move}, window=2):
        out = model.generate(
            **pad(two), max_new_tokens=4, do_sample=True, num_return_sequences=3, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        best = model.generate(**pad(two), max_new_tokens=1, num_beams=3, do_sample=False)[:, -1].tolist()
    assert best == [made_one[0] for made_one in wanted(model, move, two)]
    for row in range(6):
        prompt = two[row // 3]
        slow = slow_logits(model, {LAYER: Told(move, plain_context(model, move, prompt))}, prompt, len(prompt) - 1, 0)[
            -1
        ]
        torch.testing.assert_close(out.logits[0][row], slow, atol=1e-4, rtol=0)


def test_prompt_caches_and_given_ends() -> None:
    """What tuning and evaluation do: the prompts' caches first, then steering from the last token."""
    tiny = speaker()
    prompts = some_prompts(12)
    caches = PromptCaches(*tiny, prompts, batch_size=5)
    model = tiny[0]
    move = reader(model)
    for batch in caches.batches():
        values = values_of(batch, BLOCKS)
        with Steering(model, {LAYER: move}, window=1) as steering:
            out = decode(model, batch, max_new_tokens=4, end_ids=set(), steering=steering)
            scored = list(score(model, batch, out.tokens, steering=steering))
        for row, place in enumerate(batch.rows):
            ids = caches.ids[place]
            context = plain_context(model, move, ids)
            torch.testing.assert_close(values[row], plain_values(model, ids), atol=1e-5, rtol=0)
            slow = {LAYER: Told(move, context)}
            assert out.tokens[row] == slow_generate(model, slow, ids, 4, 1, ends=())
            whole = slow_logits(model, slow, [*ids, *out.tokens[row]], len(ids) - 1, 1)[len(ids) - 1 : -1]
            torch.testing.assert_close(scored[row], whole, atol=1e-4, rtol=0)
        plain = [slow_logits(model, {}, caches.ids[place], 0, 0)[-1] for place in batch.rows]
        torch.testing.assert_close(first_logits(model, batch), torch.stack(plain), atol=1e-4, rtol=0)


def test_compiled() -> None:
    model = tiny_model()
    move = reader(model)
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    try:
        with Steering(model, {LAYER: move}, window=2):
            found = made(model, pad(PROMPTS), cache_implementation="static", compile_config=config)
            assert found == wanted(model, move, PROMPTS)
    finally:
        torch.compiler.reset()
    runner = torch.compile(tiny_model(), backend="eager")
    try:
        with Steering(runner, {LAYER: move}, window=2), torch.no_grad():  # of each row three tokens are looked at
            logits = runner(**pad(PROMPTS)).logits[:, -1]
        slow = [
            slow_logits(model, {LAYER: Told(move, plain_context(model, move, p))}, p, len(p) - 1, 0)[-1]
            for p in PROMPTS
        ]
        torch.testing.assert_close(logits, torch.stack(slow), atol=1e-4, rtol=0)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("kinds", ["sf", "fs", "ss"])
def test_of_a_sliding_window_the_columns_that_are_left_are_read(kinds: str) -> None:
    """In the cache of a block with a window of 4 the last 3 columns are left; a column counts where no block has lost it."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    model = tiny_model("gemma3", sliding_window=4, layer_types=[names[one] for one in f"f{kinds}f"])
    whole, slid = DynamicCache(), DynamicCache(config=model.config)  # without the configuration no column is lost
    inputs = pad(PROMPTS)
    with torch.no_grad():
        for cache in (whole, slid):
            model(**inputs, past_key_values=cache, use_cache=True)
    assert {cache.layers[at].values.shape[2] for cache in (whole, slid) for at in range(*BLOCKS)} == {3, 9}
    real = inputs["attention_mask"].bool()
    expected, _ = prompt_values(whole, BLOCKS, real)
    found, kept = prompt_values(slid, BLOCKS, real)
    assert torch.equal(kept, real & (torch.arange(9) >= 6))
    torch.testing.assert_close(found[kept], expected[kept])

    move = reader(tiny_model())
    with Steering(model, {LAYER: move}, window=0), torch.no_grad():
        steered = model(**inputs).logits[:, -1]
    for row, prompt in enumerate(PROMPTS):
        before = kept[row : row + 1, :-1]  # the last token is none of its own context
        context = prompt_context(whole, BLOCKS, before, move.context_query, move.context_mean)[row : row + 1]
        slow = slow_logits(model, {LAYER: Told(move, context)}, prompt, len(prompt) - 1, 0)[-1]
        torch.testing.assert_close(steered[row], slow, atol=1e-4, rtol=0)


def test_without_a_cache_that_can_be_read_it_is_an_error() -> None:
    model = tiny_model()
    move = reader(model)
    with Steering(model, {LAYER: move}, window=0):
        with pytest.raises(SteeringError, match="use_cache=True"):
            made(model, pad(PROMPTS), use_cache=False)
        with pytest.raises(SteeringError, match="use_cache=True"), torch.no_grad():
            model(**pad(PROMPTS), use_cache=False)
        model(**pad(PROMPTS))
    quantised = object.__new__(QuantizedCache)
    quantised.layers = [type("Layer", (), {"values": torch.zeros(1, 2, 3, 4), "_quantized_values": None})()] * 4
    with pytest.raises(SteeringError, match="no quantised"):
        prompt_context(quantised, BLOCKS, torch.ones(1, 3, dtype=torch.bool), move.context_query, move.context_mean)


def test_a_row_of_one_token_has_no_context() -> None:
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[101, 3]]), past_key_values=cache)
    move = reader(model)
    for columns in (torch.zeros(1, 0, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)):
        found = prompt_context(cache, BLOCKS, columns, move.context_query, move.context_mean)
        assert torch.equal(found, torch.zeros(1, *move.context_query.shape))


@pytest.mark.parametrize("same", [True, False])
def test_blocks_that_read_the_same_context_read_it_once_a_pass(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = tiny_model("qwen2", num_hidden_layers=5), []
    one, other = reader(model), reader(model)
    if not same:
        other.context_query.mul_(2)

    def counted(*args: Any) -> Tensor:
        reads.append(args)
        return prompt_context(*args)

    monkeypatch.setattr("elsteer.steering.attach.prompt_context", counted)
    with Steering(model, {LAYER: one, LAYER + 1: other}, window=0), torch.no_grad():
        for passes in (1, 2):
            found = model(**pad(PROMPTS)).logits[:, -1]
            assert len(reads) == passes * (1 if same else 2)
    moves = [(LAYER, one), (LAYER + 1, other)]
    slow = [
        slow_logits(model, {at: Told(move, plain_context(model, move, p)) for at, move in moves}, p, len(p) - 1, 0)[-1]
        for p in PROMPTS
    ]
    torch.testing.assert_close(found, torch.stack(slow), atol=1e-4, rtol=0)


def test_the_values_of_every_prompt_that_is_answered_are_kept(tmp_path: Path) -> None:
    """What the energies learn to read is what they are given while steering; a killed run goes on."""
    tiny, prompts = speaker(), some_prompts(12)
    caches = PromptCaches(*tiny, prompts, batch_size=5)

    def answer(places: Sequence[int] | None = None) -> StateStore:
        store = StateStore(tmp_path / "states")
        complete(
            caches,
            get_judge("rules"),
            max_new_tokens=4,
            places=places,
            path=tmp_path / "done.jsonl",
            states=store,
            values=BLOCKS,
        )
        return store

    answer(range(5))
    found = answer().values([one.id for one in prompts], mapped=tmp_path / "values")
    for ids, values in zip(caches.ids, found, strict=True):
        torch.testing.assert_close(values.float(), plain_values(tiny[0], ids), atol=2e-3, rtol=1e-3)
