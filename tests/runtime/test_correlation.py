"""Correlation time: of processes whose autocorrelation is known, and of episodes that show none."""

import numpy as np
import pytest

from grood_edge.runtime.correlation import autocorrelation, correlation_lag


def ar1(episodes: int, frames: int, rho: float, scene: float = 0.0, seed: int = 0) -> list[np.ndarray]:
    """Return episodes of variance 1, of which the share `scene` is one value an episode."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(episodes, frames)) * np.sqrt(1 - rho**2)
    noise[:, 0] /= np.sqrt(1 - rho**2)
    for index in range(1, frames):
        noise[:, index] += rho * noise[:, index - 1]
    return list(np.sqrt(1 - scene) * noise + np.sqrt(scene) * rng.normal(size=(episodes, 1)))


def test_autocorrelation_is_that_of_a_loop_over_pairs() -> None:
    episodes = ar1(3, 50, 0.5, 0.3)
    episodes[1][[4, 5, 20]] = np.nan
    values = np.concatenate(episodes)
    mean, variance = np.nanmean(values), np.nanvar(values)
    found = autocorrelation(episodes, 10)
    for lag in range(11):
        products = np.concatenate([(e[: 50 - lag] - mean) * (e[lag:] - mean) for e in episodes])
        assert found[lag] == pytest.approx(np.nanmean(products) / variance, abs=1e-12)
    assert found[0] == pytest.approx(1)


def test_ar1_has_the_lag_at_which_it_falls_below_five_percent() -> None:
    correlation = correlation_lag(ar1(60, 3000, 0.9))
    assert correlation.longest == 100
    assert correlation.lag is not None
    assert 25 <= correlation.lag <= 34  # 0.9^28.4 = 0.05; the estimate's noise is 0.007 here


def test_independent_frames_need_no_decimation() -> None:
    assert correlation_lag(ar1(20, 600, 0.0)).lag == 1


def test_the_mean_is_that_of_all_episodes_so_scenes_forbid_a_decimation() -> None:
    """Each episode's own mean would call these frames uncorrelated."""
    scenes = ar1(60, 900, 0.0, scene=0.5)
    own = [episode - episode.mean() for episode in scenes]
    assert correlation_lag(own).lag == 1
    found = correlation_lag(scenes)
    assert found.lag is None
    assert "still 0.5" in found.reason or "still 0.4" in found.reason


@pytest.mark.parametrize(
    ("episodes", "reason"),
    [
        ([np.arange(900.0)], "one episode"),
        ([np.arange(900.0), np.arange(29.0)], "at least 30"),
        ([np.full(90, 0.5), np.full(90, 0.5)], "all p_values are equal"),
        (ar1(60, 300, 0.98), "shows no more"),
        (ar1(60, 600, 0.9), "shows no more"),  # 28 frames long, and 600 are not 30 times that
    ],
)
def test_short_or_empty_episodes_set_no_decimation(episodes: list[np.ndarray], reason: str) -> None:
    found = correlation_lag(episodes)
    assert found.lag is None
    assert reason in found.reason


def test_an_autocorrelation_that_comes_back_does_not_stay_below() -> None:
    time = np.arange(3000)
    rng = np.random.default_rng(0)
    episodes = [np.sin(2 * np.pi * time / 150 + rng.uniform(0, 7)) + rng.normal(size=3000) for _ in range(20)]
    found = correlation_lag(episodes)  # a camera on a turntable: falls below at a quarter turn, and is back after one
    assert found.lag is None
    assert "again" in found.reason
