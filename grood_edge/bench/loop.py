"""The measuring loop: sides take turns, first until their times have settled, then for a while.

The clock is an argument, so that tests need no time.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from grood_edge.bench.statistics import LEAST_RUNS, is_settled

__all__ = ["MOST_RUNS", "WINDOW", "Clock", "Side", "WarmUp", "timed", "times_in_turn", "warmed_up"]

Clock = Callable[[], float]  # seconds
Side = Callable[[int], tuple[float, ...]]  # makes run number i, and returns the seconds of each of its stages
Report = Callable[[float], None]  # is told how many seconds have passed

WINDOW = 10  # runs
MOST_RUNS = 100_000
_BETWEEN_REPORTS = 0.5  # seconds; a report is made between runs


@dataclass(frozen=True)
class WarmUp:
    """What it took: runs of each side, seconds, and whether all sides settled before the cap."""

    runs: int
    seconds: float
    settled: bool


def timed(call: Callable[[], object], clock: Clock) -> Side:
    """Make a side of one stage."""

    def side(number: int) -> tuple[float, ...]:
        started = clock()
        call()
        return (clock() - started,)

    return side


def warmed_up(sides: Sequence[Side], seconds: float, clock: Clock, report: Report = lambda passed: None) -> WarmUp:
    """Run the sides in turn until the medians of the last three windows of ten runs agree, for each side.

    At most `seconds`, and at least one window. See `statistics.is_settled`.
    """
    started = reported = clock()
    windows: list[list[float]] = [[] for _ in sides]
    number, settled = 0, False
    while not settled:
        totals = np.empty((WINDOW, len(sides)))
        for row in totals:
            for index in _order(number, len(sides)):
                row[index] = sum(sides[index](number))
            number += 1
        for medians, median in zip(windows, np.median(totals, axis=0), strict=True):
            medians.append(float(median))
        settled = all(is_settled(medians) for medians in windows)
        passed = clock() - started
        reported = _reported(started, reported, clock, report)
        if passed >= seconds:
            break
    return WarmUp(number, round(clock() - started, 3), settled)


def times_in_turn(
    sides: Sequence[Side],
    seconds: float,
    clock: Clock,
    report: Report = lambda passed: None,
    least: int = LEAST_RUNS,
) -> list[np.ndarray]:
    """Run the sides in turn, the order alternating; return their times in seconds, `[runs, stages]` each.

    For `seconds`, but at least `least` runs of each and at most 100,000.
    """
    started = reported = clock()
    kept = [array("d") for _ in sides]
    number = 0
    while number < least or (clock() - started < seconds and number < MOST_RUNS):
        for index in _order(number, len(sides)):
            kept[index].extend(sides[index](number))
        number += 1
        reported = _reported(started, reported, clock, report)
    return [np.array(times).reshape(number, -1) for times in kept]


def _order(number: int, count: int) -> range:
    return range(count) if number % 2 else range(count - 1, -1, -1)


def _reported(started: float, reported: float, clock: Clock, report: Report) -> float:
    """Report when it is time to; return when that was done last."""
    now = clock()
    if now - reported < _BETWEEN_REPORTS:
        return reported
    report(now - started)
    return now
