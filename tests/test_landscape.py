"""A landscape: what it steers, what it fits, and that it comes back from its folder as it was."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from elsteer.decoding import plain_model
from elsteer.energy.descent import Descent
from elsteer.errors import LandscapeError, ModelError, SteeringError
from elsteer.landscape import Landscape, SteeringRule
from elsteer.models import encode_chat, fingerprint
from landscapes import RULE, same_landscape, tiny_landscape
from tiny import tiny_model, tiny_tokenizer

IDS = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def steered(landscape: Landscape, model: PreTrainedModel, strength: Tensor | float | None = None) -> Tensor:
    with landscape.attach(model, strength):
        return logits(model)


# Saving and loading


@pytest.mark.parametrize("method", ["els", "random"])
def test_saved_and_loaded_it_steers_the_same_to_the_bit(tmp_path: Path, method: str) -> None:
    model = tiny_model()
    rule = SteeringRule((1, 2), eta=0.3, steps=3, window=2, gates={1: -2.5, 2: -3.0}, strength=0.75)
    provenance = {"seed": 3, "auroc": {"1": 0.81}, "figures": [{"name": "removed", "value": 0.5}]}
    landscape = tiny_landscape(model, rule=rule, provenance=provenance, method=method)
    landscape.save_pretrained(tmp_path / "landscape")
    loaded = Landscape.from_pretrained(tmp_path / "landscape")
    same_landscape(loaded, landscape)
    before = steered(landscape, model)
    assert torch.equal(before, steered(loaded, model))
    assert not torch.equal(before, logits(model))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with landscape.attach(model):
        answers = model.generate(IDS, **options)
    with loaded.attach(model):
        assert torch.equal(model.generate(IDS, **options), answers)


def test_a_chat_is_encoded_as_the_fit_asked_its_own() -> None:
    tokenizer = tiny_tokenizer("qwen3")
    asked = {"settings": {"collect": {"system": "Be kind.", "thinking": False}}}
    landscape, chat = tiny_landscape(provenance=asked), [{"role": "user", "content": "Name a tree."}]
    found = landscape.encode(tokenizer, chat)
    assert found["input_ids"].tolist() == [encode_chat(tokenizer, chat, system="Be kind.", thinking=False)]
    assert found["attention_mask"].shape == found["input_ids"].shape
    own = [{"role": "system", "content": "Be brief."}, *chat]
    assert landscape.encode(tokenizer, own)["input_ids"].tolist() == [encode_chat(tokenizer, own, thinking=False)]
    assert tiny_landscape().encode(tokenizer, chat)["input_ids"].tolist() == [encode_chat(tokenizer, chat)]


def test_the_digest_is_of_the_numbers_alone(tmp_path: Path) -> None:
    landscape = tiny_landscape()
    turned = {layer: dict(reversed(named.items())) for layer, named in landscape.tensors.items()}
    parts = landscape.rule, turned, landscape.guards, landscape.fingerprint
    assert Landscape(*parts).digest() == landscape.digest()  # files give tensors in any order
    landscape.save_pretrained(tmp_path / "landscape")
    assert Landscape.from_pretrained(tmp_path / "landscape").digest() == landscape.digest()
    layer = landscape.rule.layers[0]
    turned[layer]["bias"] = turned[layer]["bias"] + 1e-3
    assert Landscape(*parts).digest() != landscape.digest()
    guards = {at: guard.flip(0) for at, guard in landscape.guards.items()}
    assert Landscape(landscape.rule, landscape.tensors, guards, landscape.fingerprint).digest() != landscape.digest()


@pytest.mark.parametrize(("layer_norm", "hidden"), [(True, (8,)), (False, (8,)), (True, ()), (False, (12, 6))])
def test_every_shape_of_energy_model_is_kept(tmp_path: Path, layer_norm: bool, hidden: tuple[int, ...]) -> None:
    landscape = tiny_landscape(layer_norm=layer_norm, hidden=hidden)
    landscape.save_pretrained(tmp_path / "landscape")
    same_landscape(Landscape.from_pretrained(str(tmp_path / "landscape")), landscape)


def test_only_the_layers_of_the_rule_are_saved(tmp_path: Path) -> None:
    tiny_landscape().with_rule(layers=(2,)).save_pretrained(tmp_path / "landscape")
    loaded = Landscape.from_pretrained(tmp_path / "landscape")
    assert list(loaded.tensors) == [2]
    assert list(loaded.guards) == [2]


def test_provenance_is_what_json_can_hold() -> None:
    made = tiny_landscape(provenance={"layers": (1, 2), "auroc": {1: float("nan")}}).provenance
    assert made == {"layers": [1, 2], "auroc": {"1": None}}
    with pytest.raises(LandscapeError, match="not Tensor"):
        tiny_landscape(provenance={"weights": torch.zeros(2)})


def test_an_entry_added_to_the_provenance_leaves_the_first_landscape_alone() -> None:
    landscape = tiny_landscape(provenance={"seed": 1})
    assert landscape.with_provenance(trials=60).provenance == {"seed": 1, "trials": 60}
    assert landscape.provenance == {"seed": 1}


# Steering


def test_blocks_that_are_not_found_can_be_named_in_attach() -> None:
    model = tiny_model()
    found = tiny_landscape(model)
    model.model.extra = torch.nn.ModuleList(
        copy.deepcopy(block) for block in model.model.layers
    )  # another list like it
    with pytest.raises(ModelError, match="were not found"):
        found.attach(model)
    with pytest.raises(ModelError):
        found.attach(model, blocks="model.nowhere")
    with found.attach(model, blocks="model.layers") as steering, plain_model(model):
        assert not steering.enabled


def test_attach_moves_by_the_descent_of_the_rule() -> None:
    model = tiny_model()
    landscape = tiny_landscape(model).with_rule(layers=(1,), gates={1: -1e9})
    seen: list[Tensor] = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    hook.remove()
    with landscape.attach(model):  # ours runs first, so this hook sees the moved states
        hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits(model)
        hook.remove()
    plain, moved = seen
    descent = Descent(landscape.tensors[1], eta=0.3, steps=2, gate=-1e9, guard=landscape.guards[1])
    torch.testing.assert_close(moved[:, -1], plain[:, -1] + descent.delta(plain[:, -1]))
    assert torch.equal(moved[:, :-1], plain[:, :-1])
    kept = landscape.guards[1].T @ (moved[:, -1] - plain[:, -1]).T
    assert kept.abs().max() < 1e-5


@pytest.mark.parametrize("window", [0, 2])
def test_attach_moves_the_tokens_of_the_window_and_no_more(window: int) -> None:
    """By the state of each generated token before block 1, with and without: the first `window` of them are moved there."""
    model = tiny_model()
    landscape = tiny_landscape(model).with_rule(layers=(1,), window=window)
    moved: list[bool] = []
    before: list[Tensor] = []
    ids = torch.tensor([[5, 6, 7, 8]])
    with landscape.attach(model):  # the first hook sees what comes in, the second what ours has made of it
        hooks = [
            model.model.layers[1].register_forward_pre_hook(lambda _, args: before.append(args[0]), prepend=True),
            model.model.layers[1].register_forward_pre_hook(
                lambda _, args: moved.append(not torch.equal(args[0][:, -1], before[-1][:, -1]))
            ),
        ]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        for hook in hooks:
            hook.remove()
    assert moved == [True, *[True] * window, *[False] * (4 - window)]


def test_energy_is_lower_after_the_move() -> None:
    landscape = tiny_landscape().with_rule(eta=0.02, steps=3)
    states = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    move = landscape.move(2)
    assert (landscape.energy(2, states + move.delta(states)) < landscape.energy(2, states)).all()


def test_attached_within_inference_mode_it_may_be_differentiated_after_it() -> None:
    model = tiny_model().requires_grad_(True)
    with torch.inference_mode():
        steering = tiny_landscape(model).attach(model)
    model(IDS).logits.sum().backward()
    steering.remove()
    assert all(bool(parameter.grad.any()) for parameter in model.parameters() if parameter.grad is not None)
    assert model.get_input_embeddings().weight.grad is not None


def test_strength_zero_is_the_plain_model_to_the_bit() -> None:
    model = tiny_model()
    assert torch.equal(steered(tiny_landscape(model), model, 0.0), logits(model))


def test_the_rules_strength_is_the_default(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    landscape = tiny_landscape(model)
    half = landscape.with_rule(strength=0.5)
    assert torch.equal(steered(half, model), steered(landscape, model, 0.5))
    assert not caplog.records


def test_a_landscape_of_strength_zero_warns_and_leaves_the_model_plain(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    nothing = tiny_landscape(model).with_rule(strength=0.0)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(steered(nothing, model), logits(model))
    assert "has strength 0" in caplog.text
    assert not torch.equal(steered(nothing, model, 1.0), logits(model))


def test_strength_may_differ_by_row() -> None:
    model = tiny_model()
    landscape = tiny_landscape(model)
    mixed = steered(landscape, model, torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(mixed[0], logits(model)[0])
    torch.testing.assert_close(mixed[1], steered(landscape, model, 1.0)[1])


@pytest.mark.parametrize("strength", [-0.5, float("nan"), float("inf"), torch.tensor([1.0, -1.0, 1.0])])
def test_a_strength_that_means_nothing_is_refused(strength: Tensor | float) -> None:
    model = tiny_model()
    with pytest.raises(SteeringError, match="strength"):
        tiny_landscape(model).attach(model, strength)
    assert steered(tiny_landscape(model), model, 0.5).isfinite().all()  # nothing stayed attached


# Which models it fits


def refusal(landscape: Landscape, model: PreTrainedModel, **options: Any) -> str:
    before = logits(model)
    with pytest.raises(LandscapeError) as caught:
        landscape.attach(model, **options)
    assert torch.equal(logits(model), before)
    assert "\n" not in str(caught.value)
    assert "elsteer fit" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_model_in_another_dtype_is_accepted(dtype: torch.dtype) -> None:
    landscape = tiny_landscape()
    model = tiny_model().to(dtype)
    assert not torch.equal(steered(landscape, model), logits(model))


def test_a_compiled_model_is_accepted() -> None:
    model = tiny_model()
    tiny_landscape(model).attach(torch.compile(model)).remove()


def test_another_width_says_so() -> None:
    said = refusal(tiny_landscape(), tiny_model(hidden_size=64))
    assert "the hidden size is 64 instead of 32" in said
    assert "allow_other_model" not in said


def test_another_depth_says_so() -> None:
    assert "the number of decoder blocks is 2 instead of 4" in refusal(
        tiny_landscape(), tiny_model(num_hidden_layers=2)
    )


def test_another_family_says_so() -> None:
    assert "architecture is LlamaForCausalLM instead of Qwen2ForCausalLM" in refusal(
        tiny_landscape(), tiny_model("llama")
    )


def test_other_weights_say_so_and_name_the_way_to_use_it_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    landscape, other = tiny_landscape(), tiny_model(seed=1)
    said = refusal(landscape, other)
    assert "the weights are of another model" in said
    assert "allow_other_model=True" in said
    with caplog.at_level(logging.WARNING), landscape.attach(other, allow_other_model=True):
        assert logits(other).isfinite().all()
    assert "the weights are of another model" in caplog.text


def test_another_width_cannot_be_allowed() -> None:
    refusal(tiny_landscape(), tiny_model(hidden_size=64), allow_other_model=True)


def test_another_chat_template_says_so_where_the_tokenizer_is_given() -> None:
    model = tiny_model()
    landscape = tiny_landscape(model)
    landscape.attach(model, tokenizer=tiny_tokenizer("chatml")).remove()
    assert "chat template is another one" in refusal(landscape, model, tokenizer=tiny_tokenizer("llama-3"))
    landscape.attach(model).remove()  # without a tokenizer there is nothing to compare


# What does not fit together


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": ()}, "layers"),
        ({"layers": (2, 1)}, "layers"),
        ({"layers": (1, 1)}, "layers"),
        ({"layers": (-1,)}, "layers"),
        ({"layers": (1, 3)}, "layer 3"),
        ({"eta": 0}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"eta": 10**400}, "eta"),
        ({"eta": "0.1"}, "eta"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"window": -1}, "window"),
        ({"strength": -1}, "strength"),
        ({"guard": 1}, "guard"),
        ({"gates": {1: float("inf")}}, "gates"),
        ({"gates": {"1": 0.0}}, "gates"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(LandscapeError, match=said):
        tiny_landscape().with_rule(**change)


def test_the_guard_is_asked_for_and_not_there() -> None:
    landscape = tiny_landscape()
    unguarded = Landscape(SteeringRule((1, 2), 0.3, 2, 1, guard=False), landscape.tensors, None, landscape.fingerprint)
    with pytest.raises(LandscapeError, match="guard=False"):
        unguarded.with_rule(guard=True)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(LandscapeError, match="els, random"):
        tiny_landscape(method="magic")


def test_energy_models_of_another_width_are_refused() -> None:
    wide = tiny_landscape(tiny_model(hidden_size=64))
    narrow = fingerprint(tiny_model(), tiny_tokenizer("chatml"))
    with pytest.raises(LandscapeError, match="layer 1 does not fit"):
        Landscape(RULE, wide.tensors, wide.guards, narrow)


def test_a_guard_that_is_not_orthonormal_is_refused() -> None:
    landscape = tiny_landscape()
    with pytest.raises(LandscapeError, match="orthonormal"):
        Landscape(RULE, landscape.tensors, {1: torch.ones(32, 2), 2: landscape.guards[2]}, landscape.fingerprint)


def test_a_layer_without_an_energy_model_is_named() -> None:
    with pytest.raises(LandscapeError, match="layer 3, only for 1, 2"):
        tiny_landscape().energy(3, torch.zeros(1, 32))
