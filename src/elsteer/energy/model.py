"""Energy networks of many layers at once, and the closed-form gradient that steers.

One energy model per layer, E(h) = f(W x + b) with x = (h - mean) / scale, where `scale` is the root mean square of
h - mean over the training states. f acts on r numbers: LayerNorm (optional), SiLU, then hidden linear layers with SiLU,
then a linear read-out. The first operation is linear and narrow, so the gradient with respect to the state is W'^T s with
W' = W / scale and s = df/dz, z = W' h + b', b' = b - W' mean; see `elsteer.energy.descent`.

Shapes: L layers, N states, d = hidden size, r = width of the first operation, m = width of a hidden layer.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elsteer.energy.product import product_energy, product_slope, silu_slope
from elsteer.energy.standard import standardised

__all__ = ["EnergyModels", "energy_of", "slope_of"]

EPSILON = 1e-5  # of LayerNorm


class EnergyModels(nn.Module):
    """L energy models of one shape, evaluated and trained as one batched module.

    layers: the decoder block each belongs to; mean: (L, d) and scale: (L,) are buffers, the rest are parameters.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        layers: list[int],
        hidden_size: int,
        *,
        width: int = 128,
        hidden: tuple[int, ...] = (64,),
        layer_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers, self.hidden_size = list(layers), hidden_size
        self.width, self.hidden, self.layer_norm, self.dropout = width, tuple(hidden), layer_norm, dropout
        count = len(layers)
        self.register_buffer("mean", torch.zeros(count, hidden_size))
        self.register_buffer("scale", torch.ones(count))
        self.weight = _linear(count, width, hidden_size)
        self.bias = nn.Parameter(torch.zeros(count, width))
        self.norm_weight = nn.Parameter(torch.ones(count, width))
        self.norm_bias = nn.Parameter(torch.zeros(count, width))
        sizes = (width, *self.hidden)
        self.hidden_weights = nn.ParameterList([_linear(count, to, by) for by, to in pairwise(sizes)])
        self.hidden_biases = nn.ParameterList([nn.Parameter(torch.zeros(count, to)) for to in sizes[1:]])
        self.read_out = nn.Parameter(torch.randn(count, sizes[-1]) / math.sqrt(sizes[-1]))

    def standardise(self, states: Tensor) -> None:
        """Set `mean` and `scale` from training states (N, L, d)."""
        for at in range(len(self.layers)):  # a layer at a time: the float64 copy stays small
            self.mean[at], self.scale[at] = standardised(states[:, at])

    def forward(self, states: Tensor) -> Tensor:
        """Energies (N, L) of states (N, L, d). Dropout is on in training mode only."""
        x = (states.float() - self.mean) / self.scale[:, None]
        z = torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight.transpose(1, 2))
        u = z
        if self.layer_norm:
            u = F.layer_norm(z, (self.width,), eps=EPSILON) * self.norm_weight[:, None] + self.norm_bias[:, None]
        a = F.silu(u)
        if not self.hidden:
            a = F.dropout(a, self.dropout, self.training)
        for weight, bias in zip(self.hidden_weights, self.hidden_biases, strict=True):
            a = F.dropout(a, self.dropout, self.training)
            a = F.silu(torch.einsum("lni,loi->lno", a, weight) + bias[:, None])
        return torch.einsum("lni,li->nl", a, self.read_out)

    def tensors_of(self, at: int) -> dict[str, Tensor]:
        """The tensors of the model at place `at`, by name, as a landscape saves them."""
        found = {name: tensor[at].detach().clone() for name, tensor in self.state_dict().items()}
        if not self.layer_norm:
            del found["norm_weight"], found["norm_bias"]
        return found


def _linear(count: int, out: int, into: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(count, out, into) / math.sqrt(into))


def energy_of(tensors: dict[str, Tensor], z: Tensor) -> Tensor:
    """f(z): energies (n,) of z = W' h + b' (n, r), for one layer's `tensors`, of this module or of `ProductEnergies`."""
    return (
        _forward(tensors, z)[0]
        if "read_out" in tensors
        else product_energy(z, tensors.get("bend"), tensors.get("sharpness"))
    )


def slope_of(tensors: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """(f(z), df/dz) with shapes (n,), (n, r), written out: no autograd, so inference mode and graph capture work."""
    if "read_out" not in tensors:
        return product_slope(z, tensors.get("bend"), tensors.get("sharpness"))
    energy, normal, deviation, kept = _forward(tensors, z)
    depth = len(kept) - 1
    slope = tensors["read_out"] * silu_slope(kept[-1])
    for at in reversed(range(depth)):
        slope = (slope @ tensors[f"hidden_weights.{at}"]) * silu_slope(kept[at])
    if normal is None or deviation is None:
        return energy, slope
    slope = slope * tensors["norm_weight"]
    inner = (slope * normal).mean(dim=-1, keepdim=True)
    return energy, (slope - slope.mean(dim=-1, keepdim=True) - normal * inner) / deviation


def _forward(tensors: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    normal = deviation = None
    u = z
    if "norm_weight" in tensors:
        centred = z - z.mean(dim=-1, keepdim=True)
        deviation = (centred.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()
        normal = centred / deviation
        u = normal * tensors["norm_weight"] + tensors["norm_bias"]
    kept = [u]
    a = F.silu(u)
    at = 0
    while f"hidden_weights.{at}" in tensors:
        u = F.linear(a, tensors[f"hidden_weights.{at}"], tensors[f"hidden_biases.{at}"])
        kept.append(u)
        a = F.silu(u)
        at += 1
    return a @ tensors["read_out"], normal, deviation, kept
