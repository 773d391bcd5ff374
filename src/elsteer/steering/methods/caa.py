"""`caa`, contrastive activation addition, and `random`, its control: one vector per layer, added to every state.

    delta(h) = strength * alpha * spread * v,    v = unit(mean(helpful) - mean(false refusal))

Source: Rimsky et al. 2024, arXiv 2312.06681, where v is the mean difference of a behaviour's contrast pairs (A or B as the
answer) and its multiple a free number. Here the contrast is what the model did by itself with benign prompts: answers against
false refusals; alpha counts in spreads of the layer's states, and v is a unit vector, so that one grid fits all layers. The
paper steers each token after the prompt; here windows of 0 tokens and of all are tuned.

`random` adds a vector of the same length in a direction that means nothing, drawn from a normal distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elsteer.steering.evidence import Evidence
from elsteer.steering.methods.baseline import Baseline, Candidate
from elsteer.steering.methods.layers import EVERY_TOKEN, bands, per_row, singles, unit

__all__ = ["CAA", "RANDOM_VECTOR", "AddVector"]

ALPHAS = (0.06, 0.12, 0.25, 0.5)
WIDE_ALPHAS = (0.12, 0.25, 0.5, 1.0)


class AddVector(nn.Module):
    """Adds `vector` (d,) times strength to every state."""

    vector: Tensor

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.register_buffer("vector", vector.detach().float().clone())

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """(n, d) float32 to add to states (n, d); strength: one number or (n,)."""
        column = per_row(strength, states)
        scaled = column * self.vector
        return scaled.expand(states.shape[0], -1)


def _caa(evidence: Evidence) -> list[Candidate]:
    def direction(layer: int) -> Tensor:
        means = evidence.means(layer)
        return unit(means.of("helpful") - means.of("false_refusal"))

    directions = {layer: direction(layer) for layers, _ in _choices(evidence.depth) for layer in layers}
    return _added("caa", evidence, directions)


def _random(evidence: Evidence) -> list[Candidate]:
    directions = {}
    for layer in {layer for layers, _ in _choices(evidence.depth) for layer in layers}:
        generator = torch.Generator().manual_seed(1_000_003 * evidence.seed + layer)
        size = evidence.states(layer).shape[1]
        directions[layer] = unit(torch.randn(size, generator=generator, dtype=torch.float64))
    return _added("random", evidence, directions)


def _choices(depth: int) -> list[tuple[tuple[int, ...], int]]:
    """(layers, window): two blocks alone and the widest band, at the prompt's last token and, as published, at every one."""
    layers = [*singles(depth, (0.4, 0.5)), bands(depth)[-1]]
    return [(one, window) for window in (0, EVERY_TOKEN) for one in dict.fromkeys(layers)]  # a shallow model has few


def _added(method: str, evidence: Evidence, directions: dict[int, Tensor]) -> list[Candidate]:
    found = []
    for layers, window in _choices(evidence.depth):
        for alpha in ALPHAS if len(layers) == 1 else WIDE_ALPHAS:
            share = alpha / len(layers)
            moves = {at: AddVector(share * evidence.means(at).spread * directions[at]) for at in layers}
            settings = {"layers": list(layers), "alpha": alpha, "window": window}
            found.append(Candidate(method, settings, moves, window))
    return found


CAA = Baseline("caa", "Contrastive activation addition", _caa)
RANDOM_VECTOR = Baseline("random", "Random vector", _random)
