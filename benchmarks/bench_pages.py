"""What it costs that the C library gives freed memory back, and what `elsteer.allocator` saves of it.

    .venv/bin/python benchmarks/bench_pages.py

Prefills of 128 starter prompts by the real model, in processes that leave the C library as it is and in ones that call
`keep_freed_memory`, in turn: seconds of either (the ratio above 1: leaving it takes longer), page faults and peak memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from statistics import median
from time import perf_counter

from side_by_side import keep, no_options, ratio, show

import elsteer
from elsteer.allocator import keep_freed_memory
from elsteer.completions import PromptCaches
from elsteer.demo import MODEL, fast_dtype
from elsteer.evaluation.figures import Figure, machine
from elsteer.prompts import load_starter, sample

COMMAND = "python benchmarks/bench_pages.py"
PROMPTS, PASSES, REPEATS = 128, 4, 3


def child(kept: bool) -> None:
    """Prefills in this process; prints seconds, faults and MiB as JSON."""
    if kept and not keep_freed_memory():
        raise SystemExit("The C library here is not glibc, or MALLOC_ variables are set: there is nothing to compare.")
    model, tokenizer = elsteer.load(MODEL, dtype=fast_dtype(), device="cpu")
    prompts = sample(load_starter("train"), PROMPTS, 0)

    def prefill() -> None:
        for _ in PromptCaches(model, tokenizer, prompts, batch_size=PROMPTS, keep_bytes=0).batches():
            pass

    prefill()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, perf_counter()
    for _ in range(PASSES):
        prefill()
    spent, after = perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    sys.stdout.write(json.dumps([spent / PASSES, (after.ru_minflt - before) / PASSES, after.ru_maxrss / 1024]) + "\n")


def main() -> None:
    found: dict[str, list[list[float]]] = {"left": [], "kept": []}
    for _ in range(REPEATS):
        for name, rows in found.items():
            done = subprocess.run([sys.executable, __file__, name], stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    middle = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    show(
        ["freed memory is", "s", "page faults", "peak MiB"],
        [[name, f"{a:.2f}", f"{b:,.0f}", f"{c:,.0f}"] for name, (a, b, c) in middle.items()],
    )
    model = f"{MODEL}, {str(fast_dtype()).removeprefix('torch.')}"
    times = ratio(*([row[0] for row in found[name]] for name in ("left", "kept")))
    memory = ratio(*([row[2] for row in found[name]] for name in ("kept", "left")))
    note = f"{PROMPTS} prompts, {PASSES} passes each; {middle['left'][1]:,.0f} page faults a pass, kept {middle['kept'][1]:,.0f}"
    keep(
        "pages",
        [
            Figure.of("pages.prefill_ratio", times, COMMAND, 0, model, machine(), note=note),
            Figure.of("pages.memory_ratio", memory, COMMAND, 0, model, machine(), note="peak, kept over left"),
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:] in (["left"], ["kept"]):
        child(sys.argv[1] == "kept")
    else:
        no_options(__doc__)
        main()
