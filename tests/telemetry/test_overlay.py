"""What stands in the picture, whatever the frame's size, brightness and channels."""

import numpy as np
import pytest

from grood_edge.errors import MissingExtraError
from grood_edge.preprocessing import Color
from grood_edge.runtime.decision import StateName
from grood_edge.runtime.selftest import MODEL
from grood_edge.runtime.session import open_session
from grood_edge.telemetry.overlay import COLOURS, Overlay, score_axis
from tests.telemetry.conftest import AXIS, verdict_of

HISTORY = 60  # frames in the strip, here

pytest.importorskip("cv2", reason="OpenCV (extra video) is not installed")


@pytest.fixture(autouse=True)
def _short_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grood_edge.telemetry.overlay.HISTORY", HISTORY)


def drawn(image: np.ndarray | None, color: Color = "bgr", **options: object) -> np.ndarray:
    canvas = Overlay(AXIS, color).draw(verdict_of(0, image, **options))  # type: ignore[arg-type]
    return canvas


def picture_in(canvas: np.ndarray) -> np.ndarray:
    """The frame's part of a canvas 640 wide, without its border."""
    return canvas[54 + 3 : -64 - 3, 3:-3]


def test_the_frame_is_in_it_pixel_for_pixel(video: list[np.ndarray]) -> None:
    canvas = drawn(video[0])
    assert canvas.shape == (272 + 54 + 64, 640, 3)
    np.testing.assert_array_equal(picture_in(canvas), video[0][3:-3, 3:-3])


def test_channel_order(video: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(drawn(video[0]), drawn(video[0][..., ::-1], "rgb"))


@pytest.mark.parametrize("state", list(COLOURS))
def test_state_has_its_colour_around_the_frame_and_in_the_band(video: list[np.ndarray], state: StateName) -> None:
    canvas = drawn(video[0], state=state)
    assert tuple(canvas[56, 320]) == COLOURS[state]
    assert tuple(canvas[-1, -1]) == COLOURS[state]
    assert tuple(canvas[5, 3]) == COLOURS[state]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32), np.uint8),
        np.full((32, 32, 1), 255, np.uint8),
        np.zeros((2160, 3840, 3), np.uint8),
        np.zeros((3, 4001, 3), np.uint8),
        np.zeros((4001, 3, 3), np.uint8),
        np.zeros((101, 641, 3), np.uint8)[::-1],
        None,
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10), np.float32),
    ],
    ids=lambda image: "none" if image is None else f"{image.shape}-{image.dtype}",
)
def test_any_frame_gives_a_canvas_of_bounded_even_size(image: np.ndarray | None) -> None:
    canvas = drawn(image)
    height, width = canvas.shape[:2]
    assert width % 2 == 0
    assert height % 2 == 0
    assert 480 <= width <= 1280
    assert height <= 1080 + 2 * (54 + 64)


def test_later_frames_of_another_size_fit_the_first(video: list[np.ndarray], photo: np.ndarray) -> None:
    overlay = Overlay(AXIS, "bgr")
    shape = overlay.draw(verdict_of(0, video[0])).shape
    canvas = overlay.draw(verdict_of(1, photo))
    assert canvas.shape == shape
    assert not picture_in(canvas)[:, :180].any()  # black beside the square photo
    assert picture_in(canvas)[:, 190:440].mean() > 50
    empty = overlay.draw(verdict_of(2, None, "NO-VIEW", "INVALID"))
    assert not picture_in(empty).any()


@pytest.mark.parametrize("level", [0, 255])
def test_text_is_legible_on_black_and_on_white_frames(level: int) -> None:
    """The text never lies on the frame."""
    canvas = drawn(np.full((272, 640, 3), level, np.uint8))
    np.testing.assert_array_equal(picture_in(canvas), np.full_like(picture_in(canvas), level))
    text = canvas[2:30, 130:250].max(axis=-1)
    assert text.max() > 200
    assert np.median(text) < 40


def test_long_class_names_are_cut_before_the_p_value(video: list[np.ndarray]) -> None:
    short, long = drawn(video[0], name="great white shark"), drawn(video[0], name="great white shark, " * 400)
    assert (short[:54] != long[:54]).any()
    np.testing.assert_array_equal(short[:54, -125:], long[:54, -125:])


def test_a_name_without_letters_of_the_font_becomes_its_number(video: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(drawn(video[0], name="猫")[:54], drawn(video[0], name="class 3")[:54])


def test_the_strip_shows_scores_over_the_threshold_above_it(video: list[np.ndarray]) -> None:
    """Two runs: below the threshold, then above it; what is drawn brightly is below, then above, the dashed line."""
    overlay = Overlay(AXIS, "bgr")
    for index in range(HISTORY):
        late = index >= HISTORY // 2
        overlay.draw(verdict_of(index, video[0], "UNKNOWN" if late else "KNOWN", score=12.0 if late else 4.0))
    strip = overlay.draw(verdict_of(HISTORY, video[0], "UNKNOWN", score=12.0))[-64:].astype(int)
    green, red = strip[18:-8, 200:300], strip[18:-8, 500:620]
    green_rows = np.flatnonzero((green[..., 1] - green[..., 2] > 60).any(axis=1))
    red_rows = np.flatnonzero((red[..., 2] - red[..., 1] > 60).any(axis=1))
    assert green_rows.size
    assert red_rows.size
    assert red_rows.max() < green_rows.min()


def test_frames_without_a_score_are_a_gap(video: list[np.ndarray]) -> None:
    overlay = Overlay(AXIS, "bgr")
    for index in range(HISTORY):
        blind = 20 <= index < 40
        overlay.draw(verdict_of(index, video[0], "NO-VIEW" if blind else "KNOWN", "BLACK" if blind else "OK"))
    strip = overlay.draw(verdict_of(HISTORY, video[0]))[-64:]
    assert (strip[30, 230:400] == strip[30, 230]).all()
    assert strip[30, 300].max() > strip[30, 100].max()


def test_scores_that_are_no_numbers_or_far_away_are_cut_off(video: list[np.ndarray]) -> None:
    overlay = Overlay(AXIS, "bgr")
    for index, score in enumerate((3.4e38, -3.4e38, float("nan"), float("inf"))):
        overlay.draw(verdict_of(index, video[0], score=score))


def test_memory_of_the_strip_is_bounded(video: list[np.ndarray]) -> None:
    overlay = Overlay(AXIS, "bgr")
    for index in range(HISTORY + 5):
        overlay.draw(verdict_of(index, video[0][::8, ::8]))
    assert len(overlay._points) == HISTORY


def test_axis_of_an_artifact() -> None:
    with open_session(MODEL) as session:
        axis = score_axis(session.contract, session.rule)
        quantiles = session.contract.calibration.quantiles
    assert axis.threshold == session.rule.threshold(0)
    assert axis.low < quantiles[1] < axis.threshold < axis.high


def test_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"grood-edge\[video\]"):
        Overlay(AXIS, "bgr")
