"""The outputs that a stream was asked for, each checked before the first frame."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from grood_edge.runtime.capture.mailbox import Capture
from grood_edge.runtime.session import Session
from grood_edge.telemetry.alarm_frames import open_alarm_frames
from grood_edge.telemetry.jsonl import open_json_lines
from grood_edge.telemetry.mcap_log import open_mcap
from grood_edge.telemetry.metrics import open_metrics
from grood_edge.telemetry.overlay import Overlay, score_axis
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
    """Open what was asked for, or nothing; a window that is closed ends the capture.

    Last come those that do something at once: no server is left running, and no file begun, when another one fails.

    Raises:
        UsageError: a name or address that says something else.
        MissingExtraError: a package is missing.
        OutputError: something cannot be written, or exists without `force`, or the port is taken.
        BackendError: no window can be shown.
    """
    source, sinks = capture.source, list[Sink]()
    with contextlib.ExitStack() as opened:

        def add(sink: Sink) -> None:
            opened.callback(sink.close)
            sinks.append(sink)

        if asked.log is not None:
            add(open_json_lines(asked.log, force))
        if asked.mcap is not None:
            add(open_mcap(asked.mcap, force))
        if asked.record is not None or asked.show:
            overlay = Overlay(score_axis(session.contract, session.rule), source.color)
            if asked.record is not None:
                add(open_recording(asked.record, force, source, overlay))
            if asked.show:
                add(open_window(overlay, capture.close))
        if asked.on_unknown is not None:
            add(open_alarm_frames(asked.on_unknown, source))
        if asked.metrics is not None:
            add(open_metrics(asked.metrics, session.contract.classes))
        if asked.rerun is not None:
            add(open_rerun(asked.rerun, force, source))
        opened.pop_all()
    return tuple(sinks)
