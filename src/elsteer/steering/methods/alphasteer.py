"""`alphasteer`: a linear map of the state that vanishes on one kind of prompt and gives a fixed vector on another.

    delta(h) = lambda * D h,    D = W P,    P = Q Q^T,    W = argmin sum_i |W P h_i - r|^2 + ridge * |W P|^2

Q: eigenvectors of the second moments of the states to be left alone, without the largest share of their eigenvalues. Since every
target is the same r, D = r w^T with w = Q (Q^T S Q + ridge * I)^-1 Q^T m, S and m the second moments and the mean of the
states that are to move: the whole map costs one product.

Source: Sheng et al. 2025, arXiv 2506.07022: benign states are left alone, harmful ones move by the refusal vector r (mean of
refused minus mean of answered prompts). That is `refuse` here; by design it refuses more and answers no more.
Ours is the mirror, `answer`: the states of rightly refused harmful prompts are left alone and those of falsely refused benign
ones move by mean(helpful) - mean(false refusal). `both` is the sum. The ridge is relative to the mean eigenvalue within Q.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elsteer.steering.evidence import Evidence
from elsteer.steering.methods.baseline import Baseline, Candidate
from elsteer.steering.methods.layers import EVERY_TOKEN, TINY, band, layer_at, per_row

__all__ = ["ALPHASTEER", "NullSpaceMap", "null_space_reader"]

LAMBDAS = (1.0, 2.0, 4.0)
RIDGE = 0.01


class NullSpaceMap(nn.Module):
    """Adds factor * (h W^T) R to every state: read (k, d) is W, targets (k, d) is R."""

    read: Tensor
    targets: Tensor

    def __init__(self, read: Tensor, targets: Tensor, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("read", read.detach().float().clone())
        self.register_buffer("targets", targets.detach().float().clone())

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """(n, d) float32 to add to states (n, d); strength: one number or (n,)."""
        return (self.factor * per_row(strength, states)) * (states.float() @ self.read.T) @ self.targets


def null_space_reader(kept: Tensor, moved: Tensor, dropped: float, ridge: float = RIDGE) -> Tensor:
    """(d,) float64 w: about 0 on the states `kept` (n, d), about 1 on `moved` (m, d).

    dropped: the share of eigenvalues of the kept states' second moments, the largest ones, that w is orthogonal to.
    """
    kept, moved = kept.double(), moved.double()
    ways = torch.linalg.eigh(kept.T @ kept / len(kept))[1]  # the largest eigenvalue is the last
    size = ways.shape[0]
    inside = ways[:, : max(1, size - round(dropped * size))]
    within = moved @ inside
    moments = within.T @ within / len(within)
    weight = max(TINY, ridge * float(moments.diagonal().mean()))
    solved = torch.linalg.solve(moments + weight * torch.eye(len(moments), dtype=torch.float64), within.mean(dim=0))
    return inside @ solved


def _alphasteer(evidence: Evidence) -> list[Candidate]:
    single: tuple[int, ...] = (layer_at(0.6, evidence.depth),)
    wide = band(evidence.depth, 0.4, 0.8)
    fitted = {(at, 0.6): _Fitted(evidence, at, 0.6) for at in {*single, *wide}}
    fitted |= {(at, 0.3): _Fitted(evidence, at, 0.3) for at in wide}
    plan = [(single, kind, 0.6, 0) for kind in ("answer", "both")]
    plan += [(wide, kind, dropped, 0) for kind in ("answer", "both") for dropped in (0.3, 0.6)]
    plan += [(wide, "both", 0.6, EVERY_TOKEN), (wide, "refuse", 0.6, EVERY_TOKEN)]
    found = []
    for layers, kind, dropped, window in dict.fromkeys(plan):
        for factor in LAMBDAS:
            moves = {at: fitted[at, dropped].move(kind, factor / len(layers)) for at in layers}
            settings = {"layers": list(layers), "kind": kind, "dropped": dropped, "lambda": factor, "window": window}
            found.append(Candidate("alphasteer", settings, moves, window))
    return found


class _Fitted:
    """The two rank-one maps of one layer."""

    def __init__(self, evidence: Evidence, layer: int, dropped: float) -> None:
        means, states, harmful = evidence.means(layer), evidence.states(layer), evidence.harmful
        refusal = means.of("safe_refusal", "false_refusal") - means.of("helpful", "jailbreak")
        answer = means.of("helpful") - means.of("false_refusal")
        means.of("safe_refusal")
        self.targets = {"refuse": refusal, "answer": answer}
        self.read = {
            "refuse": null_space_reader(states[~harmful], states[harmful], dropped),
            "answer": null_space_reader(
                states[evidence.rows("safe_refusal")], states[evidence.rows("false_refusal")], dropped
            ),
        }

    def move(self, kind: str, factor: float) -> NullSpaceMap:
        parts = ("refuse", "answer") if kind == "both" else (kind,)
        read, targets = (
            torch.stack([self.read[one] for one in parts]),
            torch.stack([self.targets[one] for one in parts]),
        )
        return NullSpaceMap(read, targets, factor)


ALPHASTEER = Baseline("alphasteer", "Null-space steering", "Sheng et al. 2025, arXiv 2506.07022", _alphasteer)
