"""Drift: the distance and its p_value against scipy, which frames count, and how often ID frames are called drift."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import ks_2samp

from grood_edge.artifact import read_artifact
from grood_edge.conformal import DecisionRule
from grood_edge.contract import StreamCalibration
from grood_edge.errors import UsageError
from grood_edge.runtime.decision import Observation
from grood_edge.runtime.drift import DriftMemory, DriftWatch, drift_watch, ks_p_value, ks_statistic
from grood_edge.runtime.selftest import MODEL


def one_group(scores: np.ndarray) -> DecisionRule:
    return DecisionRule((np.sort(scores.astype(np.float32)),), (1,), np.zeros(3, np.int32))


def window_of(scores: np.ndarray) -> list[tuple[float, int]]:
    return [(float(np.float32(score)), 0) for score in scores]


def run(watch: DriftWatch, scores: np.ndarray, period: float = 1.0) -> DriftMemory:
    memory = DriftMemory()
    for index, score in enumerate(scores):
        seen = Observation(index * period, "OK", 0, "cup", 0.5)
        memory = watch.step(memory, seen, float(score), "KNOWN")
    return memory


@pytest.mark.parametrize("ties", [False, True])
def test_statistic_is_scipys(ties: bool) -> None:
    rng = np.random.default_rng(0)
    for n, m, shift in ((314, 200, 0.0), (60, 200, 0.5), (1000, 20, -0.4), (20, 21, 3.0)):
        known, seen = rng.normal(size=n).astype(np.float32), rng.normal(shift, 1, size=m).astype(np.float32)
        if ties:
            known, seen = np.round(known, 1), np.round(seen, 1)
        statistic, effective = ks_statistic(one_group(known), window_of(seen))
        assert statistic == pytest.approx(ks_2samp(seen, known).statistic, abs=1e-12)
        assert effective == pytest.approx(m * n / (m + n))


def test_p_value_is_near_the_exact_one() -> None:
    """0.91 to 1.20 times scipy's exact p_value from 1e-9 up, for windows of 50 and 200 frames and 60 to 1000 scores."""
    rng = np.random.default_rng(1)
    ratios = []
    for n, m in ((60, 200), (314, 200), (1000, 200), (300, 50)):
        for shift in np.linspace(0, 1.2, 25):
            exact = ks_2samp(rng.normal(shift, 1, m), rng.normal(size=n), method="exact")
            if 1e-9 < exact.pvalue < 0.9:
                ratios.append(ks_p_value(float(exact.statistic), m * n / (m + n)) / exact.pvalue)
    assert len(ratios) > 40
    assert 0.9 < min(ratios) <= max(ratios) < 1.25
    assert ks_p_value(0.0, 100.0) == 1
    assert ks_p_value(1.0, 1000.0) < 1e-300


def test_the_two_series_meet() -> None:
    at = 1.18 / (math.sqrt(100) + 0.12 + 0.11 / math.sqrt(100))
    assert ks_p_value(at - 1e-9, 100.0) == pytest.approx(ks_p_value(at + 1e-9, 100.0), abs=1e-7)


def test_groups_are_compared_each_with_its_own_scores() -> None:
    """Two classes whose scores differ, mixed otherwise than in calibration: no drift, though the pooled KS cries it."""
    rng = np.random.default_rng(2)
    low, high = np.sort(rng.normal(0, 1, 900)), np.sort(rng.normal(5, 1, 100))
    rule = DecisionRule((low.astype(np.float32), high.astype(np.float32)), (1, 1), np.array([0, 1], np.int32))
    ids = (rng.random(200) < 0.8).astype(int)
    window = [(float(rng.normal(5 * group, 1)), int(group)) for group in ids]
    statistic, effective = ks_statistic(rule, window)
    share = ids.mean()
    assert effective == pytest.approx(1 / (1 / 200 + (1 - share) ** 2 / 900 + share**2 / 100))
    assert ks_p_value(statistic, effective) > 0.05
    assert ks_2samp([score for score, _ in window], np.concatenate([low, high])).pvalue < 1e-10


def test_grouped_p_values_are_nearly_uniform_for_id_frames() -> None:
    rng = np.random.default_rng(3)
    small = []
    for _ in range(600):
        groups = tuple(np.sort(rng.normal(size=n)).astype(np.float32) for n in (30, 80, 300))
        rule = DecisionRule(groups, (1, 1, 1), np.arange(3, dtype=np.int32))
        ids = rng.choice(3, 100, p=[0.6, 0.3, 0.1])
        window = list(zip(rng.normal(size=100).tolist(), ids.tolist(), strict=True))
        small.append(ks_p_value(*ks_statistic(rule, window)))
    for level in (0.05, 0.2):
        share, error = np.mean(np.array(small) < level), math.sqrt(level * (1 - level) / 600)
        assert level - 6 * error < share < level + 3 * error  # somewhat conservative, as with any ties


def test_windows_do_not_overlap_and_the_levels_sum_to_the_level() -> None:
    rng = np.random.default_rng(4)
    watch = DriftWatch(one_group(rng.normal(size=300)), 0.0, True, window=20, level=0.01)
    levels, times = [], []
    memory = DriftMemory()
    for index in range(100):
        memory = watch.step(memory, Observation(float(index), "OK", 0, "cup", 0.5), float(rng.normal()), "KNOWN")
        assert len(memory.window) < 20
        if memory.drift and memory.drift.time == index:
            levels.append(memory.drift.level)
            times.append(index)
    assert times == [19, 39, 59, 79, 99]
    np.testing.assert_allclose(levels, [0.01 * 6 / math.pi**2 / j**2 for j in range(1, 6)])
    assert sum(0.01 * 6 / math.pi**2 / j**2 for j in range(1, 100_000)) < 0.01


def test_id_frames_are_not_drift_and_darker_ones_are_with_figure_and_time() -> None:
    rng = np.random.default_rng(5)
    calls = 0
    for _ in range(100):
        watch = DriftWatch(one_group(rng.normal(size=300)), 0.0, True, window=25, level=0.05)
        memory = DriftMemory()
        for index, score in enumerate(rng.normal(size=100)):
            memory = watch.step(memory, Observation(float(index), "OK", 0, "c", 0.5), float(score), "KNOWN")
            if memory.drift is not None and memory.drift.drifted:
                calls += 1
                break
    assert calls <= 100 * 0.05 + 3 * math.sqrt(100 * 0.05 * 0.95)
    watch = DriftWatch(one_group(rng.normal(size=300)), 0.0, True)
    drift = run(watch, rng.normal(0.7, 1, 200)).drift
    assert drift is not None
    assert drift.drifted
    assert (drift.time, drift.window, drift.look) == (199.0, 200, 1)
    assert 0.2 < drift.statistic < 0.4
    assert drift.p_value < drift.level


def test_correlated_frames_cry_drift_unless_they_are_decimated() -> None:
    """method.md: AR(1) with 0.9 on raw frames; one frame in 25 is nearly independent."""
    rng = np.random.default_rng(6)
    raw = decimated = 0
    for _ in range(60):
        noise = rng.normal(size=1500) * math.sqrt(1 - 0.81)
        z = lfilter([1], [1, -0.9], noise)[500:]
        rule = one_group(rng.normal(size=1000))
        every, apart = (DriftWatch(rule, i, True, window=40, level=0.05) for i in (0.0, 25.0))
        first, later = run(every, z[:40]).drift, run(apart, z).drift
        assert first is not None
        assert later is not None
        raw += first.drifted
        decimated += later.drifted
    assert raw >= 18
    assert decimated <= 6


def test_what_is_not_ok_or_unknown_is_left_out() -> None:
    watch = DriftWatch(one_group(np.arange(300.0)), 1.0, True, slack=0.1, window=20)
    ok = Observation(10.0, "OK", 0, "cup", 0.5)
    start = DriftMemory()
    assert watch.step(start, ok, 1.0, "UNKNOWN") is start
    assert watch.step(start, Observation(10.0, "BLACK"), None, "NO-VIEW") is start
    fed = watch.step(start, ok, 1.0, "UNSURE")
    assert len(fed.window) == 1
    assert watch.step(fed, replace(ok, time=10.8), 1.0, "KNOWN") is fed
    assert len(watch.step(fed, replace(ok, time=10.95), 1.0, "KNOWN").window) == 2  # early by jitter


def test_the_watch_of_an_artifact_feeds_as_the_episodes_said() -> None:
    contract = read_artifact(MODEL).contract
    plain = drift_watch(contract, 30.0)
    assert (plain.interval, plain.measured, plain.slack) == (1.0, False, 1 / 60)
    stream = StreamCalibration(30.0, 2, 100, 0.2, 0.2, (1.0, 0.5), "0" * 64)
    measured = drift_watch(replace(contract, stream=stream))
    assert (measured.interval, measured.measured) == (0.2, True)
    refused = drift_watch(replace(contract, stream=replace(stream, correlation=None, interval=None)))
    assert (refused.interval, refused.measured) == (1.0, False)
    own = contract.calibration.sorted_scores()
    drift = run(measured, own[np.linspace(0, len(own) - 1, 200).astype(int)]).drift
    assert drift is not None
    assert not drift.drifted
    assert drift.statistic < 0.2


def test_settings_that_cannot_be_are_refused() -> None:
    for window, level in ((19, 0.01), (200_000, 0.01), (200, 0.0), (200, 1.0)):
        with pytest.raises(UsageError, match="drift"):
            DriftWatch(one_group(np.arange(30.0)), 0.0, True, window=window, level=level)
