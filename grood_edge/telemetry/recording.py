"""`--record out.mp4`: the overlay as a video that can be read however the loop ends."""

from pathlib import Path
from typing import Any

import numpy as np

from grood_edge.errors import OutputError
from grood_edge.runtime.capture.sources import Source
from grood_edge.runtime.capture.video import open_opencv, require_utf8
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry.disk import check_growing, require_room
from grood_edge.telemetry.overlay import Overlay

__all__ = ["Recording", "open_recording"]

FPS = 30.0  # where the source names none, or one that no camera has
MOST_REPEATS = 5  # of one frame; a longer gap is shorter in the video, so that the loop is not held up
_INDEX_BYTES = 64  # that a frame takes in the index at the end of an .mp4, at most


def open_recording(path: Path, force: bool, source: Source, overlay: Overlay) -> "Recording":
    """Check that the video can be written; it is created at the first frame.

    Raises:
        MissingExtraError: OpenCV is not installed.
        UsageError: the path ends neither in `.mp4` nor in `.mkv`.
        OutputError: the folder is missing or not writable, or the file exists without `force`.
    """
    require_utf8(str(path.absolute()), OutputError)
    check_growing(path, (".mp4", ".mkv"), force)
    open_opencv("Writing a video")
    return Recording(path, source, overlay)


class Recording:
    """One video, MPEG-4. Of a camera, its time is that of the capture: frames are repeated or left out for it."""

    def __init__(self, path: Path, source: Source, overlay: Overlay) -> None:
        self.path = path
        self._cv2 = open_opencv("Writing a video")
        self._overlay = overlay
        self._fps = source.fps if source.fps is not None and 1 <= source.fps <= 240 else FPS
        self._live = source.live
        self._writer: Any = None
        self._frames = 0
        self._start = 0.0  # when the video began, by the clock of captures
        self._broken = False

    def write(self, verdict: StreamVerdict) -> None:
        """Draw and encode a frame.

        Raises:
            OutputError: the disk is nearly full, and the video can still be finished; or a frame was not written.
        """
        canvas = self._overlay.draw(verdict)
        # OpenCV 4 says nothing of a full disk, and an .mp4 without its end is lost: so it is never let come to that.
        require_room(self.path, 2 * canvas.nbytes + _INDEX_BYTES * self._frames)
        if self._writer is None:
            self._open(canvas)
            self._start = verdict.frame.captured
        for _ in range(self._due(verdict.frame.captured)):
            if self._writer.write(canvas) is False:
                self._broken = True
                raise OutputError(
                    f"OpenCV could not write frame {self._frames} of {self.path}: no room is left, or a limit on the "
                    "size of files is reached; an .mp4 that ends here cannot be played, an .mkv can"
                )
            self._frames += 1

    def close(self) -> None:
        """Finish the video, and see whether it can be read.

        Raises:
            OutputError: it cannot, or frames are missing.
        """
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        writer.release()
        if self._broken:  # was said
            return
        reader = self._cv2.VideoCapture(str(self.path))
        good, count = reader.read()[0], reader.get(self._cv2.CAP_PROP_FRAME_COUNT)
        reader.release()
        if self._frames and not (good and count > 0.99 * self._frames - 2):  # an .mkv gives its length, rounded
            raise OutputError(
                f"{self.path} lacks frames of the {self._frames} that were written: no room was left, or a limit on "
                "the size of files is reached"
            )

    def _open(self, canvas: np.ndarray) -> None:
        size = (canvas.shape[1], canvas.shape[0])
        code = self._cv2.VideoWriter_fourcc(*"mp4v")
        self._writer = self._cv2.VideoWriter(str(self.path), self._cv2.CAP_FFMPEG, code, self._fps, size)
        if not self._writer.isOpened():
            self._writer = None
            raise OutputError(
                f"OpenCV cannot write {self.path} ({size[0]}x{size[1]}, mp4v); choose another path, or install "
                "opencv-python-headless, which brings its own encoder"
            )

    def _due(self, captured: float) -> int:
        """Return how often this frame stands in the video, so that it keeps the camera's time."""
        if not self._live:
            return 1
        due = round((captured - self._start) * self._fps) + 1 - self._frames
        if due > MOST_REPEATS:  # the gap is cut out
            self._start += (due - MOST_REPEATS) / self._fps
        return min(max(due, 0), MOST_REPEATS)
