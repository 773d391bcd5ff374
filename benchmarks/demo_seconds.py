"""How long the demo takes once the model is there, and what it finds: `demo.seconds` in results/main.json and main.md.

    .venv/bin/python benchmarks/demo_seconds.py

Runs `elsteer demo` as a user would, in a process of its own and an empty run folder; the model must have been fetched
before (`elsteer models fetch`), so that no download is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from main_figures import write_page

from elsteer.demo import MODEL, fast_dtype
from elsteer.evaluation.figures import Figure, machine, write_figures
from elsteer.evaluation.statistics import Interval


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    command = "python benchmarks/demo_seconds.py"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "elsteer", "demo", "--run-dir", folder], check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            return done.returncode
        summary = json.loads((Path(folder) / "evaluation/summary.json").read_text(encoding="utf-8"))
    figures = [
        Figure.of(
            "demo.seconds",
            Interval(round(seconds), round(seconds), round(seconds), 1),
            command,
            0,
            f"{MODEL}, {str(fast_dtype()).removeprefix('torch.')}",
            machine(),
            note="one run, model fetched before",
        )
    ]
    write_figures(options.results / "main.json", figures)
    write_page(options.results)
    sys.stdout.write(f"{seconds:.0f} seconds\n{json.dumps(summary, indent=1)[:2000]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
