"""The e-CUSUM: evidence against "these are ID frames", added up over a stream. Pure functions of p_values.

Source: Shin, Ramdas, Rinaldo, "E-detectors: a nonparametric framework for sequential change detection",
arXiv 2203.03532. Every frame that is fed gives an e-value, a number whose mean is at most 1 for ID frames; the detector
is M_t = max(M_(t-1), 1) e_t, and an alarm is raised at M >= A. Everything is kept as logarithms.
"""

import math
from collections.abc import Iterator

import numpy as np

from grood_edge.conformal import largest_rank
from grood_edge.errors import UsageError

__all__ = [
    "CONFIDENCE",
    "correction",
    "count_alarms",
    "detector_step",
    "fed_every",
    "hours_between_alarms",
    "largest_evidence",
    "log_e_value",
    "log_e_values",
    "log_threshold",
    "slack_of",
    "threshold_by_episode",
]

CONFIDENCE = 0.95  # of the correction, over the draw of the calibration set
SMALL = 1e-4  # of -ln p, below which (expm1(x) - x) / x^2 loses its digits
_DRAWS = 10_000
_CHUNK = 500  # draws held at once
_SAME = 0.02  # ranks whose log e differs by less are drawn together


def log_e_value(p_value: float) -> float:
    """Return the log of the e-value of a p_value: of the mixture of eps p^(eps - 1) over eps in 0..1.

    With x = -ln p this is (e^x - 1 - x) / x^2, which is 0.5 at p = 1. For the 0 < p <= 1 of scored frames.
    """
    x = -math.log(p_value)
    return math.log(0.5 + x / 6 if x < SMALL else (math.expm1(x) - x) / (x * x))


def log_e_values(p_values: np.ndarray) -> np.ndarray:
    """Return `log_e_value` of each p_value, float64, in the shape given; NaN stays NaN."""
    x = -np.log(p_values.astype(np.float64))
    exact = np.where(x < SMALL, SMALL, x)
    values: np.ndarray = np.log(np.where(x < SMALL, 0.5 + x / 6, (np.expm1(exact) - exact) / (exact * exact)))
    return values


def correction(sizes: tuple[int, ...]) -> float:
    """Return max(1, c) by which e-values are divided, because the calibration set is fixed.

    An ID frame has the rank r with a probability that the calibration set decides; over the draw of the set these
    probabilities are distributed as Dirichlet(1, ..., 1). c is the 95 % quantile of the mean of e(r / (n + 1)) under
    them: with confidence 95 % the mean of e / c is at most 1 from then on.

    sizes: number of calibration scores in each group. With several groups c is the largest: the confidence is for
    each predicted class on its own.
    """
    return max(1.0, *(_quantile(n) for n in sorted(set(sizes))))


def _quantile(n: int) -> float:
    """Draw with a fixed seed. Neighbouring ranks with nearly equal e share a draw: a sum of m weights is Gamma(m)."""
    e = log_e_values(np.arange(1, n + 2) / (n + 1))
    starts = np.flatnonzero(np.diff(np.floor(e / _SAME), prepend=np.inf))
    ranks = np.diff(starts, append=n + 1)
    means = np.add.reduceat(np.exp(e), starts) / ranks
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS // _CHUNK):
        weights = rng.standard_gamma(ranks, (_CHUNK, len(ranks)))
        drawn.append(weights @ means / weights.sum(axis=1))
    return float(np.quantile(np.concatenate(drawn), CONFIDENCE))


def detector_step(log_m: float, log_e: float) -> float:
    """Return log M after a frame: M_t = max(M_(t-1), 1) e_t. `log_e` 0 stands for a frame that was not scored."""
    return max(log_m, 0.0) + log_e


def log_threshold(hours: float, fed_per_second: float) -> float:
    """Return log A, A = 3600 * hours * fed frames a second.

    Raises:
        UsageError: hours or rate not above 0 and finite, or an A of no more than one frame.
    """
    frames = 3600 * hours * fed_per_second
    if not (hours > 0 and fed_per_second > 0 and 1 < frames < math.inf):
        raise UsageError(
            f"e-cusum was given {hours:g} hours between false alarms at {fed_per_second:g} fed frames a second; "
            "expected both above 0 and at least two frames in that time, such as hours=8"
        )
    return math.log(frames)


def threshold_by_episode(maxima: tuple[float, ...], alpha: float, delta: float) -> float | None:
    """Return the log of the least M that is an alarm, so that at most alpha of ID episodes raise one.

    An alarm is M above the k-th largest of the episodes' maxima (`conformal.largest_rank`), with confidence 1 - delta
    over the draw of the episodes. None where their number carries no such k (59 are needed for 5 %, 5 %).
    """
    k = largest_rank(alpha, delta, len(maxima)) if maxima else 0
    return math.nextafter(sorted(maxima)[-k], math.inf) if k else None


def fed_every(interval: float, fps: float) -> int:
    """Return how many frames lie from one that is fed to the next, when one is due `interval` seconds later.

    Half a frame too early is in time: frames come with jitter, and 0.4999 s must not become a whole frame more.
    """
    return max(1, math.ceil(interval * fps - 0.5 - 1e-9))


def slack_of(interval: float, fps: float) -> float:
    """Return by how many seconds a frame may come too early and be fed: half a frame, as `fed_every` counts."""
    return min(0.5 / fps, interval / 2)


def largest_evidence(log_e: np.ndarray, every: int) -> float:
    """Return the largest log M over an episode, at least 0. `log_e` float64 `[n]`, NaN where nothing was scored."""
    log_m = largest = 0.0
    for value in _fed(log_e, every):
        log_m = detector_step(log_m, value)
        largest = max(largest, log_m)
    return largest


def count_alarms(log_e: np.ndarray, every: int, log_a: float) -> int:
    """Count the alarms of an episode; M = 1 after each."""
    log_m, alarms = 0.0, 0
    for value in _fed(log_e, every):
        log_m = detector_step(log_m, value)
        if log_m >= log_a:
            log_m, alarms = 0.0, alarms + 1
    return alarms


def _fed(log_e: np.ndarray, every: int) -> Iterator[float]:
    due = 0
    for index, value in enumerate(log_e.tolist()):
        if index >= due and not math.isnan(value):
            due = index + every
            yield value


def hours_between_alarms(alarms: int, hours: float) -> tuple[float, float]:
    """Return the two bounds, each at 95 %, of the mean time between alarms, by the exact Poisson interval.

    No alarm in H hours shows at least H / 3, and no upper bound: infinity.
    """
    lower = hours / _poisson_mean(alarms, 1 - CONFIDENCE)
    return lower, hours / _poisson_mean(alarms - 1, CONFIDENCE) if alarms else math.inf


def _poisson_mean(count: int, tail: float) -> float:
    """Return the mean at which P(N <= count) = tail, by bisection."""
    root = math.sqrt(count + 1)
    low, high = max(0.0, count - 10 * root), count + 10 * root + 10
    first = max(0, int(count - 40 * root))  # what lies below has no weight at these means
    for _ in range(80):
        middle = (low + high) / 2
        below = sum(math.exp(i * math.log(middle) - middle - math.lgamma(i + 1)) for i in range(first, count + 1))
        low, high = (middle, high) if below > tail else (low, middle)
    return low
