"""Metrics of an OOD score, in NumPy alone, so that a robot can evaluate itself.

AUROC with a bootstrap interval, AUPR, FPR95, intervals of a rate, the band in which a count of false alarms must lie,
and risk against coverage. Scores: higher = more OOD. Checked against scikit-learn and SciPy in the tests.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from grood_edge.arrays import Flags, IdScores, Scores, Scores64
from grood_edge.ranking import auroc

__all__ = [
    "Interval",
    "RiskCoverage",
    "aupr",
    "auroc",
    "auroc_interval",
    "beta_binomial_band",
    "count_band",
    "fpr95",
    "rate_interval",
    "risk_coverage",
    "roc_curve",
]

Interval = tuple[float, float]  # lower and upper end

RESAMPLES = 1000


def auroc_interval(id_scores: IdScores, ood_scores: Scores, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the percentile bootstrap interval of the AUROC: ID and OOD images are resampled 1,000 times, seeded.

    Where the two sets do not overlap at all every resample gives 1, and the interval is (1, 1): too narrow.
    """
    rng = np.random.default_rng(seed)
    n, m = id_scores.size, ood_scores.size
    ordered = np.sort(id_scores)
    below = np.searchsorted(ordered, ood_scores, side="left")
    up_to = np.searchsorted(ordered, ood_scores, side="right")
    values = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = np.bincount(rng.integers(0, n, n), minlength=n)
        cumulative = np.concatenate([[0], np.cumsum(drawn)])
        chosen = rng.integers(0, m, m)
        values[index] = (cumulative[below[chosen]] + cumulative[up_to[chosen]]).mean() / (2 * n)
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def aupr(positive: IdScores, negative: Scores) -> float:
    """Return the area under precision and recall (average precision), 0..1; positives are those that score higher.

    For "ID is positive" hand in the negated scores, ID first. It depends on how many images each set has.
    """
    scores = np.concatenate([positive, negative])
    truth = np.concatenate([np.ones(positive.size), np.zeros(negative.size)])
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # only whole groups of equal scores can be called positive
    hits = np.cumsum(truth[order])[last]
    called = np.arange(1, scores.size + 1)[last]
    recall = np.concatenate([[0.0], hits / positive.size])
    return float(np.sum(np.diff(recall) * hits / called))


def fpr95(id_scores: IdScores, ood_scores: Scores) -> float:
    """Return FPR95: the share of OOD accepted when 95 % of ID is accepted, 0..1."""
    threshold = np.sort(id_scores)[math.ceil(0.95 * id_scores.size) - 1]
    return float((ood_scores <= threshold).mean())


def roc_curve(id_scores: IdScores, ood_scores: Scores, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Return (share of ID called OOD, share of OOD called OOD), both float64, ascending, at up to `points` thresholds.

    The thresholds are quantiles of all scores, so that steps are spread evenly over the images.
    """
    everything = np.sort(np.concatenate([id_scores, ood_scores]))
    picks = np.unique(np.linspace(0, everything.size - 1, points).astype(int))
    thresholds = np.unique(everything[picks])[::-1]
    called_id = 1 - np.searchsorted(np.sort(id_scores), thresholds, side="right") / id_scores.size
    called_ood = 1 - np.searchsorted(np.sort(ood_scores), thresholds, side="right") / ood_scores.size
    return np.concatenate([called_id, [1.0]]), np.concatenate([called_ood, [1.0]])


def beta_binomial_band(m: int, n: int, k: int, level: float = 0.99) -> tuple[int, int]:
    """Return the central band of the number of false alarms among m new ID images.

    With n calibration scores and rank k the count is beta-binomial(m, k, n + 1 - k).
    Source: Bates et al., arXiv 2104.08279.
    """
    return count_band([(m, n, k)], level)


def count_band(groups: Sequence[tuple[int, int, int]], level: float = 0.99) -> tuple[int, int]:
    """Return the central band of the false alarms of several groups (m, n, k) together: each has its own threshold."""
    law = np.ones(1)
    for m, n, k in groups:
        law = np.convolve(law, _beta_binomial(m, n, k))
    cumulative = np.cumsum(law)
    tail = (1 - level) / 2
    return int(np.searchsorted(cumulative, tail)), int(np.searchsorted(cumulative, 1 - tail))


def _beta_binomial(m: int, n: int, k: int) -> np.ndarray:
    """Probabilities of 0, 1, ... alarms; the tail that is too rare to matter is cut off."""
    a, b = k, n + 1 - k
    counts = range(m + 1)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    log_pmf = [
        math.lgamma(m + 1) - math.lgamma(c + 1) - math.lgamma(m - c + 1)
        + math.lgamma(a + c) + math.lgamma(b + m - c) - math.lgamma(a + b + m) - log_beta
        for c in counts
    ]  # fmt: skip
    law = np.exp(log_pmf)
    return law[: int(np.flatnonzero(law > 1e-18)[-1]) + 1]


def rate_interval(count: int, total: int, level: float = 0.95) -> Interval:
    """Return the exact (Clopper-Pearson) interval of a rate of which `count` of `total` were seen, 0..1.

    Source: Clopper, Pearson, Biometrika 26 (1934). The ends solve P(X >= count) = tail and P(X <= count) = tail.
    """
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else _solve(lambda rate: 1 - _binomial_cdf(count - 1, total, rate) - tail)
    high = 1.0 if count == total else _solve(lambda rate: tail - _binomial_cdf(count, total, rate))
    return low, high


def _solve(function: Callable[[float], float]) -> float:
    """Return the root of an increasing function on 0..1, by bisection to the last bit that matters."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def _binomial_cdf(count: int, total: int, rate: float) -> float:
    steps = np.arange(1, count + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((total - steps + 1) / steps))])
    hits = np.arange(count + 1)
    log_terms = log_choose + hits * math.log(rate) + (total - hits) * math.log1p(-rate)
    return min(1.0, float(np.exp(log_terms).sum()))


@dataclass(frozen=True)
class RiskCoverage:
    """Share of wrong classes among the images accepted first: `coverage`, `risk` float64 `[n]`; `aurc`: mean risk."""

    coverage: Scores64
    risk: Scores64
    aurc: float


def risk_coverage(scores: IdScores, wrong: Flags) -> RiskCoverage:
    """Accept ID images in the order of their score, lowest first, and count the wrong classes among them.

    Images of equal score are accepted together: inside such a group the errors are spread evenly.
    Source: Geifman, El-Yaniv, "Selective classification for deep neural networks", arXiv 1705.08500.
    """
    order = np.argsort(scores, kind="stable")
    errors = np.concatenate([[0], np.cumsum(wrong[order])])
    ends = np.concatenate([[0], np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) + 1])
    accepted = np.arange(1, scores.size + 1)
    risk = np.interp(accepted, ends, errors[ends]) / accepted
    return RiskCoverage(accepted / scores.size, risk, float(risk.mean()))
