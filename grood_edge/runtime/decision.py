"""What a planner wants: known, unknown, unsure, or no valid view; pure functions over verdicts in order of time."""

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["Decision", "Observation", "State", "StateName", "Status"]

Status = Literal["OK", "STALE", "FROZEN", "BLACK", "SATURATED", "INVALID"]
StateName = Literal["KNOWN", "UNKNOWN", "UNSURE", "NO-VIEW"]


@dataclass(frozen=True)
class Observation:
    """One frame as the decision sees it.

    time: seconds, of one clock, not descending. status: `OK`, or why the frame was not scored. The other four are
    of the artifact's verdict, None (False) unless the status is `OK`.
    """

    time: float
    status: Status
    class_id: int | None = None
    class_name: str | None = None
    p_value: float | None = None
    is_ood: bool = False


@dataclass(frozen=True)
class State:
    """What is held to be true, since when (`Observation.time`), and why.

    class_name: of the newest scored frame, in the state KNOWN. evidence: log of the e-CUSUM, or the number of frames
    among the last n that speak for UNKNOWN; whatever the decision goes by. fed: this frame took part in the decision.
    """

    name: StateName
    since: float
    reason: str
    class_name: str | None = None
    evidence: float = 0.0
    fed: bool = True


class Decision(Protocol):
    """A rule over time, given as its start and its step: no state of its own, so a recording can be decided again."""

    name: str

    def start(self, time: float) -> "Memory":
        """Return the memory before the first frame; its state is UNSURE."""

    def step(self, memory: "Memory", seen: Observation) -> "Memory":
        """Return the memory after a frame."""


class Memory(Protocol):
    """What a decision remembers; `state` is what it holds to be true."""

    @property
    def state(self) -> State:
        """The state after the newest frame."""
