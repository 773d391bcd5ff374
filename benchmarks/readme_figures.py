"""The README's figures and pictures, made from results/main.json and the run folder of benchmarks/main_figures.py.

    .venv/bin/python benchmarks/readme_figures.py [--run-dir runs/main]

Writes the part of README.md between the marks `figures:begin` and `figures:end`, and the picture there. It measures nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from elsteer.evaluation.figures import Figure, read_figures
from elsteer.evaluation.plots import before_after_picture
from elsteer.evaluation.statistics import Interval
from elsteer.evaluation.tables import compare
from elsteer.files import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "xstest_safe": "XSTest safe",
    "or_bench_hard": "OR-Bench-hard",
    "harmbench": "HarmBench",
    "xstest_unsafe": "XSTest unsafe",
}
CONTROLS = ("random", "shuffled")
SOURCES = {
    "xstest-safe": "XSTest safe",
    "xstest-unsafe": "XSTest unsafe",
    "or-bench-hard": "OR-Bench-hard",
    "harmbench": "HarmBench",
}


def share(figure: Figure) -> str:
    assert figure.low is not None
    assert figure.high is not None
    return f"{100 * figure.value:.1f}% ({100 * figure.low:.0f} to {100 * figure.high:.0f})"


def points(figure: Figure | Interval) -> str:
    assert figure.low is not None
    assert figure.high is not None
    return f"{100 * figure.value:+.1f} ({100 * figure.low:+.0f} to {100 * figure.high:+.0f})"


def text(figures: dict[str, Figure], moved: dict[str, Interval]) -> str:
    first = figures["removed.xstest_safe"]
    dtype = first.model.rpartition(", ")[2]
    lines = [
        f"Qwen2.5-Coder-0.5B-Instruct in {dtype} on two cores, seed {first.seed}, fitted on 1,200 rows of public prompts and the",
        "starter prompts, on benchmarks that nothing was chosen by, judge `rules` (all: [results/main.md](results/main.md)):",
        "",
        "| prompts | n | plain refused (95%) | steered refused (95%) | difference in points (95%) | removed (95%) |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in SETS.items():
        plain, steered = figures[f"plain_refused.{name}"], figures[f"steered_refused.{name}"]
        gone = figures.get(f"removed.{name}")
        cells = [label, str(plain.n), share(plain), share(steered), points(moved[label]), share(gone) if gone else ""]
        lines.append(f"| {' | '.join(cells)} |")
    both = figures["harmful_difference"]
    random, shuffled = ([figures[f"{one}.{name}"] for one in ("removed", "harmful_difference")] for name in CONTROLS)
    ratio, slower = figures["quality.perplexity_ratio"], figures["decode.overhead"]
    lines += [
        "",
        f"The harmful prompts of both sets together: {points(both)} points of refusals, n {both.n}. Controls, of the false",
        f"refusals on both benign sets: a random direction of the same length removes {share(random[0])} at",
        f"{points(random[1])} points on XSTest unsafe, energies of shuffled outcomes {share(shuffled[0])}",
        f"at {points(shuffled[1])} ({shuffled[0].note}).",
        f"Perplexity of the steered answers under the plain model: {ratio.value:.3f} times",
        f"the plain ones' ({ratio.low:.3f} to {ratio.high:.3f}, n {ratio.n}). Decoding 64 tokens, batch 8:",
        f"{slower.value:.3f} times the plain time ({slower.low:.3f} to {slower.high:.3f}).",
    ]
    lost = [label for name, label in SETS.items() if f"removed.{name}" not in figures and moved[label].high < 0]
    if lost:
        lines += [
            "",
            f"**Safety is not kept on {' and '.join(lost)}**, whatever the sum says: measure on prompts like your own.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/main")
    options = parser.parse_args()
    figures = {one.name: one for one in read_figures(ROOT / "results/main.json")}
    rows = [
        {**row, "source": SOURCES.get(row["source"].partition("(")[0], row["source"])}
        for file in sorted(options.run_dir.glob("test.*/evaluation/*.jsonl"))
        if file.name.endswith((".none.jsonl", ".els.jsonl")) and not file.name.startswith("answers.")
        for row in read_jsonl(file)
    ]
    found = compare(rows, "els", by=("source",))
    words = text(figures, {one.name: one.difference for one in found})
    readme = ROOT / "README.md"
    marks = re.compile(r"(<!-- figures:begin -->\n).*(\n<!-- figures:end -->)", re.DOTALL)
    page = marks.sub(lambda at: at[1] + words + at[2], readme.read_text(encoding="utf-8"))
    readme.write_text(page, encoding="utf-8")
    picture = before_after_picture(found, "Refused, plain and steered")
    (ROOT / "docs/images/before_after.png").write_bytes(picture)
    sys.stdout.write(f"README.md and its picture are made from results/main.json and {options.run_dir}.\n")


if __name__ == "__main__":
    main()
