"""Frames to verdicts, one after the other, and the state that they amount to."""

from dataclasses import dataclass

from grood_edge.runtime.decision import State, Status
from grood_edge.runtime.drift import Drift
from grood_edge.runtime.session import Verdict
from grood_edge.runtime.sources import CapturedFrame

__all__ = ["StreamVerdict"]


@dataclass(frozen=True)
class StreamVerdict:
    """One frame of a stream: how it was, what the artifact says of it, and what is now held to be true.

    status: `OK`, or why the frame was not scored; `verdict` is None then. state: after this frame; `changed`: it has
    another name than before. age: seconds from capture to the end of the decision. latency: seconds that the session
    took. dropped: frames that were captured and never seen, up to here. drift: how the scores compare with calibration,
    None until a first window is full.
    """

    frame: CapturedFrame
    status: Status
    verdict: Verdict | None
    state: State
    changed: bool
    age: float
    latency: float
    dropped: int
    drift: Drift | None
