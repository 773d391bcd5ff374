"""The steering step: K steps down the energy, in r numbers, with two products of the hidden size in all.

With z = W' h + b', s = df/dz, P = I - U U^T (U: an orthonormal basis of the guarded directions, P = I without guard),
G = W' P W'^T (r x r, precomputed) and eta the step's length in units of h:

    |P grad_h E|^2 = s^T G s
    z <- z - (eta / |P grad_h E|) G s           K times, while E > tau (the gate)
    h_K = h_0 - P W'^T sum_k (eta / |P grad_h E|_k) s_k

For a product energy (`elsteer.energy.product`) with a guard, u is held: s is the slope by v alone, so that no step changes
whether refusing is due, and G and W' keep the rows that this takes. The step is shorter where u is in doubt: the divisor is
max(|P grad_h E|, |P W'_v|), and |P grad_h E| = |tanh u| |P W'_v|. So it is |P W'_v|, and a step adds (eta / |P W'_v|) tanh u
times P W'_v. Pooled, the u of the step is given from outside: the mean over the steered blocks so far
(`elsteer.energy.product`). With a sharpness r is held as u is, and the need g multiplies the step, the divisor unchanged.

The guard keeps h's coordinates along U, so steering may change the decision but not what the model thinks the request is.
Exact, not an approximation: equal to K normalised gradient steps on h by autograd, as in ELS (arXiv 2510.08646), whose own
loop takes K full backward passes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from elsteer.energy.model import energy_of, slope_of
from elsteer.energy.product import due_of, held_slope

__all__ = ["Descent"]

TINY = 1e-12


class Descent(nn.Module):
    """One layer's steering step. All tensors are float32 buffers and move with `.to(device)`.

    tensors: the energy model of the layer (`EnergyModels.tensors_of`, `ProductEnergies.tensors_of`); guard: (d, k)
    orthonormal columns, k may be 0.
    eta: length of one step in units of the root-mean-square distance of states from their mean, scale * sqrt(d), times the
    tensor "length" where there is one (energies trained through the model have it, `elsteer.energy.refine`); steps: K.
    gate: tau, rows at or below it stay; None moves every row.
    pooled: whether a step wants u from outside, the mean of `due` over the steered blocks up to this one.
    context_blocks: (first, stop) of the blocks whose values the context is read from, by context_query (H, C) and around
    context_mean (C,) (`elsteer.energy.context`); None: there is none.
    """

    down: Tensor
    shift: Tensor
    up: Tensor
    gram: Tensor
    look: Tensor
    context_query: Tensor
    context_mean: Tensor

    def __init__(
        self,
        tensors: dict[str, Tensor],
        *,
        eta: float,
        steps: int,
        gate: float | None = None,
        guard: Tensor | None = None,
    ) -> None:
        super().__init__()
        weight = tensors["weight"].double() / tensors["scale"].double()
        shift = tensors["bias"].double() - weight @ tensors["mean"].double()
        guarded, product = weight, "read_out" not in tensors
        self.held = False
        if guard is not None and guard.shape[1] > 0:
            basis = guard.to(weight.device).double()
            guarded = weight - (weight @ basis) @ basis.T
            self.held = product
        rows = slice(1, 2) if self.held else slice(None)  # of W', those that a step goes along
        self.register_buffer("down", weight.float())
        self.register_buffer("shift", shift.float())
        self.register_buffer("up", guarded[rows].float())
        self.register_buffer("gram", (guarded[rows] @ guarded.T).float())
        self.context_blocks: tuple[int, int] | None = None
        if "context_weight" in tensors:
            first, stop = tensors["context_blocks"].tolist()
            self.context_blocks = int(first), int(stop)
            self.register_buffer("look", tensors["context_weight"].flatten(1).float().clone())
            for name in ("context_query", "context_mean"):
                self.register_buffer(name, tensors[name].float().clone())
        self.pooled = self.held and "pooled" in tensors
        rest = {
            "weight",
            "bias",
            "mean",
            "scale",
            "length",
            "context_weight",
            "context_query",
            "context_mean",
            "context_blocks",
            "pooled",
        }
        self._names = [name for name in tensors if name not in rest]
        for name in self._names:
            self.register_buffer(_flat(name), tensors[name].float().clone())
        self.eta, self.steps, self.gate = eta * float(tensors.get("length", 1.0)), steps, gate
        self.reach = max(TINY, float(guarded[1].norm())) if product else TINY
        self.unit = float(tensors["scale"]) * math.sqrt(weight.shape[1])

    def _head(self) -> dict[str, Tensor]:
        return {name: getattr(self, _flat(name)) for name in self._names}

    def energy(self, states: Tensor, context: Tensor | None = None) -> Tensor:
        """Energies (n,) of states (n, d) in their context (n, H, C), zeros by default."""
        return energy_of(self._head(), self._z(states, context))

    def due(self, states: Tensor, context: Tensor | None = None) -> Tensor:
        """u (n,) of states (n, d): by this block, is refusing due? Product energies alone have one."""
        return due_of(self._z(states, context), self._head().get("bend"))

    def delta(
        self,
        states: Tensor,
        strength: Tensor | float = 1.0,
        context: Tensor | None = None,
        due: Tensor | None = None,
    ) -> Tensor:
        """What to add to states (n, d), float32; strength: one number or (n,), multiplies eta.

        context: (n, H, C), zeros by default; where `context_blocks` is None there is none. due: (n,), goes for u,
        this block's own by default.
        """
        return self._total(states, strength, context, due=due).neg() @ self.up

    def path(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """The states on the way in the average context, (steps + 1, n, d), for pictures; `delta` does it in one product."""
        stops = [states.float()]
        for steps in range(1, self.steps + 1):
            stops.append(states.float() - self._total(states, strength, None, steps) @ self.up)
        return torch.stack(stops)

    def _z(self, states: Tensor, context: Tensor | None) -> Tensor:
        z = torch.addmm(self.shift, states.float(), self.down.T)
        if context is not None and self.context_blocks:
            z = z + context.float().flatten(1) @ self.look.T
        return z

    def _total(
        self,
        states: Tensor,
        strength: Tensor | float,
        context: Tensor | None,
        steps: int | None = None,
        due: Tensor | None = None,
    ) -> Tensor:
        head = self._head()
        z = self._z(states, context)
        if due is not None:  # u is z_0 and what the hidden units add
            z = torch.cat([(z[:, 0] + due - due_of(z, head.get("bend")))[:, None], z[:, 1:]], dim=1)
        length: Tensor | float = self.eta * self.unit * strength
        if isinstance(length, Tensor):
            length = length.to(z)[:, None]
        last = (self.steps if steps is None else steps) - 1
        parts = []
        for step in range(last + 1):
            if self.held:  # the divisor is always |P W'_v|
                slope = held_slope(z, head.get("bend"), head.get("sharpness"))
                factor = length / self.reach
            else:
                slope = slope_of(head, z)[1]
                norm = (slope * (slope @ self.gram)).sum(dim=-1, keepdim=True).clamp_min(0).sqrt()
                factor = length / norm.clamp_min(self.reach)
            if self.gate is not None:
                slope = torch.where((energy_of(head, z) > self.gate)[:, None], slope, 0.0)
            parts.append(factor * slope)
            if step < last:
                z = z - parts[-1] @ self.gram
        return sum(parts[1:], parts[0])


def _flat(name: str) -> str:
    return name.replace(".", "_")
