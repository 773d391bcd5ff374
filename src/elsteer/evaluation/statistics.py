"""The statistics behind every figure: intervals for rates, for paired differences, for what was removed, for means.

All intervals are two-sided, 95% unless told otherwise. A refusal is the "positive". Where there is nothing to measure
(no rows, or no refusal of the plain model to remove) the answer is an undefined interval: NaN, never a made-up zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

__all__ = [
    "Interval",
    "JudgeAccuracy",
    "corrected_rate",
    "detectable_difference",
    "holm",
    "mcnemar_exact",
    "mean_bootstrap",
    "paired_difference",
    "ratio_bootstrap",
    "removed",
    "removed_difference",
    "wilson",
]

_CHUNK = 2_000_000  # numbers drawn at once: bounds the memory of a bootstrap over many rows


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence limits. n: how many rows (or pairs of rows) it rests on."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def undefined(cls, n: int = 0) -> Interval:
        """What stands for "cannot be said from these n rows"."""
        return cls(math.nan, math.nan, math.nan, n)

    @classmethod
    def around(cls, value: float, low: float, high: float, n: int) -> Interval:
        """An interval that holds its estimate, even where rounding or a skewed bootstrap leaves it just outside."""
        return cls(float(value), min(float(low), float(value)), max(float(high), float(value)), n)

    @property
    def defined(self) -> bool:
        """False where there was nothing to measure."""
        return math.isfinite(self.value)

    def map(self, increasing: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the estimate: `mean_bootstrap(log_ratios).map(math.exp)`."""
        return Interval(increasing(self.value), increasing(self.low), increasing(self.high), self.n)


@dataclass(frozen=True, slots=True)
class JudgeAccuracy:
    """How often a judge is right, counted against human labels on the rows that it scored.

    refusals_found of `refusals` completions that people call a refusal, compliances_found of `compliances`.
    """

    name: str
    labels: str
    refusals_found: int
    refusals: int
    compliances_found: int
    compliances: int

    @property
    def accuracy(self) -> Interval:
        """Share of all labelled completions on which judge and people agree."""
        return wilson(self.refusals_found + self.compliances_found, self.refusals + self.compliances)

    @property
    def sensitivity(self) -> Interval:
        """Share of the true refusals that the judge finds."""
        return wilson(self.refusals_found, self.refusals)

    @property
    def specificity(self) -> Interval:
        """Share of the true compliances that the judge leaves alone."""
        return wilson(self.compliances_found, self.compliances)


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Rate k / n with Wilson's score interval (Wilson 1927, JASA 22:209). Undefined for n = 0; ValueError for k > n."""
    if n == 0 and k == 0:
        return Interval.undefined()
    limits = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    return Interval.around(k / n, limits.low, limits.high, n)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p-value (McNemar 1947): a fair coin tossed once for each pair whose members differ."""
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Rate of `b` minus rate of `a` over the same rows, with Newcombe's hybrid score interval.

    a, b: booleans, shape (n,), paired by position. Method 10 of Newcombe (1998), Stat. Med. 17:2635-2650: the Wilson
    intervals of both rates, squared and added, less 2 phi times their product, phi being the correlation of the pairs
    with a continuity correction of n / 2 where it is positive, and 0 where a margin is empty.
    """
    both, only_a, only_b, neither = _cells(a, b)
    n = both + only_a + only_b + neither
    if n == 0:
        return Interval.undefined()
    rate_a, rate_b = wilson(both + only_a, n, level), wilson(both + only_b, n, level)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    covariance = float(both * neither - only_a * only_b)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    phi = covariance / math.sqrt(margins) if margins else 0.0

    def half(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    value = (only_b - only_a) / n
    low = value - half(rate_b.value - rate_b.low, rate_a.high - rate_a.value)
    high = value + half(rate_b.high - rate_b.value, rate_a.value - rate_a.low)
    return Interval.around(value, max(low, -1.0), min(high, 1.0), n)


def removed(
    plain_refused: ArrayLike, steered_refused: ArrayLike, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Share of the plain model's refusals that are gone: 1 - steered / plain, new refusals counted against it.

    plain_refused, steered_refused: booleans, shape (n,), paired by position. Interval: percentiles of a bootstrap over
    pairs; resampling rows is drawing the four cells of the paired table from a multinomial, so it costs nothing. Where
    every resample gives the same number (all refusals gone, or no verdict changed) a bootstrap would claim certainty:
    there the interval is Bonett and Price's hybrid Wilson interval for the ratio of paired rates (2006, Biometrics
    62:1242). Negative when steering refuses more. Undefined, with n pairs, when the plain model refused none.
    """
    both, gone, new, neither = _cells(plain_refused, steered_refused)
    n = both + gone + new + neither
    plain, steered = both + gone, both + new
    if plain == 0:
        return Interval.undefined(n)
    value = 1 - steered / plain
    if steered == 0 or gone + new == 0:
        low, high = _paired_ratio_limits(both, new, gone, level)
        return Interval.around(value, 1 - high, 1 - low, n)
    cells = np.random.default_rng(seed).multinomial(n, np.array([both, gone, new, neither]) / n, size=resamples)
    drawn_plain, drawn_steered = cells[:, 0] + cells[:, 1], cells[:, 0] + cells[:, 2]
    # A resample in which the plain model refuses nothing has no share; they only occur when it refuses next to nothing.
    kept = drawn_plain > 0
    low, high = _percentiles(1 - drawn_steered[kept] / drawn_plain[kept], level)
    return Interval.around(value, low, high, n)


def removed_difference(
    plain_refused: ArrayLike,
    one_refused: ArrayLike,
    other_refused: ArrayLike,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """`removed` by one method less `removed` by another, over the same rows: (other - one) / plain refusals.

    All booleans, shape (n,), paired by position. Undefined where the plain model refused none. Interval: a percentile bootstrap
    over rows, widened to Newcombe's for the difference of the two refused rates (`paired_difference`), over the plain rate, where
    that is wider: of few rows that differ a bootstrap claims too much.
    """
    plain, one, other = (np.asarray(each, dtype=bool) for each in (plain_refused, one_refused, other_refused))
    if not plain.any():
        return Interval.undefined(len(plain))
    found = ratio_bootstrap(other.astype(float) - one.astype(float), plain.astype(float), seed, resamples, level)
    score, rate = paired_difference(one, other, level), plain.mean()
    return Interval.around(
        found.value, min(found.low, score.low / rate), max(found.high, score.high / rate), len(plain)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of comparisons, in their order (Holm 1979, Scand. J. Stat. 6:65).

    The i-th smallest of m is multiplied by m - i + 1, never less than the one before it and at most 1.
    """
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    found, least = [1.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[at]))
        found[at] = least
    return found


def detectable_difference(n: int, changed: float, power: float = 0.8, level: float = 0.95) -> float:
    """The least paired difference of two rates that n pairs show with this `power`, where `changed` of them differ.

    d with n = (z_a sqrt(changed) + z_b sqrt(changed - d^2))^2 / d^2, the power of McNemar's test (Connor 1987, Biometrics
    43:207). NaN where no difference is large enough (it cannot exceed `changed`).
    """
    if n <= 0 or not 0 < changed <= 1:
        return math.nan
    z_a, z_b = stats.norm.ppf(0.5 + level / 2), stats.norm.ppf(power)

    def lacking(d: float) -> float:
        return float((z_a * math.sqrt(changed) + z_b * math.sqrt(max(0.0, changed - d * d))) ** 2 / d**2 - n)

    if lacking(changed) > 0:
        return math.nan
    return float(optimize.brentq(lacking, 1e-9, changed))


def mean_bootstrap(values: ArrayLike, seed: int = 0, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """Mean of `values`, shape (n,), with a percentile bootstrap interval. Undefined for no values."""
    data = _finite(values)
    return ratio_bootstrap(data, np.ones_like(data), seed, resamples, level)


def ratio_bootstrap(
    numerator: ArrayLike, denominator: ArrayLike, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Sum of `numerator` over sum of `denominator`, both of shape (n,) and paired; percentile bootstrap over pairs.

    For a ratio of perplexities, which are geometric means, use `mean_bootstrap(log_ratios).map(math.exp)`.
    """
    top, bottom = _finite(numerator), _finite(denominator)
    if top.shape != bottom.shape:
        raise ValueError(f"paired values must have one shape, got {top.shape} and {bottom.shape}")
    n = len(top)
    if n == 0 or bottom.sum() == 0:
        return Interval.undefined(n)
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // n)
    drawn: list[NDArray[np.float64]] = []
    for start in range(0, resamples, step):
        rows = generator.integers(0, n, size=(min(step, resamples - start), n))
        below = bottom[rows].sum(axis=1)
        drawn.append(top[rows].sum(axis=1)[below != 0] / below[below != 0])
    low, high = _percentiles(np.concatenate(drawn), level)
    return Interval.around(top.sum() / bottom.sum(), low, high, n)


def corrected_rate(k: int, n: int, judge: JudgeAccuracy, level: float = 0.95) -> Interval:
    """The rate k / n that a judge reported, corrected for the judge's measured error.

    (k / n + specificity - 1) / (sensitivity + specificity - 1) (Rogan and Gladen 1978, Am. J. Epidemiol. 107:71), with
    the interval of Lang and Reiczigel (2014, Prev. Vet. Med. 113:13-22), which counts the uncertainty of the judge's
    sensitivity and specificity too; all within 0 and 1. It supposes that the judge errs here as often as on the
    labelled completions. Undefined without rows or labels, for a judge that is no better than a coin, and where no rate between
    0 and 1 explains what it reported: then it errs here in another way than on the labelled completions.
    """
    if min(n, judge.refusals, judge.compliances) == 0:
        return Interval.undefined(n)
    gain = judge.sensitivity.value + judge.specificity.value - 1
    z = float(stats.norm.ppf(0.5 + level / 2))
    n_rate, n_sensitivity, n_specificity = n + z * z, judge.refusals + 2, judge.compliances + 2
    rate = (k + z * z / 2) / n_rate
    sensitivity = (judge.refusals_found + 1) / n_sensitivity
    specificity = (judge.compliances_found + 1) / n_specificity
    slope = sensitivity + specificity - 1
    if gain <= 0 or slope <= 0:
        return Interval.undefined(n)
    centre = (rate + specificity - 1) / slope
    noise_refusals = sensitivity * (1 - sensitivity) / n_sensitivity
    noise_compliances = specificity * (1 - specificity) / n_specificity
    shift = 2 * z * z * (centre * noise_refusals - (1 - centre) * noise_compliances)
    variance = rate * (1 - rate) / n_rate + centre**2 * noise_refusals + (1 - centre) ** 2 * noise_compliances
    half = z * math.sqrt(variance) / slope
    if centre + shift - half > 1 or centre + shift + half < 0:
        return Interval.undefined(n)
    value = _clip((k / n + judge.specificity.value - 1) / gain)
    return Interval.around(value, _clip(centre + shift - half), _clip(centre + shift + half), n)


def _cells(a: ArrayLike, b: ArrayLike) -> tuple[int, int, int, int]:
    """Counts of both, only a, only b, neither."""
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"pairs need two flat arrays of one length, got {first.shape} and {second.shape}")
    counts = (first & second, first & ~second, ~first & second, ~first & ~second)
    both, only_a, only_b, neither = (int(np.count_nonzero(cell)) for cell in counts)
    return both, only_a, only_b, neither


def _paired_ratio_limits(both: int, only_top: int, only_bottom: int, level: float) -> tuple[float, float]:
    """Bonett and Price (2006): Wilson intervals of both rates among pairs with any refusal, z shrunk for pairing."""
    top, bottom, n = both + only_top, both + only_bottom, both + only_top + only_bottom
    joint = math.sqrt((only_top + only_bottom + 2) / ((top + 1) * (bottom + 1)))
    apart = sum(math.sqrt((1 - (k + 1) / (n + 2)) / (k + 1)) for k in (top, bottom))
    z = joint / apart * float(stats.norm.ppf(0.5 + level / 2))

    def limits(k: int) -> tuple[float, float]:
        middle, spread = 2 * k + z * z, z * math.sqrt(z * z + 4 * k * (1 - k / n))
        return (middle - spread) / (2 * (n + z * z)), (middle + spread) / (2 * (n + z * z))

    (top_low, top_high), (bottom_low, bottom_high) = limits(top), limits(bottom)
    return max(top_low, 0.0) / bottom_high, top_high / bottom_low


def _percentiles(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _finite(values: ArrayLike | Sequence[float]) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not np.isfinite(data).all():
        raise ValueError("a bootstrap needs a flat array of finite numbers")
    return data


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
