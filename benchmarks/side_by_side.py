"""What the benchmarks share: timing things in turn (A B A B), ratios with their spread, the table and the file of results."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from elsteer.evaluation.figures import Figure, write_figures
from elsteer.evaluation.statistics import Interval

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench"


def no_options(about: str | None) -> None:
    """Tells `--help`, and refuses any other option: a benchmark without options would measure, and replace what is recorded."""
    argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def finish() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], least: float = 0.02) -> float:
    """Seconds of one call, the mean over as many calls as take `least` seconds."""
    finish()
    calls, start = 0, time.perf_counter()
    while True:
        run()
        calls += 1
        finish()
        passed = time.perf_counter() - start
        if passed >= least:
            return passed / calls


def in_turn(runs: Mapping[str, Callable[[], object]], repeats: int, least: float = 0.02) -> dict[str, list[float]]:
    """Seconds of each of `runs`, `repeats` times in turn after one call of each to warm up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, least))
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Ratio of the medians; low and high are the least and the greatest ratio of neighbouring runs."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    middle = median(above) / median(below)
    return Interval(middle, min(*each, middle), max(*each, middle), len(each))


def product(size: int, units: int = 64, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a product energy as `fit` trains them, of random weights, and its guard (size, 2)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2 + units, size, generator=generator) / size**0.5
    tensors = {
        "weight": weight,
        "bias": torch.randn(2 + units, generator=generator),
        "bend": torch.randn(units, generator=generator) / units**0.5,
        "mean": torch.zeros(size),
        "scale": torch.tensor(1.0),
    }
    guard = torch.linalg.qr(torch.stack([torch.randn(size, generator=generator), weight[0]], dim=1)).Q
    return tensors, guard.contiguous()


def products(size: int, depth: int, layers: int) -> dict[int, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """`product` for each of the last `layers` blocks but two of a model of `depth`."""
    first = max(0, depth - 2 - layers)
    return {layer: product(size, seed=layer) for layer in range(first, first + layers)}


def anonymous() -> float:
    """MiB of the process's anonymous resident pages: what no file can give back. Reads /proc, so Linux alone."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """While open, the list's one entry follows the peak of `anonymous`, less what there was before, in MiB."""
    before, ended, peak = anonymous(), threading.Event(), [0.0]

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], anonymous() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def show(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table on the screen."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(header))]
    for row in cells:
        sys.stdout.write("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
    sys.stdout.flush()


def keep(name: str, figures: Sequence[Figure]) -> None:
    """Write the figures to results/bench/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figures(path, figures)
    sys.stdout.write(f"Written to {path.relative_to(RESULTS.parent.parent)}\n")
