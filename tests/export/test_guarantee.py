"""The promise itself: how often the false-alarm rate exceeds alpha over many draws of a calibration set."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from grood_edge.contract import Calibration
from grood_edge.evaluate.metrics import beta_binomial_band
from grood_edge.export.bank import HeadPlan, fit_head
from grood_edge.export.calibration import CalibrationScores, Promise, calibration_from_scores
from grood_edge.export.ood_prototype import OodSource, plain_source
from grood_edge.scoring import Head, ood_scores
from tests.export.gaussians import Gaussians, centers, table_of

DRAWS = 1000
ALPHA, DELTA = 0.05, 0.05
MOST = DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / DRAWS)  # share of draws that may break the promise
PROMISE = Promise(ALPHA, DELTA, "unseen", "separate")
MARGINAL = Promise(ALPHA, None, "unseen", "separate", marginal=True)
NAMES = ("a", "b", "c", "d", "e")


@dataclass(frozen=True)
class Population:
    """All ID images there are: their scores, ascending, and predicted classes. Draws are independent, rates exact."""

    scores: np.ndarray
    class_ids: np.ndarray

    def calibrated(self, n: int, promise: Promise, rng: np.random.Generator) -> Calibration:
        rows = rng.integers(0, len(self.scores), n)
        drawn = CalibrationScores(self.scores[rows], self.class_ids[rows], "")
        return calibration_from_scores(drawn, promise, NAMES)

    def rate(self, calibration: Calibration) -> float:
        """Return the share of all ID images that are called OOD."""
        threshold = calibration.rule(len(NAMES)).threshold(0)
        return 1 - float(np.searchsorted(self.scores, np.float32(threshold), side="right")) / len(self.scores)

    def rates(self, n: int, promise: Promise, draws: int = DRAWS) -> np.ndarray:
        rng = np.random.default_rng(n)
        return np.array([self.rate(self.calibrated(n, promise, rng)) for _ in range(draws)])


def population(scores: np.ndarray, class_ids: np.ndarray) -> Population:
    order = np.argsort(scores, kind="stable")
    return Population(scores[order].astype(np.float32), class_ids[order].astype(np.int64))


@pytest.fixture(scope="module")
def plain() -> Population:
    rng = np.random.default_rng(0)
    return population(rng.standard_normal(100_000), rng.integers(0, 5, 100_000))


def fitted_head(gaussians: Gaussians, rows: int | None) -> Head:
    """The combination of three OOD prototypes, fitted once on 400 images."""
    rng = np.random.default_rng(1)
    between = OodSource(replace(plain_source("mean").entry, source="noise"), gaussians.centers[:2].mean(axis=0))
    plan = HeadPlan((plain_source("mean"), between, plain_source("origin")), rows, "int8", 0)
    return fit_head(gaussians.table(rng, np.arange(400) % 5), plan)[0]


@pytest.fixture(scope="module")
def combination() -> Population:
    """60,000 fresh images of five classes in eight dimensions, scored by the combination."""
    rng = np.random.default_rng(2)
    gaussians = Gaussians(centers(rng, 5, 8, 6.0))
    features = gaussians.draw(rng, rng.integers(0, 5, 60_000))
    head = fitted_head(gaussians, 24)
    assert len(head.ood_heads) == 3
    return population(ood_scores(features.astype(np.float64), head), gaussians.nearest(features))


@pytest.mark.parametrize("n", [60, 300, 1000])
def test_rate_stays_below_alpha_in_95_of_100_draws(n: int, plain: Population) -> None:
    rates = plain.rates(n, PROMISE)
    assert (rates > ALPHA).mean() <= MOST
    assert (rates > ALPHA / 2).mean() > DELTA  # no more cautious than it has to be


@pytest.mark.parametrize("n", [60, 300])
def test_the_combination_keeps_the_promise(n: int, combination: Population) -> None:
    rates = combination.rates(n, PROMISE)
    assert (rates > ALPHA).mean() <= MOST
    calibration = combination.calibrated(n, PROMISE, np.random.default_rng(0))
    expected = calibration.k / (n + 1)  # the mean of Beta(k, n + 1 - k)
    assert rates.mean() == pytest.approx(expected, abs=4 * rates.std() / np.sqrt(DRAWS))


def test_rate_is_that_of_the_rule_itself(combination: Population) -> None:
    calibration = combination.calibrated(300, PROMISE, np.random.default_rng(3))
    alarms = calibration.rule(len(NAMES)).is_alarm(combination.scores, combination.class_ids.astype(np.int32))
    assert combination.rate(calibration) == pytest.approx(alarms.mean(), abs=1e-12)


@pytest.mark.parametrize("n", [60, 300])
def test_marginal_rule_is_right_on_average_and_promises_nothing_else(n: int, combination: Population) -> None:
    rates = combination.rates(n, MARGINAL)
    error = 4 * rates.std() / np.sqrt(DRAWS)
    k = int(ALPHA * (n + 1) + 1e-9)
    assert rates.mean() == pytest.approx(k / (n + 1), abs=error)
    assert rates.mean() <= ALPHA + error
    assert (rates > ALPHA).mean() > 4 * DELTA  # which is why it is not the default


def test_per_class_rates_keep_the_promise_in_every_predicted_class(combination: Population) -> None:
    """One threshold for all leaves classes with different rates; a threshold each does not."""
    per_class = replace(PROMISE, per_class=True)
    rng, draws = np.random.default_rng(5), 400
    groups = [combination.scores[combination.class_ids == label] for label in range(len(NAMES))]
    broken = np.zeros(len(NAMES))
    for _ in range(draws):
        rule = combination.calibrated(600, per_class, rng).rule(len(NAMES))
        for label, scores in enumerate(groups):
            rate = 1 - np.searchsorted(scores, np.float32(rule.threshold(label)), side="right") / len(scores)
            broken[label] += rate > ALPHA
    assert (broken / draws <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / draws)).all()


def test_seen_images_get_no_confidence(plain: Population) -> None:
    calibration = plain.calibrated(
        300, replace(PROMISE, delta=None, provenance="seen-in-training"), np.random.default_rng(0)
    )
    assert (calibration.delta, calibration.guarantee) == (None, "none")


@pytest.mark.parametrize("promise", [PROMISE, MARGINAL], ids=["guaranteed", "marginal"])
def test_counts_of_real_splits_lie_in_the_band(promise: Promise) -> None:
    """Digits 0-6 by their pixels, divided at random ten times: fit, calibrate, count."""
    digits = load_digits()
    known = digits.target < 7
    pixels, labels = digits.data[known] / 16, digits.target[known]
    inside = 0
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(len(labels))
        fit, calibrate, count = order[:500], order[500:800], order[800:]
        means = np.stack([pixels[fit][labels[fit] == label].mean(axis=0) for label in range(7)])
        plan = HeadPlan((plain_source("mean"), plain_source("origin")), 64, "int8", seed)
        classifier = Gaussians(means)
        table = table_of(pixels[fit], labels[fit], classifier.nearest(pixels[fit]))
        head, _ = fit_head(table, plan)
        scores = ood_scores(pixels, head).astype(np.float32)
        held_out = CalibrationScores(scores[calibrate], classifier.nearest(pixels[calibrate]), "")
        calibration = calibration_from_scores(held_out, promise, tuple("0123456"))
        alarms = int((scores[count] > calibration.rule(7).threshold(0)).sum())
        low, high = beta_binomial_band(len(count), calibration.n, calibration.k, level=0.99)
        inside += low <= alarms <= high
        assert high < len(count) / 6
    assert inside >= 9  # of ten independent splits two outside happen once in 240
