"""`--show`: the overlay in a window; q, Esc or closing it ends the stream."""

import subprocess
import sys
from collections.abc import Callable

from grood_edge.errors import BackendError
from grood_edge.runtime.capture.video import open_opencv
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry.overlay import Overlay

__all__ = ["Window", "open_window"]

NAME = "grood-edge"
_KEYS = (ord("q"), 27)
_TRIAL = f"import cv2; cv2.namedWindow({NAME!r}); cv2.waitKey(1)"


def open_window(overlay: Overlay, end: Callable[[], object]) -> "Window":
    """Check in a process of its own that a window can be opened: without a display, Qt ends the process that asks.

    `end` is called when the user closes the window.

    Raises:
        MissingExtraError: OpenCV is not installed.
        BackendError: OpenCV was built without windows, or there is no display.
    """
    cv2 = open_opencv("Showing a window")
    try:
        tried = subprocess.run(  # noqa: S603 - our own words to our own interpreter
            [sys.executable, "-c", _TRIAL], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
        failed, said = tried.returncode != 0, tried.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        failed, said = True, ["no answer from the display within 60 seconds"]
    if failed:
        headless = "GUI:                           NONE" in cv2.getBuildInformation()
        advice = (
            "this OpenCV is built without windows (opencv-python-headless); replace it with opencv-python "
            "(pip uninstall opencv-python-headless; pip install opencv-python)"
            if headless
            else f"is there a display? OpenCV says: {said[-1] if said else 'nothing'}"
        )
        raise BackendError(f"--show cannot open a window: {advice}. --record and --log work without one")
    return Window(overlay, end)


class Window:
    """Shows each frame; never waits for the display longer than a millisecond."""

    def __init__(self, overlay: Overlay, end: Callable[[], object]) -> None:
        self._cv2 = open_opencv("Showing a window")
        self._overlay = overlay
        self._end = end
        self._open = False

    def write(self, verdict: StreamVerdict) -> None:
        """Show a frame; ends the stream when the user wants that."""
        cv2 = self._cv2
        canvas = self._overlay.draw(verdict)
        gone = self._open and cv2.getWindowProperty(NAME, cv2.WND_PROP_VISIBLE) < 1
        if not gone:
            if not self._open:
                cv2.namedWindow(NAME, cv2.WINDOW_AUTOSIZE)
                self._open = True
            cv2.imshow(NAME, canvas)
            gone = cv2.waitKey(1) & 0xFF in _KEYS
        if gone:
            self._end()

    def close(self) -> None:
        """Close the window."""
        if self._open:
            self._open = False
            self._cv2.destroyWindow(NAME)
