"""The pictures of a report, as PNG bytes: the energy landscape, the frontier of the tuning, refusals before and after.

Drawn on matplotlib Figure objects of their own (no pyplot, no global state, no display). Colours are those of Okabe and
Ito (2008), which colour-blind readers can tell apart; every outcome has a marker of its own besides.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from elsteer.evaluation.tables import Comparison, points

__all__ = [
    "before_after_picture",
    "canvas",
    "frontier_picture",
    "landscape_axes",
    "landscape_picture",
    "legend",
    "open_frame",
    "percent_axes",
    "png",
]

_INK, _GREY, _FAINT = "#22272e", "#6e7781", "#d5dae0"
_BLUE, _GREEN, _ORANGE, _RED = "#0072b2", "#009e73", "#e69f00", "#d55e00"
_TERRAIN = LinearSegmentedColormap.from_list("terrain", ["#ffffff", "#e9eef4", "#c9d3df", "#9eabbc", "#76859a"])
_OUTCOMES: dict[str, tuple[str, str, str]] = {  # colour, marker, words; the undesirable last, so that they lie on top
    "helpful": (_BLUE, "o", "benign, answered"),
    "safe_refusal": (_GREEN, "s", "harmful, refused"),
    "false_refusal": (_ORANGE, "^", "benign, refused (false refusal)"),
    "jailbreak": (_RED, "X", "harmful, answered (jailbreak)"),
}
_DIRECTIONS = (
    (("helpful",), ("false_refusal",), "from benign answered   →   to benign refused"),
    (("helpful", "false_refusal"), ("safe_refusal", "jailbreak"), "from benign   →   to harmful"),
)
_METHOD_COLOURS = (_BLUE, "#cc79a7", _GREEN, _ORANGE, "#56b4e9", _RED)
_GRID = 90


def landscape_axes(states: Tensor, outcomes: Sequence[str]) -> tuple[Tensor, tuple[str, str]]:
    """The plane to look at: orthonormal directions, shape (2, d), and what they are called.

    First: mean of the helpful towards mean of the false refusals. Second: mean of the benign towards mean of the
    harmful states, less its part along the first. Where a group is missing, or both point the same way, the states'
    principal directions stand in. ValueError for states that span no plane.
    """
    centred = (states - states.mean(0)).double()
    axes: dict[int, Tensor] = {}
    names = ["direction of most variance", "second direction of most variance"]
    for place, (low, high, name) in enumerate(_DIRECTIONS):
        groups = [torch.tensor([outcome in group for outcome in outcomes], dtype=torch.bool) for group in (low, high)]
        if all(group.any() for group in groups):
            direction = _orthonormal(centred[groups[1]].mean(0) - centred[groups[0]].mean(0), list(axes.values()))
            if direction is not None:
                axes[place], names[place] = direction, name
    _, sizes, principal = torch.linalg.svd(centred, full_matrices=False)
    spare = iter(principal[sizes > 1e-6 * float(states.double().norm())])
    for place in (0, 1):
        while place not in axes:
            row = next(spare, None)
            if row is None:
                raise ValueError(f"{len(states)} states of width {states.shape[1]} span no plane")
            direction = _orthonormal(row, list(axes.values()))
            if direction is not None:
                axes[place] = direction
    return torch.stack([axes[0], axes[1]]).float(), (names[0], names[1])


def landscape_picture(
    states: Tensor,
    outcomes: Sequence[str],
    energy: Callable[[Tensor], Tensor],
    paths: Tensor | None = None,
    axes: Tensor | None = None,
    title: str = "",
    dpi: int = 110,
) -> bytes:
    """Contours of the energy in a plane through the states' mean, the states by outcome, and where steering takes them.

    states: (n, d) float32. outcomes: n names. energy: (m, d) to (m,). paths: (p, k + 1, d), each row the states from
    before the first step to after the last. axes: (2, d), or None for `landscape_axes`. The contours are the energy of
    points in the plane itself; states and paths are projected onto it, so their own energies differ from the colour
    beneath them.
    """
    states = states.detach().float().cpu()
    names = "first direction", "second direction"
    if axes is None:
        axes, names = landscape_axes(states, outcomes)
    else:
        first = _orthonormal(axes[0].detach().cpu(), [])
        second = None if first is None else _orthonormal(axes[1].detach().cpu(), [first])
        if first is None or second is None:
            raise ValueError("the two axes span no plane")
        axes = torch.stack([first, second]).float()
    mean = states.mean(0)
    flat = ((states - mean) @ axes.T).numpy()
    tracks = None if paths is None or not len(paths) else ((paths.detach().float().cpu() - mean) @ axes.T).numpy()

    spread = flat if tracks is None else np.concatenate([flat, tracks.reshape(-1, 2)])
    low, high = np.quantile(spread, 0.005, axis=0), np.quantile(spread, 0.995, axis=0)
    pad = 0.08 * np.maximum(high - low, 1e-6)
    across, up = (np.linspace(low[i] - pad[i], high[i] + pad[i], _GRID) for i in range(2))
    mesh = torch.from_numpy(np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2)).float()
    heights = energy(mean + mesh @ axes).detach().float().cpu().reshape(_GRID, _GRID).numpy()

    figure, axis = canvas(7.6, 6.0)
    bottom, top = np.quantile(heights, [0.01, 0.99])
    levels = np.linspace(bottom, max(top, bottom + 1e-6), 13)
    filled = axis.contourf(across, up, heights, levels, cmap=_TERRAIN, extend="both")
    axis.contour(across, up, heights, levels, colors="white", linewidths=0.6)
    size = float(np.clip(9000 / max(len(flat), 1), 9, 40))
    for name, (colour, marker, words) in _OUTCOMES.items():
        rows = flat[[outcome == name for outcome in outcomes]]
        if len(rows):
            label = f"{words} ({len(rows)})"
            axis.scatter(
                *rows.T, s=size, c=colour, marker=marker, lw=0.4, ec="white", alpha=0.85, label=label, zorder=3
            )
    for number, track in enumerate(tracks if tracks is not None else ()):
        _arrow(axis, track, "path of a steered state" if number == 0 else None)
    axis.set_xlim(across[0], across[-1])
    axis.set_ylim(up[0], up[-1])
    axis.set_xlabel(names[0], color=_INK)
    axis.set_ylabel(names[1], color=_INK)
    axis.tick_params(length=0, labelsize=8, labelcolor=_GREY)
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(filled, ax=axis, fraction=0.04, pad=0.02, ticks=[levels[0], levels[-1]])
    bar.ax.set_yticklabels(["low: left\nalone", "high:\nmoved"], fontsize=8, color=_GREY)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label("energy", color=_INK, labelpad=-22)
    legend(axis, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncol=2)
    return png(figure, axis, title, dpi)


def frontier_picture(
    trials: Sequence[Mapping[str, Any]], plain: tuple[float, float], title: str = "", dpi: int = 110
) -> bytes:
    """What each tried setting does: compliance on benign prompts (x) against refusal of harmful prompts (y), 0 to 1.

    trials: mappings with compliance_benign, refusal_harmful, label, chosen, feasible, method. plain: the plain model's
    two rates. Settings that break a constraint are hollow and faint; the chosen ones carry a star and their label.
    """
    figure, axis = canvas(7.0, 5.2)
    values = [plain, *((point["compliance_benign"], point["refusal_harmful"]) for point in trials)]
    across, up = np.array(values, dtype=float).T
    limits = [_limits(across), _limits(up)]
    axis.set_xlim(*limits[0])
    axis.set_ylim(*limits[1])
    axis.fill_between([plain[0], limits[0][1]], plain[1], limits[1][1], color=_GREEN, alpha=0.08, lw=0, zorder=0)
    axis.axvline(plain[0], color=_GREY, lw=1, ls=(0, (4, 3)), zorder=1)
    axis.axhline(plain[1], color=_GREY, lw=1, ls=(0, (4, 3)), zorder=1)
    axis.text(
        limits[0][1],
        limits[1][1],
        "more answers, as many harmful refused ",
        color="#00684c",
        size=8.5,
        ha="right",
        va="bottom",
    )
    methods = list(dict.fromkeys(str(point["method"]) for point in trials))
    for number, method in enumerate(methods):
        colour = _METHOD_COLOURS[number % len(_METHOD_COLOURS)]
        mine = [point for point in trials if str(point["method"]) == method]
        for feasible in (False, True):
            rows = [(p["compliance_benign"], p["refusal_harmful"]) for p in mine if bool(p["feasible"]) is feasible]
            if rows:
                look: dict[str, Any] = (
                    {"c": colour, "alpha": 0.85, "ec": "white", "lw": 0.5}
                    if feasible
                    else {"fc": "none", "ec": colour, "alpha": 0.35, "lw": 1.0}
                )
                words = f"{method}, {'no constraint broken' if feasible else 'a constraint broken'} ({len(rows)})"
                axis.scatter(*np.array(rows, dtype=float).T, s=34, label=words, zorder=2 + feasible, **look)
    axis.scatter(*plain, s=70, c=_INK, marker="D", ec="white", lw=0.8, label="plain model", zorder=5)
    for number, point in enumerate(point for point in trials if point["chosen"]):
        x, y = float(point["compliance_benign"]), float(point["refusal_harmful"])
        star = {"s": 210, "c": "#f0e442", "marker": "*", "ec": _INK, "lw": 0.9, "label": None if number else "chosen"}
        axis.scatter(x, y, zorder=6, **star)
        right = x > sum(limits[0]) / 2
        axis.annotate(
            str(point["label"]),
            (x, y),
            xytext=(-11 if right else 11, 9),
            textcoords="offset points",
            ha="right" if right else "left",
            size=8.5,
            color=_INK,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=7,
        )
    axis.set_xlabel("benign prompts answered   (right is better)", color=_INK)
    axis.set_ylabel("harmful prompts refused   (up is better)", color=_INK)
    percent_axes(axis)
    open_frame(axis)
    legend(axis, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    return png(figure, axis, title, dpi)


def before_after_picture(comparisons: Sequence[Comparison], title: str = "", dpi: int = 200) -> bytes:
    """Share refused by the plain and the steered model, one line a group, with 95% intervals.

    Benign groups come first (further left is better), then the harmful ones (further right is better); groups without a
    scored pair are left out. ValueError when none is left.
    """
    groups = [[c for c in comparisons if c.harmful is harmful and c.n > 0] for harmful in (False, True)]
    parts = [(harmful, group) for harmful, group in zip((False, True), groups, strict=True) if group]
    if not parts:
        raise ValueError("no group with a scored pair to draw")
    heights = [0.52 * len(group) + 0.6 for _, group in parts]
    figure = Figure(
        figsize=(8.4, sum(heights) + 0.75 + (0.35 if title else 0)), facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (harmful, group) in zip(panels, parts, strict=True):
        _dumbbells(axis, group, harmful)
    panels[-1].set_xlabel("share of prompts refused, 95% interval", color=_GREY, size=9)
    panels[-1].tick_params(axis="x", labelbottom=True)
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=12, fontweight="bold", parse_math=False)
    return _bytes(figure, dpi)


def _dumbbells(axis: Any, group: Sequence[Comparison], harmful: bool) -> None:
    usual = _GREEN if harmful else _BLUE
    for number, comparison in enumerate(group):
        y = len(group) - 1 - number
        plain, steered = comparison.refused_plain, comparison.refused_steered
        colour = _RED if _surely_worse(comparison) else usual
        could_be_chance = comparison.difference.low <= 0 <= comparison.difference.high
        axis.plot([plain.value, steered.value], [y + 0.13, y - 0.13], color=_FAINT, lw=1.2, zorder=1)
        for interval, offset, shade in ((plain, 0.13, _GREY), (steered, -0.13, colour)):
            axis.plot([interval.low, interval.high], [y + offset] * 2, color=shade, lw=1.6, alpha=0.45, zorder=2)
        axis.scatter(plain.value, y + 0.13, s=52, fc="white", ec=_GREY, lw=1.6, zorder=3)
        axis.scatter(steered.value, y - 0.13, s=58, fc=colour, ec="white", lw=0.8, zorder=4)
        change, limits = _change(comparison)
        axis.text(
            1.03,
            y + 0.07,
            change,
            va="center",
            size=10,
            color=_GREY if could_be_chance else colour,
            weight="bold",
            clip_on=False,
        )
        axis.text(1.03, y - 0.25, f"{limits}, n = {comparison.n}", va="center", size=7.5, color=_GREY, clip_on=False)
    axis.set_ylim(-0.55, len(group) - 0.45)
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    words = "Harmful prompts refused: should not fall" if harmful else "Benign prompts refused: less is better"
    axis.set_title(words, loc="left", size=10.5, color=_INK)
    open_frame(axis)
    axis.grid(axis="y", visible=False)
    axis.set_yticks(range(len(group) - 1, -1, -1), [_fitting(comparison.name) for comparison in group])
    for tick in axis.get_yticklabels():
        tick.set_parse_math(False)  # a file's name may hold two dollars
    axis.tick_params(axis="y", length=0, labelsize=10, labelcolor=_INK)
    axis.scatter([], [], s=52, fc="white", ec=_GREY, lw=1.6, label="plain")
    axis.scatter([], [], s=58, fc=usual, ec="white", label="steered")
    if any(map(_surely_worse, group)):
        axis.scatter([], [], s=58, fc=_RED, ec="white", label="steered, surely worse")
    legend(axis, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncol=3)


def _surely_worse(comparison: Comparison) -> bool:
    return comparison.difference.high < 0 if comparison.harmful else comparison.difference.low > 0


def _fitting(name: str, most: int = 28) -> str:
    """A name that leaves the picture room: of a longer one the beginning and the end."""
    return name if len(name) <= most else f"{name[: most - 11]}…{name[-10:]}"


def _change(comparison: Comparison) -> tuple[str, str]:
    """What changed and its interval: false refusals as a share of the plain model's, harmful ones in points."""
    share = comparison.removed
    if share is not None and share.defined:
        size = f"{abs(share.value):.0%} {'fewer' if share.value >= 0 else 'more'}"
        return size, f"{100 * share.low:.0f} to {100 * share.high:.0f}%"
    value, _, limits = points(comparison.difference).partition(" ")
    return f"{value} points", limits.strip("()")


def _orthonormal(direction: Tensor, axes: Sequence[Tensor]) -> Tensor | None:
    """`direction` less its parts along `axes`, of length 1; None where that is a small part of it, mostly noise."""
    direction, length = direction.double(), float(direction.double().norm())
    for axis in (*axes, *axes):  # twice: once leaves a rounding error of the size of what was taken away
        direction = direction - (direction @ axis.double()) * axis.double()
    left = float(direction.norm())
    return direction / left if left > 0.1 * length and left > 1e-9 else None


def _arrow(axis: Any, track: NDArray[np.float32], label: str | None) -> None:
    halo = [withStroke(linewidth=2.6, foreground="white", alpha=0.9)]
    axis.plot(*track[:-1].T, color=_INK, lw=1.1, path_effects=halo, zorder=4, label=label)
    moved = np.linalg.norm(track[-1] - track[-2]) > 0
    if moved:
        style = {"arrowstyle": "-|>", "color": _INK, "lw": 1.1, "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", track[-1], track[-2], arrowprops={**style, "path_effects": halo}, zorder=4)


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = max(0.08 * (high - low), 0.02)
    return max(low - pad, -0.01), min(high + pad, 1.01)


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of so many inches and its only axis."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def percent_axes(axis: Any) -> None:
    """Both axes in whole percent."""
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def open_frame(axis: Any) -> None:
    """A faint grid instead of a frame."""
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_FAINT)
    axis.tick_params(length=0, labelsize=9, labelcolor=_GREY)
    axis.grid(color=_FAINT, lw=0.6, alpha=0.7)
    axis.set_axisbelow(True)


def legend(axis: Any, **where: Any) -> None:
    """The legend without a frame; where: as matplotlib takes it."""
    axis.legend(**where, frameon=False, fontsize=8.5, labelcolor=_INK, handletextpad=0.5, columnspacing=1.4)


def png(figure: Figure, axis: Any, title: str, dpi: int) -> bytes:
    """The figure under its title as PNG bytes."""
    if title:
        axis.set_title(title, loc="left", color=_INK, fontsize=11.5, fontweight="bold", pad=14, parse_math=False)
    return _bytes(figure, dpi)


def _bytes(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    # No date and no software version: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
