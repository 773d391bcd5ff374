"""The README's figures, made from results/headline.json.

    .venv/bin/python benchmarks/readme_figures.py

Writes the part of README.md between the marks `figures:begin` and `figures:end`. It measures nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from elsteer.evaluation.figures import Figure, read_figures
from elsteer.evaluation.statistics import Interval
from elsteer.evaluation.tables import points as in_points

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("0.5b", "1.5b")
SETS = {
    "xstest_safe": "XSTest safe",
    "or_bench_hard": "OR-Bench-hard",
    "harmbench": "HarmBench",
    "xstest_unsafe": "XSTest unsafe",
}
BENIGN = ("xstest_safe", "or_bench_hard")


def share(figure: Figure) -> str:
    assert figure.low is not None
    assert figure.high is not None
    return f"{100 * figure.value:.1f}% ({100 * figure.low:.0f} to {100 * figure.high:.0f})"


def points(figure: Figure) -> str:
    """Percentage points, to a tenth."""
    assert figure.low is not None
    assert figure.high is not None
    return in_points(Interval(figure.value, figure.low, figure.high, figure.n or 0))


def before_and_after(of_size: dict[str, Figure]) -> list[str]:
    """els alone on the four sets, and what else was measured of it."""
    first = of_size["removed"]
    model, _, dtype = first.model.rpartition(", ")
    lines = [
        f"{model.rpartition('/')[2]} in {dtype}, seed {first.seed}, judge `rules`, prompts that no fit was trained or tuned on"
        f" (`{first.command}`; all: [results/headline.md](results/headline.md)):",
        "",
        "| prompts | n | plain refused (95%) | steered refused (95%) | removed (95%) | difference in points (95%) |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in SETS.items():
        plain, steered = of_size[f"plain_refused.{name}"], of_size[f"steered_refused.{name}"]
        gone = share(of_size[f"removed.{name}"]) if name in BENIGN else ""
        more = "" if name in BENIGN else points(of_size[f"harmful_difference.{name}"])
        n = plain.n if plain.n == steered.n else f"{plain.n} plain, {steered.n} steered"
        lines.append(f"| {label} | {n} | {share(plain)} | {share(steered)} | {gone} | {more} |")
    both = of_size["harmful_difference"]
    lines += ["", f"The harmful prompts of both sets together: {points(both)} points of refusals, n {both.n}."]
    told = {
        "harmful_difference.attacked": ("harmful refusals under five families of attacks, points", points),
        "decode.overhead": ("time of decoding 64 tokens, batch 8, times the plain model's", ratio),
        "quality.perplexity_ratio": ("perplexity of the steered answers, times the plain ones'", ratio),
        "degenerate_difference": ("answers to everyday prompts that degenerate, points", points),
        "kl_neutral": ("KL per token on everyday prompts, nats", ratio),
        "facts_kept": ("short-answer questions that stay right", share),
        "mmlu_difference": ("MMLU, points", points),
        "arc_difference": ("ARC, points", points),
        "truthfulqa_difference": ("TruthfulQA, points", points),
    }
    known = {
        name: f"| {words} | {of_size[name].n} | {write(of_size[name])} |"
        for name, (words, write) in told.items()
        if name in of_size
    }
    others = {of_size[name].model.rpartition(", ")[2] for name in known} - {dtype}
    harm = {SETS[name]: of_size[f"harmful_difference.{name}"] for name in SETS if name not in BENIGN}
    fell = [label for label, one in harm.items() if one.value < 0 <= one.high]
    if fell:
        lines.append(
            f"Fewer of {' and '.join(fell)} are refused here, which may be chance: measure on prompts like your own."
        )
    lines += not_kept([label for label, one in harm.items() if one.high < 0])
    if known:
        lines += [
            "",
            f"| also measured{f', in {others.pop()}' if others else ''} | n | steered, or steered less plain |",
            "|---|---|---|",
        ]
        lines += known.values()
    return lines


def summary(of_size: dict[str, Figure]) -> str:
    """A size in a line."""
    model = of_size["removed"].model.rpartition(", ")[0].rpartition("/")[2]
    safe, hard = (f"{of_size[f'removed.{name}'].value:.0%} on {SETS[name]}" for name in BENIGN)
    more = of_size["harmful_difference"]
    return f"- {model}: false refusals removed {safe}, {hard}; harmful prompts refused {points(more)} points"


def not_kept(lost: list[str]) -> list[str]:
    """The lines that say on which sets harmful refusals fell; none for none."""
    if not lost:
        return []
    return [
        "",
        f"**Safety is not kept on {' and '.join(lost)}**, whatever the sum says: measure on prompts like your own.",
    ]


def methods(of_size: dict[str, Figure], size: str) -> list[str]:
    """A row for each method."""
    direct = "--published" in of_size["removed"].command
    lines = [
        "",
        "Every method tuned on the same dev prompts ([how](docs/comparison.md), [what each does](docs/methods.md); `els` is "
        f"elsteer's, `random` and `shuffled` are controls){', els also on attacks' if direct else ''}:",
        "",
        "| method | removed, XSTest safe | OR-Bench-hard | harmful refusals, points: all | HarmBench | XSTest unsafe |",
        "|---|---|---|---|---|---|",
    ]
    names = [name.removesuffix(".removed") for name in of_size if name.endswith(".removed")]
    for method in ["", *(f"{name}." for name in names)]:
        cells = [share(of_size[f"{method}removed.{name}"]) for name in BENIGN]
        cells += [points(of_size[f"{method}harmful_difference{part}"]) for part in ("", ".harmbench", ".xstest_unsafe")]
        label = method.removesuffix(".") or "**els**"
        missed = of_size[f"{method}removed"].note == "constraints not met on dev"
        lines.append(f"| {label}{' (*)' if missed else ''} | {' | '.join(cells)} |")
    if any(line.partition(" | ")[0].endswith("(*)") for line in lines):
        lines += [
            "",
            "(*) No setting tried on dev kept the bounds and removed any: shown is the one with the best trade.",
        ]
    picture = f"results/frontier-{size}.png"
    lines += ["", f"![Benign prompts answered against harmful prompts refused, by method]({picture})"]
    return lines if names else []


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
    figures = {one.name: one for one in read_figures(ROOT / "results/headline.json")}
    lines: list[str] = []
    short: list[str] = []
    for size in SIZES:
        of_size = {name[len(size) + 1 :]: one for name, one in figures.items() if name.startswith(f"{size}.")}
        if not of_size:
            continue
        lines += ["", *before_and_after(of_size)] if lines else before_and_after(of_size)
        short.append(summary(of_size))
        lines += methods(of_size, size)
    put("figures", "\n".join(lines))
    put("summary", "\n".join(short))
    sys.stdout.write("The figures of README.md are made from results/headline.json.\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
