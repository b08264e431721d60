"""The video, read back by OpenCV: what is in it, its time, and what is left when the disk is full."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grood_edge.errors import OutputError, UsageError
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry import disk
from grood_edge.telemetry.overlay import COLOURS, Overlay
from grood_edge.telemetry.recording import MOST_REPEATS, Recording, open_recording
from tests.telemetry.conftest import AXIS, Camera, small_disk, verdict_of, write_all

cv2 = pytest.importorskip("cv2", reason="OpenCV (extra video) is not installed")
ROOT = Path(__file__).parent.parent.parent


def frames_of(path: Path) -> tuple[list[np.ndarray], float]:
    reader = cv2.VideoCapture(str(path))
    frames = []
    while (read := reader.read())[0]:
        frames.append(read[1])
    fps = reader.get(cv2.CAP_PROP_FPS)
    reader.release()
    return frames, fps


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_every_frame_of_a_file_is_in_it(tmp_path: Path, video: list[np.ndarray], suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    recording = open_recording(path, False, Camera(), Overlay(AXIS, "bgr"))
    assert not path.exists()
    for index, image in enumerate(video[:20]):
        recording.write(verdict_of(index, image, "KNOWN" if index < 10 else "UNKNOWN"))
    recording.close()
    recording.close()
    frames, fps = frames_of(path)
    assert (len(frames), fps) == (20, 25.0)
    assert frames[0].shape == (390, 640, 3)
    inner = frames[0][60:320, 6:-6].astype(int) - video[0][6:-6, 6:-6]
    assert np.abs(inner).mean() < 6  # MPEG-4 loses a little
    for frame, state in ((frames[2], "KNOWN"), (frames[-1], "UNKNOWN")):
        colour = frame[4:26, 4:9].reshape(-1, 3).mean(axis=0)
        assert np.abs(colour - COLOURS[state]).max() < 25  # type: ignore[index]


def test_a_camera_keeps_its_time(tmp_path: Path, video: list[np.ndarray]) -> None:
    """15 frames a second of a camera of 30, for 2 seconds; then nothing for a minute, then one more."""
    path = tmp_path / "out.mp4"
    recording = open_recording(path, False, Camera(live=True, fps=30.0), Overlay(AXIS, "bgr"))
    for index in range(30):
        recording.write(verdict_of(index, video[index], captured=100.0 + index / 15))
    recording.write(verdict_of(30, video[30], captured=162.0))
    recording.write(verdict_of(31, video[31], captured=162.0 + 1 / 30))
    recording.close()
    frames, fps = frames_of(path)
    assert fps == 30.0
    assert len(frames) == 59 + MOST_REPEATS + 1


def test_frames_faster_than_the_video_are_left_out(tmp_path: Path, video: list[np.ndarray]) -> None:
    recording = open_recording(tmp_path / "out.mp4", False, Camera(live=True, fps=None), Overlay(AXIS, "bgr"))
    for index in range(40):
        recording.write(verdict_of(index, video[index], captured=100.0 + index / 120))
    recording.close()
    assert len(frames_of(tmp_path / "out.mp4")[0]) == 11


@pytest.mark.parametrize("fps", [None, 0.0, 90_000.0, float("nan")])
def test_rates_that_no_camera_has(tmp_path: Path, video: list[np.ndarray], fps: float | None) -> None:
    recording = open_recording(tmp_path / "out.mp4", False, Camera(fps=fps), Overlay(AXIS, "bgr"))
    recording.write(verdict_of(0, video[0]))
    recording.close()
    assert frames_of(tmp_path / "out.mp4")[1] == 30.0


def test_no_frame_no_file(tmp_path: Path) -> None:
    open_recording(tmp_path / "out.mp4", False, Camera(), Overlay(AXIS, "bgr")).close()
    assert os.listdir(tmp_path) == []


def test_nearly_full_disk_leaves_a_whole_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: list[np.ndarray]
) -> None:
    monkeypatch.setattr(disk, "RESERVE", 2**20)
    with small_disk(tmp_path / "disk", 4) as small:
        recording = open_recording(small / "out.mp4", False, Camera(), Overlay(AXIS, "bgr"))
        noise = np.random.default_rng(0).integers(0, 256, (40, 272, 640, 3), np.uint8)
        with pytest.raises(OutputError, match="nearly full"):
            write_all(recording, (verdict_of(index, noise[index % 40]) for index in range(1000)))
        recording.close()
        frames, _ = frames_of(small / "out.mp4")
        assert len(frames) == recording._frames > 3


@pytest.mark.parametrize("silent", [False, True], ids=["answering", "silent"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_limit_on_file_size_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, video: list[np.ndarray], suffix: str, silent: bool
) -> None:
    """Free space does not show it: OpenCV 5 says so by its answer; 4 is silent, and it shows when all is read back."""
    path = tmp_path / f"out{suffix}"
    recording = open_recording(path, False, Camera(), Overlay(AXIS, "bgr"))
    recording.write(verdict_of(0, video[0]))
    if silent:
        writer = recording._writer
        monkeypatch.setattr(recording, "_writer", Silent(writer))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OutputError, match=r"could not write frame|lacks frames of the 121 that were written"):
            write_and_close(recording, (verdict_of(index, video[index % 40]) for index in range(120)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recording.close()
    assert (len(frames_of(path)[0]) > 10) == (suffix == ".mkv")


class Silent:
    """OpenCV 4's writer, which answers nothing."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, image: np.ndarray) -> None:
        self._writer.write(image)

    def release(self) -> None:
        self._writer.release()


def write_and_close(recording: Recording, verdicts: Iterable[StreamVerdict]) -> None:
    try:
        write_all(recording, verdicts)
    finally:
        recording.close()


WRITER = """
import sys, numpy as np
from pathlib import Path
from grood_edge.telemetry.overlay import Overlay
from grood_edge.telemetry.recording import open_recording
from tests.telemetry.conftest import AXIS, Camera, verdict_of
recording = open_recording(Path(sys.argv[1]), False, Camera(), Overlay(AXIS, "bgr"))
noise = np.random.default_rng(0).integers(0, 256, (272, 640, 3), np.uint8)
for index in range(40):
    recording.write(verdict_of(index, noise))
print("there", flush=True)
sys.stdin.read()
"""


def test_killed_mkv_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "out.mkv"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    with writer.stdin, writer.stdout:
        assert writer.stdout.readline() == b"there\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=30)
    assert len(frames_of(path)[0]) > 10


def test_refused_before_the_loop(tmp_path: Path) -> None:
    (tmp_path / "old.mp4").write_bytes(b"old")
    with pytest.raises(OutputError, match="use --force"):
        open_recording(tmp_path / "old.mp4", False, Camera(), Overlay(AXIS, "bgr"))
    with pytest.raises(UsageError, match=r"expected \.mp4 or \.mkv"):
        open_recording(tmp_path / "out.avi", False, Camera(), Overlay(AXIS, "bgr"))
    assert (tmp_path / "old.mp4").read_bytes() == b"old"


def test_a_name_that_opencv_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not UTF-8, and OpenCV cannot take it"):
        open_recording(tmp_path / os.fsdecode(b"o\xff.mp4"), False, Camera(), Overlay(AXIS, "bgr"))
