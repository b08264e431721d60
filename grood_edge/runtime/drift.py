"""Do the scores of ID frames still look like those of the calibration images?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from grood_edge.conformal import DecisionRule
from grood_edge.contract import Contract
from grood_edge.errors import UsageError
from grood_edge.runtime.e_cusum import slack_of
from grood_edge.runtime.states import Observation, StateName

__all__ = ["Drift", "DriftMemory", "DriftWatch", "drift_watch", "ks_p_value", "ks_statistic"]

WINDOW = 200  # fed frames: finds a distance of 0.13 in the first window and 0.24 in the 1000th, n = 1000
LEVEL = 0.01  # chance of one false warning or more, from start to stop
UNMEASURED_INTERVAL = 1.0  # seconds between fed frames where no episodes said how far apart they must be
LEAST_WINDOW, MOST_WINDOW = 20, 100_000


@dataclass(frozen=True)
class Drift:
    """The newest full window of fed frames against the calibration scores.

    statistic: Kolmogorov-Smirnov distance, 0 to 1. p_value: of that distance. level: below which it is drift (already
    divided among the looks). window: frames in it. time: when it was full (`Observation.time`). look: how many windows
    were full so far. measured: the time between fed frames was measured on episodes; where it was not, neighbours may
    be correlated, and then the level is not kept.
    """

    statistic: float
    p_value: float
    level: float
    window: int
    time: float
    look: int = 1
    measured: bool = True

    @property
    def drifted(self) -> bool:
        """The scores no longer look like calibration."""
        return self.p_value < self.level


@dataclass(frozen=True)
class DriftMemory:
    """The window that is filling, as (ood_score, class id), at most `window` long; and the newest full one's result."""

    window: tuple[tuple[float, int], ...] = ()
    last_fed: float = -math.inf
    looks: int = 0
    drift: Drift | None = None


@dataclass(frozen=True)
class DriftWatch:
    """Compares windows of scores, one after the other, with the calibration scores of their predicted classes.

    Windows do not overlap, and the j-th is tested at `level` * 6 / (pi^2 j^2): these sum to `level` however long the
    stream runs, and nobody needs to say beforehand for how long. The distance that is found grows slowly with j.

    rule: the calibration scores. interval: seconds between fed frames. slack: how much too early is in time.
    """

    rule: DecisionRule
    interval: float
    measured: bool
    slack: float = 0.0
    window: int = WINDOW
    level: float = LEVEL

    def __post_init__(self) -> None:
        if not LEAST_WINDOW <= self.window <= MOST_WINDOW or not 0 < self.level < 1:
            raise UsageError(
                f"drift is looked for in windows of {self.window} frames at level {self.level:g}; expected "
                f"{LEAST_WINDOW} to {MOST_WINDOW:,} frames and a level above 0 and below 1"
            )

    def step(self, memory: DriftMemory, seen: Observation, ood_score: float | None, state: StateName) -> DriftMemory:
        """Return the memory after a frame; `memory.drift` is the newest full window's.

        Frames that are not OK are left out, and so are those in the state UNKNOWN: an unknown object is an alarm, not
        drift. The state must be that after this frame.
        """
        if seen.status != "OK" or ood_score is None or seen.class_id is None or state == "UNKNOWN":
            return memory
        if seen.time - memory.last_fed < self.interval - self.slack:
            return memory
        window = (*memory.window, (ood_score, seen.class_id))
        if len(window) < self.window:
            return replace(memory, window=window, last_fed=seen.time)
        look = memory.looks + 1
        statistic, effective = ks_statistic(self.rule, window)
        level = self.level * 6 / (math.pi * look) ** 2
        p_value = ks_p_value(statistic, effective)
        drift = Drift(statistic, p_value, level, len(window), seen.time, look, self.measured)
        return DriftMemory((), seen.time, look, drift)


def drift_watch(contract: Contract, fps: float | None = None) -> DriftWatch:
    """Return the watch for an artifact: it feeds frames as far apart as the episodes said.

    Without episodes, or where they set no decimation, it feeds one a second and says so (`Drift.measured`). fps: frames
    a second that will come; None: as in the episodes.
    """
    stream = contract.stream
    measured = stream is not None and stream.interval is not None
    interval = stream.interval if stream is not None and stream.interval is not None else UNMEASURED_INTERVAL
    rate = fps if fps is not None else (stream.fps if stream else None)
    slack = 0.0 if rate is None else slack_of(interval, rate)
    return DriftWatch(contract.calibration.rule(len(contract.classes)), interval, measured, slack)


def ks_statistic(rule: DecisionRule, window: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return the two-sample Kolmogorov-Smirnov distance of a window, and the effective sample size of its p_value.

    Each score is replaced by its place among the calibration scores of its group, 0 to 1. With one group the distance
    is the usual one. With several, of which the window has m_g frames and calibration n_g scores, the difference of the
    two distributions varies like a Brownian bridge of variance 1/m + sum (m_g / m)^2 / n_g. The inverse of that is the
    size returned: m n / (m + n) for one group.
    """
    scores = np.array([score for score, _ in window], np.float32)
    groups = rule.group_of_class[np.array([class_id for _, class_id in window])]
    m = len(scores)
    below, up_to, variance = np.empty(m), np.empty(m), 1 / m
    for group in np.unique(groups):
        rows, known = groups == group, rule.scores[group]
        below[rows] = np.searchsorted(known, scores[rows], side="left") / known.size
        up_to[rows] = np.searchsorted(known, scores[rows], side="right") / known.size
        variance += (rows.sum() / m) ** 2 / known.size
    more = np.searchsorted(np.sort(up_to), up_to, side="right") / m - up_to
    less = below - np.searchsorted(np.sort(below), below, side="left") / m
    return max(float(more.max()), float(less.max()), 0.0), float(1 / variance)


def ks_p_value(statistic: float, effective: float) -> float:
    """Return the asymptotic p_value of a Kolmogorov-Smirnov distance, with Stephens's correction.

    lambda = (sqrt(e) + 0.12 + 0.11 / sqrt(e)) D, e the effective size m n / (m + n) (Stephens, JRSS B 32, 1970). It
    is 0.9 to 1.25 times the exact two-sample value down to 1e-9 (tests/runtime/test_drift.py).
    """
    root = math.sqrt(effective)
    x = (root + 0.12 + 0.11 / root) * statistic
    if x < 1.18:  # there the other series converges faster
        if x < 0.1:
            return 1.0
        terms = [math.exp(-(((2 * j - 1) * math.pi) ** 2) / (8 * x * x)) for j in range(1, 5)]
        return min(1.0, max(0.0, 1 - math.sqrt(2 * math.pi) / x * sum(terms)))
    return min(1.0, 2 * sum((1 if j % 2 else -1) * math.exp(-2 * (j * x) ** 2) for j in range(1, 7)))
