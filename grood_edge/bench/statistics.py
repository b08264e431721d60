"""What times amount to: percentiles, whether they have settled, and how two sides that took turns compare.

Arrays in, numbers out. A round is a stretch of time in which both sides took turns: seconds `[pairs, 2]`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "AGREEMENT",
    "LEAST_RUNS",
    "PERCENTS",
    "WINDOWS",
    "Interval",
    "drift_of",
    "is_settled",
    "percentiles",
    "ratio_interval",
    "ratio_of",
    "rounds_of",
    "runs_needed",
]

PERCENTS = (50.0, 90.0, 99.0, 99.9)
WINDOWS, AGREEMENT = 3, 0.05  # so many windows whose medians agree within this have settled
LEAST_RUNS = 20  # in a round
_MOST_ROUNDS = 8
_TAIL = 0.025  # on each side of a 95 % interval
_DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


def runs_needed(percent: float) -> int:
    """Return from how many runs on a percentile is told.

    With fewer, all runs lie below the true percentile with a probability above 2.5 %, so that none of them bounds it
    from above at 95 %.
    """
    return math.ceil(math.log(_TAIL) / math.log(percent / 100))


def percentiles(times: np.ndarray) -> dict[float, float | None]:
    """Return the percentiles of times `[n]`, each one of the times (the smallest that so many do not exceed).

    None where there are fewer than `runs_needed`.
    """
    ordered = np.sort(times)
    # rounded: 99.9 % of 10,000 is a little more than 9,990 in binary
    places = {percent: math.ceil(round(len(ordered) * percent / 100, 6)) - 1 for percent in PERCENTS}
    return {
        percent: float(ordered[place]) if len(ordered) >= runs_needed(percent) else None
        for percent, place in places.items()
    }


def is_settled(medians: Sequence[float]) -> bool:
    """Say whether the last three of the windows' medians agree within 5 % of the smallest."""
    last = medians[-WINDOWS:]
    return len(last) == WINDOWS and max(last) <= (1 + AGREEMENT) * min(last)


def drift_of(times: np.ndarray) -> float:
    """Return the median of the second half of times `[n]`, n at least 2, over that of the first: 1 where none."""
    middle = len(times) // 2
    return float(np.median(times[middle:]) / np.median(times[:middle]))


def rounds_of(pairs: np.ndarray) -> list[np.ndarray]:
    """Cut times `[pairs, 2]` into at most eight stretches of at least twenty pairs, or into one."""
    return np.array_split(pairs, max(1, min(_MOST_ROUNDS, len(pairs) // LEAST_RUNS)))


def ratio_of(rounds: Sequence[np.ndarray]) -> float:
    """Return the median over rounds of the ratio of medians, second side over first: what drifts hits both sides."""
    medians = np.array([np.median(times, axis=0) for times in rounds])
    return float(np.median(medians[:, 1] / medians[:, 0]))


def ratio_interval(rounds: Sequence[np.ndarray]) -> Interval:
    """Return a 95 % interval of `ratio_of` from a seeded bootstrap that draws rounds, and times within them.

    The median of n times that are drawn from n is one of them, and its place is distributed as Beta((n + 1) / 2,
    (n + 1) / 2): so it is drawn at once. The sides are drawn apart, and what differs within rounds counts between them
    as well: with many rounds the interval is rather too wide than too narrow. Not with few: in a simulation it held the
    ratio in 96.5 % of the cases with eight rounds, and in 86 % with three.
    """
    rng = np.random.default_rng(0)
    sizes = np.array([len(times) for times in rounds])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    chosen = rng.integers(0, len(rounds), (_DRAWS, len(rounds)))
    middle = (sizes[chosen] + 1) / 2
    medians = []
    for side in (0, 1):
        ordered = np.concatenate([np.sort(times[:, side]) for times in rounds])
        place = (sizes[chosen] * rng.beta(middle, middle)).astype(np.int64)
        medians.append(ordered[starts[chosen] + np.minimum(place, sizes[chosen] - 1)])
    low, high = np.quantile(np.median(medians[1] / medians[0], axis=1), [_TAIL, 1 - _TAIL])
    return Interval(float(low), float(high))
