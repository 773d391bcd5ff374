"""Decoder blocks are found in every family, and where not, the error names the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from elsteer.errors import ModelError
from elsteer.models import (
    blocks_path,
    cache_given,
    decoder_blocks,
    decoder_of,
    hidden_size,
    num_layers,
)
from tiny import FAMILIES, VOCABULARY, tiny_model

PATHS = {"gpt2": "transformer.h", "falcon": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def tiny_gemma3_with_images() -> PreTrainedModel:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    # As many layers and as wide as the text part: only its place tells the vision tower apart.
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_every_family_are_found(family: str) -> None:
    model = tiny_model(family)
    assert blocks_path(model) == PATHS.get(family, "model.layers")
    assert len(decoder_blocks(model)) == num_layers(model) == 4
    assert hidden_size(model) == 32
    width = []
    for block in decoder_blocks(model):
        block.register_forward_pre_hook(lambda _, args: width.append(args[0].shape[-1]))
    model(torch.tensor([[1, 2, 3]]))
    assert width == [32] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_given_ids_mask_and_cache_in_generate(family: str) -> None:
    model = tiny_model(family)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    decoder_of(model).register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    model.generate(ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert len(seen) == 2
    for step, (args, kwargs) in enumerate(seen):
        assert (args[0] if args else kwargs["input_ids"]).shape == (2, 1 if step else 3)
        assert kwargs["attention_mask"].shape[0] == 2
        assert cache_given(kwargs) is not None


def test_the_text_part_of_a_model_with_images_is_taken() -> None:
    model = tiny_gemma3_with_images()
    assert blocks_path(model) == "model.language_model.layers"
    assert decoder_of(model) is model.model.language_model
    assert hidden_size(model) == 32


def test_experts_are_not_taken_for_blocks() -> None:
    model = tiny_model("mixtral", num_hidden_layers=2, num_local_experts=2)
    assert blocks_path(model) == "model.layers"


def test_a_path_can_be_given() -> None:
    model = tiny_gemma3_with_images()
    path = "model.vision_tower.encoder.layers"
    if not hasattr(model.model.vision_tower, "encoder"):
        path = "model.vision_tower.vision_model.encoder.layers"
    assert blocks_path(model, path) == path
    assert decoder_blocks(model, path) is model.get_submodule(path)
    assert decoder_of(model, path) is model.get_submodule(path.removesuffix(".layers"))


def test_a_wrong_path_is_an_error_that_lists_the_right_ones() -> None:
    model = tiny_model()
    for path in ("model.blocks", "model.norm", "", "nothing.at.all"):
        with pytest.raises(ModelError, match=r"model\.layers \(4\)"):
            decoder_blocks(model, path)


def test_a_model_without_a_list_of_blocks_is_an_error_that_names_the_override() -> None:
    model = tiny_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"7 blocks.*model\.layers \(4\).*dotted path"):
        decoder_blocks(model)


def test_a_mere_container_does_not_count_as_the_decoder() -> None:
    class Inner(torch.nn.Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleDict({"h": model.model.layers, "wte": model.model.embed_tokens})

    model = tiny_model()
    inner = Inner(model)
    model.model = inner
    model.get_input_embeddings = lambda: inner.parts["wte"]  # type: ignore[method-assign]
    assert blocks_path(model) == "model.parts.h"
    assert decoder_of(model) is inner


@pytest.mark.parametrize("model_type", ["opt", "bloom", "stablelm", "starcoder2", "gptj"])
def test_families_that_were_not_thought_of_work_too(model_type: str) -> None:
    names = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
    if model_type == "gptj":
        names = {"vocab_size": VOCABULARY, "n_layer": 3, "n_head": 4, "n_embd": 32, "rotary_dim": 8}
    if model_type == "opt":
        names |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **names))
    assert len(decoder_blocks(model)) == 3
    assert decoder_blocks(model) in list(decoder_of(model).children())
