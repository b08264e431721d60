"""`--rerun`: pictures, scores and states on Rerun's timelines."""

from pathlib import Path
from typing import Any

from grood_edge.errors import MissingExtraError, OutputError, UsageError
from grood_edge.publishing import check_output
from grood_edge.runtime.capture.sources import Source
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry.disk import require_room
from grood_edge.telemetry.picture import jpeg, picture_of
from grood_edge.telemetry.record import wall_time

__all__ = ["RerunLog", "open_rerun"]

WIDE, QUALITY = 640, 75  # of the pictures: Rerun keeps all of them


def open_rerun(target: str, force: bool, source: Source) -> "RerunLog":
    """Open a recording: `spawn` starts Rerun's viewer, `NAME.rrd` is a file, `rerun+http://...` a viewer elsewhere.

    Raises:
        MissingExtraError: the package rerun-sdk is not installed.
        UsageError: another target.
        OutputError: the file cannot be written or exists without `force`, or the viewer does not start.
    """
    file = Path(target) if target.lower().endswith(".rrd") else None
    if file is None and target != "spawn" and not target.startswith(("rerun+http://", "rerun+https://")):
        raise UsageError(f"--rerun got {target!r}; expected spawn, a file NAME.rrd, or rerun+http://HOST:9876/proxy")
    if file is not None:
        check_output(file, force)
    try:
        import rerun
    except ImportError as error:
        raise MissingExtraError("rerun-sdk", "rerun", "Logging to Rerun (--rerun)") from error
    stream = rerun.RecordingStream("grood-edge")
    try:
        if file is not None:
            stream.save(file)
        elif target == "spawn":
            stream.spawn()
        else:
            stream.connect_grpc(target)
    except Exception as error:  # the SDK raises what its Rust half says: RuntimeError, ValueError, OSError
        raise OutputError(f"Rerun cannot open {target}: {error}") from error
    return RerunLog(rerun, stream, file, source)


class RerunLog:
    """Logs `camera`, `ood_score`, `p_value`, `age`, `latency` and, when it changes, `state`."""

    def __init__(self, module: Any, stream: Any, file: Path | None, source: Source) -> None:
        self._rerun = module
        self._stream = stream
        self._file = file
        self._color = source.color
        self._said = ""  # the last state and status

    def write(self, verdict: StreamVerdict) -> None:
        """Log one verdict.

        Raises:
            OutputError: the disk of the file is nearly full.
        """
        if self._file is not None:
            require_room(self._file)
        rerun, stream, frame = self._rerun, self._stream, verdict.frame
        stream.set_time("capture", timestamp=wall_time(frame.captured))
        stream.set_time("frame", sequence=frame.index)
        if (image := picture_of(frame)) is not None:
            contents = jpeg(image, self._color, QUALITY, WIDE)
            stream.log("camera", rerun.EncodedImage(contents=contents, media_type="image/jpeg"))
        values = {"age": verdict.age}
        if verdict.verdict is not None:
            said = verdict.verdict
            values |= {"ood_score": said.ood_score, "p_value": said.p_value, "latency": verdict.latency}
        if verdict.drift is not None:
            values["drift"] = verdict.drift.statistic
        for name, value in values.items():
            stream.log(name, rerun.Scalars(value))
        if (now := f"{verdict.state.name} ({verdict.status})") != self._said:
            self._said = now
            level = rerun.TextLogLevel.WARN if verdict.state.name == "UNKNOWN" else rerun.TextLogLevel.INFO
            stream.log("state", rerun.TextLog(f"{now}: {verdict.state.reason}", level=level))

    def close(self) -> None:
        """Send what waits, and finish the file."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.flush(timeout_sec=10)
            stream.disconnect()
