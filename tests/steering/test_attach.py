"""The handle, forward passes of one's own, and what is left of steering when it is gone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
)

from elsteer.errors import SteeringError
from elsteer.models import accepts, decoder_blocks, decoder_of
from elsteer.steering import Steering
from slow import Push, energy_moves, inputs_of_blocks, pad, slow_generate, slow_logits
from tiny import FAMILIES, tiny_model

PROMPTS = [[5, 9, 33, 71, 12], [40, 41], [7, 88, 21, 3, 3, 60, 61, 90, 14]]
PROMPT = PROMPTS[2]


def hooks(model: PreTrainedModel) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())


def logits_of(model: PreTrainedModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# The first token


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_generated_token_is_steered(family: str) -> None:
    model, moves = tiny_model(family), energy_moves()
    inputs = {"input_ids": torch.tensor([PROMPT])}
    plain = logits_of(model, **inputs)
    with Steering(model, moves, window=0):
        steered = logits_of(model, **inputs)
    assert torch.equal(steered[0, :-1], plain[0, :-1])  # earlier tokens exactly as they were
    assert float((steered[0, -1] - plain[0, -1]).abs().max()) > 1e-2
    torch.testing.assert_close(steered[0], slow_logits(model, moves, PROMPT, len(PROMPT) - 1, 0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2", "falcon"])
def test_a_padded_forward_equals_its_rows_alone(family: str, side: str) -> None:
    model, inputs = tiny_model(family), pad(PROMPTS, side)
    if side == "left":  # as generate does; without it models with learnt positions give another answer, steered or not
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    with Steering(model, moves := energy_moves(), window=2):
        found = logits_of(model, **inputs)
    for row, prompt in enumerate(PROMPTS):
        last = inputs["input_ids"].shape[1] - 1 if side == "left" else len(prompt) - 1
        wanted = slow_logits(model, moves, prompt, len(prompt) - 1, 2)[-1]
        torch.testing.assert_close(found[row, last], wanted, atol=1e-4, rtol=0)


# Which tokens are touched


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_pads_and_earlier_prompt_tokens_are_never_touched(family: str, side: str) -> None:
    model, inputs = tiny_model(family), pad(PROMPTS, side)
    with inputs_of_blocks(model) as plain:
        logits_of(model, **inputs)
    with Steering(model, {0: Push(length=2.0)}, window=3), inputs_of_blocks(model) as steered:
        logits_of(model, **inputs)
    moved = (steered[0][0] != plain[0][0]).any(dim=-1)
    width = inputs["input_ids"].shape[1]
    ends = [width - 1 if side == "left" else len(prompt) - 1 for prompt in PROMPTS]
    assert moved.nonzero().tolist() == [[row, end] for row, end in enumerate(ends)]
    torch.testing.assert_close(steered[0][0][moved], plain[0][0][moved] + Push(length=2.0).vector, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [0, 2])
def test_tokens_after_the_window_are_not_touched(window: int) -> None:
    """In every pass of generate, block 0's input (that depends on the token alone) is moved inside the window only."""
    model, inputs = tiny_model(), pad(PROMPTS)
    with Steering(model, {0: Push(length=2.0)}, window=window), inputs_of_blocks(model) as steered:
        out = model.generate(**inputs, max_new_tokens=7, do_sample=False, eos_token_id=None)
    found = torch.cat(steered[0], dim=1)
    plain = model.get_input_embeddings()(out[:, :-1])
    moved = ((found - plain).abs() > 1e-4).any(dim=-1)
    width = inputs["input_ids"].shape[1]
    wanted = torch.zeros_like(moved)
    wanted[:, width - 1 : width + window] = True
    assert torch.equal(moved, wanted)


def test_a_prompt_of_two_tokens_beside_a_long_one_in_a_static_cache() -> None:
    """A pad's position must not be taken for the position of a short prompt's end."""
    model, inputs = tiny_model(), pad([PROMPT, [40, 41], [101]])
    with Steering(model, {0: Push(length=2.0)}, window=1), inputs_of_blocks(model) as steered:
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, cache_implementation="static"
        )
    plain = model.get_input_embeddings()(out[:, :-1])
    moved = ((torch.cat(steered[0], dim=1) - plain).abs() > 1e-4).any(dim=-1)
    width = len(PROMPT)
    assert moved.nonzero().tolist() == [[row, column] for row in range(3) for column in (width - 1, width)]


# Loops of one's own


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("own_cache", [False, True])
def test_a_decoding_loop_of_ones_own(family: str, own_cache: bool) -> None:
    """The cache that the model made in the first pass is known in the second: that one goes on, it ends no prompt."""
    model, moves = tiny_model(family), energy_moves()
    with Steering(model, moves, window=2), torch.no_grad():
        for prompt in (PROMPTS[0], PROMPT):
            cache = DynamicCache(config=model.config) if own_cache else None
            out = model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True)
            made = [int(out.logits[0, -1].argmax())]
            while len(made) < 6:
                out = model(input_ids=torch.tensor([[made[-1]]]), past_key_values=out.past_key_values, use_cache=True)
                made.append(int(out.logits[0, -1].argmax()))
            assert made == slow_generate(model, moves, prompt, 6, 2, ends=())


def test_a_padded_loop_of_ones_own() -> None:
    model, moves, inputs = tiny_model(), energy_moves(), pad(PROMPTS)
    mask = inputs["attention_mask"]
    with Steering(model, moves, window=2), torch.no_grad():
        out = model(**inputs, position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0), use_cache=True)
        made = [out.logits[:, -1].argmax(dim=-1)]
        while len(made) < 6:
            mask = torch.cat([mask, mask.new_ones(len(PROMPTS), 1)], dim=1)
            out = model(
                input_ids=made[-1][:, None],
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            made.append(out.logits[:, -1].argmax(dim=-1))
    assert torch.stack(made, dim=1).tolist() == [slow_generate(model, moves, p, 6, 2, ends=()) for p in PROMPTS]


def test_a_loop_with_a_static_cache_of_ones_own() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        out = model(input_ids=torch.tensor([PROMPT]), past_key_values=cache)
        made = [int(out.logits[0, -1].argmax())]
        while len(made) < 6:
            out = model(input_ids=torch.tensor([[made[-1]]]), past_key_values=cache)
            made.append(int(out.logits[0, -1].argmax()))
    assert made == slow_generate(model, moves, PROMPT, 6, 2, ends=())


def test_a_batch_that_changes_within_a_sequence_is_refused_unless_the_ends_are_told() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2) as steering, torch.no_grad():
        out = model(**pad(PROMPTS), use_cache=True)
        cache = out.past_key_values
        cache.batch_select_indices(torch.tensor([2]))
        with pytest.raises(SteeringError, match=r"steering\.prompts"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        with steering.prompts(torch.tensor([len(PROMPT)])):
            found = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(
        found, slow_logits(model, moves, [*PROMPT, 7], len(PROMPT) - 1, 2)[-1], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_and_answers_in_one_pass_where_the_ends_are_told(side: str) -> None:
    model, moves, answer = tiny_model(), energy_moves(), [9, 8, 7, 6]
    inputs = pad([[*prompt, *answer] for prompt in PROMPTS], side)
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    with Steering(model, moves, window=1) as steering, steering.prompts(lengths):
        found = logits_of(model, **inputs)
    for row, prompt in enumerate(PROMPTS):
        kept = found[row][inputs["attention_mask"][row].bool()]
        wanted = slow_logits(model, moves, [*prompt, *answer], len(prompt) - 1, 1)
        torch.testing.assert_close(kept, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ([5, 0], "from 1 up"),
        ([-1, 2], "from 1 up"),
        ([5.0, 2.0], "from 1 up"),
        ([[5, 2]], "from 1 up"),
        ([True, True], "from 1 up"),
        ([5], "1 lengths were given for a batch of 2 rows"),
        ([5, 2, 2], "3 lengths were given for a batch of 2 rows"),
        ([5, 3], "Row 1 was said to have a prompt of 3 tokens and only 2 ran"),
    ],
)
def test_lengths_that_do_not_fit_the_batch_are_an_error(lengths: list[Any], told: str) -> None:
    model, inputs = tiny_model(), pad(PROMPTS[:2])
    with (
        Steering(model, energy_moves(), window=0) as steering,
        pytest.raises(SteeringError, match=told),
        steering.prompts(torch.tensor(lengths)),
    ):
        logits_of(model, **inputs)


def test_a_prompt_in_pieces_ends_where_its_length_says() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=0) as steering, steering.prompts([len(PROMPT)]):  # a list will do
        cache = DynamicCache(config=model.config)
        logits_of(model, input_ids=torch.tensor([PROMPT[:4]]), past_key_values=cache)
        found = logits_of(model, input_ids=torch.tensor([PROMPT[4:]]), past_key_values=cache)
    wanted = slow_logits(model, moves, PROMPT, len(PROMPT) - 1, 0)
    torch.testing.assert_close(found[0], wanted[4:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [0, 2])
def test_where_the_ends_were_told_the_tokens_after_them_are_generated_ones(window: int) -> None:
    """The prompt in two pieces within `prompts`, its answer outside; a sequence before it leaves nothing behind."""
    model, moves, length = tiny_model(), energy_moves(), len(PROMPT)
    with Steering(model, moves, window=window) as steering, torch.no_grad():
        model(input_ids=torch.tensor([PROMPT[:2]]), use_cache=True)
        with steering.prompts(torch.tensor([length])):
            cache = model(input_ids=torch.tensor([PROMPT[:3]]), use_cache=True).past_key_values
            model(input_ids=torch.tensor([PROMPT[3:]]), past_key_values=cache)
        found = [model(input_ids=torch.tensor([[one]]), past_key_values=cache).logits[0, -1] for one in (7, 8, 9)]
    wanted = slow_logits(model, moves, [*PROMPT, 7, 8, 9], length - 1, window)
    torch.testing.assert_close(torch.stack(found), wanted[-3:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [0, 3])
def test_one_more_token_after_generate_is_a_generated_one(window: int) -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=window), torch.no_grad():
        made = model.generate(
            **pad(PROMPTS), max_new_tokens=2, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        cache, tokens = made.past_key_values, made.sequences[:, -2:]
        mask = torch.nn.functional.pad(pad(PROMPTS)["attention_mask"], (0, 2), value=1)
        given = {"attention_mask": mask, "position_ids": mask.sum(dim=1, keepdim=True) - 1}
        found = model(input_ids=tokens[:, -1:], past_key_values=cache, **given).logits[:, -1]
    for row, prompt in enumerate(PROMPTS):
        wanted = slow_logits(model, moves, [*prompt, *tokens[row].tolist()], len(prompt) - 1, window)
        torch.testing.assert_close(found[row], wanted[-1], atol=1e-4, rtol=0)


def test_one_more_token_after_several_returned_sequences_is_one_of_its_own_prompt() -> None:
    """The prompts are of different lengths, so that those of another row would end elsewhere."""
    model, moves, inputs = tiny_model(), energy_moves(), pad(PROMPTS)
    with Steering(model, moves, window=3), torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2, eos_token_id=None,
            return_dict_in_generate=True,
        )  # fmt: skip
        tokens = made.sequences[:, -2:]
        mask = torch.nn.functional.pad(inputs["attention_mask"].repeat_interleave(2, dim=0), (0, 2), value=1)
        given = {"attention_mask": mask, "position_ids": mask.sum(dim=1, keepdim=True) - 1}
        found = model(input_ids=tokens[:, -1:], past_key_values=made.past_key_values, **given).logits[:, -1]
    for row, said in enumerate(tokens.tolist()):
        prompt = PROMPTS[row // 2]
        wanted = slow_logits(model, moves, [*prompt, *said], len(prompt) - 1, 3)
        torch.testing.assert_close(found[row], wanted[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("strength", ["much", "", None, object(), [[1.0]], [float("nan")], float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength: Any) -> None:
    with pytest.raises(SteeringError, match="strength is one finite number"):
        Steering(tiny_model(), energy_moves(), window=0, strength=strength)


def test_a_strength_may_be_written_as_text() -> None:
    with Steering(tiny_model(), energy_moves(), window=0, strength="0.5") as steering:  # type: ignore[arg-type]
        assert steering.strength == 0.5


def test_strengths_of_another_number_than_the_rows_are_refused() -> None:
    model = tiny_model()
    for count in (1, 2, 3):
        given = torch.ones(count)
        with (
            Steering(model, energy_moves(), window=1, strength=given),
            pytest.raises(SteeringError, match=f"strength has {count} entries and the batch 4 rows"),
        ):
            logits_of(model, **pad([PROMPT] * 4))


def test_strengths_by_row_of_the_callers_list() -> None:
    model, moves, strengths = tiny_model(), energy_moves(), torch.tensor([0.0, 1.0, 0.5])
    with Steering(model, moves, window=2, strength=strengths) as steering:
        rows = [2, 0]
        lengths = torch.tensor([len(PROMPTS[row]) for row in rows])
        with steering.prompts(lengths, torch.tensor(rows)):
            found = logits_of(model, **pad([PROMPTS[row] for row in rows]))
        with steering.prompts(lengths, torch.tensor([3, 0])), pytest.raises(SteeringError, match="3 entries and row 3"):
            logits_of(model, **pad([PROMPTS[row] for row in rows]))
    for at, row in enumerate(rows):
        wanted = slow_logits(model, moves, PROMPTS[row], len(PROMPTS[row]) - 1, 2, float(strengths[row]))
        torch.testing.assert_close(found[at, -1], wanted[-1], atol=1e-4, rtol=0)


# The handle


def test_disable_and_enable() -> None:
    model, inputs = tiny_model(), pad([PROMPT])
    plain = logits_of(model, **inputs)
    with Steering(model, energy_moves(), window=2) as steering:
        steered = logits_of(model, **inputs)
        steering.disable()
        assert torch.equal(logits_of(model, **inputs), plain)
        steering.enable()
        assert torch.equal(logits_of(model, **inputs), steered)
    assert not torch.equal(steered, plain)


def test_nothing_is_left_after_it_is_removed() -> None:
    model = tiny_model()
    before, weights = set(vars(model)) | set(vars(decoder_of(model))), copy.deepcopy(model.state_dict())
    plain, count = logits_of(model, **pad(PROMPTS)), hooks(model)
    steering = Steering(model, energy_moves(), window=2)
    assert hooks(model) == count + 4
    model.generate(**pad(PROMPTS), max_new_tokens=4, do_sample=False)
    steering.remove()
    steering.remove()  # twice does no harm
    assert hooks(model) == count
    assert set(vars(model)) | set(vars(decoder_of(model))) == before
    assert model.generate.__func__ is type(model).generate
    assert torch.equal(logits_of(model, **pad(PROMPTS)), plain)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_landscape_is_not_part_of_the_models_weights_while_attached() -> None:
    model = tiny_model()
    names, parameters = list(model.state_dict()), len(list(model.parameters()))
    with Steering(model, energy_moves(), window=2):
        assert list(model.state_dict()) == names
        assert len(list(model.parameters())) == parameters


def test_a_generate_of_the_users_own_is_put_back() -> None:
    model = tiny_model()
    plain = model.generate
    calls = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return plain(*args, **kwargs)

    model.generate = own
    with Steering(model, moves := energy_moves(), window=2):
        found = model.generate(**pad([PROMPT]), max_new_tokens=3, do_sample=False)[0, len(PROMPT) :].tolist()
    assert found == slow_generate(model, moves, PROMPT, 3, 2)
    assert model.generate is own
    assert len(calls) == 1


def test_an_exception_inside_the_with_block_detaches() -> None:
    model = tiny_model()
    count = hooks(model)
    with pytest.raises(KeyError), Steering(model, energy_moves(), window=2):
        raise KeyError("anything")
    assert hooks(model) == count
    assert "generate" not in vars(model)


def test_an_exception_inside_the_model_leaves_nothing_half_done() -> None:
    model, moves = tiny_model(), energy_moves()
    with Steering(model, moves, window=2):
        with pytest.raises(IndexError):
            model.generate(torch.tensor([[5, 100_000]]), max_new_tokens=2)
        found = model.generate(**pad([PROMPT]), max_new_tokens=4, do_sample=False)[0, len(PROMPT) :].tolist()
    assert found == slow_generate(model, moves, PROMPT, 4, 2)


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_a_steered_model_is_neither_copied_nor_pickled(strength: float) -> None:
    model = tiny_model()
    with Steering(model, energy_moves(), window=0, strength=strength):
        with pytest.raises(SteeringError, match="copied"):
            copy.deepcopy(model)
        with pytest.raises(SteeringError, match="pickled"):
            pickle.dumps(model)
    assert torch.equal(logits_of(copy.deepcopy(model), **pad([PROMPT])), logits_of(model, **pad([PROMPT])))


def test_attaching_twice_is_refused() -> None:
    model = tiny_model()
    with Steering(model, energy_moves(), window=2):
        count = hooks(model)
        with pytest.raises(SteeringError, match="steered already"):
            Steering(model, energy_moves(), window=2)
        assert hooks(model) == count
    with Steering(model, energy_moves(), window=2):
        pass


def test_two_models_are_steered_apart() -> None:
    one, other = tiny_model(), tiny_model("llama")
    plain = logits_of(other, **pad([PROMPT]))
    with Steering(one, energy_moves(), window=2):
        assert torch.equal(logits_of(other, **pad([PROMPT])), plain)
        with Steering(other, energy_moves(), window=2):
            assert not torch.equal(logits_of(other, **pad([PROMPT])), plain)


def test_a_layer_that_the_model_does_not_have() -> None:
    model = tiny_model()
    count = hooks(model)
    with pytest.raises(SteeringError, match="4 decoder blocks; there is no block 4"):
        Steering(model, {4: Push()}, window=0)
    with pytest.raises(SteeringError, match="no layer to steer"):
        Steering(model, {}, window=0)
    assert hooks(model) == count
    with Steering(model, {0: Push()}, window=0):
        pass


def test_a_block_whose_hook_does_not_fire_is_an_error() -> None:
    model = tiny_model()
    blocks = decoder_blocks(model)
    with Steering(model, energy_moves((1, 2)), window=2):
        blocks[2]._forward_pre_hooks.clear()
        with pytest.raises(SteeringError, match="reached 1 of 2 layers"):
            logits_of(model, **pad([PROMPT]))
        with pytest.raises(SteeringError, match="reached 1 of 2 layers"):
            model.generate(**pad([PROMPT]), max_new_tokens=2)


def test_a_decoder_whose_hooks_do_not_fire_is_an_error() -> None:
    model = tiny_model()
    decoder = decoder_of(model)
    with Steering(model, energy_moves(), window=2):
        model.forward = lambda **kwargs: bypass(model, decoder, kwargs)
        with pytest.raises(SteeringError, match="nothing was steered"):
            model.generate(**pad([PROMPT]), max_new_tokens=2)
        del model.forward


def bypass(model: PreTrainedModel, decoder: torch.nn.Module, kwargs: dict[str, Any]) -> Any:
    kept, decoder._forward_pre_hooks = decoder._forward_pre_hooks, type(decoder._forward_pre_hooks)()
    try:
        return type(model).forward(model, **kwargs)
    finally:
        decoder._forward_pre_hooks = kept


# Precision and modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_models_step_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Each step alone rounds away in bfloat16; their float32 sum does not, and is rounded once."""
    model = tiny_model(dtype=None).to(dtype)
    taken: list[Tensor] = []

    class Watch:
        def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
            taken.append(states)
            return torch.full_like(states, 3e-3)

    with inputs_of_blocks(model) as plain:
        logits_of(model, **pad([PROMPT]))
    with Steering(model, {1: Watch()}, window=0), inputs_of_blocks(model) as steered:
        assert logits_of(model, **pad([PROMPT])).dtype == dtype
    assert taken[0].dtype == torch.float32
    before, after = plain[1][0][0, -1], steered[1][0][0, -1]
    assert torch.equal(after, (before.float() + 3e-3).to(dtype))


def test_steering_under_inference_mode_and_with_gradients_on() -> None:
    model, moves = tiny_model(), energy_moves()
    wanted = slow_logits(model, moves, PROMPT, len(PROMPT) - 1, 2)
    with Steering(model, moves, window=2):
        with torch.inference_mode():
            torch.testing.assert_close(model(**pad([PROMPT])).logits[0], wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(model(**pad([PROMPT])).logits[0], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("moves", [energy_moves(), {1: Push(), 2: Push(seed=1)}])
def test_gradients_go_through_the_step(moves: dict[int, Any]) -> None:
    model = tiny_model()
    embedded = model.get_input_embeddings()(torch.tensor([PROMPT])).detach()
    blocks = decoder_blocks(model)

    def gradient() -> Tensor:
        inputs = embedded.clone().requires_grad_()
        model(inputs_embeds=inputs, use_cache=False).logits[0, -1].square().sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    def hook(at: int) -> Any:
        def add(_module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
            last = args[0][:, -1]
            return (torch.cat([args[0][:, :-1], (last + moves[at].delta(last))[:, None]], dim=1), *args[1:])

        return add

    plain = gradient()
    handles = [blocks[at].register_forward_pre_hook(hook(at)) for at in moves]
    wanted = gradient()
    for handle in handles:
        handle.remove()
    with Steering(model, moves, window=0):
        found = gradient()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert float((found - plain).abs().max()) > 1e-2


def test_the_step_is_float32_under_autocast_too() -> None:
    model, taken = tiny_model(), []

    class Watch:
        def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
            taken.append(states @ torch.ones(32, 32))
            return torch.zeros_like(states)

    with Steering(model, {1: Watch()}, window=0), torch.autocast("cpu", torch.bfloat16):
        logits_of(model, **pad([PROMPT]))
    assert [one.dtype for one in taken] == [torch.float32]


def test_one_token_on_a_cache_that_is_not_that_of_the_pass_before_is_refused() -> None:
    """A copied cache, or a second conversation's: whether the token ends a prompt or goes on with an answer is not told."""
    model, moves = tiny_model(), energy_moves()
    token = torch.tensor([[7]])
    with torch.no_grad(), Steering(model, moves, window=0) as steering:
        first = model(torch.tensor([PROMPT]), use_cache=True)
        copied = copy.deepcopy(first.past_key_values)
        with pytest.raises(SteeringError, match=r"steering\.prompts"):
            model(token, past_key_values=copied, use_cache=True)
        with steering.prompts(torch.tensor([len(PROMPT)])):
            told = model(token, past_key_values=copied, use_cache=True).logits[0]
    wanted = slow_logits(model, moves, [*PROMPT, 7], len(PROMPT) - 1, 0)
    torch.testing.assert_close(told, wanted[-1:], atol=1e-4, rtol=0)


class Wrapper(torch.nn.Module):
    """Hands all on, as the wrapper that an adapter's library puts around a model does (that library is not installed here)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config, self.base_model_prefix = model, model.config, "base_model"

    def get_base_model(self) -> PreTrainedModel:
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def test_a_wrapper_that_hands_all_on_generates_by_position() -> None:
    model, moves = tiny_model(), energy_moves()
    ids = torch.tensor([PROMPT])
    wanted = slow_generate(model, moves, PROMPT, 4, 0)
    wrapped: Any = Wrapper(model)
    assert accepts(wrapped, "attention_mask")
    assert not accepts(wrapped, "frames")
    with Steering(wrapped, moves, window=0):
        assert wrapped.generate(ids, max_new_tokens=4, do_sample=False)[0, len(PROMPT) :].tolist() == wanted


def seeing_model() -> PreTrainedModel:
    """A tiny Gemma 3 with its vision tower, whose decoder is given masks of another form."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 320,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 64,
        "query_pre_attn_scalar": 8,
        "max_position_embeddings": 256,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_known_where_a_decoder_is_given_masks_of_another_form(side: str) -> None:
    model, moves, inputs = seeing_model(), energy_moves(), pad(PROMPTS, side)
    if side == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    with Steering(model, moves, window=0):
        found = logits_of(model, **inputs)
        alone = [logits_of(model, input_ids=torch.tensor([prompt]))[0, -1] for prompt in PROMPTS]
    plain = logits_of(model, **inputs)
    for row, prompt in enumerate(PROMPTS):
        last = inputs["input_ids"].shape[1] - 1 if side == "left" else len(prompt) - 1
        torch.testing.assert_close(found[row, last], alone[row], atol=1e-4, rtol=0)
        assert float((found[row, last] - plain[row, last]).abs().max()) > 1e-3


@pytest.mark.parametrize("before", [None, PROMPTS[1], PROMPT * 3])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_prompt_begun_while_disabled_ends_with_the_token_after_enabling(
    before: list[int] | None, pieces: int
) -> None:
    """On the same cache nothing is in doubt: the token is the prompt's last, whatever prompt ran before it."""
    model, moves = tiny_model(), energy_moves()
    with torch.no_grad(), Steering(model, moves, window=0) as steering:
        if before is not None:
            model(torch.tensor([before]), use_cache=True)
        steering.disable()
        begun = model(torch.tensor([PROMPT[: -2 if pieces == 2 else -1]]), use_cache=True)
        if pieces == 2:
            begun = model(torch.tensor([PROMPT[-2:-1]]), past_key_values=begun.past_key_values, use_cache=True)
        steering.enable()
        found = model(torch.tensor([PROMPT[-1:]]), past_key_values=begun.past_key_values, use_cache=True).logits
    torch.testing.assert_close(
        found[0, -1], slow_logits(model, moves, PROMPT, len(PROMPT) - 1, 0)[-1], atol=1e-4, rtol=0
    )


def test_positions_tell_where_prompts_end_beside_a_mask_of_another_form() -> None:
    model, moves = tiny_model(), energy_moves()
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    whole = torch.zeros(2, 1, len(PROMPT), len(PROMPT)).masked_fill(
        torch.ones(len(PROMPT), len(PROMPT)).triu(1).bool(), torch.finfo(torch.float32).min
    )
    places = torch.arange(len(PROMPT)).expand(2, -1)
    with torch.no_grad(), Steering(model, moves, window=0):
        found = model(ids, attention_mask=whole, position_ids=places).logits
        with pytest.raises(SteeringError, match="two dimensions"):
            model(ids, attention_mask=whole)
    wanted = slow_logits(model, moves, PROMPT, len(PROMPT) - 1, 0)[-1]
    torch.testing.assert_close(found[0, -1], wanted, atol=1e-4, rtol=0)
