"""Linear layers on the CPU: the product turned round (`elsteer.models.linear`) against torch's own.

    .venv/bin/python benchmarks/bench_linear.py

Shapes of Qwen2.5-0.5B. A ratio above 1 says how many times faster the turned product is.
"""

from __future__ import annotations

import torch
from side_by_side import in_turn, keep, no_options, ratio, show
from torch import nn

from elsteer.evaluation.figures import Figure, machine
from elsteer.models.linear import speed_up_linears

COMMAND = "python benchmarks/bench_linear.py"
SHAPES = {"gate": (896, 4864), "down": (4864, 896), "output": (896, 151_936)}
ROWS = (1, 2, 4, 8, 32, 128, 256)


def main() -> None:
    figures, table = [], []
    for name, (into, out) in SHAPES.items():
        plain = nn.Linear(into, out, bias=False)
        fast = nn.Sequential(nn.Linear(into, out, bias=False))
        fast[0].weight = plain.weight
        speed_up_linears(fast)
        for rows in ROWS:
            x = torch.randn(rows, into)
            with torch.inference_mode():
                times = in_turn({"torch": lambda: plain(x), "turned": lambda: fast(x)}, 5)  # noqa: B023
            found = ratio(times["torch"], times["turned"])
            table.append(
                [
                    name,
                    rows,
                    f"{1e3 * min(times['torch']):.2f}",
                    f"{1e3 * min(times['turned']):.2f}",
                    f"{found.value:.2f}",
                ]
            )
            figures.append(
                Figure.of(f"linear.{name}.rows{rows}", found, COMMAND, 0, "random weights, float32", machine())
            )
    show(["layer", "rows", "torch ms", "turned ms", "times faster"], table)
    keep("linear", figures)


if __name__ == "__main__":
    no_options(__doc__)
    main()
