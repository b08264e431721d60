"""The maps that make scores of several OOD prototypes comparable: increasing, -ln survival, an exponential tail."""

import numpy as np
import pytest

from grood_edge.export import score_map as module
from grood_edge.export.score_map import fitted_map
from grood_edge.scoring import IDENTITY, ScoreMap

WIDE = np.concatenate([np.linspace(-1e6, 1e6, 401), np.linspace(-30, 30, 2001)])


def samples(kind: str, count: int = 1000) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "exponential":
        return rng.exponential(2.0, count) - 7
    if kind == "normal":
        return 3 * rng.standard_normal(count) - 40
    if kind == "two humps":
        return np.where(rng.random(count) < 0.9, rng.normal(-9, 0.5, count), rng.normal(2, 0.1, count))
    return np.floor(4 * rng.standard_normal(count))  # many ties


KINDS = ("exponential", "normal", "two humps", "ties")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [12, 100, 1000])
def test_map_increases_everywhere(kind: str, count: int) -> None:
    found = fitted_map(samples(kind, count))
    x = np.unique(WIDE)
    assert (np.diff(found(x)) > 0).all()
    assert (found.slope_at(x) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_at_most_16_knots(kind: str) -> None:
    found = fitted_map(samples(kind))
    assert 1 <= len(found.knots) == len(found.weights) <= 16
    assert (np.diff(found.knots) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_last_knot_the_slope_is_one_over_the_mean_excess(kind: str) -> None:
    scores = samples(kind)
    found = fitted_map(scores)
    last = found.knots[-1]
    expected = 1 / (scores[scores > last] - last).mean()
    assert found.slope_at(np.array([last + 1e-3, 1e6])) == pytest.approx([expected] * 2, rel=1e-6)
    a, b = found(np.array([last, last + 10.0]))
    assert (b - a) / 10 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "normal", "two humps"])
def test_inside_it_is_minus_log_survival(kind: str) -> None:
    scores, fresh = samples(kind), np.sort(np.random.default_rng(9).permutation(samples(kind, 40_000)))
    found = fitted_map(scores)
    for level in (0.5, 0.25, 0.1, 0.03):
        x = float(np.quantile(fresh, 1 - level))
        # relative error of an empirical survival of 1,000 scores: sqrt((1 - p) / (1000 p)), times four
        assert float(found(np.array([x]))[0]) == pytest.approx(
            -np.log(level), abs=4 * np.sqrt((1 - level) / (1000 * level))
        )


def test_knots_are_quantiles_and_their_values_the_levels() -> None:
    scores = samples("normal")
    found = fitted_map(scores)
    levels = np.linspace(0, np.log(len(scores) / module.TAIL_IMAGES), module.KNOTS)
    expected = np.quantile(scores, 1 - np.exp(-levels))
    np.testing.assert_allclose(found.knots, expected[1:], rtol=1e-12)
    np.testing.assert_allclose(found(expected), levels, atol=1e-9)


@pytest.mark.parametrize("scores", [np.full(500, -13.8), np.full(1, 2.0), np.array([1.0, 1.0 + 1e-9])])
def test_constant_scores_are_left_as_they_are(scores: np.ndarray) -> None:
    assert fitted_map(scores) is IDENTITY
    np.testing.assert_array_equal(IDENTITY(WIDE), WIDE)
    np.testing.assert_array_equal(IDENTITY.slope_at(WIDE), np.ones(len(WIDE)))


def test_one_outlier_among_constants_stays_finite() -> None:
    found = fitted_map(np.append(np.full(400, 3.0), 9.0))
    assert np.isfinite(found(WIDE)).all()


def test_slopes_are_those_between_knots() -> None:
    bent = ScoreMap(1.0, 0.5, np.array([0.0, 2.0]), np.array([1.5, -1.0]))
    x = np.array([-1.0, 0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(bent(x), [0.5, 1.0, 3.0, 5.0, 6.0])
    np.testing.assert_allclose(bent.slope_at(x), [0.5, 0.5, 2.0, 2.0, 1.0])  # at a knot, the one before it


def test_scaled_multiplies_values_and_slopes() -> None:
    found = fitted_map(samples("normal"))
    third = found.scaled(1 / 3)
    np.testing.assert_allclose(third(WIDE), found(WIDE) / 3, rtol=1e-9)
    np.testing.assert_allclose(third.slope_at(WIDE), found.slope_at(WIDE) / 3, rtol=1e-9)
    np.testing.assert_array_equal(third.knots, found.knots)
