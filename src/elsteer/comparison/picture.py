"""The picture of a comparison: compliance on benign prompts against refusal of harmful ones, every method, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elsteer.evaluation.plots import canvas, legend, open_frame, percent_axes, png
from elsteer.evaluation.statistics import Interval
from elsteer.tuning import Trial

__all__ = ["Spot", "comparison_picture"]

_COLOURS = (
    "#0072b2",
    "#cc79a7",
    "#009e73",
    "#e69f00",
    "#56b4e9",
    "#d55e00",
    "#7f5ab6",
    "#8c564b",
    "#5f6b76",
    "#a3b32a",
    "#1f3a93",
    "#b5651d",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "8", "p")  # the star is the plain model's
_INK, _GREY = "#22272e", "#6e7781"


@dataclass(frozen=True, slots=True)
class Spot:
    """One method at one strength on the test prompts: refusals of the benign and of the harmful ones."""

    method: str
    strength: float
    benign: Interval
    harmful: Interval
    chosen: bool


def comparison_picture(
    spots: Sequence[Spot],
    plain: tuple[Interval, Interval],
    dev: Mapping[str, Sequence[Trial]] | None = None,
    dpi: int = 160,
) -> bytes:
    """PNG bytes. Test points carry 95% intervals, a method's strengths are joined; its dev trials are small and faint, and
    belong to the plain model on dev, a hollow star, as the others do to the dashed lines.
    """
    figure, axis = canvas(9.0, 6.0)
    for number, method in enumerate(dict.fromkeys(spot.method for spot in spots)):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        for tried in (dev or {}).get(method, ()):
            axis.scatter(tried.answered_benign, tried.refused_harmful, s=9, c=colour, alpha=0.22, lw=0, zorder=1)
        mine = [spot for spot in spots if spot.method == method and spot.benign.defined and spot.harmful.defined]
        line = sorted((spot.strength, 1 - spot.benign.value, spot.harmful.value) for spot in mine)
        if len(line) > 1:
            axis.plot([x for _, x, _ in line], [y for _, _, y in line], c=colour, lw=1.2, alpha=0.6, zorder=2)
        for spot in mine:
            x, y = 1 - spot.benign.value, spot.harmful.value
            if spot.chosen:
                across = [[spot.benign.high - spot.benign.value], [spot.benign.value - spot.benign.low]]
                up = [[spot.harmful.value - spot.harmful.low], [spot.harmful.high - spot.harmful.value]]
                axis.errorbar(x, y, xerr=across, yerr=up, c=colour, lw=0.9, alpha=0.55, fmt="none", zorder=3)
            size, words = (78, method) if spot.chosen else (22, None)
            axis.scatter(x, y, s=size, c=colour, marker=marker, ec="white", lw=0.7, label=words, zorder=4)
    if plain[0].defined and plain[1].defined:
        x, y = 1 - plain[0].value, plain[1].value
        axis.axvline(x, color=_GREY, lw=1, ls=(0, (4, 3)), zorder=0)
        axis.axhline(y, color=_GREY, lw=1, ls=(0, (4, 3)), zorder=0)
        axis.scatter(x, y, s=95, c=_INK, marker="*", ec="white", lw=0.8, label="plain model", zorder=5)
    trial = next((trial for trials in (dev or {}).values() for trial in trials), None)
    if trial is not None:  # all are of the same dev prompts
        x, y = trial.plain_answered, trial.plain_refused
        axis.scatter(
            x, y, s=80, fc="none", marker="*", ec=_INK, lw=0.8, alpha=0.6, label="plain model on dev", zorder=4
        )
    axis.set_xlabel(f"benign prompts answered, n {plain[0].n}   (right is better; bars: 95% intervals)", color=_INK)
    axis.set_ylabel(f"harmful prompts refused, n {plain[1].n}   (up is better)", color=_INK)
    percent_axes(axis)
    open_frame(axis)
    legend(axis, loc="center left", bbox_to_anchor=(1.01, 0.5), ncol=1)
    faint = "" if trial is None else "; faint: settings tried on dev"
    return png(figure, axis, f"On prompts that nothing was chosen by{faint}", dpi)
