"""`alphasteer`: a linear map of the state that vanishes on one kind of prompt and gives a fixed vector on another.

    delta(h) = sum over the maps of lambda * D h,    D = W P,    P = Q Q^T,    W = argmin sum_i |W P h_i - r|^2 + ridge * |W P|^2

Q: eigenvectors of the second moments of the states to be left alone, without the largest share of their eigenvalues. Since every
target is the same r, D = r w^T with w = Q (Q^T S Q + ridge * I)^-1 Q^T m, S and m the second moments and the mean of the
states that are to move: the whole map costs one product.

Source: Sheng et al. 2025, arXiv 2506.07022: benign states are left alone, harmful ones move by the refusal vector r (mean of
refused minus mean of answered prompts). That is `refuse` here; by design it refuses more and answers no more. Ours is the
mirror, `answer`: the states of rightly refused harmful prompts are left alone and those of falsely refused benign ones move by
mean(helpful) - mean(false refusal). Each map has a strength of its own, and the two are added. The ridge is relative to the
mean eigenvalue within Q. In the paper the vector is computed once, of the prompt's last token, and added to all of the
prompt's tokens; here the last token alone moves.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from elsteer.steering.evidence import Evidence
from elsteer.steering.methods.baseline import Baseline, Candidate
from elsteer.steering.methods.layers import TINY, band, per_row

__all__ = ["ALPHASTEER", "NullSpaceMap", "null_space_reader"]

RIDGE = 0.01


class NullSpaceMap(nn.Module):
    """Adds (h W^T) R to every state: read (k, d) is W, targets (k, d) is R."""

    read: Tensor
    targets: Tensor

    def __init__(self, read: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.register_buffer("read", read.detach().float().clone())
        self.register_buffer("targets", targets.detach().float().clone())

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """(n, d) float32 to add to states (n, d); strength: one number or (n,)."""
        return per_row(strength, states) * ((states.float() @ self.read.T) @ self.targets)


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
    late, early = band(evidence.depth, 0.4, 0.8), band(evidence.depth, 0.2, 0.7)
    plan = [(late, 0.6, answer, refuse) for answer, refuse in product((2.0, 4.0, 6.0), (0.0, 0.5, 1.0, 2.0))]
    plan += [(early, 0.6, answer, refuse) for answer, refuse in product((2.0, 4.0, 6.0), (0.5, 1.0))]
    plan += [(late, 0.3, 4.0, refuse) for refuse in (0.5, 1.0, 2.0)]
    plan += [(late, 0.6, 0.0, refuse) for refuse in (1.0, 2.0, 4.0)]
    fitted = {
        (at, dropped): _Fitted(evidence, at, dropped)
        for at, dropped in sorted({(at, dropped) for layers, dropped, _, _ in plan for at in layers})
    }
    found = []
    for layers, dropped, answer, refuse in dict.fromkeys(plan):
        factors = {"answer": answer / len(layers), "refuse": refuse / len(layers)}
        moves = {at: fitted[at, dropped].move(factors) for at in layers}
        settings = {"layers": list(layers), "dropped": dropped, "answer": answer, "refuse": refuse, "window": 0}
        found.append(Candidate("alphasteer", settings, moves, 0))
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

    def move(self, factors: dict[str, float]) -> NullSpaceMap:
        """The sum of both maps, each times its factor."""
        parts = [name for name, factor in factors.items() if factor]
        read, targets = (
            torch.stack(rows)
            for rows in ([self.read[one] for one in parts], [factors[one] * self.targets[one] for one in parts])
        )
        return NullSpaceMap(read, targets)


ALPHASTEER = Baseline("alphasteer", "Null-space steering", _alphasteer)
