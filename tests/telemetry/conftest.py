"""Stream verdicts made by hand, over frames of a real video."""

import itertools
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import skimage

from grood_edge.preprocessing import Color
from grood_edge.runtime.capture.sources import CapturedFrame
from grood_edge.runtime.decision import State, StateName, Status
from grood_edge.runtime.drift import Drift
from grood_edge.runtime.session import Verdict
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry.overlay import ScoreAxis
from grood_edge.telemetry.sink import Sink

AXIS = ScoreAxis(low=2.0, high=14.0, threshold=8.0)


@dataclass
class Camera:
    """What a sink asks of a source."""

    name: str = "bikes.mp4"
    live: bool = False
    fps: float | None = 25.0
    color: Color = "bgr"

    def read(self) -> CapturedFrame | None:
        return None

    def close(self) -> None:
        pass


def verdict_of(
    index: int,
    image: np.ndarray | None = None,
    state: StateName = "KNOWN",
    status: Status = "OK",
    changed: bool = False,
    name: str = "cup",
    score: float = 5.0,
    p_value: float = 0.42,
    captured: float | None = None,
    drift: Drift | None = None,
    dropped: int = 0,
    problem: str | None = None,
) -> StreamVerdict:
    """One verdict at 25 frames a second; scored where the status is OK."""
    when = time.monotonic() if captured is None else captured
    said = Verdict(3, name, score, p_value, p_value < 0.05, True) if status == "OK" else None
    known = name if state == "KNOWN" else None
    return StreamVerdict(
        frame=CapturedFrame(image, index, when, index / 25, "bikes.mp4", problem),
        time=index / 25,
        status=status,
        verdict=said,
        state=State(state, 0.0, "p_value at least 0.05 in 5 of 8 frames", known, 0.25),
        changed=changed,
        age=0.031,
        latency=0.0125 if said else 0.0,
        dropped=dropped,
        drift=drift,
    )


@pytest.fixture(scope="session")
def video() -> list[np.ndarray]:
    """Forty frames of a real video, uint8 [272, 640, 3] BGR."""
    pytest.importorskip("cv2", reason="OpenCV (extra video) is not installed")
    from tests.videos import frames_of, packaged_video

    frames = list(itertools.islice(frames_of(packaged_video("bikes.mp4")), 40))
    assert [frame.shape for frame in frames] == [(272, 640, 3)] * 40
    return frames


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """The astronaut, uint8 [512, 512, 3] RGB."""
    image: np.ndarray = skimage.data.astronaut()  # type: ignore[no-untyped-call]
    return image


def write_all(sink: Sink, verdicts: Iterable[StreamVerdict]) -> None:
    """Write until it fails, or all is written."""
    for verdict in verdicts:
        sink.write(verdict)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of a few MiB, which gets really full."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, timeout=20, check=True)
