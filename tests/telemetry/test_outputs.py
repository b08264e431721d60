"""Outputs are opened together: all, or nothing is left open and nothing was begun."""

import socket
from pathlib import Path

import numpy as np
import pytest

from grood_edge.errors import OutputError
from grood_edge.runtime.capture.mailbox import Capture, FramePolicy
from grood_edge.runtime.selftest import MODEL
from grood_edge.runtime.session import open_session
from grood_edge.telemetry.metrics import Metrics
from grood_edge.telemetry.outputs import Asked, open_sinks
from grood_edge.telemetry.overlay import Overlay
from grood_edge.telemetry.recording import Recording
from grood_edge.telemetry.window import Window
from tests.telemetry.conftest import Camera, verdict_of
from tests.telemetry.test_window import Screen


def test_when_one_fails_the_others_are_closed_and_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client (extra metrics) is not installed")
    served: list[Metrics] = []
    serve = Metrics.serve

    def serve_and_note(self: Metrics, host: str, port: int) -> None:
        serve(self, host, port)
        served.append(self)

    monkeypatch.setattr(Metrics, "serve", serve_and_note)
    asked = Asked(
        log=tmp_path / "a.jsonl", record=tmp_path / "a.mp4", on_unknown=f"save:{tmp_path / 'alarms'}", metrics=":0",
        rerun=str(tmp_path / "missing" / "a.rrd"),
    )  # fmt: skip
    with open_session(MODEL) as session, pytest.raises(OutputError, match="missing does not exist"):
        open_sinks(asked, session, Capture(Camera(), FramePolicy("newest")), force=False)
    (metrics,) = served
    host, _, port = metrics.address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_is_drawn_once_for_window_and_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: list[np.ndarray]
) -> None:
    drawn: list[int] = []
    head = Overlay._drawn_head

    def counted(self: Overlay, verdict: object) -> object:
        drawn.append(1)
        return head(self, verdict)  # type: ignore[arg-type]

    monkeypatch.setattr(Overlay, "_drawn_head", counted)
    monkeypatch.setattr("grood_edge.telemetry.outputs.open_window", Window)
    with open_session(MODEL) as session:
        asked = Asked(show=True, record=tmp_path / "a.mp4")
        recording, window = open_sinks(asked, session, Capture(Camera(), FramePolicy("newest")), force=False)
    assert isinstance(recording, Recording)
    assert isinstance(window, Window)
    screen = Screen()
    monkeypatch.setattr(window, "_cv2", screen.module())
    for index in range(3):
        verdict = verdict_of(index, video[index])
        for sink in (recording, window):
            sink.write(verdict)
    recording.close()
    assert len(drawn) == len(screen.shown) == 3
    assert not (screen.shown[0] == screen.shown[1]).all()
