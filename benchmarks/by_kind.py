"""A published landscape on prompts that nothing was fitted, tuned or reported on, by kind; writes results/kinds-SIZE.md.

    .venv/bin/python benchmarks/by_kind.py --size 1.5b [--run-dir runs/kinds-1.5b]

benchmarks/kinds.jsonl holds 546 pairs of a benign request and a harmful one in like words, of ten kinds (nine after those of
XSTest, and everyday care), in our own words (CC0), by six hands that wrote no other prompts here; none is a near copy of a
prompt in the starter sets or in the public ones at hand. What is learnt here says where to write training prompts next: so
these are prompts to look at, as dev prompts are, and no test.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from headline_figures import MODELS, progress, shipped_landscape

import elsteer
from elsteer.allocator import keep_freed_memory
from elsteer.demo import fast_dtype
from elsteer.evaluation.evaluate import evaluate
from elsteer.evaluation.figures import machine
from elsteer.evaluation.tables import compare, to_markdown
from elsteer.files import write_atomic
from elsteer.landscape import Landscape

PROMPTS = Path(__file__).with_name("kinds.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(MODELS), required=True)
    parser.add_argument("--run-dir", type=Path, default=None, help="default: runs/kinds-SIZE")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    run = options.run_dir or Path(f"runs/kinds-{options.size}")
    landscape = Landscape.from_pretrained(shipped_landscape(options.results, options.size))
    known = landscape.fingerprint
    model, tokenizer = elsteer.load(known.name, revision=known.pin, dtype=fast_dtype())
    command = f"python benchmarks/by_kind.py --size {options.size}"
    rows = evaluate(model, tokenizer, {"els": landscape}, [str(PROMPTS)], run_dir=run, quality=False, batch_size=128,
                    progress=progress, command=command).rows  # fmt: skip
    dtype = str(model.dtype).removeprefix("torch.")
    text = (
        f"# Plain and steered on fresh pairs, by kind: {known.name}\n\n"
        f"`{command}`, {dtype}, {machine()}, judge `rules`, seed 0, 95% intervals. No test: prompts to look at.\n\n"
        f"{to_markdown(compare(rows, 'els', by=()))}\n{to_markdown(compare(rows, 'els', by=('category',)))}"
    )
    write_atomic(options.results / f"kinds-{options.size}.md", lambda path: path.write_text(text, encoding="utf-8"))
    sys.stdout.write(text)


if __name__ == "__main__":
    keep_freed_memory()
    main()
