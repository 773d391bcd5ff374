"""The steering step of one layer: closed form against autograd on the same energy, and against the paper's network and loop.

    .venv/bin/python benchmarks/bench_descent.py

Paper: Linear, LayerNorm, SiLU at widths 2048, 1024, 1024, 512, then Linear to 1; K times a forward pass and autograd's
gradient, the step normalised (arXiv 2510.08646 and its published code; dropout off). Same rows, one process, in turn. Product:
with hidden units and guard, as `fit` makes it; the autograd beside it is of the same energy, without the guard.
`descent.ratio` is the least ratio over the grid, of the default (product) energy. Beside each time stands the floor: the
bytes and operations that must move, over this machine's measured rates: of a copy of as many bytes, of a large product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from side_by_side import in_turn, keep, no_options, product, ratio, seconds, show
from torch import Tensor, nn

from elsteer.energy.descent import Descent
from elsteer.energy.model import EnergyModels, energy_of
from elsteer.evaluation.figures import Figure, machine
from elsteer.evaluation.statistics import Interval

COMMAND = "python benchmarks/bench_descent.py"
SIZES, ROWS, STEPS = (896, 2048, 4096, 8192), (1, 8, 64, 256), (1, 3, 12)


class PaperEnergy(nn.Sequential):
    def __init__(self, size: int) -> None:
        layers: list[nn.Module] = []
        for into, out in ((size, 2048), (2048, 1024), (1024, 1024), (1024, 512)):
            layers += [nn.Linear(into, out), nn.LayerNorm(out), nn.SiLU()]
        super().__init__(*layers, nn.Linear(512, 1))


def by_autograd(energy: Callable[[Tensor], Tensor], states: Tensor, length: float, steps: int) -> Tensor:
    """The paper's loop: h <- h - eta g / |g|."""
    h = states
    for _ in range(steps):
        h = h.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(h).sum(), h)
        h = h - length * gradient / (gradient.norm(dim=-1, keepdim=True) + 1e-8)
    return h.detach()


def copy_seconds(count: int) -> float:
    """Seconds of a copy of so many float32 numbers, in the caches where they fit."""
    source, target = torch.randn(count), torch.empty(count)
    return min(seconds(lambda: target.copy_(source), 0.02) for _ in range(3))


def main() -> None:
    torch.manual_seed(0)
    square = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / seconds(lambda: square @ square, 0.5)
    copying = cache(copy_seconds)
    table, figures = [], []
    ratios: dict[str, list[Interval]] = {"product": [], "network": []}
    for size in SIZES:
        paper = PaperEnergy(size)
        for parameter in paper.parameters():
            parameter.requires_grad_(False)
        network = EnergyModels([0], size, width=128, hidden=(64,), layer_norm=True, dropout=0.0).eval()
        energies = {"product": product(size), "network": (network.tensors_of(0), None)}
        for rows in ROWS:
            states = torch.randn(rows, size)
            for steps in STEPS:
                for name, (tensors, guard) in energies.items():
                    descent = Descent(tensors, eta=0.1, steps=steps, guard=guard)
                    w, b = tensors["weight"] / tensors["scale"], tensors["bias"]

                    def ours(descent: Descent = descent, states: Tensor = states) -> Tensor:
                        with torch.inference_mode():
                            return states + descent.delta(states)

                    def same(
                        w: Tensor = w, b: Tensor = b, tensors: dict[str, Tensor] = tensors, states: Tensor = states
                    ) -> Tensor:
                        return by_autograd(lambda h: energy_of(tensors, h @ w.T + b), states, 1.0, steps)  # noqa: B023

                    runs = {
                        "ours": ours,
                        "autograd": same,
                        "paper": lambda: by_autograd(lambda h: paper(h)[:, 0], states, 1.0, steps),  # noqa: B023
                    }
                    times = in_turn(runs, 3, 0.01)
                    width = len(descent.down) + len(descent.up)  # rows of the two thin matrices
                    moved = width * size + 2 * rows * size  # the matrices and the states once in, the states once out
                    floor = max(copying(moved // 2), 2 * rows * size * width / rate)
                    found, over = ratio(times["paper"], times["ours"]), ratio(times["autograd"], times["ours"])
                    ratios[name].append(found)
                    table.append(
                        [
                            name,
                            size,
                            rows,
                            steps,
                            *(f"{1e3 * min(times[one]):.3f}" for one in ("ours", "autograd", "paper")),
                            f"{1e3 * floor:.4f}",
                            f"{over.value:.1f}",
                            f"{found.value:.0f}",
                        ]
                    )
                    figures.append(
                        Figure.of(
                            f"descent.{name}.d{size}.rows{rows}.k{steps}",
                            found,
                            COMMAND,
                            0,
                            "random weights",
                            machine(),
                            note=f"paper / ours; autograd on the same energy / ours {over.value:.1f}; "
                            f"ours {1e3 * min(times['ours']):.3f} ms, floor {1e3 * floor:.4f} ms",
                        )
                    )
    for name, label in (("product", "descent.ratio"), ("network", "descent.ratio.network")):
        least = min(ratios[name], key=lambda one: one.value)
        figures.append(
            Figure.of(label, least, COMMAND, 0, f"random weights, {name} energy", machine(), note="least over the grid")
        )
    show(
        ["energy", "size", "rows", "K", "ours ms", "autograd ms", "paper ms", "floor ms", "/autograd", "/paper"], table
    )
    show(["figure", "value"], [[one.name, f"{one.value:.1f}"] for one in figures[-2:]])
    keep("descent", figures)


if __name__ == "__main__":
    no_options(__doc__)
    main()
