"""What episodes of ID video showed: threshold by episode, and how often an e-CUSUM alarms on them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grood_edge.conformal import least_calibration_images
from grood_edge.contract import Contract, StreamCalibration
from grood_edge.runtime.correlation import Correlation
from grood_edge.runtime.e_cusum import (
    count_alarms,
    fed_every,
    hours_between_alarms,
    log_threshold,
    threshold_by_episode,
)
from grood_edge.runtime.e_cusum_rule import EPISODE_ALPHA, EPISODE_DELTA
from grood_edge.runtime.states import Status

__all__ = ["AlarmRate", "EpisodeReport", "ScoredEpisodes", "episode_report"]

FEW_EPISODES = 10
HOURS = (0.1, 1.0, 8.0)


@dataclass(frozen=True)
class ScoredEpisodes:
    """log e of every frame of each episode, already corrected, NaN where nothing was scored; and what stands beside.

    unhealthy: frames a status (BLACK, SATURATED, FROZEN) that were not scored, as `watch` would not score them.
    resized: frames of another size than the artifact's camera's, which `watch` would call INVALID.
    """

    log_e: tuple[np.ndarray, ...]
    fps: float
    hashes: np.ndarray
    not_valid: int
    unreadable: tuple[tuple[str, str], ...]
    unhealthy: dict[Status, int]
    resized: int = 0


@dataclass(frozen=True)
class AlarmRate:
    """How often an e-CUSUM set to a mean of `set_to` hours alarms on these episodes.

    lower, upper: of the mean hours between alarms, each with 95 % confidence if alarms come independently.
    """

    set_to: float
    alarms: int
    lower: float
    upper: float


@dataclass(frozen=True)
class EpisodeReport:
    """What was measured and written.

    hours: of video. threshold: by episode, as log M; None with fewer than `needed` episodes. not_valid: frames whose
    verdict was not valid. unreadable: (frame, reason). unhealthy: frames a status that were not scored.
    """

    path: Path
    stream: StreamCalibration
    contract: Contract
    correlation: Correlation
    hours: float
    threshold: float | None
    needed: int
    rates: tuple[AlarmRate, ...]
    not_valid: int
    unreadable: tuple[tuple[str, str], ...]
    unhealthy: dict[Status, int]
    warnings: tuple[str, ...]


def episode_report(target: Path, contract: Contract, scored: ScoredEpisodes, correlation: Correlation) -> EpisodeReport:
    """Say what the episodes carry; `contract` is the one that was written to `target`."""
    stream = contract.stream
    assert stream is not None
    every = fed_every(stream.interval or 0.0, stream.fps)
    length = sum(map(len, scored.log_e)) / stream.fps / 3600
    rates = []
    for set_to in (hours for hours in HOURS if 3600 * hours * stream.fps > every):
        log_a = log_threshold(set_to, stream.fps / every)
        alarms = sum(count_alarms(values, every, log_a) for values in scored.log_e)
        rates.append(AlarmRate(set_to, alarms, *hours_between_alarms(alarms, length)))
    warnings = []
    if contract.calibration.guarantee == "none":
        warnings.append(
            "the calibration images were seen in training, so no mean time between alarms can be promised: recalibrate "
            "with --data FRESH --threshold-only, then calibrate on the episodes again"
        )
    if too_often := [rate for rate in rates if rate.upper < rate.set_to]:
        warnings.append(
            f"e-cusum set to {too_often[-1].set_to:g} h alarmed {too_often[-1].alarms} times in {length:.2g} h: these "
            "episodes do not look like the calibration images, or hold objects that are not ID. If they are ID, "
            "recalibrate with --data on frames of this camera, then calibrate on the episodes again"
        )
    if scored.resized:
        camera = contract.preprocessing.camera
        assert camera is not None
        warnings.append(
            f"{scored.resized:,} frames of another size than the camera's {camera.height}x{camera.width} (height x "
            "width) were resized; watch would call them INVALID"
        )
    if correlation.lag is not None and len(scored.log_e) < FEW_EPISODES:
        warnings.append(f"{len(scored.log_e)} episodes hardly show how much scenes differ; {FEW_EPISODES} or more do")
    return EpisodeReport(
        path=target,
        stream=stream,
        contract=contract,
        correlation=correlation,
        hours=length,
        threshold=threshold_by_episode(stream.maxima, EPISODE_ALPHA, EPISODE_DELTA),
        needed=least_calibration_images(EPISODE_ALPHA, EPISODE_DELTA),
        rates=tuple(rates),
        not_valid=scored.not_valid,
        unreadable=scored.unreadable,
        unhealthy=scored.unhealthy,
        warnings=tuple(warnings),
    )
