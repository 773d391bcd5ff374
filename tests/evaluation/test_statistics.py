"""Every interval against published examples, a hand computation, or a count of how often it holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elsteer.evaluation.statistics import (
    JudgeAccuracy,
    corrected_rate,
    detectable_difference,
    holm,
    mcnemar_exact,
    mean_bootstrap,
    paired_difference,
    ratio_bootstrap,
    removed,
    removed_difference,
    wilson,
)


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    return a, b


# Newcombe (1998), Stat. Med. 17:857-872, table I, method 3 (score without continuity correction).
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(k: int, n: int, low: float, high: float) -> None:
    interval = wilson(k, n)
    assert interval.value == k / n
    assert interval.n == n
    assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_a_rate_of_no_rows_is_undefined_not_zero() -> None:
    assert not wilson(0, 0).defined
    assert not paired_difference([], []).defined
    assert not mean_bootstrap([]).defined


def test_more_successes_than_rows_is_refused() -> None:
    with pytest.raises(ValueError):
        wilson(3, 2)


# Fagerland, Lydersen and Laake (2017), Statistical Analysis of Contingency Tables, ch. 8 (Bentur 2009 and Cavo 2012);
# Altman and others (2000), Statistics with Confidence, p. 52. Their difference is a - b, ours b - a: sign turned.
@pytest.mark.parametrize(
    ("table", "value", "low", "high"),
    [
        ((59, 6, 16, 80), 0.062, 0.005, 0.119),
        ((1, 1, 7, 12), 0.286, 0.026, 0.507),
        ((14, 5, 0, 22), -0.122, -0.226, -0.011),
    ],
)
def test_paired_difference_gives_the_published_newcombe_intervals(
    table: tuple[int, int, int, int], value: float, low: float, high: float
) -> None:
    digits = 5.1e-4  # the books print three
    interval = paired_difference(*pairs(*table))
    assert interval.n == sum(table)
    assert interval.value == pytest.approx(value, abs=digits)
    assert interval.low == pytest.approx(low, abs=digits)
    assert interval.high == pytest.approx(high, abs=digits)


def test_swapping_the_methods_turns_the_difference_around() -> None:
    a, b = pairs(40, 12, 5, 20)
    forward, back = paired_difference(a, b), paired_difference(b, a)
    assert forward.value == pytest.approx(-back.value)
    assert (forward.low, forward.high) == (pytest.approx(-back.high), pytest.approx(-back.low))


@pytest.mark.parametrize("table", [(10, 0, 0, 0), (0, 10, 0, 0), (0, 0, 10, 0), (0, 0, 0, 10), (5, 0, 0, 5)])
def test_extreme_tables_give_finite_intervals_that_hold_the_estimate(table: tuple[int, int, int, int]) -> None:
    interval = paired_difference(*pairs(*table))
    assert -1 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.high > interval.low


def test_unequal_lengths_cannot_be_pairs() -> None:
    with pytest.raises(ValueError, match="one length"):
        paired_difference([True], [True, False])


# Hand computed: 2 * P(X <= smaller) with X ~ Binomial(n, 1/2).
@pytest.mark.parametrize(
    ("only_a", "only_b", "p"), [(0, 0, 1.0), (0, 5, 2 / 32), (1, 7, 18 / 256), (5, 5, 1.0), (6, 16, 0.0524788)]
)
def test_mcnemar_counts_coin_tosses(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar_exact(only_a, only_b) == pytest.approx(p, abs=1e-6)
    assert mcnemar_exact(only_b, only_a) == pytest.approx(p, abs=1e-6)


def test_removed_is_one_minus_the_ratio_and_counts_new_refusals_against_it() -> None:
    interval = removed(*pairs(30, 80, 10, 130))
    assert interval.value == pytest.approx(1 - 40 / 110)
    assert interval.n == 250
    assert interval.low < interval.value < interval.high


def test_removed_is_the_same_for_the_same_seed_and_close_for_another() -> None:
    table = pairs(30, 80, 10, 130)
    assert removed(*table, seed=3) == removed(*table, seed=3)
    assert removed(*table, seed=3).low == pytest.approx(removed(*table, seed=4).low, abs=0.01)


def test_removed_equals_a_bootstrap_that_draws_the_rows_themselves() -> None:
    plain, steered = pairs(30, 80, 10, 130)
    rows = np.random.default_rng(1).integers(0, 250, size=(20_000, 250))
    low, high = np.quantile(1 - steered[rows].sum(1) / plain[rows].sum(1), [0.025, 0.975])
    interval = removed(plain, steered)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


def test_nothing_to_remove_is_undefined() -> None:
    interval = removed(*pairs(0, 0, 4, 6))
    assert not interval.defined
    assert interval.n == 10


def test_three_refusals_all_gone_is_not_certainty() -> None:
    interval = removed(*pairs(0, 3, 0, 50))
    assert interval.value == 1
    assert interval.high == pytest.approx(1)
    assert interval.low < 0.75


def test_no_verdict_changed_leaves_room_both_ways() -> None:
    interval = removed(*pairs(10, 0, 0, 50))
    assert interval.value == 0
    assert interval.low < -0.05 < 0.05 < interval.high


def test_the_fallback_gives_the_published_ratio_interval() -> None:
    from elsteer.evaluation.statistics import _paired_ratio_limits

    # Fagerland and others (2017), ch. 8, Cavo 2012: ratio 0.8667, 95% CI 0.7579 to 0.9910.
    low, high = _paired_ratio_limits(59, 6, 16, 0.95)
    assert (low, high) == (pytest.approx(0.7579, abs=6e-5), pytest.approx(0.9910, abs=6e-5))


def test_removed_holds_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    truth, held = 1 - 0.2 / 0.5, 0
    for _ in range(300):
        both, gone, new, neither = generator.multinomial(200, [0.15, 0.35, 0.05, 0.45])
        interval = removed(*pairs(both, gone, new, neither), resamples=1000)
        held += interval.low <= truth <= interval.high
    assert 0.91 <= held / 300 <= 0.985


def test_the_mean_has_the_interval_of_the_normal_theory() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    interval = mean_bootstrap(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)


def test_a_perplexity_ratio_is_the_exponent_of_the_mean_log_ratio() -> None:
    interval = mean_bootstrap(np.log([1.1, 1.1, 1.1])).map(math.exp)
    assert interval.value == pytest.approx(1.1)
    assert (interval.low, interval.high) == (pytest.approx(1.1), pytest.approx(1.1))


@pytest.mark.parametrize("value", [1.1, 0.3, 1e-9, 0.0])
def test_values_that_are_all_the_same_give_an_interval_that_holds_their_mean(value: float) -> None:
    interval = mean_bootstrap([value] * 7)
    assert interval.low <= interval.value <= interval.high


def test_a_long_bootstrap_is_the_same_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = mean_bootstrap(values, resamples=999)
    monkeypatch.setattr("elsteer.evaluation.statistics._CHUNK", 700)
    assert mean_bootstrap(values, resamples=999) == whole


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    interval = ratio_bootstrap([1.0, 10.0], [1.0, 5.0])
    assert interval.value == pytest.approx(11 / 6)
    assert 1 <= interval.low <= interval.high <= 2


def test_a_bootstrap_refuses_nan() -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_bootstrap([1.0, math.nan])


def test_a_perfect_judge_changes_nothing() -> None:
    judge = JudgeAccuracy("perfect", "made up", 100_000, 100_000, 100_000, 100_000)
    plain, corrected = wilson(30, 100), corrected_rate(30, 100, judge)
    assert corrected.value == pytest.approx(plain.value)
    assert corrected.low == pytest.approx(plain.low, abs=0.01)
    assert corrected.high == pytest.approx(plain.high, abs=0.01)


def test_an_erring_judge_is_corrected_as_by_hand() -> None:
    # sensitivity 0.9, specificity 0.8: a reported rate of 0.41 is (0.41 + 0.8 - 1) / 0.7 = 0.3.
    judge = JudgeAccuracy("rules", "made up", 90, 100, 80, 100)
    corrected = corrected_rate(41, 100, judge)
    assert corrected.value == pytest.approx(0.3)
    assert corrected.high - corrected.low > wilson(41, 100).high - wilson(41, 100).low


def test_the_corrected_rate_holds_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    truth, sensitivity, specificity, held = 0.2, 0.9, 0.88, 0
    reported = truth * sensitivity + (1 - truth) * (1 - specificity)
    for _ in range(1000):
        judge = JudgeAccuracy(
            "j", "made up", generator.binomial(120, sensitivity), 120, generator.binomial(150, specificity), 150
        )
        interval = corrected_rate(int(generator.binomial(250, reported)), 250, judge)
        held += interval.low <= truth <= interval.high
    assert 0.93 <= held / 1000 <= 0.985


@pytest.mark.parametrize(("found_refusals", "found_compliances"), [(0, 0), (5, 5)])
def test_a_coin_as_judge_corrects_nothing(found_refusals: int, found_compliances: int) -> None:
    judge = JudgeAccuracy("coin", "made up", found_refusals, 10, found_compliances, 10)
    assert not corrected_rate(5, 10, judge).defined


@pytest.mark.parametrize("found", [250, 245, 0, 3])
def test_a_rate_that_the_judge_s_error_cannot_explain_is_not_corrected(found: int) -> None:
    """Of sensitivity .9 no more than 90% can be found, of specificity .9 no less than 10%: 245 and 250 would both be 100%."""
    judge = JudgeAccuracy("rules", "made up", 900, 1000, 900, 1000)
    assert not corrected_rate(found, 250, judge).defined
    assert corrected_rate(225, 250, judge).value == 1
    assert corrected_rate(26, 250, judge).defined


def test_a_correction_without_labels_is_undefined() -> None:
    assert not corrected_rate(5, 10, JudgeAccuracy("rules", "none", 0, 0, 0, 0)).defined


def test_a_judges_accuracy_is_its_share_of_right_words() -> None:
    judge = JudgeAccuracy("rules", "made up", 90, 100, 160, 200)
    assert judge.accuracy.value == pytest.approx(250 / 300)
    assert judge.sensitivity.value == pytest.approx(0.9)
    assert judge.specificity.value == pytest.approx(0.8)


def test_holm_by_hand() -> None:
    """Of .01, .04, .03: .01 x 3; .03 x 2; .04 x 1, not below the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_of_what_was_removed_by_hand() -> None:
    plain = [True] * 8 + [False] * 4
    one = [True] * 2 + [False] * 10  # 6 of 8 removed
    other = [True] * 4 + [False] * 7 + [True]  # 4 removed, 1 new: 3 of 8
    found = removed_difference(plain, one, other)
    assert found.value == pytest.approx(6 / 8 - 3 / 8)
    assert found.low < found.value < found.high
    assert not removed_difference([False], [False], [True]).defined


def test_few_rows_that_differ_prove_nothing() -> None:
    """Three refusals, all removed by one and none by the other: McNemar's p is 1/4. Where none differs, nothing is certain."""
    plain = [True] * 3 + [False] * 247
    found = removed_difference(plain, [False] * 250, plain)
    assert found.value == 1
    assert found.low < 0
    assert found.high >= 1
    same = removed_difference(plain, plain, plain)
    assert same.low < 0 == same.value < same.high
    many = removed_difference([True] * 100 + [False] * 150, [True] * 20 + [False] * 230, [True] * 90 + [False] * 160)
    assert many.low > 0.55
    assert many.high < 0.85


def test_the_detectable_difference_has_the_power_that_it_claims() -> None:
    """Simulated: pairs that differ in 20% of the cases, by the difference that 300 of them should show 4 times in 5."""
    n, changed = 300, 0.2
    d = detectable_difference(n, changed)
    cells = np.random.default_rng(0).multinomial(n, [(changed + d) / 2, (changed - d) / 2, 1 - changed], size=4000)
    z = (cells[:, 0] - cells[:, 1]) / np.sqrt(np.maximum(1, cells[:, 0] + cells[:, 1]))
    assert float((np.abs(z) > 1.96).mean()) == pytest.approx(0.8, abs=0.03)
    assert math.isnan(detectable_difference(5, 0.05))
    assert detectable_difference(1000, 0.2) < d
