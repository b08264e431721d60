"""From calibration scores to a decision with a stated guarantee. Pure Python and NumPy: it runs on the device.

Source: Bates, Candès, Lei, Romano, Sesia, "Testing for outliers with conformal p-values", arXiv 2104.08279.
Given the n calibration scores, the false-alarm rate of "alarm above the k-th largest score" is distributed
as Beta(k, n + 1 - k); P(Beta(k, n + 1 - k) <= alpha) = P(Bin(n, alpha) >= k).
"""

import math
from dataclasses import dataclass

import numpy as np

from grood_edge.arrays import IdScores, Scores
from grood_edge.errors import CalibrationError, UsageError

__all__ = [
    "ClassIds",
    "DecisionRule",
    "count_at_least",
    "largest_rank",
    "least_calibration_images",
    "p_values",
    "rank_for",
]

ClassIds = np.ndarray  # int32 [n]


@dataclass(frozen=True)
class DecisionRule:
    """Which calibration scores a score is compared with, and the rank k that decides.

    `scores`: float32, ascending, one array a group; `ranks`: k of each group; `group_of_class` int32 `[k]`: the group
    of each predicted class. One group holds all scores, or (Mondrian) each class has its own.
    """

    scores: tuple[IdScores, ...]
    ranks: tuple[int, ...]
    group_of_class: np.ndarray

    def counts(self, scores: Scores, class_ids: ClassIds) -> np.ndarray:
        """Count the calibration scores of each sample's group that are >= its score: int64 `[n]`."""
        groups = self.group_of_class[class_ids]
        counts = np.zeros(len(scores), np.int64)
        for group in np.unique(groups):
            rows = groups == group
            counts[rows] = count_at_least(self.scores[group], scores[rows])
        return counts

    def is_alarm(self, scores: Scores, class_ids: ClassIds) -> np.ndarray:
        """Tell whether fewer than k calibration scores are >= each score: bool `[n]`."""
        alarms: np.ndarray = self.counts(scores, class_ids) < self.ranks_of(class_ids)
        return alarms

    def ranks_of(self, class_ids: ClassIds) -> np.ndarray:
        """Return the rank k that decides for each sample: int64 `[n]`."""
        ranks: np.ndarray = np.array(self.ranks)[self.group_of_class[class_ids]]
        return ranks

    def threshold(self, class_id: int) -> float:
        """Return the k-th largest calibration score of a class's group: above it is OOD."""
        group = int(self.group_of_class[class_id])
        return float(self.scores[group][len(self.scores[group]) - self.ranks[group]])


def largest_rank(alpha: float, delta: float | None, n: int) -> int:
    """Return the largest usable rank k, or 0 when n images carry no decision at this alpha and delta.

    With `delta`, k is the largest rank with P(Bin(n, alpha) >= k) >= 1 - delta, so that the false-alarm rate
    stays at or below alpha with probability 1 - delta over the draw of the calibration set. With
    `delta=None`, k = floor(alpha (n + 1)): alpha holds on average over calibration sets only.
    """
    if delta is None:
        return min(n, math.floor(alpha * (n + 1) + 1e-9))
    log_alpha, log_rest = math.log(alpha), math.log1p(-alpha)
    tail = 0.0  # P(Bin(n, alpha) <= rank)
    for rank in range(n + 1):
        log_term = math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1)
        tail += math.exp(log_term + rank * log_alpha + (n - rank) * log_rest)
        if tail > delta:
            return rank
    return n


def least_calibration_images(alpha: float, delta: float | None) -> int:
    """Return the smallest n for which `largest_rank` is at least 1."""
    if delta is None:
        return math.ceil(1 / alpha - 1 - 1e-9)
    return math.ceil(math.log(delta) / math.log1p(-alpha) - 1e-9)


def rank_for(alpha: float, delta: float | None, n: int) -> int:
    """Return the rank k of the decision rule `is_ood = at most k - 1 calibration scores are >= the score`.

    Raises:
        UsageError: alpha or delta outside (0, 1).
        CalibrationError: n is too small; says how many images are needed.
    """
    for name, value in (("alpha", alpha), ("delta", delta)):
        if value is not None and not (isinstance(value, int | float) and 0.0 < value < 1.0):
            raise UsageError(f"{name} is {value}; expected a number above 0 and below 1, such as 0.05")
    rank = largest_rank(alpha, delta, n)
    if rank >= 1:
        return rank
    confidence = "on average" if delta is None else f"with {1 - delta:.0%} confidence (delta {delta:g})"
    raise CalibrationError(
        f"{n} calibration images cannot carry alpha {alpha:g} {confidence}: at least "
        f"{least_calibration_images(alpha, delta):,} are needed. Add calibration images, or ask for a larger alpha"
    )


def count_at_least(calibration_scores: IdScores, scores: Scores) -> np.ndarray:
    """Count, for each score, the calibration scores that are greater or equal: int64 `[n]`.

    `calibration_scores` is sorted, ascending.
    """
    return calibration_scores.size - np.searchsorted(calibration_scores, scores, side="left")


def p_values(calibration_scores: IdScores, scores: Scores) -> Scores:
    """Conformal p-value of each score: (1 + #{S_i >= S}) / (n + 1), small = OOD; ties counted, never interpolated.

    `calibration_scores` is sorted, ascending.
    """
    counts = count_at_least(calibration_scores, scores) + 1
    result: Scores = (counts.astype(np.float32) / np.float32(calibration_scores.size + 1)).astype(np.float32)
    return result
