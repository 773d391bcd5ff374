"""Where a model keeps its decoder blocks, found by structure and not by the family's name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from elsteer.errors import ModelError

__all__ = [
    "accepts",
    "blocks_path",
    "cache_argument",
    "cache_given",
    "cache_made",
    "decoder_blocks",
    "decoder_of",
    "hidden_size",
    "num_layers",
]

# What transformers calls the key-value cache: the first name since 5.23 or so, the second before.
_CACHE_NAMES = ("cache", "past_key_values")


def num_layers(model: PreTrainedModel) -> int:
    """How many decoder blocks the configuration names (those of the text part in a multimodal model)."""
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ModelError(f"The configuration of {type(model).__name__} does not say how many decoder blocks it has.")
    return layers


def hidden_size(model: PreTrainedModel) -> int:
    """The width of a state: the length of one token's vector between two decoder blocks."""
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    if not isinstance(width, int):
        raise ModelError(f"The configuration of {type(model).__name__} does not say how wide its hidden states are.")
    return width


def decoder_blocks(model: PreTrainedModel, path: str | None = None) -> torch.nn.ModuleList:
    """The list of decoder blocks, first to last.

    Found by structure: a ModuleList of as many modules as the configuration has layers, with attention in them, that
    stands beside the token embeddings (which a vision or audio tower does not). path: its dotted name instead, such as
    "model.layers". Raises ModelError, naming that way out, where none or several fit.
    """
    return _find(model, path)[1]


def blocks_path(model: PreTrainedModel, path: str | None = None) -> str:
    """The dotted name of the list that `decoder_blocks` finds, such as "model.layers"."""
    return _find(model, path)[0]


def decoder_of(model: PreTrainedModel, path: str | None = None) -> torch.nn.Module:
    """The module that owns the decoder blocks and runs them.

    Its forward takes input_ids or inputs_embeds, attention_mask, position_ids and the cache (`cache_given`). Some
    families hand it input_ids by position.
    """
    owner = _find(model, path)[0]
    while owner:
        owner = owner.rpartition(".")[0]
        module = model.get_submodule(owner)
        if _runs(module):
            return module
    return model


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's forward has an argument of that name; an adapter's wrapper hands all on to the model within."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in _parameters(type(inner).forward)


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which the model's forward takes its key-value cache."""
    return next((name for name in _CACHE_NAMES if accepts(model, name)), _CACHE_NAMES[-1])


def cache_given(kwargs: dict[str, Any]) -> Any:
    """The key-value cache among the arguments of a forward or `generate` call, or None."""
    return next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)


def cache_made(output: Any) -> Any:
    """The key-value cache in a model's output, or None."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return next((found for name in _CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without self


def _runs(module: torch.nn.Module) -> bool:
    """Whether the module has a forward of its own; mere containers have none."""
    return not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)


def _find(model: PreTrainedModel, path: str | None) -> tuple[str, torch.nn.ModuleList]:
    path = getattr(model, "elsteer_blocks", None) if path is None else path  # said once, when the model was loaded
    if path is not None:
        return path, _named(model, path)
    layers = num_layers(model)
    found = [(name, blocks) for name, blocks in _lists(model) if len(blocks) == layers and _attends(blocks)]
    if len(found) > 1:
        embeddings = model.get_input_embeddings()
        beside = [item for item in found if _holds(model.get_submodule(item[0].rpartition(".")[0]), embeddings)]
        found = beside or found
    # A list inside another one's blocks is a part of a block.
    found = [item for item in found if not any(item[0].startswith(f"{other}.") for other, _ in found)]
    if len(found) == 1:
        return found[0]
    what = f"several lists of {layers} blocks with attention" if found else f"no list of {layers} blocks with attention"
    raise ModelError(
        f"The decoder blocks of {type(model).__name__} were not found: {what} among its module lists ({_seen(model)}); "
        "give the right one by its dotted path, such as elsteer.load(..., blocks='model.layers') or --blocks model.layers."
    )


def _named(model: PreTrainedModel, path: str) -> torch.nn.ModuleList:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if isinstance(module, torch.nn.ModuleList) and len(module):
        return module
    raise ModelError(f"'{path}' is no list of decoder blocks in {type(model).__name__}; its lists are: {_seen(model)}.")


def _lists(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.ModuleList]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            yield name, module


def _seen(model: PreTrainedModel) -> str:
    return ", ".join(f"{name} ({len(blocks)})" for name, blocks in _lists(model)) or "none"


def _attends(blocks: torch.nn.ModuleList) -> bool:
    """Whether attention is anywhere in the blocks; hybrid models have blocks without it."""
    return any("attention" in type(part).__name__.lower() for part in blocks.modules())


def _holds(owner: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    return any(part is wanted for part in owner.modules())
