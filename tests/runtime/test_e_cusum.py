"""The e-value, its correction, the detector and its thresholds, against direct computations."""

import math

import numpy as np
import pytest

from grood_edge.errors import UsageError
from grood_edge.runtime.e_cusum import _quantile as quantile
from grood_edge.runtime.e_cusum import (
    correction,
    count_alarms,
    detector_step,
    fed_every,
    hours_between_alarms,
    largest_evidence,
    log_e_value,
    log_e_values,
    log_threshold,
    threshold_by_episode,
)


def test_the_e_value_is_the_mixture_over_eps() -> None:
    eps = (np.arange(200_000) + 0.5) / 200_000
    for p in (1e-4, 1 / 315, 0.05, 0.3, 0.9, 0.9999):
        assert math.exp(log_e_value(p)) == pytest.approx(float(np.mean(eps * p ** (eps - 1))), rel=1e-6)


def test_p_values_of_seen_frames_reach_one_and_the_branches_meet() -> None:
    """p = 1 is what the least strange ID frames have; the textbook form is 0 / 0 there."""
    assert log_e_value(1.0) == math.log(0.5)
    n = 1000
    every = np.arange(1, n + 2) / (n + 1)
    logs = [log_e_value(float(np.float32(p))) for p in every]
    assert np.isfinite(logs).all()
    assert (np.diff(logs) < 0).all()
    around = [math.exp(-1e-4 * (1 + shift)) for shift in (-1e-9, 1e-9)]
    assert log_e_value(around[0]) == pytest.approx(log_e_value(around[1]), abs=1e-9)


def test_one_and_many_agree() -> None:
    p = np.concatenate([np.arange(1, 316) / 315, [1 - 1e-6, np.nan]])
    many = log_e_values(p)
    np.testing.assert_allclose(many[:-1], [log_e_value(v) for v in p[:-1]], rtol=1e-12)
    assert np.isnan(many[-1])


@pytest.mark.parametrize("n", [1, 59, 314, 3000])
def test_the_mean_e_value_of_an_id_frame_is_at_most_one(n: int) -> None:
    assert np.exp(log_e_values(np.arange(1, n + 2) / (n + 1))).mean() < 1


@pytest.mark.parametrize("n", [10, 314, 2000])
def test_the_quantile_is_that_of_direct_draws(n: int) -> None:
    """Drawing neighbouring ranks together changes nothing beyond the noise of the draws, and needs 30 times less."""
    e = np.exp(log_e_values(np.arange(1, n + 2) / (n + 1)))
    rng = np.random.default_rng(1)
    weights = [rng.standard_exponential((500, n + 1)) for _ in range(16)]
    direct = np.quantile(np.concatenate([w @ e / w.sum(axis=1) for w in weights]), 0.95)
    assert quantile(n) == pytest.approx(float(direct), abs=0.006)


def test_the_correction_is_never_below_one_and_reproducible() -> None:
    assert correction((314,)) == correction((314,)) >= 1
    assert correction((20, 300)) == max(1.0, quantile(20), quantile(300))


def test_the_detector_forgets_what_speaks_for_id_frames() -> None:
    assert detector_step(-3.0, 1.5) == 1.5
    assert detector_step(2.0, -0.5) == 1.5
    assert detector_step(2.0, 0.0) == 2.0  # not scored


def test_threshold_is_the_number_of_fed_frames() -> None:
    assert log_threshold(2.0, 5.0) == pytest.approx(math.log(36_000))
    for hours, rate in ((0.0, 5.0), (-1.0, 5.0), (math.nan, 5.0), (1.0, 0.0), (1.0, math.inf), (1e-5, 1.0)):
        with pytest.raises(UsageError, match="hours"):
            log_threshold(hours, rate)


def test_threshold_by_episode_needs_59_and_is_exceeded_as_rarely_as_it_says() -> None:
    assert threshold_by_episode((), 0.05, 0.05) is None
    assert threshold_by_episode((1.0,) * 58, 0.05, 0.05) is None
    least = threshold_by_episode((2.0, 7.0) + (1.0,) * 57, 0.05, 0.05)
    assert least is not None
    assert 7.0 < least < 7.0 + 1e-9  # an alarm is above the largest maximum, and equal is none
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(400):
        threshold = threshold_by_episode(tuple(rng.exponential(size=93)), 0.05, 0.05)
        assert threshold is not None
        broken += math.exp(-threshold) > 0.05
    assert 0 < broken <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_largest_evidence_and_alarms_are_those_of_a_loop_over_the_fed_frames() -> None:
    log_e = np.random.default_rng(0).normal(0, 1, 500)
    log_e[[0, 7, 8]] = np.nan
    for every in (1, 4):
        m, largest, alarms, m_reset, due = 0.0, 0.0, 0, 0.0, 0
        for index in range(500):
            if index < due or math.isnan(log_e[index]):
                continue
            due = index + every
            m = max(m, 0) + log_e[index]
            largest = max(largest, m)
            m_reset = max(m_reset, 0) + log_e[index]
            if m_reset >= 4:
                alarms, m_reset = alarms + 1, 0.0
        assert largest_evidence(log_e, every) == largest
        assert count_alarms(log_e, every, 4.0) == alarms > 0
    assert largest_evidence(np.full(5, -1.0), 1) == 0


def test_frames_that_come_half_a_frame_early_are_in_time() -> None:
    assert [fed_every(i, 30.0) for i in (0.0, 1 / 30, 0.1, 0.11, 0.5)] == [1, 1, 3, 3, 15]
    assert fed_every(0.12, 30.0) == 4


def test_hours_between_alarms_is_the_exact_poisson_interval() -> None:
    from scipy.stats import chi2

    lower, upper = hours_between_alarms(0, 9.0)
    assert lower == pytest.approx(9 / -math.log(0.05))
    assert upper == math.inf
    assert lower == pytest.approx(9 / 3, rel=0.002)
    for alarms in (1, 2, 17, 400):
        lower, upper = hours_between_alarms(alarms, 9.0)
        assert lower == pytest.approx(9 / (chi2.ppf(0.95, 2 * alarms + 2) / 2), rel=1e-6)
        assert upper == pytest.approx(9 / (chi2.ppf(0.05, 2 * alarms) / 2), rel=1e-6)
