"""The fixed maps that make the scores of several OOD prototypes comparable before they are added.

Each maps log S to about -ln P(an ID image's log S is larger): piecewise linear between quantiles, and beyond the last
one a line, as for an exponential tail. It is fitted on bank images and needs no exactness: the sum is calibrated
afterwards, as a whole, on images that had no part in it (ranks would saturate, and would be calibrated twice).
"""

import numpy as np

from grood_edge.arrays import Scores64
from grood_edge.scoring import IDENTITY, ScoreMap

__all__ = ["fitted_map"]

KNOTS = 16
TAIL_IMAGES = 10  # so many scores lie above the last knot: their mean excess gives the slope of the tail
_SMALLEST_STEP = 1e-4  # of log S between two knots; nearer ones are one


def fitted_map(scores: Scores64) -> ScoreMap:
    """Fit the map to the scores of bank images, float64 `[n]`, each scored without its own part in the bank."""
    last = np.log(max(2.0, scores.size / TAIL_IMAGES))
    levels = np.linspace(0.0, last, KNOTS)  # of -ln survival
    knots = np.quantile(scores, 1.0 - np.exp(-levels))
    distinct = np.concatenate([[True], np.diff(knots) > _SMALLEST_STEP])
    knots, levels = knots[distinct], levels[distinct]
    above = scores[scores > knots[-1]]
    excess = float((above - knots[-1]).mean()) if above.size else 0.0
    if len(knots) < 2 or excess < _SMALLEST_STEP:
        return IDENTITY  # the scores are all the same: there is no scale to bring them to
    slopes = np.append(np.diff(levels) / np.diff(knots), 1.0 / excess)
    bias = float(levels[0] - slopes[0] * knots[0])
    return ScoreMap(bias, float(slopes[0]), knots[1:], np.diff(slopes))
