"""How time and memory of the energy training grow with prompts, layers and hidden size, on synthetic states.

    .venv/bin/python benchmarks/bench_scale.py

Each point runs in a process of its own: states are written to the run folder's shards as `fit` does, then the energies are
trained from there (training through the model left out: its memory is `refine_memory`, whatever the number of prompts). Time, and
memory (the peak of the process's anonymous pages, less what it had before: pages of the file that states are mapped from go when
others need the room) are told, with the exponent of each fitted over the points (log-log least squares).
`scale.peak_memory_mib` is the greatest. Reads /proc, so it runs on Linux alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from side_by_side import keep, peak_memory, show

from elsteer.completions import Completion
from elsteer.evaluation.figures import Figure, machine
from elsteer.prompts import Prompt
from elsteer.run import RunFolder
from elsteer.settings import FitSettings
from elsteer.states import StateStore
from elsteer.training import train_energies

COMMAND = "python benchmarks/bench_scale.py"
POINTS = {
    "prompts": [(count, 8, 896) for count in (128, 1024, 8192, 100_000)],
    "layers": [(1024, count, 896) for count in (8, 24, 64)],
    "hidden": [(1024, 8, count) for count in (512, 2048, 8192)],
}
SHARD = 64


def point(prompts: int, layers: int, size: int) -> dict[str, float]:
    """Seconds and MiB of training the energies of so many prompts, layers and numbers per state."""
    generator = torch.Generator().manual_seed(0)
    harmful, refused = torch.arange(prompts) % 2 == 0, torch.arange(prompts) % 4 < 2
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        store = StateStore(run / "states")
        for start in range(0, prompts, SHARD):
            rows = range(start, min(prompts, start + SHARD))
            states = torch.randn(len(rows), 1, layers, size, generator=generator)
            states[..., 0] += 4.0 * harmful[rows.start : rows.stop, None, None]
            states[..., 1] += 4.0 * refused[rows.start : rows.stop, None, None]
            store.append([str(row) for row in rows], states, torch.ones(len(rows)))
        asked = [Prompt.of(f"prompt {at}", bool(harmful[at]), id=str(at)) for at in range(prompts)]
        said = [
            Completion(str(at), "", 1, True, "refusal" if refused[at] else "compliance", 1.0, "")
            for at in range(prompts)
        ]
        with peak_memory() as peak:
            start = time.perf_counter()
            train_energies(run, asked, said, FitSettings(), "", layers)
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "mib": peak[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, default=None, help="prompts of one more, the greatest point")
    options = parser.parse_args()
    if options.point:
        json.dump(point(*options.point), sys.stdout)
        return
    if options.most:
        POINTS["prompts"].append((options.most, 8, 896))
    table, figures, peak = [], [], 0.0
    for name, points in POINTS.items():
        found = []
        for each in points:
            done = subprocess.run(
                [sys.executable, __file__, "--point", *map(str, each)], check=True, capture_output=True, text=True
            )
            found.append(json.loads(done.stdout))
            table.append([name, *each, f"{found[-1]['seconds']:.1f}", f"{found[-1]['mib']:.0f}"])
            show(["grows", "prompts", "layers", "size", "seconds", "MiB"], table[-1:])
        peak = max(peak, *(one["mib"] for one in found))
        along = np.log([each[list(POINTS).index(name)] for each in points])
        for what in ("seconds", "mib"):
            slope = float(np.polyfit(along, np.log([max(1e-3, one[what]) for one in found]), 1)[0])
            note = ", ".join(
                f"{each[list(POINTS).index(name)]}: {one[what]:.1f}" for each, one in zip(points, found, strict=True)
            )
            figures.append(
                Figure(f"scale.{name}.{what}.exponent", slope, COMMAND, 0, "synthetic", machine(), note=note)
            )
    figures.append(
        Figure("scale.peak_memory_mib", peak, COMMAND, 0, "synthetic states", machine(), note="over all points")
    )
    show(["figure", "value"], [[one.name, f"{one.value:.2f}"] for one in figures])
    keep("scale", figures)


if __name__ == "__main__":
    main()
