"""Frames to verdicts, one after the other, and the state that they amount to."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from grood_edge.contract import Contract
from grood_edge.errors import FrameError, UsageError
from grood_edge.runtime.capture.health import HealthMemory, HealthRules, check_frame, describe
from grood_edge.runtime.capture.mailbox import Capture
from grood_edge.runtime.capture.sources import CapturedFrame, Clock, Source
from grood_edge.runtime.decision import parse_decision
from grood_edge.runtime.drift import Drift, DriftMemory, DriftWatch, drift_watch
from grood_edge.runtime.session import Session, Verdict
from grood_edge.runtime.states import Decision, Memory, Observation, State, Status

__all__ = ["FILE_FPS", "StreamRules", "StreamVerdict", "stream_rules", "untimed", "verdicts"]

MAX_AGE = 0.5  # seconds
FILE_FPS = 30.0  # of files that do not say: only how the decision counts time hangs on it


@dataclass(frozen=True)
class StreamRules:
    """How frames are judged: which are not scored, what their verdicts amount to, when the scores have drifted."""

    decision: Decision
    health: HealthRules
    drift: DriftWatch | None = None


def stream_rules(
    contract: Contract, source: Source, decision: str = "hysteresis", *, fps: float | None = None,
    alpha: float | None = None, max_age: float = MAX_AGE,
) -> StreamRules:  # fmt: skip
    """Return the rules that `grood-edge watch` goes by. `health.max_age` is also the capture's `stall_after`.

    Args:
        contract: of the artifact.
        source: a live one has stale frames; those of a file wait.
        decision: as `decision.parse_decision` takes it.
        fps: frames a second, where the source does not say it.
        alpha: the session's, None for the artifact's own.
        max_age: seconds after which a camera's frame is stale, and a camera without frames stands still.

    Raises:
        UsageError: a decision that cannot be read, a `max_age` that is not above 0, or another `fps` than the source's
            own, by whose times the decision counts.
        CalibrationError: calibration scores or episodes cannot carry the decision.
    """
    if not max_age > 0:
        raise UsageError(f"--max-age {max_age:g}; expected seconds above 0")
    if fps is not None and source.fps is not None and not math.isclose(fps, source.fps, rel_tol=0.01):
        raise UsageError(
            f"--fps {fps:g}, but {source.name} has {source.fps:g} frames a second, and its own times, by which the "
            "decision counts; leave --fps out: it is for sources that do not say"
        )
    camera, rate = contract.preprocessing.camera, fps or source.fps
    shape = None if camera is None else (camera.height, camera.width)
    return StreamRules(
        parse_decision(decision, contract, rate, alpha),
        HealthRules(max_age=max_age if source.live else None, shape=shape),
        drift_watch(contract, rate),
    )


@dataclass(frozen=True)
class StreamVerdict:
    """One frame of a stream: how it was, what the artifact says of it, and what is now held to be true.

    time: seconds, of the clock that the decision counts by: the source's own for files, `time.monotonic()` for cameras.
    status: `OK`, or why the frame was not scored; `verdict` is None or not valid then, and `frame.problem` says why.
    state: after this frame; `changed`: it has another name than before. age: seconds from capture to the end of the
    decision. latency: seconds that the session took. dropped: frames that were captured and never seen, up to here.
    drift: how the scores compare with calibration, None until a first window is full.
    """

    frame: CapturedFrame
    time: float
    status: Status
    verdict: Verdict | None
    state: State
    changed: bool
    age: float
    latency: float
    dropped: int
    drift: Drift | None


def verdicts(
    session: Session,
    capture: Capture,
    rules: StreamRules,
    on_change: Callable[[StreamVerdict], None] | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[StreamVerdict]:
    """Judge every frame that `capture` hands out, in order; none is passed over in silence.

    A frame whose status is not `OK` is not scored. While a camera stands still, `capture` hands out its last frame
    without a picture every `stall_after` seconds, and its verdict has the status `STALE`. `on_change` is called when
    the state's name changes, before the verdict is handed on.

    Raises:
        SourceError: the source vanished.
        BackendError: the device failed.
        UsageError: e-cusum, which promises hours, on frames without times and rate (`untimed`).
    """
    health, drift = HealthMemory(), DriftMemory()
    memory: Memory | None = None
    moment = -math.inf
    for captured in capture:
        begun = clock()
        if rules.decision.name == "e-cusum" and untimed(captured, capture.source):
            raise UsageError(
                f"{capture.source.name} does not say when its frames were taken, and e-cusum promises hours between "
                "false alarms; say how many frames a second there are (--fps)"
            )
        health, status = check_frame(rules.health, health, captured, begun)
        frame = captured
        if status != "OK":
            frame = replace(captured, problem=describe(rules.health, captured, begun, status))
        frame, status, verdict = _scored(session, frame, status)
        done = clock()
        moment = max(moment, _time_of(frame, capture.source, begun, moment))
        memory = memory or rules.decision.start(moment)
        before, seen = memory.state, _observed(moment, status, verdict)
        memory = rules.decision.step(memory, seen)
        if rules.drift is not None:
            score = None if verdict is None else verdict.ood_score
            drift = rules.drift.step(drift, seen, score, memory.state.name)
        found = StreamVerdict(
            frame=frame, time=moment, status=status, verdict=verdict, state=memory.state,
            changed=memory.state.name != before.name, age=done - frame.captured, latency=done - begun,
            dropped=capture.dropped, drift=drift.drift,
        )  # fmt: skip
        if found.changed and on_change is not None:
            on_change(found)
        yield found


def untimed(frame: CapturedFrame, source: Source) -> bool:
    """Tell whether a file's picture has no time of its own and no rate: it counts as one of `FILE_FPS` a second."""
    return not source.live and source.fps is None and frame.source_time is None and frame.image is not None


def _scored(session: Session, frame: CapturedFrame, status: Status) -> tuple[CapturedFrame, Status, Verdict | None]:
    """Score a frame that is OK; what the session refuses or cannot answer becomes INVALID."""
    if status != "OK" or frame.image is None:
        return frame, status, None
    try:
        verdict = session.predict(frame.image)
    except FrameError as error:  # such as a grey frame among those of a colour camera
        return replace(frame, problem=str(error)), "INVALID", None
    if not verdict.valid:
        return replace(frame, problem="the network's outputs are not finite"), "INVALID", verdict
    return frame, "OK", verdict


def _time_of(frame: CapturedFrame, source: Source, now: float, before: float) -> float:
    """Return the moment that the decision counts by: a file is decided alike however fast it is read.

    A camera's frame without picture counts now: one that stands still has the capture time of its last frame.
    """
    if source.live:
        return now if frame.image is None else frame.captured
    if frame.source_time is None and frame.image is None and before > -math.inf:
        return before  # damage in a recording whose clock is in its pictures
    return frame.source_time if frame.source_time is not None else frame.index / (source.fps or FILE_FPS)


def _observed(moment: float, status: Status, verdict: Verdict | None) -> Observation:
    if status != "OK" or verdict is None:
        return Observation(moment, status)
    return Observation(moment, status, verdict.class_id, verdict.class_name, verdict.p_value, verdict.is_ood)
