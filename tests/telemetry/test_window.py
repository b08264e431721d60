"""The window, against the real OpenCV where it has windows, and a written-down one where it has none."""

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grood_edge.errors import BackendError, MissingExtraError
from grood_edge.telemetry.overlay import Overlay
from grood_edge.telemetry.window import Window, open_window
from tests.telemetry.conftest import AXIS, verdict_of

cv2 = pytest.importorskip("cv2", reason="OpenCV (extra video) is not installed")


def test_a_build_without_windows_says_what_to_install() -> None:
    if "GUI:                           NONE" not in cv2.getBuildInformation():
        pytest.skip("this OpenCV has windows")
    with pytest.raises(BackendError, match=r"built without windows .*replace it with opencv-python"):
        open_window(Overlay(AXIS, "bgr"), lambda: None)


def test_without_a_display_or_with_one(video: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    if "GUI:                           NONE" in cv2.getBuildInformation():
        pytest.skip("this OpenCV is built without windows")
    if os.environ.get("DISPLAY"):
        window = open_window(Overlay(AXIS, "bgr"), lambda: None)
        window.write(verdict_of(0, video[0]))
        window.close()
    monkeypatch.setenv("DISPLAY", ":77")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(BackendError, match="is there a display"):
        open_window(Overlay(AXIS, "bgr"), lambda: None)


class Screen:
    """The five functions of OpenCV's windows, and what they were told."""

    def __init__(self) -> None:
        self.shown: list[np.ndarray] = []
        self.key = -1
        self.visible = 1.0
        self.closed = 0

    def module(self) -> Any:
        return SimpleNamespace(
            WINDOW_AUTOSIZE=1,
            WND_PROP_VISIBLE=4,
            namedWindow=lambda name, how: None,
            imshow=lambda name, image: self.shown.append(image.copy()),
            waitKey=lambda milliseconds: self.key,
            getWindowProperty=lambda name, what: self.visible,
            destroyWindow=self._destroy,
        )

    def _destroy(self, name: str) -> None:
        self.closed += 1


@pytest.mark.parametrize(("key", "visible", "ends"), [(-1, 1.0, 0), (ord("q"), 1.0, 2), (27, 1.0, 2), (-1, 0.0, 1)])
def test_q_esc_and_closing_end_the_stream(video: list[np.ndarray], key: int, visible: float, ends: int) -> None:
    screen, calls = Screen(), []
    window = Window(Overlay(AXIS, "bgr"), lambda: calls.append(1))
    window._cv2 = screen.module()
    screen.key, screen.visible = key, visible
    window.write(verdict_of(0, video[0]))
    window.write(verdict_of(1, video[1]))
    window.close()
    window.close()
    assert len(calls) == ends
    assert screen.closed == 1
    assert screen.shown[0].shape == (390, 640, 3)


def test_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"grood-edge\[video\]"):
        open_window(Overlay(AXIS, "bgr"), lambda: None)
