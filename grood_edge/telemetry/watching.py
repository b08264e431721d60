"""Watch a stream to its end: every verdict to every output, and a summary of what was seen."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry.sink import Sink

__all__ = ["Tally", "Transition", "WatchSummary", "watch"]

MAX_TRANSITIONS = 1000  # kept for the summary; a log has all
# Edges of the histogram of times: 0.01 ms to 100 s, 5 % apart; percentiles are right to 5 %, whatever the length.
_EDGES = np.geomspace(1e-5, 100.0, 331)


@dataclass(frozen=True)
class Transition:
    """A change of state: seconds since the first frame, at which frame, from what to what, and why."""

    time: float
    frame: int
    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class WatchSummary:
    """What a stream came to.

    statuses: frames a status. problems: why the first frame of each status but `OK` was not scored. states: seconds in
    each state. transitions: the first 1,000, of `changes` in all. age and latency: seconds, median and 99th percentile,
    None without frames; age runs from capture to the decision. drifted: windows in which the scores of ID frames no
    longer looked like calibration. ended: why the stream ended.
    """

    frames: int
    dropped: int
    statuses: dict[str, int]
    problems: dict[str, str]
    states: dict[str, float]
    transitions: tuple[Transition, ...]
    changes: int
    age: tuple[float, float] | None
    latency: tuple[float, float] | None
    drifted: int
    ended: str


@dataclass
class Tally:
    """The running counts behind a `WatchSummary`; its size does not depend on the length of the stream."""

    frames: int = 0
    dropped: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    problems: dict[str, str] = field(default_factory=dict)
    states: dict[str, float] = field(default_factory=dict)
    transitions: list[Transition] = field(default_factory=list)
    changes: int = 0
    drifted: int = 0
    _ages: np.ndarray = field(default_factory=lambda: np.zeros(_EDGES.size + 1, np.int64))
    _latencies: np.ndarray = field(default_factory=lambda: np.zeros(_EDGES.size + 1, np.int64))
    _start: float = 0.0  # the clock of the decision at the first frame
    _last: StreamVerdict | None = None

    def add(self, found: StreamVerdict) -> None:
        """Count one verdict."""
        self.frames += 1
        self.dropped = found.dropped
        self.statuses[found.status] += 1
        if found.frame.problem:
            self.problems.setdefault(found.status, found.frame.problem)
        self._ages[np.searchsorted(_EDGES, found.age)] += 1
        if found.verdict is not None:
            self._latencies[np.searchsorted(_EDGES, found.latency)] += 1
        before = "UNSURE" if self._last is None else self._last.state.name
        if self._last is None:
            self._start = found.time
        else:
            self.states[before] = self.states.get(before, 0.0) + found.time - self._last.time
        if found.changed:
            self.changes += 1
            if len(self.transitions) < MAX_TRANSITIONS:
                index, state = found.frame.index, found.state
                self.transitions.append(Transition(found.time - self._start, index, before, state.name, state.reason))
        drift, old = found.drift, None if self._last is None else self._last.drift
        self.drifted += drift is not None and drift is not old and drift.drifted
        self._last = found

    @property
    def cut_off(self) -> str | None:
        """What a recording that ended before its end said of that."""
        return self._last.frame.problem if self._last is not None and self._last.frame.cut_off else None

    def summary(self, ended: str) -> WatchSummary:
        """Return what was counted."""
        return WatchSummary(
            frames=self.frames, dropped=self.dropped, statuses=dict(self.statuses),
            problems=dict(self.problems),
            states={name: round(seconds, 3) for name, seconds in self.states.items()},
            transitions=tuple(self.transitions), changes=self.changes, age=_percentiles(self._ages),
            latency=_percentiles(self._latencies), drifted=self.drifted, ended=ended,
        )  # fmt: skip


def watch(
    stream: Iterable[StreamVerdict], sinks: Sequence[Sink], tally: Tally, show: Callable[[StreamVerdict], None]
) -> None:
    """Hand every verdict of a stream to every sink, then to `show`; close all sinks however it ends.

    `tally` is what was counted up to the end, also when that end is an exception.

    Raises:
        OutputError: a sink could not write; the others are closed in order all the same.
        SourceError: the source vanished.
        BackendError: the device failed.
    """
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        for found in stream:
            tally.add(found)
            for sink in sinks:
                sink.write(found)
            show(found)


def _percentiles(counts: np.ndarray) -> tuple[float, float] | None:
    total = int(counts.sum())
    if total == 0:
        return None
    upper = np.append(_EDGES, _EDGES[-1])
    below = np.cumsum(counts)
    median, high = (float(upper[np.searchsorted(below, share * total)]) for share in (0.5, 0.99))
    return median, high
