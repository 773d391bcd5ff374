"""Three fits that differ in their seed alone, and what each removes; adds SIZE.seeds.* to results/headline.json and .md.

    .venv/bin/python benchmarks/seed_figures.py --data-dir DATA --size 0.5b [--train 8000]

As benchmarks/headline_figures.py --reduced does it, but on `--train` training prompts each, which are drawn by the seed, too: a
fit on all of them takes hours on two cores. So the three compare with one another, and with the published landscape only in
what fewer prompts cost. Killed and started again it goes on where it was; the figures are written when all three are there.

`SIZE.seeds.NAME` is the mean of the fits; low and high are the least and the greatest of them, not an interval of confidence, and
n is how many fits. `SIZE.seed-N.NAME` is that of one fit, with its 95% interval and n prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from headline_figures import MODELS, SEEDS, Work, write_page

from elsteer.allocator import keep_freed_memory
from elsteer.comparison.result import ComparisonResult
from elsteer.errors import ElsteerError
from elsteer.evaluation.figures import Figure, machine, write_figures
from elsteer.evaluation.statistics import Interval

NAMES = ("removed", "removed.xstest_safe", "removed.or_bench_hard", "harmful_difference")


def measured(result: ComparisonResult, name: str) -> Interval:
    """One figure of els by its name in the headline."""
    kind, _, part = name.partition(".")
    found: Interval = getattr(result.methods["els"], kind)[part or "all"]
    return found


def figures(work: Work, results: dict[int, ComparisonResult], command: str) -> list[Figure]:
    """Those of every fit, and their means with the least and the greatest."""
    model = f"{MODELS[work.size]}, {str(work.model[0].dtype).removeprefix('torch.')}"
    found = []
    for name in NAMES:
        each = {seed: measured(result, name) for seed, result in results.items()}
        for seed, one in each.items():
            note = f"{work.train} training prompts"
            found.append(Figure.of(f"{work.size}.seed-{seed}.{name}", one, command, seed, model, machine(), note))
        values = [one.value for one in each.values()]
        spread = Interval(statistics.mean(values), min(values), max(values), len(values))
        note = (
            f"mean, least and greatest of {len(values)} fits on {work.train} training prompts each; "
            f"standard deviation {statistics.stdev(values):.3f}"
        )
        found.append(Figure.of(f"{work.size}.seeds.{name}", spread, command, SEEDS[0], model, machine(), note))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(MODELS), required=True)
    parser.add_argument("--train", type=int, default=8000, help="training prompts of each fit (default 8000)")
    parser.add_argument("--run-dir", type=Path, default=None, help="default: runs/seeds-SIZE")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    run = options.run_dir or Path(f"runs/seeds-{options.size}")
    work = Work(options.size, options.data_dir, run, reduced=True, train=options.train)
    command = f"python benchmarks/seed_figures.py --data-dir DATA --size {options.size} --train {options.train}"
    results = {seed: work.seed(seed) for seed in SEEDS}
    write_figures(options.results / "headline.json", figures(work, results, command))
    return write_page(options.results)


if __name__ == "__main__":
    keep_freed_memory()
    try:
        sys.exit(main())
    except ElsteerError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(error.exit_code)
