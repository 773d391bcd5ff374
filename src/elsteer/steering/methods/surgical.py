"""`surgical`: the false-refusal direction, made orthogonal to the true-refusal one, is projected out.

    f = mean(false refusal) - mean(helpful),    t = unit(mean(safe refusal) - mean(helpful))
    w = unit(f - lambda (t . f) t),             delta(h) = -strength * share * (w . (h - o)) w

Source: Wang et al. 2025, "Surgical, Cheap, and Flexible", arXiv 2410.03415: vectors from differences in means of the states of
pseudo-harmful, harmful and harmless prompts; the orthogonalisation keeps the ablation from taking true refusals along, and its
part lambda (1: whole) says how cautious the model stays. Ablation there is whole, at every layer and token. Here
pseudo-harmful prompts are the benign ones that the model refused, and the ablation begins with the prompt's last token (see
`ablation`). The origin o is 0 in the paper. In some layers w . h is further below 0 for answers than for refusals, and there
an ablation to 0 makes refusals of them; `mean`, ours, takes o = mean(helpful), so that what is removed is what false refusals
have beyond answers.
"""

from __future__ import annotations

from torch import Tensor

from elsteer.steering.evidence import Evidence
from elsteer.steering.methods.ablation import RemoveDirection
from elsteer.steering.methods.baseline import Baseline, Candidate
from elsteer.steering.methods.layers import EVERY_TOKEN, band, layer_at, unit

__all__ = ["SURGICAL", "false_refusal_direction"]

LAMBDAS = (1.0, 0.75, 0.6, 0.5)


def false_refusal_direction(evidence: Evidence, layer: int, orthogonal: float = 1.0) -> Tensor:
    """(d,) unit vector w, float64; orthogonal: lambda, the part of the true-refusal direction that is taken out of it."""
    means = evidence.means(layer)
    helpful = means.of("helpful")
    false = means.of("false_refusal") - helpful
    true = unit(means.of("safe_refusal") - helpful)
    return unit(false - orthogonal * (true @ false) * true)


def _surgical(evidence: Evidence) -> list[Candidate]:
    depth, found = evidence.depth, []
    wide = band(depth, 0.4, 0.8)
    for orthogonal in LAMBDAS:
        for source in dict.fromkeys(layer_at(share, depth) for share in (0.25, 0.4, 0.5, 0.6)):
            direction = false_refusal_direction(evidence, source, orthogonal)
            everywhere = {at: RemoveDirection(direction) for at in range(depth)}
            found.append(_candidate("global", everywhere, EVERY_TOKEN, source, orthogonal, "zero"))
        for origin in ("zero", "mean"):
            moves = {}
            for at in wide:
                direction = false_refusal_direction(evidence, at, orthogonal)
                start = float(direction @ evidence.means(at).of("helpful")) if origin == "mean" else 0.0
                moves[at] = RemoveDirection(direction, origin=start)
            found.append(_candidate("local", moves, 0, min(wide), orthogonal, origin))
    return found


def _candidate(
    kind: str, moves: dict[int, RemoveDirection], window: int, source: int, orthogonal: float, origin: str
) -> Candidate:
    settings = {"kind": kind, "layers": list(moves), "from": source, "lambda": orthogonal}
    settings |= {"origin": origin, "window": window}
    return Candidate("surgical", settings, moves, window)


SURGICAL = Baseline("surgical", "Single false-refusal vector ablated", _surgical)
