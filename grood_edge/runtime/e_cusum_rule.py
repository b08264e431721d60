"""The decision `e-cusum`: which threshold, from which promise, and how its alarms become states."""

import math
from dataclasses import dataclass, replace

from grood_edge.conformal import least_calibration_images
from grood_edge.contract import Contract, StreamCalibration
from grood_edge.errors import CalibrationError, UsageError
from grood_edge.runtime.e_cusum import (
    correction,
    detector_step,
    fed_every,
    log_e_value,
    log_threshold,
    slack_of,
    threshold_by_episode,
)
from grood_edge.runtime.states import (
    HOLD,
    NO_VIEW,
    Memory,
    Observation,
    State,
    StateName,
    moved,
    require_seconds,
    scored_p_value,
    unseen,
)
from grood_edge.runtime.votes import Votes

__all__ = ["EPISODE_ALPHA", "EPISODE_DELTA", "ECusum", "e_cusum_for"]

EPISODE_ALPHA = EPISODE_DELTA = 0.05  # share of ID episodes that may alarm, and the risk that it is exceeded after all


@dataclass(frozen=True)
class _Evidence:
    """State, begin of the stream, log M, time of the frame fed last, p_values of the newest fed frames."""

    state: State
    begun: float
    log_m: float = 0.0
    last_fed: float | None = None
    recent: tuple[float, ...] = ()


@dataclass(frozen=True)
class ECusum:
    """UNKNOWN when the e-CUSUM of the fed frames reaches its threshold.

    A frame is fed when it comes `interval` seconds after the one before; half a frame (`slack` seconds) too early is in
    time, because frames come with jitter. Frames that are not OK are not fed and count as e = 1. After an alarm M
    is 1 again, and UNKNOWN lasts for `hold` seconds and until k of the last n frames fed since have p_value > leave.
    Above half of the log threshold KNOWN becomes UNSURE.

    log_a: log of the threshold. log_c: log of the correction by which each e is divided. promise: what holds, in words;
    every alarm carries it as its reason.
    """

    log_a: float
    log_c: float
    interval: float
    slack: float
    promise: str
    votes: Votes
    hold: float = HOLD
    no_view: float = NO_VIEW
    name = "e-cusum"

    def __post_init__(self) -> None:
        require_seconds("hold", self.hold)
        require_seconds("no-view", self.no_view)

    def start(self, time: float) -> _Evidence:
        """Return the memory before the first frame."""
        return _Evidence(State("UNSURE", time, f"no frame yet; e-cusum: {self.promise}"), time)

    def step(self, memory: Memory, seen: Observation) -> _Evidence:
        """Return the memory after a frame."""
        assert isinstance(memory, _Evidence)
        if seen.status != "OK":
            state = unseen(memory.state, memory.begun, seen, self.no_view)
            recent = () if state.name == "NO-VIEW" else memory.recent
            return replace(memory, state=state, log_m=detector_step(memory.log_m, 0.0), recent=recent)
        p_value = scored_p_value(seen)
        if memory.last_fed is not None and seen.time - memory.last_fed < self.interval - self.slack:
            name: StateName = "UNSURE" if memory.state.name == "NO-VIEW" else memory.state.name
            state = moved(memory.state, name, "the view is back, no frame was fed yet", seen, memory.log_m)
            return replace(memory, state=replace(state, fed=False))
        log_m = detector_step(memory.log_m, log_e_value(p_value) - self.log_c)
        alarm = log_m >= self.log_a
        recent = () if alarm else self.votes.with_newest(memory.recent, p_value)
        name, reason = self._next(memory.state, seen.time, log_m, recent)
        state = moved(memory.state, name, reason, seen, log_m)
        return _Evidence(state, memory.begun, 0.0 if alarm else log_m, seen.time, recent)

    def _next(self, state: State, time: float, log_m: float, recent: tuple[float, ...]) -> tuple[StateName, str]:
        if log_m >= self.log_a:
            return "UNKNOWN", f"log evidence {log_m:.2f} reached {self.log_a:.2f}: {self.promise}"
        known = self.votes.known(recent)
        if state.name == "UNKNOWN" and (known < self.votes.k or time - state.since < self.hold):
            return "UNKNOWN", state.reason
        if log_m >= self.log_a / 2:
            return "UNSURE", f"log evidence {log_m:.2f} is over half of {self.log_a:.2f}"
        if known >= self.votes.k:
            return "KNOWN", self.votes.sentence(recent)
        if state.name == "KNOWN":
            return "KNOWN", state.reason
        return "UNSURE", self.votes.sentence(recent)


def e_cusum_for(contract: Contract, hours: float, fps: float | None, votes: Votes) -> ECusum:
    """Return the decision for an artifact: threshold, decimation, and what they promise.

    hours: mean time between false alarms. fps: frames a second that will come; None: as in the contract's episodes.

    The threshold is A, from hours and the frames fed a second; with enough episodes (59) it is raised to the threshold
    by episode where that is larger, so that both statements hold. Where no decimation could be set A says nothing, and
    the threshold by episode stands alone.

    Raises:
        UsageError: no frames a second, or hours and frames a second that make no threshold.
        CalibrationError: no decimation could be set, and there are too few episodes for a threshold by episode.
    """
    stream, calibration = contract.stream, contract.calibration
    rate = fps if fps is not None else (stream.fps if stream else None)
    if rate is None or not 0 < rate < float("inf"):
        raise UsageError(
            f"e-cusum needs the frames a second that will come, and they are {rate}; say them, or calibrate the "
            "artifact on video with: grood-edge calibrate MODEL --episodes DIR"
        )
    log_c = math.log(correction(calibration.class_sizes or (calibration.n,)))
    interval = _interval(stream)
    log_a = log_threshold(hours, rate / fed_every(interval, rate))
    seen = calibration.guarantee == "none"
    void = "; calibrated on images seen in training, so no mean time is promised" if seen else ""
    promise = f"a mean of {hours:g} h between false alarms" + void
    if stream is None:
        promise += ", for independent frames only, which those of a video are not (calibrate --episodes)"
    else:
        log_a, promise = _with_episodes(stream, log_a, promise)
    return ECusum(log_a, log_c, interval, slack_of(interval, rate), promise, votes)


def _interval(stream: StreamCalibration | None) -> float:
    """Return the seconds between fed frames; without a decimation those at which the episodes were scored."""
    if stream is None:
        return 0.0
    return 1 / stream.fps if stream.interval is None else stream.interval


def _with_episodes(stream: StreamCalibration, log_a: float, promise: str) -> tuple[float, str]:
    by_episode = threshold_by_episode(stream.maxima, EPISODE_ALPHA, EPISODE_DELTA)
    most = f"at most {EPISODE_ALPHA:.0%} of episodes like the {stream.episodes} calibrated on, with 95 % confidence"
    if stream.interval is None:
        if by_episode is None:
            raise CalibrationError(
                f"e-cusum: frames of the {stream.episodes} episodes stay correlated too long for a decimation, and a "
                f"threshold by episode needs {least_calibration_images(EPISODE_ALPHA, EPISODE_DELTA)} of them; "
                "calibrate on more and longer episodes, or use hysteresis, which promises nothing"
            )
        return by_episode, f"threshold by episode: {most}; no mean time can be promised"
    fed = f"{promise}, fed every {stream.interval:.3g} s, without scene effects"
    if by_episode is None:
        return log_a, fed
    if by_episode > log_a:
        return by_episode, f"threshold by episode: {most}; it is above that for {fed}"
    return log_a, f"{fed}; above the threshold by episode: {most}"
