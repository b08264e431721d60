"""Every metric against scikit-learn, SciPy or its definition, on scores with ties."""

import numpy as np
import pytest
from scipy.stats import betabinom, binomtest
from sklearn.metrics import average_precision_score, roc_auc_score

from grood_edge.evaluate.metrics import (
    aupr,
    auroc,
    auroc_interval,
    beta_binomial_band,
    count_band,
    fpr95,
    rate_interval,
    risk_coverage,
    roc_curve,
)


def draws(seed: int, shift: float = 1.0, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    known, other = rng.normal(0, 1, 300), rng.normal(shift, 1.5, 120)
    if ties:
        known, other = np.round(known, 1), np.round(other, 1)
    return known.astype(np.float32), other.astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [True, False])
def test_auroc_and_both_auprs_equal_scikit_learn(seed: int, ties: bool) -> None:
    known, other = draws(seed, ties=ties)
    scores = np.concatenate([known, other])
    is_other = np.repeat([0, 1], [known.size, other.size])
    assert auroc(known, other) == pytest.approx(roc_auc_score(is_other, scores), abs=1e-12)
    assert aupr(other, known) == pytest.approx(average_precision_score(is_other, scores), abs=1e-12)
    assert aupr(-known, -other) == pytest.approx(average_precision_score(1 - is_other, -scores), abs=1e-12)


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    known, other = np.array([0.0, 1.0], np.float32), np.array([1.0, 2.0, -1.0], np.float32)
    assert auroc(known, other) == pytest.approx((1.5 + 2 + 0) / 6)


def test_bootstrap_covers_the_true_auroc_and_is_seeded() -> None:
    from scipy.stats import norm

    truth = norm.cdf(1 / np.hypot(1, 1.5))
    intervals = [auroc_interval(*draws(seed, ties=False), seed=seed) for seed in range(40)]
    assert sum(low <= truth <= high for low, high in intervals) >= 34
    known, other = draws(0)
    assert auroc_interval(known, other, seed=3) == auroc_interval(known, other, seed=3)
    assert auroc_interval(known, other, seed=3) != auroc_interval(known, other, seed=4)


def test_bootstrap_is_as_wide_as_theory_says() -> None:
    """Hanley and McNeil, Radiology 143 (1982): the standard error for continuous scores."""
    known, other = draws(1, ties=False)
    value = auroc(known, other)
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    n, m = known.size, other.size
    error = np.sqrt((value * (1 - value) + (m - 1) * (q1 - value**2) + (n - 1) * (q2 - value**2)) / (n * m))
    low, high = auroc_interval(known, other)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.3)


def test_fpr95_by_hand() -> None:
    known = np.arange(100, dtype=np.float32)
    other = np.array([94.0, 94.5, 200.0, 300.0], np.float32)
    assert fpr95(known, other) == 0.25, "95 of 100 ID images are accepted up to 94, and one of four others with them"


def test_roc_curve_ends_in_the_corners_and_its_area_is_the_auroc() -> None:
    known, other = draws(2)
    called_id, called_ood = roc_curve(known, other, points=2000)
    assert (np.diff(called_id) >= 0).all()
    assert (np.diff(called_ood) >= 0).all()
    assert (called_id[0], called_ood[0], called_id[-1], called_ood[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(called_ood, called_id) == pytest.approx(auroc(known, other), abs=1e-9)
    assert len(roc_curve(known, other, points=20)[0]) <= 21


@pytest.mark.parametrize(("count", "total"), [(0, 1), (0, 50), (1, 2), (7, 300), (299, 300), (300, 300), (450, 20_000)])
def test_rate_interval_equals_scipy(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(0.95, "exact")
    assert rate_interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("m", "n", "k"), [(320, 314, 9), (1000, 59, 1), (10, 1000, 39)])
def test_band_holds_at_least_99_percent_of_the_beta_binomial(m: int, n: int, k: int) -> None:
    low, high = beta_binomial_band(m, n, k)
    law = betabinom(m, k, n + 1 - k)
    assert law.cdf(high) - law.cdf(low - 1) >= 0.99
    assert law.cdf(low - 1) <= 0.005
    assert law.sf(high) <= 0.005
    assert law.sf(high - 1) > 0.005


def test_the_band_of_several_groups_is_that_of_their_sum() -> None:
    groups = [(100, 60, 3), (300, 200, 10), (0, 59, 1), (40, 59, 1)]
    low, high = count_band(groups)
    rng = np.random.default_rng(0)
    sums = sum(rng.binomial(m, rng.beta(k, n + 1 - k, 200_000)) for m, n, k in groups)
    expected = np.quantile(sums, [0.005, 0.995])
    assert abs(low - expected[0]) <= 1
    assert abs(high - expected[1]) <= 1
    assert count_band([(320, 314, 9)]) == beta_binomial_band(320, 314, 9)


def test_risk_coverage_by_hand_and_ties_are_shared() -> None:
    scores = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    curve = risk_coverage(scores, np.array([False, False, True, True]))
    np.testing.assert_allclose(curve.risk, [0, 0, 1 / 3, 1 / 2])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1.0])
    assert curve.aurc == pytest.approx((1 / 3 + 1 / 2) / 4)
    tied = np.zeros(4, np.float32)
    for wrong in ([True, False, False, False], [False, False, False, True]):
        np.testing.assert_allclose(risk_coverage(tied, np.array(wrong)).risk, 0.25)


def test_a_better_order_has_a_lower_aurc() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random(500) < 0.2
    good = (wrong + rng.normal(0, 0.3, 500)).astype(np.float32)
    random = rng.normal(0, 1, 500).astype(np.float32)
    assert risk_coverage(good, wrong).aurc < 0.5 * risk_coverage(random, wrong).aurc
    assert risk_coverage(random, wrong).aurc == pytest.approx(wrong.mean(), abs=0.05)
