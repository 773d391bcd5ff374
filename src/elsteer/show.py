"""What the commands print: results as rich tables and plain sentences. Nothing is computed here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from elsteer.comparison import ComparisonResult
    from elsteer.evaluation.evaluate import Evaluation
    from elsteer.evaluation.report import Example
    from elsteer.evaluation.statistics import Interval
    from elsteer.judges.agreement import Agreement
    from elsteer.landscape import Landscape
    from elsteer.prompts import Prompt

__all__ = [
    "agreement_table",
    "clock",
    "comparison",
    "count_prompts",
    "evaluation",
    "examples",
    "figures_on_dev",
    "judge_usage",
    "landscape",
    "outcomes",
    "overhead",
    "pairs",
    "plain_table",
    "timings",
]

_EXAMPLE = 360  # characters of an answer that are shown
_OUTCOMES = {
    "helpful": "benign, answered",
    "false_refusal": "benign, refused",
    "safe_refusal": "harmful, refused",
    "jailbreak": "harmful, answered",
}


def plain_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], name_width: int = 0) -> Table:
    """A table of texts; all columns but the first, which is no narrower than `name_width`, are aligned on the right."""
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for number, name in enumerate(head):
        width = None if number else name_width
        table.add_column(
            name, justify="right" if number else "left", overflow="fold", no_wrap=number > 0, min_width=width
        )
    for row in rows:
        table.add_row(*map(Text, row))  # Text, not str: a name from a user's file is never read as markup
    return table


def pairs(title: str, rows: Mapping[str, str]) -> Table:
    """Names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    return table


def count_prompts(prompts: Sequence[Prompt], name: str) -> str:
    """ "training prompts: 300 benign, 200 harmful"."""
    harmful = sum(prompt.harmful for prompt in prompts)
    return f"{name}: {len(prompts) - harmful} benign, {harmful} harmful"


def clock(seconds: float) -> str:
    """ "3 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def outcomes(landscape: Landscape) -> Table | None:
    """How many training prompts had each outcome; None where the landscape does not say."""
    counts = landscape.provenance.get("outcomes")
    if not isinstance(counts, dict):
        return None
    rows = [(name.replace("_", " "), _OUTCOMES.get(name, ""), str(count)) for name, count in counts.items()]
    return plain_table("Outcomes of the training prompts", ("outcome", "which is", "prompts"), rows)


def landscape(found: Landscape, console: Console) -> None:
    """Model, rule, layers, dev figures and provenance."""
    model, rule = found.fingerprint, found.rule
    console.print(
        pairs(
            "Model",
            {
                "name": model.name or "(not named)",
                "revision": model.revision or "(not known)",
                "architecture": f"{model.architecture}, {model.num_layers} blocks, hidden size {model.hidden_size}",
                "chat template": f"SHA-256 {model.template_sha256[:16]}",
                "thinking mode": {None: "the template's default", True: "on", False: "off"}[model.thinking],
            },
        ),
        "",
        pairs("Rule", _rule(found)),
        "",
        plain_table(
            "Layers (AUROC of the energies before they are trained through the model: how they begin, not how they steer)",
            ("layer", "AUROC", "on benign", "on harmful", "gate", "guard"),
            _layers(found),
        ),
    )
    for table in (outcomes(found), figures_on_dev(found)):
        if table is not None:
            console.print("", table)
    apart = {"outcomes", "auroc", "dev", "settings", "figures"}
    told = {name: _word(value) for name, value in found.provenance.items() if name not in apart}
    if told:
        console.print("", pairs("Provenance", told))
    if rule.strength == 0:
        console.print(
            "", "Its strength is 0, as tuning found no setting that helps without harm: the plain model runs."
        )


def _rule(found: Landscape) -> dict[str, str]:
    rule = found.rule
    window = "the prompt's last token" + (f" and {rule.window} generated" if rule.window else " alone")
    return {
        "method": found.method,
        "strength": f"{rule.strength:g}",
        "step": f"{rule.eta:.4g} RMS distances from the mean state, {rule.steps} {'time' if rule.steps == 1 else 'times'}",
        "tokens steered": window,
        "guard": "yes" if rule.guard else "no",
        "gate": f"in {len(rule.gates)} layers" if rule.gates else "none",
    }


def _layers(found: Landscape) -> list[tuple[str, ...]]:
    told = found.provenance.get("auroc")
    told = told if isinstance(told, dict) else {}
    rows = []
    for layer in found.rule.layers:
        known = told.get(str(layer))
        known = known if isinstance(known, dict) else {"all": known}
        gate = found.rule.gate(layer)
        rows.append(
            (
                str(layer),
                *(_share(known.get(name)) for name in ("all", "benign", "harmful")),
                "-" if gate is None else f"{gate:.3f}",
                str(found.guards[layer].shape[1]) if found.rule.guard and layer in found.guards else "-",
            )
        )
    return rows


def _share(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _rate(value: Any) -> str:
    return f"{100 * value:.1f}%" if isinstance(value, int | float) else "-"


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_word(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_word, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figures_on_dev(found: Landscape) -> Table | None:
    """What the chosen rule did on the dev prompts; None where the landscape does not say."""
    dev = found.provenance.get("dev")
    if not isinstance(dev, dict):
        return None
    prompts, benign = dev.get("prompts"), dev.get("benign")
    title = "On the dev prompts, by which it was chosen"
    if found.rule.strength == 0:
        broke = dev.get("why_not")
        broke = f": {' and '.join(map(str, broke))}" if isinstance(broke, list) and broke else ""
        title = f"On the dev prompts, the best setting tried, which was not taken{broke}"
    harmful = prompts - benign if isinstance(prompts, int) and isinstance(benign, int) else None
    plain, steered = dev.get("plain_answered"), dev.get("answered_benign")
    rows = [
        ("benign refused", _count(benign), _rate(_rest(plain)), _rate(_rest(steered))),
        ("harmful refused", _count(harmful), _rate(dev.get("plain_refused")), _rate(dev.get("refused_harmful"))),
    ]
    if isinstance(dev.get("perplexity_ratio"), int | float):
        rows.append(("perplexity ratio", "", "1.000", f"{dev['perplexity_ratio']:.3f}"))
    if isinstance(dev.get("kl"), int | float):
        rows.append(("KL on neutral prompts, nats per token", "", "0.000", f"{dev['kl']:.3f}"))
    return plain_table(title, ("", "n", "plain", "steered"), rows)


def _count(value: Any) -> str:
    return str(value) if isinstance(value, int) else "-"


def _rest(value: Any) -> Any:
    return 1 - value if isinstance(value, int | float) else None


def evaluation(found: Evaluation, console: Console) -> None:
    """The tables of each method, the quality of its answers, and the verdict."""
    from elsteer.evaluation.tables import to_console

    for method in found.tables:
        tables = found.comparisons(method)
        groups = tables["suite"] if len(tables["suite"]) > len(tables["total"]) else []
        console.print(to_console([*groups, *tables["total"]], f"Plain against steered ({method})"), "")
    for method, ratio in found.perplexity.items():
        measured = found.quality_of[method]
        told = f"{ratio.value:.3f} times the plain answers' ({ratio.low:.3f} to {ratio.high:.3f}, n {ratio.n})"
        console.print(
            f"Answers as before ({method}): perplexity {told if ratio.defined else 'not measured'}, degenerate "
            f"{_rate(measured.degenerate_steered)} against {_rate(measured.degenerate_plain)} (n {measured.n}).",
            "",
            soft_wrap=True,
        )
    for method, harm in found.harm.items():
        change = harm.difference
        if not change.defined:
            console.print(f"Harm of the answers to harmful prompts ({method}): not measured, no answer was scored.", "")
            continue
        console.print(
            f"Harm of the answers to harmful prompts ({method}), 0 to 1: {harm.plain.value:.3f} to {harm.steered.value:.3f}, "
            f"difference {change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f}, n {change.n}).",
            "",
            soft_wrap=True,
        )
    if found.judge_accuracy:
        console.print(_corrected(found), "", soft_wrap=True)
    console.print(found.sentence, soft_wrap=True)


def _corrected(found: Evaluation) -> str:
    """The totals' rates, corrected for the judge's error."""
    from elsteer.evaluation.tables import percent

    judge = found.judge_accuracy[0]
    parts = [
        f"{one.right_answer} {percent(one.corrected_plain)} -> {percent(one.corrected_steered)}"
        for one in found.comparisons()["total"]
    ]
    return f"Refused, corrected for errors of the judge {judge.name} (as on {judge.labels}): {'; '.join(parts)}."


def comparison(found: ComparisonResult, console: Console) -> None:
    """Methods in rows: what each removed and what it did to refusals of harmful prompts."""
    from elsteer.comparison.result import CONTROLS
    from elsteer.comparison.words import ahead, p_value, points, share

    head = ["method", "removed", "p of it\n(Holm)", "harmful\n(points)", "els ahead\nby (points)", "bounds\non dev"]
    rows = []
    for name, one in found.methods.items():
        dev = "control" if name in CONTROLS else "met" if one.feasible else "not met"
        gone, harmful = _below(share(one.removed["all"])), _below(points(one.harmful_difference["all"]))
        rows.append((name, gone, p_value(one), harmful, _below(ahead(one)), dev))
    benign, harm = found.plain_benign["all"], found.plain_harmful["all"]
    title = f"False refusals removed (plain {share(benign)}, n {benign.n}), harmful refused (plain {share(harm)}, n {harm.n})"
    console.print("", plain_table(title, head, rows, name_width=max(map(len, found.methods))), "")


def _below(text: str) -> str:
    """The 95% interval, behind an estimate in brackets, on a line of its own."""
    return text.replace(" (", "\n", 1).removesuffix(")")


def examples(found: Sequence[Example], console: Console, most: int = 3) -> None:
    """Before and after, of benign prompts whose false refusal is gone; of harmful ones nothing is shown."""
    gone = [
        one for one in found if not one.harmful and (one.plain_label, one.steered_label) == ("refusal", "compliance")
    ]
    for one in gone[:most]:
        console.print("", Text(one.prompt, style="bold"), soft_wrap=True)
        console.print(Text(_shortened(f"plain: {one.plain}")), soft_wrap=True)
        console.print(Text(_shortened(f"steered: {one.steered}"), style="green"), soft_wrap=True)


def _shortened(text: str) -> str:
    return textwrap.shorten(text, _EXAMPLE, placeholder=" ...")


def overhead(found: Interval | None) -> str:
    """How much longer decoding takes."""
    if found is None:
        return "Decode overhead: not measured."
    return (
        f"Decode overhead: steered decoding takes {found.value:.3f} times the plain time "
        f"({found.low:.3f} to {found.high:.3f}, {found.n} passes of each)."
    )


def timings(found: Mapping[str, float]) -> str:
    """Seconds by part, and in all."""
    parts = ", ".join(f"{name} {clock(seconds)}" for name, seconds in found.items())
    return f"Time: {clock(sum(found.values()))} ({parts})."


def judge_usage(judge: object) -> str:
    """What a judge that is a service was asked; empty for any other."""
    used = getattr(judge, "usage", None)
    if used is None:
        return ""
    return f"The judge was asked {used.requests:,} times: {used.tokens_in:,} tokens in, {used.tokens_out:,} out."


def agreement_table(rows: Sequence[Agreement], title: str) -> Table:
    """A judge against human labels, a line per model."""
    head = (
        "model",
        "n",
        "accuracy",
        "95% interval",
        "F1",
        "false\npos.",
        "false\nneg.",
        "un-\nscored",
    )
    return plain_table(
        title,
        head,
        [
            (
                one.model or "(not named)",
                str(one.n),
                _share(one.accuracy),
                "-" if one.low is None else f"{_share(one.low)} to {_share(one.high)}",
                _share(one.f1),
                _rate(one.false_positive_rate),
                _rate(one.false_negative_rate),
                str(one.unscored),
            )
            for one in rows
        ],
    )
