"""The words of every decision over time: an observation goes in, a state comes out."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from grood_edge.errors import UsageError

__all__ = [
    "HOLD",
    "NO_VIEW",
    "Decision",
    "Memory",
    "Observation",
    "State",
    "StateName",
    "Status",
    "moved",
    "require_seconds",
    "scored_p_value",
    "unseen",
]

HOLD = 1.0  # seconds that UNKNOWN lasts at least
NO_VIEW = 0.5  # seconds without a valid frame, after which there is no view

Status = Literal["OK", "STALE", "FROZEN", "BLACK", "SATURATED", "INVALID"]
StateName = Literal["KNOWN", "UNKNOWN", "UNSURE", "NO-VIEW"]


@dataclass(frozen=True)
class Observation:
    """One frame as the decision sees it.

    time: seconds, of one clock, not descending. status: `OK`, or why the frame was not scored; a verdict that is not
    `valid` is `INVALID`. The other four are of the artifact's verdict, None (False) unless the status is `OK`.
    """

    time: float
    status: Status
    class_id: int | None = None
    class_name: str | None = None
    p_value: float | None = None
    is_ood: bool = False


@dataclass(frozen=True)
class State:
    """What is held to be true, since when (`Observation.time`), and why it began.

    class_name: of the newest scored frame, in the state KNOWN. evidence: log of the e-CUSUM, or the number of frames
    among the last n that speak for UNKNOWN; whatever the decision goes by. fed: this frame took part in the decision.
    last_valid: time of the newest frame with the status `OK`, None before the first.
    """

    name: StateName
    since: float
    reason: str
    class_name: str | None = None
    evidence: float = 0.0
    fed: bool = True
    last_valid: float | None = None


@runtime_checkable
class Memory(Protocol):
    """What a decision remembers; `state` is what it holds to be true."""

    @property
    def state(self) -> State:
        """The state after the newest frame."""


@runtime_checkable
class Decision(Protocol):
    """A rule over time, given as its start and its step: no state of its own, so a recording can be decided again."""

    @property
    def name(self) -> str:
        """As the command line calls it."""

    def start(self, time: float) -> Memory:
        """Return the memory before the first frame; its state is UNSURE."""

    def step(self, memory: Memory, seen: Observation) -> Memory:
        """Return the memory after a frame."""


def moved(state: State, name: StateName, reason: str, seen: Observation, evidence: float) -> State:
    """Return the state after a scored frame: of another name it begins now, of the same name since and reason stay."""
    class_name = seen.class_name if name == "KNOWN" else None
    if name == state.name:
        return replace(state, class_name=class_name, evidence=evidence, fed=True, last_valid=seen.time)
    return State(name, seen.time, reason, class_name, evidence, True, seen.time)


def unseen(state: State, start: float, seen: Observation, no_view: float) -> State:
    """Return the state after a frame that was not scored: NO-VIEW once that has lasted `no_view` seconds.

    start: when the stream began, for one in which no frame was valid yet.
    """
    last = start if state.last_valid is None else state.last_valid
    if state.name == "NO-VIEW" or seen.time - last < no_view:
        return replace(state, fed=False)
    since = "since the start" if state.last_valid is None else f"for {seen.time - last:.2f} s"
    reason = f"no valid frame {since}; the newest is {seen.status}"
    return State("NO-VIEW", seen.time, reason, None, state.evidence, False, state.last_valid)


def require_seconds(name: str, seconds: float) -> None:
    """Refuse a time that is none.

    Raises:
        UsageError: it is negative, infinite or NaN.
    """
    if not 0 <= seconds < math.inf:
        raise UsageError(f"{name} is {seconds:g} seconds; expected 0 or more")


def scored_p_value(seen: Observation) -> float:
    """Return the p_value of a frame with the status `OK`.

    Raises:
        UsageError: it has none, or one outside 0 (excluded) to 1.
    """
    if seen.p_value is None or not 0.0 < seen.p_value <= 1.0:
        raise UsageError(
            f"an observation with status OK has p_value {seen.p_value}; expected one above 0 and up to 1. "
            "A frame that is not scored, or whose verdict is not valid, has another status"
        )
    return seen.p_value
