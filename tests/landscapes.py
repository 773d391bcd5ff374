"""Small landscapes with random energy models, for any test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.energy.model import EnergyModels
from elsteer.landscape import Landscape, SteeringRule
from elsteer.models import fingerprint
from tiny import tiny_model, tiny_tokenizer

__all__ = ["same_landscape", "thoughtless", "tiny_landscape"]

LAYERS = (1, 2)
RULE = SteeringRule(LAYERS, eta=0.3, steps=2, window=1, guard=True)


def tiny_landscape(
    model: PreTrainedModel | None = None,
    *,
    rule: SteeringRule = RULE,
    provenance: dict[str, Any] | None = None,
    method: str = "els",
    layer_norm: bool = True,
    hidden: tuple[int, ...] = (8,),
) -> Landscape:
    """For `model` (default: tiny_model()) with the "chatml" template; energy models of layers 1 and 2, without training."""
    model = model or tiny_model()
    size = model.config.get_text_config(decoder=True).hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = EnergyModels(list(LAYERS), size, width=16, hidden=hidden, layer_norm=layer_norm)
        models.scale.fill_(0.7)
        models.mean.normal_()
        guards = {layer: torch.linalg.qr(torch.randn(size, 2))[0] for layer in LAYERS}
    tensors = {layer: models.tensors_of(at) for at, layer in enumerate(LAYERS)}
    return Landscape(rule, tensors, guards, fingerprint(model, tiny_tokenizer("chatml")), provenance, method)


def thoughtless(model: PreTrainedModel, **rule: Any) -> tuple[PreTrainedTokenizerBase, Landscape]:
    """A tokenizer whose template knows thinking, and a landscape for `model` that was fitted with it off."""
    tokenizer, found = tiny_tokenizer("qwen3"), tiny_landscape(model).with_rule(**rule)
    found.fingerprint = fingerprint(model, tokenizer, thinking=False)
    return tokenizer, found.with_provenance(settings={"collect": {"thinking": False}})


def same_landscape(a: Landscape, b: Landscape) -> None:
    """Assert that they are equal to the bit."""
    assert (a.rule, a.method, a.provenance, a.fingerprint) == (b.rule, b.method, b.provenance, b.fingerprint)
    assert a.tensors.keys() == b.tensors.keys()
    assert a.guards.keys() == b.guards.keys()
    for layer, named in a.tensors.items():
        assert named.keys() == b.tensors[layer].keys()
        assert all(torch.equal(tensor, b.tensors[layer][name]) for name, tensor in named.items())
    assert all(torch.equal(guard, b.guards[layer]) for layer, guard in a.guards.items())
