"""The outputs that a stream was asked for, each checked before the first frame."""

from dataclasses import dataclass
from pathlib import Path

from grood_edge.runtime.mailbox import Capture
from grood_edge.runtime.session import Session
from grood_edge.telemetry.alarm_frames import open_alarm_frames
from grood_edge.telemetry.jsonl import open_json_lines
from grood_edge.telemetry.mcap_log import open_mcap
from grood_edge.telemetry.metrics import open_metrics
from grood_edge.telemetry.overlay import score_axis
from grood_edge.telemetry.recording import open_recording
from grood_edge.telemetry.rerun_log import open_rerun
from grood_edge.telemetry.sink import Sink
from grood_edge.telemetry.window import open_window

__all__ = ["Asked", "open_sinks"]


@dataclass(frozen=True)
class Asked:
    """As on the command line: `on_unknown` is `save:DIR`, `metrics` is `[HOST]:PORT`."""

    show: bool = False
    record: Path | None = None
    log: Path | None = None
    mcap: Path | None = None
    rerun: str | None = None
    metrics: str | None = None
    on_unknown: str | None = None


def open_sinks(asked: Asked, session: Session, capture: Capture, force: bool) -> tuple[Sink, ...]:
    """Open what was asked for; a window that is closed ends the capture.

    Raises:
        UsageError: a name or address that says something else.
        MissingExtraError: a package is missing.
        OutputError: something cannot be written, or exists without `force`, or the port is taken.
        BackendError: no window can be shown.
    """
    source, axis = capture.source, score_axis(session.contract, session.rule)
    sinks: list[Sink] = []
    if asked.log is not None:
        sinks.append(open_json_lines(asked.log, force))
    if asked.mcap is not None:
        sinks.append(open_mcap(asked.mcap, force))
    if asked.record is not None:
        sinks.append(open_recording(asked.record, force, source, axis))
    if asked.rerun is not None:
        sinks.append(open_rerun(asked.rerun, force, source))
    if asked.on_unknown is not None:
        sinks.append(open_alarm_frames(asked.on_unknown, source))
    if asked.show:
        sinks.append(open_window(source, axis, capture.close))
    if asked.metrics is not None:  # last: a server that was started would have to be stopped
        sinks.append(open_metrics(asked.metrics, session.contract.classes))
    return tuple(sinks)
