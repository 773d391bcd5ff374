"""`ablation`: the refusal direction is projected out of the states.

    delta(h) = -strength * share * (r . h) r,    r = unit(mean(safe refusal) - mean(helpful))

Source: Arditi et al. 2024, arXiv 2406.11717 (directional ablation): r is the mean of harmful less that of harmless prompts
(the paper's code keeps the harmful ones that are refused and the harmless ones that are not), taken at one layer and one token
after the instruction, and removed wherever the model writes to the residual stream, at every token. Here r is taken at the
prompt's last token; it is removed from the input of each steered block, from the prompt's last token on. The paper removes it
whole (share 1) and to make models refuse nothing; as a remedy for false refusals a share of it is tuned, and `global` (the r
of one block in all of them, as in the paper) stands beside `local` (each block of a band its own r).
"""

from __future__ import annotations

from torch import Tensor, nn

from elsteer.steering.evidence import Evidence
from elsteer.steering.methods.baseline import Baseline, Candidate
from elsteer.steering.methods.layers import EVERY_TOKEN, band, layer_at, per_row, unit

__all__ = ["ABLATION", "RemoveDirection", "refusal_direction"]

SHARES = (0.25, 0.5, 0.75, 1.0)


class RemoveDirection(nn.Module):
    """Takes `share` of the component along `direction` (d,), a unit vector, away from every state.

    origin: the component from which it is counted; a whole share leaves this much of it.
    """

    direction: Tensor

    def __init__(self, direction: Tensor, share: float = 1.0, origin: float = 0.0) -> None:
        super().__init__()
        self.share, self.origin = share, origin
        self.register_buffer("direction", direction.detach().float().clone())

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """(n, d) float32 to add to states (n, d); strength: one number or (n,), scales the share."""
        along = states.float() @ self.direction - self.origin
        return (-self.share * per_row(strength, states)) * along[:, None] * self.direction


def refusal_direction(evidence: Evidence, layer: int) -> Tensor:
    """(d,) unit vector from the mean of the answered harmless to that of the refused harmful prompts' states, float64."""
    means = evidence.means(layer)
    return unit(means.of("safe_refusal") - means.of("helpful"))


def _ablation(evidence: Evidence) -> list[Candidate]:
    depth = evidence.depth
    found = []
    for source in dict.fromkeys(layer_at(share, depth) for share in (0.4, 0.5, 0.6, 0.7)):
        direction = refusal_direction(evidence, source)
        found += _grid("global", dict.fromkeys(range(depth), direction), EVERY_TOKEN, source)
    local = {at: refusal_direction(evidence, at) for at in band(depth, 0.4, 0.8)}
    for window in (0, EVERY_TOKEN):
        found += _grid("local", local, window, min(local))
    return found


def _grid(kind: str, directions: dict[int, Tensor], window: int, source: int) -> list[Candidate]:
    found = []
    for share in SHARES:
        settings = {"kind": kind, "layers": list(directions), "from": source, "share": share, "window": window}
        moves = {at: RemoveDirection(direction, share) for at, direction in directions.items()}
        found.append(Candidate("ablation", settings, moves, window))
    return found


ABLATION = Baseline("ablation", "Refusal direction ablated", _ablation, version=2)
