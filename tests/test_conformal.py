"""The k rule and its promise: the method's table, an independent binomial, and synthetic scores with known rates."""

import math

import numpy as np
import pytest
from scipy import stats

from grood_edge.conformal import (
    DecisionRule,
    count_at_least,
    largest_rank,
    least_calibration_images,
    p_values,
    rank_for,
)
from grood_edge.errors import CalibrationError, UsageError

SIZES = (300, 1000, 2000, 5000, 10_000)
RANKS = {0.05: (9, 39, 84, 225, 464), 0.01: (1, 5, 13, 39, 84), 0.001: (0, 0, 0, 2, 5)}  # 0: refused
LEAST = {0.05: 59, 0.01: 299, 0.001: 2995}
TABLE = [(alpha, n, rank) for alpha, ranks in RANKS.items() for n, rank in zip(SIZES, ranks, strict=True)]


@pytest.mark.parametrize(("alpha", "n", "rank"), TABLE)
def test_table_of_the_method(alpha: float, n: int, rank: int) -> None:
    assert largest_rank(alpha, 0.05, n) == rank
    if rank:
        assert rank_for(alpha, 0.05, n) == rank
    else:
        with pytest.raises(CalibrationError, match=f"{LEAST[alpha]:,}"):
            rank_for(alpha, 0.05, n)


@pytest.mark.parametrize(("alpha", "least"), LEAST.items())
def test_least_number_of_images(alpha: float, least: int) -> None:
    assert least_calibration_images(alpha, 0.05) == least
    assert rank_for(alpha, 0.05, least) == 1
    assert largest_rank(alpha, 0.05, least - 1) == 0


@pytest.mark.parametrize("delta", [0.3, 0.05, 1e-3, 1e-6])
@pytest.mark.parametrize("alpha", [0.5, 0.2, 0.05, 0.003])
def test_rank_is_the_largest_that_the_binomial_allows(alpha: float, delta: float) -> None:
    for n in (1, 2, 10, 59, 60, 299, 1000, 12_345, 200_000):
        k = largest_rank(alpha, delta, n)
        # P(Bin >= k) >= 1 - delta means P(Bin <= k - 1) <= delta
        assert k == 0 or stats.binom.cdf(k - 1, n, alpha) <= delta * (1 + 1e-9)
        assert k == n or stats.binom.cdf(k, n, alpha) > delta * (1 - 1e-9)


def test_more_images_never_lower_the_rank() -> None:
    ranks = [largest_rank(0.05, 0.05, n) for n in range(600)]
    assert ranks[0] == 0
    assert ranks == sorted(ranks)


@pytest.mark.parametrize(
    ("alpha", "n", "rank"), [(0.05, 18, 0), (0.05, 19, 1), (0.05, 1000, 50), (0.01, 99, 1), (0.1, 99, 10), (0.3, 9, 3)]
)
def test_marginal_rule(alpha: float, n: int, rank: int) -> None:
    assert largest_rank(alpha, None, n) == rank


@pytest.mark.parametrize("alpha", [0.9999, 0.5, 0.3, 0.1, 0.07, 0.05, 0.01, 0.003])
def test_marginal_least_number_is_tight(alpha: float) -> None:
    least = least_calibration_images(alpha, None)
    assert largest_rank(alpha, None, least) >= 1
    assert largest_rank(alpha, None, least - 1) == 0


def test_rank_never_exceeds_the_number_of_scores() -> None:
    assert largest_rank(1 - 1e-12, None, 10) == 10
    assert largest_rank(1 - 1e-12, 0.05, 10) == 10


def test_refusal_says_what_is_there_what_is_needed_and_what_to_do() -> None:
    with pytest.raises(CalibrationError) as error:
        rank_for(0.001, 0.05, 300)
    text = str(error.value)
    assert "300 calibration images" in text
    assert "alpha 0.001" in text
    assert "95% confidence" in text
    assert "at least 2,995" in text
    assert "Add calibration images" in text
    with pytest.raises(CalibrationError, match="on average: at least 99 are needed"):
        rank_for(0.01, None, 98)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 5.0, math.nan, math.inf])
def test_alpha_and_delta_out_of_range(value: float) -> None:
    with pytest.raises(UsageError, match=f"alpha is {value}; expected"):
        rank_for(value, 0.05, 100)
    with pytest.raises(UsageError, match=f"delta is {value}; expected"):
        rank_for(0.05, value, 100)


def _false_alarm_rates(rng: np.random.Generator, sets: int, n: int, k: int) -> np.ndarray:
    """Real false-alarm rate of "above the k-th largest" for many calibration sets: uniform scores, so rate = 1 - it."""
    scores = rng.random((sets, n))
    return np.asarray(1.0 - np.partition(scores, n - k, axis=1)[:, n - k])


@pytest.mark.parametrize(
    ("alpha", "delta", "n"), [(0.05, 0.05, 59), (0.05, 0.05, 300), (0.1, 0.2, 100), (0.2, 0.01, 60)]
)
def test_promise_is_kept_and_not_overcautious(alpha: float, delta: float, n: int) -> None:
    sets, rng = 20_000, np.random.default_rng(n)
    k = rank_for(alpha, delta, n)
    standard_error = math.sqrt(delta * (1 - delta) / sets)
    assert (_false_alarm_rates(rng, sets, n, k) > alpha).mean() <= delta + 3 * standard_error
    # One rank further the promise would be broken, so that the rule is the best one.
    assert (_false_alarm_rates(rng, sets, n, k + 1) > alpha).mean() >= delta - 3 * standard_error


def test_marginal_rule_is_right_on_average_and_no_more() -> None:
    sets, n, alpha = 4000, 1000, 0.05
    rates = _false_alarm_rates(np.random.default_rng(0), sets, n, largest_rank(alpha, None, n))
    assert abs(rates.mean() - 50 / 1001) <= 3 * rates.std() / math.sqrt(sets)
    assert (rates > alpha).mean() == pytest.approx(0.5, abs=0.05)  # half of the time the rate is above alpha


@pytest.mark.parametrize("grid", [None, 20], ids=["continuous", "ties"])
def test_decisions_and_p_values_on_new_frames_keep_alpha(grid: int | None) -> None:
    """The decision as the session takes it, on float32 scores, with and without ties."""
    rng, n, alpha, delta, sets = np.random.default_rng(1), 100, 0.1, 0.1, 300
    k = rank_for(alpha, delta, n)
    violations, alarms_by_p = [], []
    for _ in range(sets):
        draw = rng.normal(size=n + 4000).astype(np.float32)
        if grid:
            draw = np.round(draw * grid) / np.float32(grid)
        calibration, new = np.sort(draw[:n]), draw[n:]
        alarms = count_at_least(calibration, new) < k
        violations.append(alarms.mean() > alpha + 3 * math.sqrt(alpha * (1 - alpha) / len(new)))
        alarms_by_p.append((p_values(calibration, new) <= alpha).mean())
        assert alarms.any()
    assert np.mean(violations) <= delta + 3 * math.sqrt(delta * (1 - delta) / sets)
    assert np.mean(alarms_by_p) <= alpha + 3 * np.std(alarms_by_p) / math.sqrt(sets)


def test_p_values_by_hand() -> None:
    calibration = np.array([1, 2, 2, 2, 3], np.float32)
    scores = np.array([-np.inf, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, np.inf], np.float32)
    expected = np.array([6, 6, 6, 5, 5, 2, 2, 1, 1]) / 6  # ties are counted, so 2 scores like 1.5
    result = p_values(calibration, scores)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected.astype(np.float32))
    np.testing.assert_array_equal(count_at_least(calibration, scores), [5, 5, 5, 4, 4, 1, 1, 0, 0])


def test_p_values_are_never_interpolated_or_zero() -> None:
    rng = np.random.default_rng(0)
    calibration = np.sort(rng.normal(size=97).astype(np.float32))
    p = p_values(calibration, rng.normal(scale=2, size=5000).astype(np.float32)).astype(np.float64)
    np.testing.assert_allclose(p * 98, np.rint(p * 98), atol=1e-4)
    assert p.min() == pytest.approx(1 / 98)
    assert p.max() == 1.0


def test_higher_scores_have_smaller_p_values() -> None:
    rng = np.random.default_rng(0)
    scores = np.sort(rng.normal(size=500).astype(np.float32))
    p = p_values(np.sort(rng.normal(size=60).astype(np.float32)), scores)
    assert (np.diff(p) <= 0).all()


def test_nan_counts_nothing_and_so_is_ood() -> None:
    """A device that answers NaN must not be read as ID."""
    calibration = np.sort(np.random.default_rng(0).normal(size=60).astype(np.float32))
    assert count_at_least(calibration, np.array([np.nan], np.float32))[0] == 0


class TestDecisionRule:
    LOW = np.array([1, 2, 2, 3], np.float32)
    HIGH = np.array([10, 20, 30], np.float32)

    def rule(self) -> DecisionRule:
        """Classes 0 and 2 share the low scores, class 1 has the high ones."""
        return DecisionRule((self.LOW, self.HIGH), (2, 1), np.array([0, 1, 0], np.int32))

    def test_each_sample_is_counted_in_the_group_of_its_class(self) -> None:
        scores = np.array([2, 2, 2, 3.5, 30, 31], np.float32)
        ids = np.array([0, 1, 2, 2, 1, 1], np.int32)
        rule = self.rule()
        assert rule.counts(scores, ids).tolist() == [3, 3, 3, 0, 1, 0]
        assert rule.ranks_of(ids).tolist() == [2, 1, 2, 2, 1, 1]
        assert rule.is_alarm(scores, ids).tolist() == [False, False, False, True, False, True]

    def test_threshold_is_the_kth_largest_of_the_group(self) -> None:
        rule = self.rule()
        assert [rule.threshold(c) for c in range(3)] == [2.0, 30.0, 2.0]
        for class_id in range(3):
            at = np.array([rule.threshold(class_id)], np.float32)
            ids = np.array([class_id], np.int32)
            assert not rule.is_alarm(at, ids)[0]  # the threshold itself is not an alarm, the next float is
            assert rule.is_alarm(np.nextafter(at, np.float32(np.inf)), ids)[0]

    def test_one_group_is_the_plain_rule(self) -> None:
        rng = np.random.default_rng(0)
        calibration, scores = np.sort(rng.normal(size=60).astype(np.float32)), rng.normal(size=500).astype(np.float32)
        rule = DecisionRule((calibration,), (3,), np.zeros(5, np.int32))
        ids = rng.integers(0, 5, 500).astype(np.int32)
        np.testing.assert_array_equal(rule.counts(scores, ids), count_at_least(calibration, scores))
        np.testing.assert_array_equal(rule.is_alarm(scores, ids), scores > calibration[-3])

    def test_nan_is_an_alarm_in_every_group(self) -> None:
        ids = np.array([0, 1, 2], np.int32)
        assert self.rule().is_alarm(np.full(3, np.nan, np.float32), ids).all()

    def test_no_samples(self) -> None:
        assert self.rule().counts(np.zeros(0, np.float32), np.zeros(0, np.int32)).size == 0


def test_groups_keep_alpha_in_every_class_and_one_group_does_not() -> None:
    """Two classes whose scores differ: over all together the rate is kept, and one class pays for the other."""
    alpha, delta, n, sets = 0.1, 0.1, 100, 400
    rng, shift = np.random.default_rng(3), np.array([0.0, 1.0])
    k, k_all = rank_for(alpha, delta, n), rank_for(alpha, delta, 2 * n)
    ids = np.repeat(np.arange(2, dtype=np.int32), 4000)
    rates = {"groups": np.zeros((sets, 2)), "one": np.zeros((sets, 2))}
    for index in range(sets):
        groups = tuple(np.sort(rng.normal(shift[c], size=n)).astype(np.float32) for c in range(2))
        new = rng.normal(shift[ids]).astype(np.float32)
        rules = {
            "groups": DecisionRule(groups, (k, k), np.arange(2, dtype=np.int32)),
            "one": DecisionRule((np.sort(np.concatenate(groups)),), (k_all,), np.zeros(2, np.int32)),
        }
        for name, rule in rules.items():
            rates[name][index] = rule.is_alarm(new, ids).reshape(2, -1).mean(axis=1)
    slack = 3 * math.sqrt(alpha * (1 - alpha) / 4000)
    broken = {name: (found > alpha + slack).mean(axis=0) for name, found in rates.items()}
    assert (broken["groups"] <= delta + 3 * math.sqrt(delta * (1 - delta) / sets)).all()
    assert broken["one"][1] > 0.5
