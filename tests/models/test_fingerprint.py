"""A landscape recognises its model in any precision, and no other model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elsteer.errors import LandscapeError, ModelError
from elsteer.models import MIRRORS, Fingerprint, differences, fingerprint
from landscapes import tiny_landscape
from tiny import FAMILIES, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_in_half_precision_is_the_same_model(family: str, dtype: torch.dtype) -> None:
    tokenizer = tiny_tokenizer()
    exact, half = fingerprint(tiny_model(family), tokenizer), fingerprint(tiny_model(family).to(dtype), tokenizer)
    assert exact.weights != half.weights
    assert differences(exact, half) == differences(half, exact) == []


def test_bfloat16_against_float16_is_the_same_model_too() -> None:
    tokenizer = tiny_tokenizer()
    a, b = (fingerprint(tiny_model().to(dtype), tokenizer) for dtype in (torch.bfloat16, torch.float16))
    assert differences(a, b) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_another_training_of_the_same_shape_is_another_model(family: str) -> None:
    a, b = (fingerprint(tiny_model(family, seed=seed), tiny_tokenizer()) for seed in (0, 1))
    assert len(differences(a, b)) == 1
    assert "weights" in differences(a, b)[0]


def test_a_light_finetune_is_another_model() -> None:
    model = tiny_model()
    before = fingerprint(model, tiny_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.full_like(parameter, 0.002))  # 2% of the weights' spread
    assert differences(before, fingerprint(model.to(torch.bfloat16), tiny_tokenizer()))


@pytest.mark.parametrize("changed", ["o_proj", "down_proj", "v_proj", "lm_head"])
def test_matrices_that_alone_were_edited_make_another_model(changed: str) -> None:
    """As where a direction was taken out of all that is written to the residual stream, or an adapter was merged."""
    model = tiny_model("llama", tie_word_embeddings=False)
    before = fingerprint(model, tiny_tokenizer())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if changed in name:
                side = 0 if weight.shape[0] == model.config.hidden_size else 1
                direction = torch.nn.functional.normalize(torch.randn(weight.shape[side]), dim=0)
                inside = torch.tensordot(direction, weight, dims=([0], [side]))
                weight.sub_(torch.outer(direction, inside) if side == 0 else torch.outer(inside, direction))
    assert "weights" in differences(before, fingerprint(model, tiny_tokenizer()))[0]


def test_a_model_with_an_adapter_is_another_model() -> None:
    model = tiny_model("llama")
    before = fingerprint(model, tiny_tokenizer())
    for block in model.model.layers:  # as peft names them
        layer = torch.nn.Module()
        layer.base_layer, block.self_attn.v_proj = block.self_attn.v_proj, layer
        layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(32, 2, bias=False)})
    (said,) = differences(before, fingerprint(model, tiny_tokenizer()))
    assert "an adapter is loaded" in said


def test_of_many_experts_some_are_sampled() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.experts = torch.nn.ModuleList(torch.nn.Linear(32, 4, bias=False) for _ in range(100))
    names = [name for name in fingerprint(model, tiny_tokenizer()).weights if ".layers.1." in name]
    assert len(names) == 17
    assert any("experts.9" in name for name in names)


def test_the_weights_are_sampled_over_the_whole_depth() -> None:
    names = fingerprint(tiny_model("llama"), tiny_tokenizer()).weights
    assert all(len(values) == 8 for values in names.values())
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1", "2", "3"}
    assert "model.embed_tokens.weight" in names


def test_a_model_of_two_blocks_and_of_one_can_be_fingerprinted() -> None:
    for layers in (1, 2):
        value = fingerprint(tiny_model("qwen2", num_hidden_layers=layers), tiny_tokenizer())
        assert value.num_layers == layers


def test_quantised_tensors_are_left_out_of_the_comparison() -> None:
    model = tiny_model()
    whole = fingerprint(model, tiny_tokenizer())
    for block in model.model.layers:
        packed = torch.zeros(block.self_attn.q_proj.weight.shape, dtype=torch.uint8)
        block.self_attn.q_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    quantised = fingerprint(model, tiny_tokenizer())
    assert 0 < len(quantised.weights) < len(whole.weights)
    assert differences(whole, quantised) == []


@pytest.mark.parametrize("weights", [{}, {"another.name": [0.0] * 8}])
def test_weights_of_which_none_can_be_compared_do_not_fit(weights: dict[str, list[float]]) -> None:
    """A landscape that names no weights would fit any model of the same shape."""
    whole = fingerprint(tiny_model(), tiny_tokenizer())
    other = replace(whole, weights=weights)
    for pair in ((whole, other), (other, whole)):
        (said,) = differences(*pair)
        assert "none of the sampled weights" in said
    found = tiny_landscape()
    found.fingerprint = replace(found.fingerprint, weights=weights)
    with pytest.raises(LandscapeError, match="none of the sampled weights"):
        found.attach(tiny_model())


def test_a_model_without_any_ordinary_weights_is_known_by_its_shape() -> None:
    """As where all of them are quantised to a byte, in the model that was fitted, too: there is nothing to compare."""
    bare = replace(fingerprint(tiny_model(), tiny_tokenizer()), weights={})
    assert differences(bare, bare) == []


def test_what_differs_is_said_in_words() -> None:
    a = fingerprint(tiny_model("qwen2"), tiny_tokenizer("chatml"))
    assert differences(a, a) == []
    b = fingerprint(tiny_model("llama", num_hidden_layers=2, hidden_size=64), tiny_tokenizer("qwen3"), thinking=False)
    said = "; ".join(differences(a, b))
    assert "the architecture is LlamaForCausalLM instead of Qwen2ForCausalLM" in said
    assert "the number of decoder blocks is 2 instead of 4" in said
    assert "the hidden size is 64 instead of 32" in said
    assert "chat template" in said
    assert "the thinking mode is off instead of the template's default" in said


def test_another_name_or_revision_alone_does_not_matter() -> None:
    a = fingerprint(tiny_model(), tiny_tokenizer())
    assert differences(a, replace(a, name="a/copy", revision="0" * 40)) == []


def test_thinking_counts_only_where_the_template_knows_it() -> None:
    assert fingerprint(tiny_model(), tiny_tokenizer("chatml"), thinking=True).thinking is None
    assert fingerprint(tiny_model(), tiny_tokenizer("qwen3"), thinking=True).thinking is True


def test_it_goes_through_json_unchanged() -> None:
    value = fingerprint(tiny_model(), tiny_tokenizer("qwen3"), thinking=False)
    text = json.dumps(value.to_dict())
    assert Fingerprint.from_dict(json.loads(text)) == value
    assert Fingerprint.from_dict({**json.loads(text), "of_a_newer_version": 1}) == value
    assert len(text) < 8000


@pytest.mark.parametrize(
    "damage",
    [
        {},
        [],
        None,
        "a",
        {"weights": [1.0]},
        {"weights": {"a": "b"}},
        {"weights": {"a": ["b"]}},
        {"weights": {"a": [None]}},
        {"weights": {"a": [float("nan")]}},
        {"weights": {"a": [10**400]}},
        {"weights": {1: [1.0]}},
        {"weights": None},
        {"name": ["a"]},
        {"revision": {}},
        {"architecture": None},
        {"num_layers": "4"},
        {"num_layers": True},
        {"hidden_size": 0},
        {"vocab_size": 1.5},
        {"template_sha256": 3},
        {"thinking": "on"},
        {"thinking": 1},
    ],
)
def test_a_damaged_one_is_an_error(damage: Any) -> None:
    value = fingerprint(tiny_model(), tiny_tokenizer()).to_dict()
    with pytest.raises(ModelError, match="damaged"):
        Fingerprint.from_dict({**value, **damage} if isinstance(damage, dict) and damage else damage)


@pytest.mark.parametrize("name", ["q_proj.lora_A.default.weight", "q_proj.base_layer.weight"])
def test_an_adapter_of_any_kind_makes_another_model(name: str) -> None:
    """Kinds other than LoRA, such as IA3, are known by the name that they give to what they are put around."""
    before = fingerprint(tiny_model("llama"), tiny_tokenizer())
    loaded = replace(before, weights={**before.weights, f"model.layers.0.self_attn.{name}": [0.0] * 8})
    assert any("adapter" in one for one in differences(before, loaded))


@pytest.mark.parametrize(
    ("name", "revision", "local"),
    [
        ("owner/model", "0" * 40, False),
        ("owner/model", None, False),
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct", MIRRORS["Qwen/Qwen2.5-Coder-0.5B-Instruct"].sha256, False),
        (None, None, False),
        ("/somewhere/model", None, True),
        ("/somewhere/snapshots/x", "0" * 40, True),
        ("./model", "0" * 64, True),
        ("owner/model", "0" * 64, True),  # as earlier versions recorded a relative path: the hub has no such commit
        ("model.gguf", "0" * 64, True),
        ("C:\\models\\mine", "0" * 64, True),
    ],
)
def test_a_model_that_lay_on_a_disk_is_told_from_one_of_the_hub(
    name: str | None, revision: str | None, local: bool
) -> None:
    assert replace(fingerprint(tiny_model(), tiny_tokenizer()), name=name, revision=revision).is_local is local


def test_a_path_that_was_recorded_as_it_was_given_is_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what earlier versions measured under that name is not measured again."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    now = replace(fingerprint(tiny_model(), tiny_tokenizer()), name=str(tmp_path / "model"), revision="1" * 64)
    for name in ("model", "./model", str(tmp_path / "model")):
        assert now.named_as(name).name == name
    for name in ("other", None, "owner/model"):
        assert now.named_as(name) == now
