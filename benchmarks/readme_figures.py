"""The README's figures and pictures, made from results/headline.json, results/main.json and the run folder of main_figures.py.

    .venv/bin/python benchmarks/readme_figures.py [--run-dir runs/main | --headline]

Writes the part of README.md between the marks `figures:begin` and `figures:end`, and the picture there; with --headline the part
between `headline:begin` and `headline:end` alone. It measures nothing.
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
    return "\n".join(lines + not_kept(lost))


def not_kept(lost: list[str]) -> list[str]:
    """The lines that say on which sets harmful refusals fell; none for none."""
    if not lost:
        return []
    return [
        "",
        f"**Safety is not kept on {' and '.join(lost)}**, whatever the sum says: measure on prompts like your own.",
    ]


def headline(figures: dict[str, Figure]) -> str:
    """A table of the methods of each size that is there, and what else was measured of els."""
    lines: list[str] = []
    for size in ("0.5b", "1.5b"):
        of_size = {name[len(size) + 1 :]: one for name, one in figures.items() if name.startswith(f"{size}.")}
        if not of_size:
            continue
        methods = [name.removesuffix(".removed") for name in of_size if name.endswith(".removed")]
        first = of_size["removed"]
        lines += [
            f"{first.model.partition('/')[2]}, seed {first.seed}, judge `rules`, n {of_size['removed.xstest_safe'].n} and"
            f" {of_size['removed.or_bench_hard'].n} benign and {of_size['harmful_difference'].n} harmful prompts, 95% intervals"
            f" (`{first.command}`; all: [results/headline.md](results/headline.md)):",
            "",
            "| method | removed, XSTest safe | OR-Bench-hard | harmful refusals, points: all | HarmBench | XSTest unsafe |",
            "|---|---|---|---|---|---|",
        ]
        for method in ["", *(f"{name}." for name in methods)]:
            cells = [share(of_size[f"{method}removed.{name}"]) for name in ("xstest_safe", "or_bench_hard")]
            parts = ("", ".harmbench", ".xstest_unsafe")
            cells += [points(of_size[f"{method}harmful_difference{part}"]) for part in parts]
            lines.append(f"| {method.removesuffix('.') or '**els**'} | {' | '.join(cells)} |")
        told = {
            "harmful_difference.attacked": ("harmful refusals under five families of attacks", points),
            "quality.perplexity_ratio": ("perplexity of the steered answers, times the plain ones'", ratio),
            "kl_neutral": ("KL per token on everyday prompts, nats", ratio),
            "facts_kept": ("short-answer questions that stay right", share),
            "mmlu_difference": ("MMLU, points", points),
            "arc_difference": ("ARC, points", points),
            "truthfulqa_difference": ("TruthfulQA, points", points),
        }
        known = [f"{words}: {write(of_size[name])}" for name, (words, write) in told.items() if name in of_size]
        if known:
            lines += ["", f"els besides: {'; '.join(known)}."]
        of_harm = {SETS[name]: of_size[f"harmful_difference.{name}"] for name in ("harmbench", "xstest_unsafe")}
        lines += not_kept([label for label, one in of_harm.items() if one.high is not None and one.high < 0])
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def ratio(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:.3f}"
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def put(mark: str, words: str) -> None:
    """Put `words` in README.md between the marks."""
    readme = ROOT / "README.md"
    marks = re.compile(rf"(<!-- {mark}:begin -->\n).*(<!-- {mark}:end -->)", re.DOTALL)
    page = marks.sub(lambda at: f"{at[1]}{words}\n{at[2]}", readme.read_text(encoding="utf-8"))
    readme.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/main")
    parser.add_argument("--headline", action="store_true", help="the headline's part alone")
    options = parser.parse_args()
    put("headline", headline({one.name: one for one in read_figures(ROOT / "results/headline.json")}))
    if options.headline:
        return
    figures = {one.name: one for one in read_figures(ROOT / "results/main.json")}
    rows = [
        {**row, "source": SOURCES.get(row["source"].partition("(")[0], row["source"])}
        for file in sorted(options.run_dir.glob("test.*/evaluation/*.jsonl"))
        if file.name.endswith((".none.jsonl", ".els.jsonl")) and not file.name.startswith("answers.")
        for row in read_jsonl(file)
    ]
    found = compare(rows, "els", by=("source",))
    words = text(figures, {one.name: one.difference for one in found})
    put("figures", words)
    picture = before_after_picture(found, "Refused, plain and steered")
    (ROOT / "docs/images/before_after.png").write_bytes(picture)
    sys.stdout.write(f"README.md and its picture are made from results/main.json and {options.run_dir}.\n")


if __name__ == "__main__":
    main()
