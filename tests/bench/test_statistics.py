"""Percentiles, the rule for a settled time, and the interval of a ratio, on times whose answers are known."""

import numpy as np
import pytest

from grood_edge.bench.statistics import (
    PERCENTS,
    drift_of,
    is_settled,
    percentiles,
    ratio_interval,
    ratio_of,
    rounds_of,
    runs_needed,
)


def test_percentiles_are_times_that_were_measured() -> None:
    times = np.random.default_rng(0).permutation(np.arange(1.0, 10_001.0))
    assert percentiles(times) == {50.0: 5000.0, 90.0: 9000.0, 99.0: 9900.0, 99.9: 9990.0}


def test_a_percentile_that_the_runs_do_not_carry_is_left_out() -> None:
    assert [runs_needed(percent) for percent in PERCENTS] == [6, 36, 368, 3688]
    found = percentiles(np.ones(368))
    assert found == {50.0: 1.0, 90.0: 1.0, 99.0: 1.0, 99.9: None}
    assert percentiles(np.ones(367))[99.0] is None
    assert set(percentiles(np.ones(5)).values()) == {None}


@pytest.mark.parametrize("percent", PERCENTS)
def test_with_so_many_runs_the_slowest_bounds_the_percentile(percent: float) -> None:
    """With one run less, the slowest lies below the true percentile with a probability above 2.5 %."""
    below = (percent / 100) ** np.array([runs_needed(percent) - 1, runs_needed(percent)])
    assert below[0] > 0.025 >= below[1]


@pytest.mark.parametrize(
    ("medians", "settled"),
    [
        ([1.0, 1.0], False),
        ([1.0, 1.04, 1.0], True),
        ([1.0, 1.0, 1.06], False),
        ([9.0, 5.0, 1.05, 1.0, 1.02], True),
        ([1.0, 1.04, 1.08, 1.12], False),
    ],
)
def test_three_windows_within_5_percent_have_settled(medians: list[float], settled: bool) -> None:
    assert is_settled(medians) == settled


def test_drift_is_the_second_half_over_the_first() -> None:
    assert drift_of(np.array([1.0, 1.0, 2.0, 2.0])) == 2.0
    assert drift_of(np.ones(7)) == 1.0


def test_rounds_have_at_least_twenty_pairs() -> None:
    assert [len(times) for times in rounds_of(np.ones((39, 2)))] == [39]
    assert [len(times) for times in rounds_of(np.ones((40, 2)))] == [20, 20]
    assert len(rounds_of(np.ones((5000, 2)))) == 8


def simulated(rng: np.random.Generator, ratio: float, pairs: int = 400) -> np.ndarray:
    """Times of two sides with noise, stalls, and a clock that slows down halfway: for both."""
    clock = np.where(np.arange(pairs) < pairs // 2, 1.0, 1.3)[:, None]
    noise = rng.lognormal(0, 0.1, (pairs, 2)) * np.where(rng.random((pairs, 2)) < 0.02, 5.0, 1.0)
    times: np.ndarray = clock * noise * np.array([1.0, ratio])
    return times


def test_the_ratio_of_equal_sides_is_one_whatever_the_clock_does() -> None:
    same = np.repeat(np.linspace(1.0, 3.0, 200)[:, None], 2, axis=1)
    assert ratio_of(rounds_of(same)) == 1.0
    doubled = rounds_of(same * [1.0, 2.0])
    assert ratio_of(doubled) == 2.0
    constant = ratio_interval(rounds_of(np.tile([1.0, 1.25], (100, 1))))
    assert (constant.low, constant.high) == (1.25, 1.25)


def test_the_interval_is_the_same_for_the_same_times() -> None:
    rounds = rounds_of(simulated(np.random.default_rng(0), 1.05))
    assert ratio_interval(rounds) == ratio_interval([times.copy() for times in rounds])


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    intervals = [ratio_interval(rounds_of(simulated(rng, 1.05))) for _ in range(100)]
    assert sum(interval.low <= 1.05 <= interval.high for interval in intervals) >= 95
    assert np.median([interval.high - interval.low for interval in intervals]) < 0.07
    assert any(interval.low > 1.0 for interval in intervals)


def test_more_pairs_give_a_narrower_interval() -> None:
    few, many = (ratio_interval(rounds_of(simulated(np.random.default_rng(2), 1.0, n))) for n in (100, 10_000))
    assert many.high - many.low < 0.3 * (few.high - few.low)
