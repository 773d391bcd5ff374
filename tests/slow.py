"""Steering and decoding once more, slowly and plainly: what the fast code is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elsteer.decoding import plain_model
from elsteer.energy.descent import Descent
from elsteer.energy.model import EnergyModels
from elsteer.models import decoder_blocks

__all__ = ["Push", "energy_moves", "inputs_of_blocks", "pad", "slow_generate", "slow_logits"]


class Push:
    """A move that adds one fixed vector, whatever the state."""

    def __init__(self, size: int = 32, seed: int = 0, length: float = 1.0) -> None:
        self.vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        self.vector *= length / self.vector.norm()

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        scale = strength[:, None] if isinstance(strength, Tensor) else strength
        return self.vector.to(states.device).expand(len(states), -1) * scale


def energy_moves(layers: Sequence[int] = (1, 2), size: int = 32, eta: float = 0.3, seed: int = 0) -> dict[int, Descent]:
    """Random energy models whose steps are long enough to change what a tiny model says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = EnergyModels(list(layers), size, width=16, hidden=(8,))
        models.scale.fill_(1.5)
        return {layer: Descent(models.tensors_of(at), eta=eta, steps=3) for at, layer in enumerate(layers)}


def slow_logits(
    model: PreTrainedModel, moves: Mapping[int, Any], ids: Sequence[int], start: int, window: int, strength: float = 1.0
) -> Tensor:
    """Logits (n, vocabulary) of one row without pads or cache; tokens start to start + window are moved."""
    blocks, handles = decoder_blocks(model), []
    dues: dict[int, list[Tensor]] = {}  # by column, of the steered blocks so far

    def hook(move: Any) -> Any:
        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            for column in range(start, min(start + window + 1, hidden.shape[1])):
                state = hidden[:, column].float()
                more = {}
                if getattr(move, "pooled", False):
                    dues.setdefault(column, []).append(move.due(state))
                    more = {"due": torch.stack(dues[column]).mean(dim=0)}
                hidden[:, column] = (state + move.delta(state, strength, **more)).to(hidden.dtype)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return add

    for at, move in moves.items():
        handles.append(blocks[at].register_forward_pre_hook(hook(move), with_kwargs=True))
    try:
        with torch.no_grad(), plain_model(model):  # not steered a second time by what is attached
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def slow_generate(
    model: PreTrainedModel,
    moves: Mapping[int, Any],
    prompt: Sequence[int],
    new: int,
    window: int,
    strength: float = 1.0,
    ends: Sequence[int] = (258,),
) -> list[int]:
    """Greedy tokens, the end token included, with one whole forward pass for each."""
    made: list[int] = []
    while len(made) < new and not (made and made[-1] in ends):
        logits = slow_logits(model, moves, [*prompt, *made], len(prompt) - 1, window, strength)
        made.append(int(logits[-1].argmax()))
    return made


def pad(rows: Sequence[Sequence[int]], side: str = "left", pad_id: int = 256) -> dict[str, Tensor]:
    """input_ids and attention_mask of rows of different lengths."""
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        ids.append([pad_id] * gap + list(row) if side == "left" else list(row) + [pad_id] * gap)
        mask.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@contextmanager
def inputs_of_blocks(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """While open: for each block, its inputs (B, q, d) of every forward pass, as they are after all hooks so far."""
    blocks = decoder_blocks(model)
    seen: list[list[Tensor]] = [[] for _ in blocks]

    def hook(at: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[at].append((args[0] if args else kwargs["hidden_states"]).detach().clone())

        return keep

    handles = [block.register_forward_pre_hook(hook(at), with_kwargs=True) for at, block in enumerate(blocks)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
