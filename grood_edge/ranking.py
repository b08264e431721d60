"""How well scores separate two sets."""

import numpy as np

__all__ = ["auroc"]


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Return the area under the ROC curve: P(OOD score > ID score), ties counted half."""
    ordered = np.sort(id_scores)
    below = np.searchsorted(ordered, ood_scores, side="left")
    at_most = np.searchsorted(ordered, ood_scores, side="right")
    return float((below + at_most).sum() / (2 * ordered.size * ood_scores.size))
