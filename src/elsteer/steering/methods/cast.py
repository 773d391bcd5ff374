"""`cast`, conditional activation steering: a vector is added where a condition on the state holds, another where it does not.

    s = cos(h - m, c);    delta(h) = strength * alpha * spread * (v if s <= theta else u)

c: condition vector, unit; m: mid-point of the class means; theta: threshold; v: unit(mean(helpful) - mean(false refusal)), added
where the condition says benign; u: where it says harmful, zero or unit(mean(safe refusal) - mean(jailbreak)).

Source: Lee et al. 2024, arXiv 2409.05907: c is the first principal component of the states of contrast pairs, each minus its
pair's mean; theta is searched for the best F1 on training prompts. Where this differs: the principal components are those of
all pairs of a harmful and a benign prompt at once (the expectation over a random pairing, in closed form), and `principal`
takes the one of the first eight with the best F1, since where topics vary more than harm the first tells nothing; `mean` takes
the difference of the means instead, and `linear` Fisher's discriminant, the difference over the covariance within the classes;
the similarity is signed and of centred states, where the paper takes that of h and its projection on c, which has no sign; the
condition is asked of the prompt's last token in each steered layer, where the paper asks it once, of the mean of the prompt's
tokens at a layer of its choice; the last token alone is moved; and the paper adds a refusal vector where the condition says
harmful, where here compliance is added to what is not, and refusal is optional. Where benign prompts sound harmful, the best
F1 is nearly that of calling all of them harmful: besides it, theta is tried at quantiles of the scores of rightly refused
prompts, so that compliance is added to a tenth of them, say.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elsteer.errors import RunError
from elsteer.steering.evidence import Evidence, OutcomeMeans
from elsteer.steering.methods.baseline import Baseline, Candidate
from elsteer.steering.methods.layers import TINY, band, per_row, singles, unit

__all__ = ["CAST", "ConditionalAdd", "best_threshold", "condition"]

COMPONENTS, RIDGE = 8, 0.01


class ConditionalAdd(nn.Module):
    """Adds `benign` (d,) to states whose cosine with `way` (d,), after `centre` (d,) is taken off, is at most `threshold`.

    To the others it adds `harmful` (d,).
    """

    centre: Tensor
    way: Tensor
    benign: Tensor
    harmful: Tensor

    def __init__(self, centre: Tensor, way: Tensor, threshold: float, benign: Tensor, harmful: Tensor) -> None:
        super().__init__()
        self.threshold = threshold
        for name, tensor in (("centre", centre), ("way", way), ("benign", benign), ("harmful", harmful)):
            self.register_buffer(name, tensor.detach().float().clone())

    def similarity(self, states: Tensor) -> Tensor:
        """(n,) cosines of states (n, d)."""
        return unit(states.float() - self.centre) @ self.way

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """(n, d) float32 to add to states (n, d); strength: one number or (n,)."""
        added = torch.where((self.similarity(states) > self.threshold)[:, None], self.harmful, self.benign)
        return per_row(strength, states) * added


def condition(states: Tensor, harmful: Tensor, kind: str = "principal") -> tuple[Tensor, Tensor, float]:
    """(m, c, theta) of states (n, d) and harmful (n,) bool; m and c are (d,) float64, c is of unit length, to the harmful.

    kind: "principal", "mean" or "linear".
    """
    parts = [states[mask].double() for mask in (harmful, ~harmful)]
    means = [part.mean(dim=0) for part in parts]
    apart, centre = means[0] - means[1], (means[0] + means[1]) / 2
    ways = unit(apart)[None]
    spreads = [(part - mean).T @ (part - mean) / len(part) for part, mean in zip(parts, means, strict=True)]
    if kind == "linear":
        within = spreads[0] + spreads[1]
        within += RIDGE * within.diagonal().mean().clamp_min(TINY) * torch.eye(len(within), dtype=torch.float64)
        ways = unit(torch.linalg.solve(within, apart))[None]
    if kind == "principal":
        # Of x = (a - b) / 2 over all pairs, E[x x^T] = (cov(a) + cov(b) + apart apart^T) / 4.
        found = torch.linalg.eigh(spreads[0] + spreads[1] + torch.outer(apart, apart))[1]
        ways = found.flip(1)[:, :COMPONENTS].T
        ways = ways * torch.where(ways @ apart >= 0, 1.0, -1.0)[:, None]
    scores = unit(states.double() - centre) @ ways.T
    best = [best_threshold(column, harmful) for column in scores.T]
    at = max(range(len(best)), key=lambda number: best[number][1])
    return centre, ways[at], best[at][0]


def best_threshold(scores: Tensor, positive: Tensor) -> tuple[float, float]:
    """The threshold above which scores (n,) tell positive (n,) bool with the best F1, and that F1.

    It lies half-way between two scores.
    """
    order = scores.double().argsort(descending=True)
    ranked, hits = scores.double()[order], positive[order].double().cumsum(0)
    called = torch.arange(1, len(ranked) + 1, dtype=torch.float64)
    f1 = 2 * hits / (called + positive.sum().double()).clamp_min(TINY)
    cut = torch.cat([ranked[:-1] > ranked[1:], torch.tensor([True])])  # equal scores stay on one side
    at = int(torch.where(cut, f1, torch.tensor(-1.0, dtype=torch.float64)).argmax())
    threshold = float(ranked[at] + ranked[at + 1]) / 2 if at + 1 < len(ranked) else float(ranked[at]) - 1e-6
    return threshold, float(f1[at])


def _cast(evidence: Evidence) -> list[Candidate]:
    wide, single = band(evidence.depth, 0.4, 0.8), singles(evidence.depth, (0.5,))[0]
    few = (0.02, 0.05, 0.1)
    # layers, condition, share of the rightly refused that is called benign (None: the best F1), alpha, alpha of refusal
    plan: list[tuple[tuple[int, ...], str, float | None, float, float]] = [
        *((wide, "linear", share, 2.0, 0.0) for share in (None, *few)),
        *((wide, "mean", share, 2.0, 0.0) for share in (None, *few[:2])),
        *((wide, "principal", share, 2.0, 0.0) for share in (None, few[1])),
        *((wide, "linear", share, 1.0, 0.0) for share in few),
        *((single, "linear", share, 1.0, 0.0) for share in few),
    ]
    if evidence.rows("jailbreak").any():
        both = [(share, alpha, refuse) for share in few[:2] for alpha in (2.0, 1.0) for refuse in (0.25, 0.5)]
        plan += [(wide, "linear", *one) for one in (*both, (few[2], 2.0, 0.5))]
    plan = list(dict.fromkeys(plan))
    fitted = {at: _Fitted(evidence, at) for at in sorted({layer for layers, *_ in plan for layer in layers})}
    found = []
    for layers, kind, share, alpha, refuse in plan:
        moves = {at: fitted[at].move(kind, share, alpha / len(layers), refuse / len(layers)) for at in layers}
        settings = {"layers": list(layers), "condition": kind, "called_benign": share, "alpha": alpha}
        settings |= {"refuse": refuse, "window": 0}
        found.append(Candidate("cast", settings, moves, 0))
    return found


class _Fitted:
    """Conditions and vectors of one layer."""

    def __init__(self, evidence: Evidence, layer: int) -> None:
        self.means: OutcomeMeans = evidence.means(layer)
        self.comply = unit(self.means.of("helpful") - self.means.of("false_refusal"))
        self.means.of("safe_refusal", "jailbreak")  # a condition takes harmful prompts
        states = evidence.states(layer)
        self.conditions, self.scores = {}, {}
        refused = states[evidence.rows("safe_refusal")].double()
        for kind in ("principal", "mean", "linear"):
            centre, way, _ = self.conditions[kind] = condition(states, evidence.harmful, kind)
            self.scores[kind] = unit(refused - centre) @ way

    def move(self, kind: str, share: float | None, alpha: float, refuse: float) -> ConditionalAdd:
        """share: of the rightly refused prompts, how many are called benign; None: the threshold of the best F1."""
        centre, way, threshold = self.conditions[kind]
        if share is not None:
            if not len(self.scores[kind]):
                raise RunError("cast's condition is set by harmful prompts that are refused, and there is none.")
            threshold = float(self.scores[kind].quantile(share))
        other = torch.zeros_like(self.comply)
        if refuse:
            other = refuse * self.means.spread * unit(self.means.of("safe_refusal") - self.means.of("jailbreak"))
        return ConditionalAdd(centre, way, threshold, alpha * self.means.spread * self.comply, other)


CAST = Baseline("cast", "Conditional activation steering", _cast)
