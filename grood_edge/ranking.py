"""How well scores separate two sets: used to choose (`export`) and to report (`evaluate`)."""

import numpy as np

__all__ = ["auroc"]


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Return the probability that an OOD image scores higher than an ID image, 0..1; ties count one half."""
    ordered = np.sort(id_scores)
    below = np.searchsorted(ordered, ood_scores, side="left")
    up_to = np.searchsorted(ordered, ood_scores, side="right")
    return float((below + up_to).mean() / (2 * id_scores.size))
