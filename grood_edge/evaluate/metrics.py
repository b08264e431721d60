"""Metrics of an OOD score: AUROC, FPR95, and the band in which a count of false alarms must lie."""

import math

import numpy as np
from sklearn.metrics import roc_auc_score

from grood_edge.arrays import IdScores, Scores

__all__ = ["auroc", "beta_binomial_band", "fpr95"]


def auroc(id_scores: IdScores, ood_scores: Scores) -> float:
    """Return the probability that an OOD image scores higher than an ID image, 0..1; ties count one half."""
    labels = np.concatenate([np.zeros(id_scores.size), np.ones(ood_scores.size)])
    return float(roc_auc_score(labels, np.concatenate([id_scores, ood_scores])))


def fpr95(id_scores: IdScores, ood_scores: Scores) -> float:
    """Return FPR95: the share of OOD accepted when 95 % of ID is accepted, 0..1."""
    threshold = np.sort(id_scores)[math.ceil(0.95 * id_scores.size) - 1]
    return float((ood_scores <= threshold).mean())


def beta_binomial_band(m: int, n: int, k: int, level: float = 0.99) -> tuple[int, int]:
    """Return the central band of the number of false alarms among m new ID images.

    With n calibration scores and rank k the count is beta-binomial(m, k, n + 1 - k).
    Source: Bates et al., arXiv 2104.08279.
    """
    a, b = k, n + 1 - k
    counts = range(m + 1)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    log_pmf = [
        math.lgamma(m + 1) - math.lgamma(c + 1) - math.lgamma(m - c + 1)
        + math.lgamma(a + c) + math.lgamma(b + m - c) - math.lgamma(a + b + m) - log_beta
        for c in counts
    ]  # fmt: skip
    cumulative = np.cumsum(np.exp(log_pmf))
    tail = (1 - level) / 2
    return int(np.searchsorted(cumulative, tail)), int(np.searchsorted(cumulative, 1 - tail))
