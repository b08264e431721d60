"""Calibrate a stream on episodes of ID video: the correlation time, and the largest evidence in each episode."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from grood_edge.artifact import Artifact, artifact_bytes, read_artifact
from grood_edge.contract import Contract, StreamCalibration
from grood_edge.contract_rules import MAX_EPISODES, MAX_FPS
from grood_edge.errors import DatasetError, UsageError, VerificationError
from grood_edge.frame_hashes import digest_of, frame_hash, require_new_frames
from grood_edge.images import UNREADABLE_LIMIT, name_some
from grood_edge.probes import replay_probes
from grood_edge.progress import Progress, silent
from grood_edge.publishing import check_output, publish
from grood_edge.runtime.capture.health import HealthMemory, HealthRules, check_frame, describe
from grood_edge.runtime.capture.sources import CapturedFrame, Source
from grood_edge.runtime.correlation import Correlation, correlation_lag
from grood_edge.runtime.e_cusum import correction, largest_evidence, log_e_value
from grood_edge.runtime.episode_report import EpisodeReport, ScoredEpisodes, episode_report
from grood_edge.runtime.session import Session, open_session
from grood_edge.runtime.states import Status

__all__ = ["EpisodeOptions", "OpenEpisode", "calibrate_episodes"]

MAX_FRAMES = 20_000_000  # eight bytes each are kept twice
SAME_RATE = 0.01
# As `stream.stream_rules` has it, but of any size: as in recalibration, the host resizes what is not the camera's.
HEALTH = HealthRules(max_age=None)

OpenEpisode = Callable[[Path], Source]


@dataclass(frozen=True)
class EpisodeOptions:
    """fps: frames a second of the episodes; None takes what the videos say, and a folder of images says nothing."""

    fps: float | None = None
    force: bool = False
    allow_unreadable: bool = False


def calibrate_episodes(
    path: Path | str,
    folder: Path | str,
    out: Path | str | None = None,
    options: EpisodeOptions | None = None,
    progress: Progress = silent,
    open_episode: OpenEpisode | None = None,
) -> EpisodeReport:
    """Measure ID video and write what it shows into the artifact's contract; graph and calibration stay as they are.

    Args:
        path: the artifact.
        folder: each entry is one independent episode of ID frames alone: a video, or a folder of images in order.
        out: where the new artifact is written; None replaces `path`, once the new one is verified.
        options: see `EpisodeOptions`.
        progress: called as episodes are read.
        open_episode: opens an entry as a `Source`; None is `sources.open_source`.

    Raises:
        GroodEdgeError: see `errors`; the artifact is left as it was.
    """
    options = options or EpisodeOptions()
    target, force = Path(path) if out is None else Path(out), options.force or out is None
    artifact = read_artifact(Path(path))
    check_output(target, force)
    entries = _entries(Path(folder))
    calibration = artifact.contract.calibration
    log_c = float(np.log(correction(calibration.class_sizes or (calibration.n,))))
    with open_session(path, any_size=True) as session:  # RGB frames of any size, as recalibration takes them
        if session.contract != artifact.contract:
            raise VerificationError(f"{path} was replaced while it was opened; run the command again")
        scored = _score(session, entries, options, log_c, open_episode or _open_source, progress)
    _require_good(artifact, scored, options)
    stream, correlation = _measured(scored)
    contract = replace(artifact.contract, stream=stream)
    publish(artifact_bytes(artifact.model, contract), target, force, check=lambda written: _require(written, contract))
    return episode_report(target, contract, scored, correlation)


def _entries(folder: Path) -> list[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DatasetError(
            f"cannot read the episodes in {folder}: {error.strerror}; expected a folder with a video or a folder of "
            "images for each episode"
        ) from error
    if not 1 <= len(entries) <= MAX_EPISODES:
        raise DatasetError(
            f"{folder} has {len(entries):,} episodes; expected 1 to {MAX_EPISODES:,}: videos, or folders of images"
        )
    for entry in entries:
        if not (entry.is_file() or entry.is_dir()) or " ! " in str(entry):
            raise DatasetError(
                f"{entry} is no episode; expected a video or a folder of images, without ' ! ' in its path, which is "
                "how GStreamer writes pipelines"
            )
    return entries


def _open_source(entry: Path) -> Source:
    from grood_edge.runtime.capture.sources import open_source

    source: Source = open_source(str(entry.absolute()))  # a name such as 0 would be a camera
    return source


@dataclass
class _Seen:
    """What all episodes amount to besides their scores."""

    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    unhealthy: Counter[Status] = field(default_factory=Counter)
    resized: int = 0

    @property
    def frames(self) -> int:
        return len(self.hashes) + len(self.unreadable) + self.unhealthy.total()


def _score(
    session: Session, entries: list[Path], options: EpisodeOptions, log_c: float, open_episode: OpenEpisode,
    progress: Progress,
) -> ScoredEpisodes:  # fmt: skip
    log_e, seen = [], _Seen()
    fps, not_valid = options.fps, 0
    same: dict[bytes, str] = {}
    for number, entry in enumerate(entries):
        progress("scoring episodes", number, len(entries))
        source, before = open_episode(entry), len(seen.hashes)
        try:
            fps = _rate(source, fps, options)
            values = _episode(session, source, log_c, seen)
        finally:
            source.close()
        if not np.isfinite(values).any():
            raise DatasetError(
                f"the episode {entry} has no frame that could be scored: all are unreadable, black, saturated or "
                "frozen; remove or repair it"
            )
        other = same.setdefault(hashlib.sha256(seen.hashes[before:].tobytes()).digest(), entry.name)
        if other != entry.name:
            raise DatasetError(
                f"the episodes {other} and {entry.name} are the same frames, and must be independent; remove one"
            )
        not_valid += int(np.isinf(values).sum())
        log_e.append(np.where(np.isinf(values), np.nan, values))
    progress("scoring episodes", len(entries), len(entries))
    assert fps is not None
    return ScoredEpisodes(
        tuple(log_e),
        fps,
        np.array(seen.hashes, np.uint64),
        not_valid,
        tuple(seen.unreadable),
        dict(seen.unhealthy),
        seen.resized,
    )


def _rate(source: Source, fps: float | None, options: EpisodeOptions) -> float:
    found = options.fps if options.fps is not None else source.fps
    if found is None or not 0 < found <= MAX_FPS:
        raise UsageError(
            f"the episode {source.name} has {found} frames a second; say it with --fps, a number above 0 and up to "
            f"{MAX_FPS:,.0f}"
        )
    if fps is not None and abs(found - fps) > SAME_RATE * fps:
        raise DatasetError(
            f"the episode {source.name} has {found:g} frames a second, and those before it {fps:g}; the correlation "
            "time is measured in frames, so convert the videos to one rate, or say it with --fps if the files are wrong"
        )
    return found if fps is None else fps


def _episode(session: Session, source: Source, log_c: float, seen: _Seen) -> np.ndarray:
    """Return log e of each frame, less the correction; NaN: not scored, infinite: not valid."""
    values, memory = array("d"), HealthMemory()
    while (captured := source.read()) is not None:
        if seen.frames >= MAX_FRAMES:
            raise DatasetError(f"the episodes have more than {MAX_FRAMES:,} frames; leave some out")
        memory, status = check_frame(HEALTH, memory, captured, captured.captured)
        if status == "OK":
            values.append(_log_e(session, source, captured, seen) - log_c)
            continue
        values.append(np.nan)
        if status == "INVALID":
            why = describe(HEALTH, captured, captured.captured, status)
            seen.unreadable.append((f"{source.name}[{captured.index}]", why))
        else:
            seen.unhealthy[status] += 1
    return np.array(values, np.float64)


def _log_e(session: Session, source: Source, captured: CapturedFrame, seen: _Seen) -> float:
    """Score a healthy frame; infinite where the verdict is not valid."""
    image = captured.image
    assert image is not None
    camera = session.contract.preprocessing.camera
    seen.resized += camera is not None and image.shape[:2] != (camera.height, camera.width)
    bgr = source.color == "bgr" and image.ndim == 3 and image.shape[2] == 3
    prepared = session.prepare(image[..., ::-1] if bgr else image)
    seen.hashes.append(frame_hash(prepared))
    verdict = session.verdicts(session.infer_prepared(prepared[None]))[0]
    return log_e_value(verdict.p_value) if verdict.valid else np.inf


def _require_good(artifact: Artifact, scored: ScoredEpisodes, options: EpisodeOptions) -> None:
    """Refuse episodes of which much is unreadable, and frames that the artifact was fitted on.

    Raises:
        DatasetError: says how many.
    """
    frames = len(scored.hashes) + len(scored.unreadable) + sum(scored.unhealthy.values())
    if len(scored.unreadable) > UNREADABLE_LIMIT * frames and not options.allow_unreadable:
        raise DatasetError(
            f"{len(scored.unreadable)} of {frames} frames cannot be read: {name_some(scored.unreadable)}. Repair or "
            "remove these, or accept it with --allow-unreadable"
        )
    require_new_frames(artifact.contract.fit, scored.hashes, "frames", "video")


def _measured(scored: ScoredEpisodes) -> tuple[StreamCalibration, Correlation]:
    correlation = correlation_lag(scored.log_e)
    seconds = None if correlation.lag is None else correlation.lag / scored.fps
    every = correlation.lag or 1
    stream = StreamCalibration(
        fps=scored.fps,
        episodes=len(scored.log_e),
        frames=sum(int(np.isfinite(values).sum()) for values in scored.log_e),
        correlation=seconds,
        interval=seconds,
        maxima=tuple(sorted((largest_evidence(values, every) for values in scored.log_e), reverse=True)),
        data_digest=digest_of(scored.hashes),
    )
    return stream, correlation


def _require(written: Path, contract: Contract) -> None:
    """Reopen what was written: the contract as meant, and every probe answered as before.

    Raises:
        VerificationError: it is not so.
    """
    with open_session(written) as session:
        report = replay_probes(session.contract, session.backend.run, session.backend.provider)
        if session.contract != contract or not report.passed:
            raise VerificationError(
                f"the written artifact does not answer like the one that was read: {report.flips} decision flips, "
                f"score error up to {report.largest_error:.1e}; nothing was changed. Run grood-edge verify on it"
            )
