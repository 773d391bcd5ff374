"""`k-steering`: steps along the gradient of a small classifier of outcomes.

    L(h) = mean of the logits of the labels to avoid - mean of those of the labels to reach
    h <- h - alpha / K * spread * grad L / |grad L|,    K times

The classifier has one hidden layer of 64 units (ReLU) on standardised states and the four outcomes as classes. As in the
paper, where the user names the labels, false refusals are avoided and helpful answers are to be reached (`answer`). `both`
also avoids jailbreaks and is to reach safe refusals; but what the logits say of harm and of refusing, each by itself, cancels
in that difference. With z = A h + b before the ReLU and B the read-out, grad L = A^T ((z > 0) * B^T c), c holding 1 / labels
for each label and its sign: all K steps are done in z, and the state is moved in one product, without autograd.

Source: Oozeer et al. 2025, arXiv 2505.24535 (gradient steps on a non-linear classifier of several classes). There it has two
hidden layers, the gradient is not normalised and the step shrinks; here each step has one length, so that alpha means the same
in each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elsteer.energy.standard import standardised
from elsteer.errors import RunError
from elsteer.steering.evidence import OUTCOMES, Evidence
from elsteer.steering.methods.baseline import Baseline, Candidate
from elsteer.steering.methods.layers import EVERY_TOKEN, TINY, band, per_row, singles

__all__ = ["K_STEERING", "ClassifierSteps", "train_classifier"]

ALPHAS = (0.12, 0.25, 0.5, 1.0)
STEPS = 3
HIDDEN, PROMPTS, EPOCHS, BATCH = 64, 4000, 10, 64
# Labels to avoid, labels to reach.
LABELS = {
    "answer": (("false_refusal",), ("helpful",)),
    "both": (("false_refusal", "jailbreak"), ("helpful", "safe_refusal")),
}


class ClassifierSteps(nn.Module):
    """K steps of `length` / K each, in units of h.

    down (r, d) and shift (r,): z = down h + shift. slopes (r,): B^T c, the slope of L by each active unit.
    """

    down: Tensor
    shift: Tensor
    slopes: Tensor
    gram: Tensor

    def __init__(self, down: Tensor, shift: Tensor, slopes: Tensor, *, length: float, steps: int) -> None:
        super().__init__()
        self.length, self.steps = length, steps
        gram = down.double() @ down.double().T
        for name, tensor in (("down", down), ("shift", shift), ("slopes", slopes), ("gram", gram)):
            self.register_buffer(name, tensor.detach().float().clone())

    def loss(self, states: Tensor) -> Tensor:
        """(n,) L(h) of states (n, d), up to a constant."""
        return F.relu(states.float() @ self.down.T + self.shift) @ self.slopes

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """(n, d) float32 to add to states (n, d); strength: one number or (n,), scales the length."""
        z = states.float() @ self.down.T + self.shift
        length = per_row(strength, states) * (self.length / self.steps)
        total = torch.zeros_like(z)
        for _ in range(self.steps):
            slope = torch.where(z > 0, self.slopes, 0.0)
            moved = slope @ self.gram
            norm = (slope * moved).sum(dim=-1, keepdim=True).clamp_min(0).sqrt().clamp_min(TINY)
            z = z - (length / norm) * moved
            total = total + (length / norm) * slope
        return total.neg() @ self.down


def train_classifier(states: Tensor, classes: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train on states (n, d) of classes (n,) from 0 to count - 1; A (r, d), b (r,), B (count, r) and its bias.

    AdamW on cross-entropy, each class weighing the same; A and b are of the states as they are, not standardised.
    """
    mean, scale = standardised(states)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, y = ((states - mean) / scale).clone(), classes.clone()
        first, last = nn.Linear(x.shape[1], HIDDEN), nn.Linear(HIDDEN, count)
        model = nn.Sequential(first, nn.ReLU(), last)
        weight = len(y) / (count * torch.bincount(y, minlength=count).clamp_min(1)).float()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(BATCH):
                optimiser.zero_grad(set_to_none=True)
                F.cross_entropy(model(x[rows]), y[rows], weight).backward()
                optimiser.step()
        down = first.weight.detach() / scale
        return down, first.bias.detach() - down @ mean, last.weight.detach(), last.bias.detach()


def _k_steering(evidence: Evidence) -> list[Candidate]:
    wide = band(evidence.depth, 0.4, 0.8)
    plan = [
        (layers, window, "answer")
        for layers in dict.fromkeys([*singles(evidence.depth, (0.4, 0.5)), wide])
        for window in (0, EVERY_TOKEN)
    ]
    plan = [*plan[:-1], (wide, 0, "both")]
    rows, classes, names = _sample(evidence)
    fitted: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for layer in sorted({at for layers, _, _ in plan for at in layers}):
        states = evidence.states(layer)[rows]
        fitted[layer] = train_classifier(states, classes, len(names), evidence.seed + layer)[:3]
    found = []
    for layers, window, goal in plan:
        signs = _signs(names, goal)
        for alpha in ALPHAS:
            moves = {}
            for at in layers:
                down, shift, out = fitted[at]
                length = alpha / len(layers) * evidence.means(at).spread
                moves[at] = ClassifierSteps(down, shift, signs @ out, length=length, steps=STEPS)
            settings = {"layers": list(layers), "labels": goal, "steps": STEPS, "alpha": alpha, "window": window}
            found.append(Candidate("k-steering", settings, moves, window))
    return found


def _signs(names: list[str], goal: str) -> Tensor:
    """(classes,) c: one over the number of labels to avoid, minus one over that of labels to reach, 0 for the others."""
    avoid, reach = (torch.tensor([name in labels for name in names]).float() for labels in LABELS[goal])
    return avoid / avoid.sum() - reach / reach.sum()


def _sample(evidence: Evidence) -> tuple[Tensor, Tensor, list[str]]:
    """Rows and classes of at most PROMPTS prompts, as many of each outcome as there are up to its share."""
    names = [name for name in OUTCOMES if evidence.rows(name).any()]
    if "helpful" not in names or "false_refusal" not in names:
        raise RunError(
            "k-steering learns from answers and from false refusals, and the training prompts lack one of them."
        )
    generator = torch.Generator().manual_seed(evidence.seed)
    rows, classes = [], []
    for at, name in enumerate(names):
        known = evidence.rows(name).nonzero()[:, 0]
        chosen = known[torch.randperm(len(known), generator=generator)[: PROMPTS // len(names)]]
        rows.append(chosen)
        classes.append(torch.full_like(chosen, at))
    return torch.cat(rows), torch.cat(classes), names


K_STEERING = Baseline("k-steering", "Gradient of a classifier", _k_steering)
