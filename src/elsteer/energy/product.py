"""The product energy: low where the model refuses just when refusing is due.

    E(h) = -tanh(u) v,    u = a.x + b,    v = c.x + e,    x = (h - mean) / scale

or, with a sharpness k and a reader r = d.x + f, the log-odds that the model is about to refuse,

    E(h) = -tanh(u) v g,    g = 2 sigmoid(-k tanh(u) r)

where the need g is next to 0 if the model does what is due already, and up to 2 if it does not. For k -> 0 it is the first form.

u is the log-odds that the prompt is harmful, by logistic regression on the states: is refusing due? Energies that are
trained through the model (`elsteer.energy.refine`) add m hidden units to it, u = a.x + b + r.silu(W x + s), and may read the
context y of the state beside x (`elsteer.energy.context`). v says whether the
model is about to refuse: a coordinate along the mean difference of refused and answered prompts of one kind, -1/2 at the mean
of the answered and 1/2 at that of the refused ones, both averaged over benign and harmful prompts. A helpful answer (u < 0,
v < 0) and a safe refusal (u > 0, v > 0) have low energy, a false refusal and a jailbreak high energy.

Logistic regression of kind on state is noise contrastive estimation of u, and is convex: the same states give the same
energies, whatever the seed. With a guard the steering holds u (and r), so that the step moves v alone, down for benign and up for
harmful prompts, and is shorter where u is in doubt; see `elsteer.energy.descent`.

Each block has a u of its own, and each errs on other prompts. With the mark "pooled" a step goes by their mean, over the
steered blocks up to its own; where u is held this changes the step's length and sign alone. The energy of a state by
itself, as a picture shows it, is that of the block's own u.

Shapes: L layers, N states, d = hidden size. The tensors of one layer: weight (2 + m, d) with rows a, c and those of W, bias
(2 + m,) with b, e and s, bend (m,) with r (absent where m = 0), mean (d,), scale (); with a reader also sharpness () with k,
and a last row of weight and bias for the reader, d and f; with a context also context_weight
(rows of weight, H, C), context_query (H, C), context_mean (C,), context_blocks (2,) with first and stop; the
mark pooled (), 1. That there is no `read_out` tells them
from those of `EnergyModels`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from elsteer.energy.standard import standardised, weighted_sums

__all__ = [
    "ProductEnergies",
    "due_of",
    "held_slope",
    "need",
    "product_energy",
    "product_slope",
    "refusal_reader",
    "silu_slope",
    "verdict_means",
    "verdict_row",
]


class ProductEnergies(nn.Module):
    """L product energies, evaluated as one batched module; `fit` sets them. All tensors are float32 buffers."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, layers: list[int], hidden_size: int) -> None:
        super().__init__()
        self.layers, self.hidden_size = list(layers), hidden_size
        count = len(layers)
        self.register_buffer("mean", torch.zeros(count, hidden_size))
        self.register_buffer("scale", torch.ones(count))
        self.register_buffer("weight", torch.zeros(count, 2, hidden_size))
        self.register_buffer("bias", torch.zeros(count, 2))

    def fit(
        self,
        states: Tensor,
        harmful: Tensor,
        refused: Tensor,
        *,
        benign_weight: float = 1.0,
        ridge: float = 0.01,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Set all layers from states (N, L, d) and, for each, whether its prompt is harmful (N,) and was refused (N,).

        benign_weight: weight of the benign prompts, all together, over that of the harmful ones, in the regression: a higher
            one moves the line where refusing is due towards harm. ridge: its L2 penalty, on x, for the mean loss.
        Every kind of prompt must have rows of either verdict.
        """
        for at in range(len(self.layers)):
            mean, scale = standardised(states[:, at])
            x = ((states[:, at].float() - mean) / scale).cpu()
            self.fit_layer(at, x, mean, scale, harmful.cpu(), refused.cpu(), benign_weight=benign_weight, ridge=ridge)
            if progress is not None:
                progress(at + 1)

    def fit_layer(
        self,
        at: int,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        harmful: Tensor,
        refused: Tensor,
        rows: Tensor | None = None,
        *,
        benign_weight: float = 1.0,
        ridge: float = 0.01,
    ) -> None:
        """`fit` for the layer at place `at`, from its x (N, d) in float32, of `mean` (d,) and `scale` ().

        rows: (N,) bool, those that count (all by default). x is not copied, so it may be mapped from a file.
        """
        taken = torch.ones(len(x), dtype=torch.bool) if rows is None else rows
        kind, used = harmful.numpy(), taken.numpy()
        weights = np.where(kind, 1 / (kind & used).sum(), benign_weight / (~kind & used).sum()) * used
        weights *= used.sum() / weights.sum()
        # float32 takes half the time of float64 and differs from it by .2% of a's length (13,475 prompts).
        found = LogisticRegression(C=1 / (ridge * used.sum()), max_iter=1000, tol=1e-5)
        found.fit(x.numpy(), kind, sample_weight=weights)
        sides = verdict_means(x, harmful, refused, taken)
        c, e = verdict_row(sides, sides[1] - sides[0])
        self.mean[at], self.scale[at] = mean, scale
        self.weight[at] = torch.stack([torch.from_numpy(found.coef_[0]).double(), c])
        self.bias[at] = torch.stack([torch.tensor(float(found.intercept_[0])).double(), e])

    def forward(self, states: Tensor) -> Tensor:
        """Energies (N, L) of states (N, L, d)."""
        x = (states.float() - self.mean) / self.scale[:, None]
        z = torch.einsum("nld,lkd->nlk", x, self.weight) + self.bias
        return product_energy(z)

    def tensors_of(self, at: int) -> dict[str, Tensor]:
        """The tensors of the energy at place `at`, by name, as a landscape saves them."""
        return {name: tensor[at].detach().clone() for name, tensor in self.state_dict().items()}


def product_energy(z: Tensor, bend: Tensor | None = None, sharpness: Tensor | None = None) -> Tensor:
    """E, shape (...), of z = (a.x + b, v, W x + s, then with a sharpness () r), shape (..., rows of weight), and bend (m,)."""
    due = torch.tanh(due_of(z, bend))
    return -due * z[..., 1] * (1.0 if sharpness is None else need(due, z[..., -1], sharpness))


def product_slope(z: Tensor, bend: Tensor | None = None, sharpness: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(energy, its gradient) by z, shapes (n,) and (n, rows of weight)."""
    due, v = torch.tanh(due_of(z, bend)), z[:, 1]
    by_u, by_v = -(1 - due.square()) * v, -due
    last = []
    if sharpness is not None:
        opened = need(due, z[:, -1], sharpness)
        closing = sharpness * opened * (1 - opened / 2)  # -d need / d (due r)
        last = [(due.square() * v * closing)[:, None]]
        by_u = by_u * (opened - due * z[:, -1] * closing)
        by_v = by_v * opened
    parts = [by_u[:, None], by_v[:, None]]
    if bend is not None:
        parts.append(by_u[:, None] * bend * silu_slope(z[:, 2 : 2 + len(bend)]))
    return product_energy(z, bend, sharpness), torch.cat(parts + last, dim=-1)


def held_slope(z: Tensor, bend: Tensor | None = None, sharpness: Tensor | None = None) -> Tensor:
    """(n, 1): the gradient by v alone, u and r held, of z (n, rows of weight)."""
    due = torch.tanh(due_of(z, bend))
    return -(due if sharpness is None else due * need(due, z[:, -1], sharpness))[:, None]


def need(due: Tensor, refuses: Tensor, sharpness: Tensor) -> Tensor:
    """g, between 0 and 2, of due = tanh(u) and refuses = r, both (...), and sharpness ()."""
    return 2 * torch.sigmoid(-sharpness * due * refuses)


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of SiLU."""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def due_of(z: Tensor, bend: Tensor | None) -> Tensor:
    """u, shape (...), of z (..., rows of weight) and bend (m,)."""
    return z[..., 0] if bend is None else z[..., 0] + functional.silu(z[..., 2 : 2 + len(bend)]) @ bend


def refusal_reader(
    x: Tensor, harmful: Tensor, refused: Tensor, rows: Tensor | None = None, *, ridge: float = 0.01
) -> tuple[Tensor, Tensor]:
    """d (d,) and f (): log-odds that the model refuses, by logistic regression on x (n, d), float32.

    harmful, refused, rows: (n,) bool, as for `ProductEnergies.fit_layer`; the four outcomes weigh the same. ridge: as there.
    """
    used = np.ones(len(x), dtype=bool) if rows is None else rows.numpy()
    kind, said = harmful.numpy(), refused.numpy()
    weights = np.zeros(len(x))
    for one in (False, True):
        for other in (False, True):
            cell = (kind == one) & (said == other) & used
            weights[cell] = used.sum() / (4 * max(1, cell.sum()))
    found = LogisticRegression(C=1 / (ridge * used.sum()), max_iter=1000, tol=1e-5)
    found.fit(x.numpy()[used], said[used], sample_weight=weights[used])
    return torch.from_numpy(found.coef_[0]).float(), torch.tensor(float(found.intercept_[0]))


def verdict_row(means: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
    """c (d,) along `way` (d,) and e (), such that v = c.x + e is -1/2 at the first and 1/2 at the second of `means` (2, d).

    means: of `verdict_means`. Where the two do not differ along `way`, c is `way` over its length.
    """
    apart = (means[1] - means[0]) @ way
    unit = way / way.norm().clamp_min(1e-12)
    c = way / apart if float(apart) > 1e-6 * float(way.norm()) else unit
    return c, -c @ means.mean(dim=0)


def verdict_means(x: Tensor, harmful: Tensor, refused: Tensor, rows: Tensor | None = None) -> Tensor:
    """(2, d) in float64: means of the answered and of the refused states x (n, d), averaged over benign and harmful prompts.

    rows: (n,) bool, those that count (all by default).
    """
    taken = torch.ones_like(harmful) if rows is None else rows
    groups = [[(harmful == kind) & (refused == said) & taken for kind in (False, True)] for said in (False, True)]
    shares = torch.stack([sum(group.double() / group.sum() for group in pair) / 2 for pair in groups])  # type: ignore[misc]
    return weighted_sums(shares, x)
