"""`surgical`: the false-refusal direction, made orthogonal to the true-refusal one, is projected out.

    f = mean(false refusal) - mean(helpful),    t = unit(mean(safe refusal) - mean(helpful))
    w = unit(f - lambda (t . f) t),             delta(h) = -strength * share * (w . h) w

Source: Wang et al. 2025, "Surgical, Cheap, and Flexible", arXiv 2410.03415: vectors from differences in means of the states of
pseudo-harmful, harmful and harmless prompts; the orthogonalisation keeps the ablation from taking true refusals along, and its
part lambda (1: whole) says how cautious the model stays. Ablation there is whole, at every layer and token. Here pseudo-harmful
prompts are the benign ones that the model refused; besides lambda, the share that is removed is tuned, and the ablation
begins with the prompt's last token (see `ablation`).
"""

from __future__ import annotations

from torch import Tensor

from elsteer.steering.evidence import Evidence
from elsteer.steering.methods.ablation import RemoveDirection
from elsteer.steering.methods.baseline import Baseline, Candidate
from elsteer.steering.methods.layers import EVERY_TOKEN, band, layer_at, unit

__all__ = ["SURGICAL", "false_refusal_direction"]

SHARES = (0.5, 1.0)


def false_refusal_direction(evidence: Evidence, layer: int, orthogonal: float = 1.0) -> Tensor:
    """(d,) unit vector w, float64; orthogonal: lambda, the part of the true-refusal direction that is taken out of it."""
    means = evidence.means(layer)
    helpful = means.of("helpful")
    false = means.of("false_refusal") - helpful
    true = unit(means.of("safe_refusal") - helpful)
    return unit(false - orthogonal * (true @ false) * true)


def _surgical(evidence: Evidence) -> list[Candidate]:
    depth, found = evidence.depth, []
    for orthogonal in (1.0, 0.75, 0.5):
        for source in dict.fromkeys(layer_at(share, depth) for share in (0.5, 0.6)):
            direction = false_refusal_direction(evidence, source, orthogonal)
            spots = dict.fromkeys(range(depth), direction)
            found += _grid("global", spots, EVERY_TOKEN, source, orthogonal)
        local = {at: false_refusal_direction(evidence, at, orthogonal) for at in band(depth, 0.4, 0.8)}
        for window in (0, EVERY_TOKEN):
            found += _grid("local", local, window, min(local), orthogonal)
    return found


def _grid(kind: str, directions: dict[int, Tensor], window: int, source: int, orthogonal: float) -> list[Candidate]:
    found = []
    for share in SHARES:
        settings = {"kind": kind, "layers": list(directions), "from": source, "lambda": orthogonal}
        settings |= {"share": share, "window": window}
        moves = {at: RemoveDirection(direction, share) for at, direction in directions.items()}
        found.append(Candidate("surgical", settings, moves, window))
    return found


SURGICAL = Baseline("surgical", "Single false-refusal vector ablated", "Wang et al. 2025, arXiv 2410.03415", _surgical)
