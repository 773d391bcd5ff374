"""Steering through plain `model.generate`, however it is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from elsteer.errors import SteeringError
from elsteer.steering import Steering
from slow import Push, energy_moves, inputs_of_blocks, pad, slow_generate, slow_logits
from tiny import FAMILIES, tiny_model

PROMPTS = [[5, 9, 33, 71, 12], [40, 41], [7, 88, 21, 3, 3, 60, 61, 90, 14], [101]]
PROMPT = PROMPTS[2]
FEW = ["qwen2", "gemma3", "gpt2", "mixtral"]


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], new: int = 8, **kwargs: Any) -> list[list[int]]:
    """New tokens of each row, up to and with the end token."""
    out = model.generate(**inputs, **{"max_new_tokens": new, "do_sample": False, **kwargs})
    width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return [upto_end(row) for row in out[:, width:].tolist()]


def upto_end(row: list[int]) -> list[int]:
    return row[: row.index(258) + 1] if 258 in row else row


def alone(ids: list[int]) -> dict[str, Tensor]:
    return pad([ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_steered_generation_is_what_the_plain_loop_gives(family: str) -> None:
    model, moves = tiny_model(family), energy_moves()
    plain = generate(model, pad(PROMPTS))
    with Steering(model, moves, window=2):
        found = generate(model, pad(PROMPTS))
    assert found == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]
    assert found != plain  # else the test would show nothing
    assert generate(model, pad(PROMPTS)) == plain


@pytest.mark.parametrize("window", [0, 1, 100])
def test_any_window(window: int) -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=window):
        assert generate(model, pad(PROMPTS)) == [slow_generate(model, moves, p, 8, window) for p in PROMPTS]


@pytest.mark.parametrize("family", FEW)
def test_strength_zero_is_the_plain_model_bit_for_bit(family: str) -> None:
    model, options = tiny_model(family), {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}
    plain = model.generate(**pad(PROMPTS), **options, do_sample=False)
    zeros: list[Tensor | float] = [0.0, -0.0, torch.zeros(4)]
    for strength in zeros:
        with Steering(model, energy_moves(), window=2, strength=strength):
            found = model.generate(**pad(PROMPTS), **options, do_sample=False)
        assert torch.equal(found.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, plain.logits, strict=True))


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows_alone(family: str, side: str) -> None:
    model, options = tiny_model(family), {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 5}
    with Steering(model, energy_moves(), window=2):
        both = model.generate(**pad(PROMPTS, side), **options, do_sample=False, eos_token_id=None)
        for row, prompt in enumerate(PROMPTS):
            one = model.generate(**alone(prompt), **options, do_sample=False, eos_token_id=None)
            assert both.sequences[row, -5:].tolist() == one.sequences[0, -5:].tolist()
            for a, b in zip(both.logits, one.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=0)


def test_right_padded_inputs_without_a_mask() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2):
        found = generate(model, {"input_ids": pad(PROMPTS, "right")["input_ids"]})
    assert found == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]


def test_left_padded_inputs_without_a_mask() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2):
        found = generate(model, {"input_ids": pad(PROMPTS)["input_ids"]})
    assert found == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]


@pytest.mark.parametrize("ends", [258, [9, 258]], ids=str)
def test_end_tokens_in_a_prompt_are_no_pads_where_pads_are_end_tokens(ends: int | list[int]) -> None:
    """As in a chat of several turns whose tokenizer has no pad token of its own; `generate` infers no mask there."""
    model, moves, prompt = tiny_model(), energy_moves(), [*PROMPTS[0], 258, *PROMPT, 258]
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 258, ends
    with Steering(model, moves, window=2):
        found = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    assert found == slow_generate(model, moves, prompt, 8, 2, ends=[258, *(ends if isinstance(ends, list) else [])])


def test_inputs_given_by_place() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2):
        found = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0, len(PROMPT) :].tolist()
    assert upto_end(found) == slow_generate(model, moves, PROMPT, 8, 2)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.uint8])
def test_pads_between_the_tokens_are_refused(dtype: torch.dtype) -> None:
    model, inputs = tiny_model(), pad([PROMPT])
    inputs["attention_mask"][0, [0, -1]] = 0
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    with Steering(model, energy_moves(), window=2), pytest.raises(SteeringError, match="pad on the left"):
        generate(model, inputs)


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt_neox"])
def test_every_kind_of_cache_gives_the_same_tokens(family: str, implementation: str) -> None:
    model, moves = tiny_model(family), energy_moves()
    with Steering(model, moves, window=2):
        for _ in range(2):  # the second time a static cache may be used again
            found = generate(model, pad(PROMPTS), cache_implementation=implementation)
            assert found == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]


def test_a_cache_of_ones_own() -> None:
    model, moves = tiny_model(), energy_moves()
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)]
    with Steering(model, moves, window=2):
        for cache in caches:
            found = generate(model, alone(PROMPT), past_key_values=cache)
            assert found == [slow_generate(model, moves, PROMPT, 8, 2)]


@pytest.mark.parametrize("reused", [False, True])
def test_a_cache_that_holds_the_prompts_end_is_refused(reused: bool) -> None:
    model, cache = tiny_model(), DynamicCache()
    inputs = pad([PROMPT])
    if reused:
        generate(model, inputs, past_key_values=cache)
    else:
        model(**inputs, past_key_values=cache)
    with Steering(model, energy_moves(), window=0), pytest.raises(SteeringError, match="crop the cache"):
        generate(model, inputs, past_key_values=cache)
    cache.crop(len(PROMPT) - 1 - cache.get_seq_length())
    with Steering(model, moves := energy_moves(), window=0):
        assert generate(model, inputs, past_key_values=cache) == [slow_generate(model, moves, PROMPT, 8, 0)]


@pytest.mark.parametrize("family", FEW)
def test_no_cache_at_all(family: str) -> None:
    model, moves = tiny_model(family), energy_moves()
    with Steering(model, moves, window=2):
        found = generate(model, pad(PROMPTS), use_cache=False)
    assert found == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 64])
def test_chunked_prefill(chunk: int) -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2):
        found = generate(model, pad(PROMPTS), prefill_chunk_size=chunk)
    assert found == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]


def test_embeddings_instead_of_ids() -> None:
    model, moves, inputs = tiny_model(), energy_moves(), pad(PROMPTS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with Steering(model, moves, window=2):
        found = generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert found == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]


def test_right_padded_embeddings() -> None:
    model, moves, inputs = tiny_model(), energy_moves(), pad(PROMPTS, "right")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with Steering(model, moves, window=2):
        found = generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert found == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]


def test_generation_from_the_begin_token_alone() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2):
        found = model.generate(max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    assert upto_end(found) == slow_generate(model, moves, [257], 8, 2)


def test_a_chat_goes_on_with_the_cache_of_its_last_turn() -> None:
    """The second turn is steered at its own end; what was steered in the first turn stays in the cache."""
    model, moves = tiny_model(), {1: Push(length=3.0), 2: Push(seed=1, length=3.0)}
    with Steering(model, moves, window=1):
        first = model.generate(
            **alone(PROMPT), max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        turn = torch.cat([first.sequences, torch.tensor([PROMPTS[0]])], dim=1)
        with inputs_of_blocks(model) as steered:
            second = model.generate(turn, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    # block 1 of every pass, against the plain inputs of the same block: only the window differs, by the vector
    seen, new = first.past_key_values.get_seq_length(), torch.cat(steered[1], dim=1)
    plain = plain_inputs(model, second[:, :-1], layer=1)[:, -new.shape[1] :]
    end = turn.shape[1] - 1
    columns = torch.arange(second.shape[1] - 1)[-new.shape[1] :]
    moved = ((new - plain).abs() > 1e-4).any(dim=-1)[0]
    assert seen >= end
    assert columns[moved].tolist() == [end, end + 1]


def plain_inputs(model: PreTrainedModel, ids: Tensor, layer: int) -> Tensor:
    with inputs_of_blocks(model) as seen, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return seen[layer][0]


@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search(beams: int) -> None:
    """Beams are steered like rows: each row's best beam is the same alone, in a batch, and without a cache."""
    model, moves = tiny_model(), energy_moves()
    plain = generate(model, pad(PROMPTS), num_beams=beams)
    with Steering(model, moves, window=2):
        found = generate(model, pad(PROMPTS), num_beams=beams)
        slow = generate(model, pad(PROMPTS), num_beams=beams, use_cache=False)
        rows = [generate(model, alone(prompt), num_beams=beams)[0] for prompt in PROMPTS]
        scored = model.generate(
            **alone(PROMPT), num_beams=beams, max_new_tokens=5, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    assert found == slow != plain
    assert [upto_end(row) for row in found] == [upto_end(row) for row in rows]
    # the winning beam's score is its log probability under the slow reference
    ids = scored.sequences[0].tolist()
    logits = slow_logits(model, moves, ids, len(PROMPT) - 1, 2).log_softmax(dim=-1)
    wanted = sum(float(logits[at - 1, ids[at]]) for at in range(len(PROMPT), len(ids)))
    assert float(scored.sequences_scores[0]) == pytest.approx(wanted, abs=1e-4)


def test_sampling_with_a_seed_and_several_sequences() -> None:
    model, moves, options = tiny_model(), energy_moves(), {"do_sample": True, "top_k": 0, "eos_token_id": None}
    with Steering(model, moves, window=2):
        made = []
        for _ in range(2):
            torch.manual_seed(3)
            made.append(
                model.generate(
                    **pad(PROMPTS), max_new_tokens=4, num_return_sequences=3, return_dict_in_generate=True,
                    output_logits=True, **options,
                )
            )  # fmt: skip
    assert torch.equal(made[0].sequences, made[1].sequences)
    new = made[0].sequences[:, -4:]
    for row in range(len(PROMPTS) * 3):  # each sequence's logits are the reference's for its own tokens
        prompt, own = PROMPTS[row // 3], new[row].tolist()
        wanted = slow_logits(model, moves, [*prompt, *own], len(prompt) - 1, 2)[len(prompt) - 1 : -1]
        found = torch.stack([logits[row] for logits in made[0].logits])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("kind", ["model", "itself", "lookup"])
def test_assisted_generation_gives_the_same_tokens(family: str, kind: str) -> None:
    model, moves = tiny_model(family), energy_moves()
    helper = {
        "model": {"assistant_model": tiny_model(family, seed=1)},
        "itself": {"assistant_model": tiny_model(family)},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[kind]
    prompt = PROMPT * 3
    with Steering(model, moves, window=3):
        assert generate(model, alone(prompt), new=12, **helper) == [slow_generate(model, moves, prompt, 12, 3)]


@pytest.mark.parametrize(
    "options",
    [{"assistant_early_exit": 2}, {"guidance_scale": 2.0}, {"token_healing": True}],
    ids=lambda o: next(iter(o)),
)
def test_ways_to_generate_that_the_window_does_not_describe_are_refused(options: dict[str, Any]) -> None:
    model = tiny_model()
    with Steering(model, energy_moves(), window=2) as steering:
        with pytest.raises(SteeringError, match=next(iter(options))):
            generate(model, alone(PROMPT), **options)
        assert generate(model, alone(PROMPT), guidance_scale=1.0)
        steering.disable()
        if "token_healing" not in options:
            assert generate(model, alone(PROMPT), **options)


@pytest.mark.parametrize("place", ["argument", "config", "model"])
def test_what_is_refused_is_refused_wherever_it_is_set(place: str) -> None:
    model = tiny_model()
    options: dict[str, Any] = {}
    config = copy.deepcopy(model.generation_config)
    config.guidance_scale = 2.0
    if place == "argument":
        options["guidance_scale"] = 2.0
    elif place == "config":
        options["generation_config"] = config
    else:
        model.generation_config = config
    ids = torch.tensor([PROMPT])
    with Steering(model, energy_moves(), window=2), pytest.raises(SteeringError, match="guidance_scale"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **options)


def test_a_strength_per_row_is_that_of_all_sequences_returned_for_it() -> None:
    model, moves = tiny_model(), energy_moves()
    strengths = [0.0, 1.0, 0.5, 2.0]

    def first(strength: Tensor | float, **options: Any) -> Tensor:
        with Steering(model, moves, window=2, strength=strength):
            made = model.generate(
                **pad(PROMPTS), max_new_tokens=1, return_dict_in_generate=True, output_logits=True, **options
            )
        return made.logits[0]

    torch.manual_seed(0)
    found = first(torch.tensor(strengths), num_return_sequences=2, do_sample=True)
    for row, strength in enumerate(strengths):
        wanted = first(strength, do_sample=False)[row]
        for copied in (2 * row, 2 * row + 1):
            torch.testing.assert_close(found[copied], wanted)


def test_continuous_batching_is_refused() -> None:
    model = tiny_model()
    with Steering(model, energy_moves(), window=2):
        with pytest.raises(SteeringError, match=r"model\.generate"):
            model.generate_batch([PROMPT])
        with pytest.raises(SteeringError, match=r"model\.generate"):
            model.generate(torch.tensor([PROMPT]), cache_implementation="paged")
    assert model.generate_batch.__func__ is type(model).generate_batch


def test_one_strength_per_row() -> None:
    model, moves = tiny_model(), energy_moves()
    strengths = [0.0, 1.0, 0.5, 2.0]
    with Steering(model, moves, window=2, strength=torch.tensor(strengths)) as steering:
        found = generate(model, pad(PROMPTS))
        wanted = [slow_generate(model, moves, p, 8, 2, s) for p, s in zip(PROMPTS, strengths, strict=True)]
        assert found == wanted
        assert generate(model, pad(PROMPTS), num_beams=3)[0] == generate_plain(model, steering, PROMPTS[0], num_beams=3)
        for prompts in (PROMPTS[:3], PROMPTS * 2):
            with pytest.raises(SteeringError, match="strength has 4 entries"):
                generate(model, pad(prompts))


def generate_plain(model: PreTrainedModel, steering: Steering, prompt: list[int], **kwargs: Any) -> list[int]:
    steering.disable()
    try:
        return generate(model, alone(prompt), **kwargs)[0]
    finally:
        steering.enable()


def test_strength_changes_between_calls() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2) as steering:
        for strength in (1.0, 0.3, 0.0, 2.0):
            steering.strength = strength
            assert generate(model, pad(PROMPTS)) == [slow_generate(model, moves, p, 8, 2, strength) for p in PROMPTS]
        with pytest.raises(SteeringError, match="finite"):
            steering.strength = float("nan")
        with pytest.raises(SteeringError, match="finite"):
            steering.strength = torch.ones(2, 2)
        with pytest.raises(SteeringError, match="negative"):
            steering.strength = torch.tensor([1.0, -0.5])


def test_generation_under_inference_mode() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2), torch.inference_mode():
        assert generate(model, pad(PROMPTS)) == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]


def test_one_generation_after_another() -> None:
    """Nothing of a call is left for the next: other batch sizes, lengths, and a call that failed between."""
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2):
        assert generate(model, pad(PROMPTS)) == [slow_generate(model, moves, prompt, 8, 2) for prompt in PROMPTS]
        with pytest.raises(ValueError):
            generate(model, alone(PROMPT), no_such_option=1)
        for prompt in PROMPTS:
            assert generate(model, alone(prompt)) == [slow_generate(model, moves, prompt, 8, 2)]


@pytest.mark.parametrize("window", [0, 2])
def test_after_a_generation_that_was_broken_off_it_is_not_guessed_where_the_prompt_ended(window: int) -> None:
    model, moves = tiny_model(), energy_moves()
    cache, begun = DynamicCache(config=model.config), slow_generate(model, moves, PROMPT, 1, window)

    def stop(_input_ids: Tensor, scores: Tensor) -> Tensor:
        if cache.get_seq_length() > len(PROMPT):
            raise KeyError("stopped")
        return scores

    with torch.no_grad(), Steering(model, moves, window=window) as steering:
        with pytest.raises(KeyError):
            model.generate(**alone(PROMPT), past_key_values=cache, do_sample=False, logits_processor=[stop])
        with pytest.raises(SteeringError, match=r"steering\.prompts"):
            model(torch.tensor([[7]]), past_key_values=cache)
        with steering.prompts(torch.tensor([len(PROMPT)])):
            found = model(torch.tensor([[7]]), past_key_values=cache).logits[0]
    wanted = slow_logits(model, moves, [*PROMPT, *begun, 7], len(PROMPT) - 1, window)
    torch.testing.assert_close(found, wanted[-1:], atol=1e-4, rtol=0)
