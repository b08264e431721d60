"""A frame with what is held to be true above it, and the scores of the last frames below it."""

import collections
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grood_edge.conformal import DecisionRule
from grood_edge.contract import Contract
from grood_edge.preprocessing import Color
from grood_edge.runtime.capture.video import open_opencv
from grood_edge.runtime.decision import StateName
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry.picture import picture_of

__all__ = ["Overlay", "ScoreAxis", "score_axis"]

MIN_WIDTH, MAX_WIDTH = 480, 1280  # of the picture; smaller frames are enlarged, larger ones reduced
MAX_HEIGHT = 1080
HISTORY = 300  # frames in the strip
# Blue, green, red, as the canvas is: Pillow draws whatever three numbers it is given.
COLOURS: dict[StateName, tuple[int, int, int]] = {
    "KNOWN": (72, 139, 34),
    "UNKNOWN": (40, 44, 208),
    "UNSURE": (34, 168, 236),
    "NO-VIEW": (120, 110, 104),
}
_BACK, _TEXT, _DIM, _GRID = (26, 22, 20), (245, 242, 240), (176, 166, 160), (84, 75, 70)
_DRAWABLE = "\u024f"  # the last letter that Pillow's own font has: Latin with accents


@dataclass(frozen=True)
class ScoreAxis:
    """The strip's axis of ood_score, the same from the first frame to the last.

    threshold: above it a frame is OOD; None where each class has its own.
    """

    low: float
    high: float
    threshold: float | None


def score_axis(contract: Contract, rule: DecisionRule) -> ScoreAxis:
    """Return an axis from the lowest calibration scores to as far above the threshold; beyond, the line is cut off."""
    quantiles = contract.calibration.quantiles
    threshold = rule.threshold(0) if len(rule.ranks) == 1 else None
    top = quantiles[-1] if threshold is None else threshold
    span = max(top - quantiles[1], 1e-6)
    return ScoreAxis(quantiles[1] - 0.25 * span, top + span, threshold)


@dataclass(frozen=True)
class _Point:
    score: float | None
    state: StateName


class Overlay:
    """Draws one frame after the other on one canvas, whose size the first frame fixes.

    Outputs may share one: a verdict that was just drawn is not drawn again.
    """

    def __init__(self, axis: ScoreAxis, color: Color) -> None:
        self._cv2 = open_opencv("Drawing on frames")
        self._axis = axis
        self._color = color
        self._points: collections.deque[_Point] = collections.deque(maxlen=HISTORY)
        self._canvas = np.empty((0, 0, 3), np.uint8)
        self._drawn: StreamVerdict | None = None
        self._unit = 1.0  # what a pixel of a picture 640 wide is here
        self._head = self._strip = 0
        self._fonts: dict[int, Any] = {}

    def draw(self, verdict: StreamVerdict) -> np.ndarray:
        """Return uint8 `[height, width, 3]` BGR, only to be read, valid until the next call; always of one size."""
        if verdict is self._drawn:
            return self._canvas
        said, image = verdict.verdict, picture_of(verdict.frame)
        score = None if said is None or math.isnan(said.ood_score) else said.ood_score
        self._points.append(_Point(score, verdict.state.name))
        if not self._canvas.size:
            self._lay_out((272, 640) if image is None else (image.shape[0], image.shape[1]))
        height = self._canvas.shape[0]
        self._paste(self._drawn_head(verdict), 0)
        self._fill_picture(image)
        self._frame_picture(COLOURS[verdict.state.name])
        self._paste(self._drawn_strip(verdict), height - self._strip)
        self._drawn = verdict
        return self._canvas

    def _lay_out(self, size: tuple[int, int]) -> None:
        """Choose the canvas: both sides even, because video codecs cut odd ones."""
        height, width = size
        scale = min(max(1.0, MIN_WIDTH / width), MAX_WIDTH / width, MAX_HEIGHT / height)
        wide = max(MIN_WIDTH, round(width * scale))
        wide += wide % 2
        self._unit = min(max(wide / 640, 0.8), 2.0)
        self._head, self._strip = 2 * round(27 * self._unit), 2 * round(32 * self._unit)
        picture = max(2, round(height * scale))
        self._canvas = np.zeros((self._head + picture + picture % 2 + self._strip, wide, 3), np.uint8)

    def _fill_picture(self, image: np.ndarray | None) -> None:
        """Fit the frame between head and strip; what it leaves free stays black."""
        area = self._canvas[self._head : self._canvas.shape[0] - self._strip]
        if image is None:
            area[:] = 0
            return
        scale = min(area.shape[0] / image.shape[0], area.shape[1] / image.shape[1])
        # a frame that misses the area by the pixel that made it even fills it
        high, wide = (max(1, round(side * scale)) for side in image.shape[:2])
        high, wide = (full if full - part <= 2 else part for full, part in zip(area.shape, (high, wide), strict=False))
        if (high, wide) != area.shape[:2]:
            area[:] = 0
        top, left = (area.shape[0] - high) // 2, (area.shape[1] - wide) // 2
        cv2 = self._cv2
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST if scale >= 2 else cv2.INTER_LINEAR
        plain = image if image.shape[:2] == (high, wide) else cv2.resize(image, (wide, high), interpolation=how)
        if plain.ndim == 2 or plain.shape[2] == 1:
            plain = cv2.cvtColor(plain, cv2.COLOR_GRAY2BGR)
        elif self._color == "rgb":
            plain = cv2.cvtColor(plain, cv2.COLOR_RGB2BGR)
        area[top : top + high, left : left + wide] = plain

    def _frame_picture(self, colour: tuple[int, int, int]) -> None:
        area, thick = self._canvas[self._head : self._canvas.shape[0] - self._strip], max(2, round(3 * self._unit))
        for edge in (area[:thick], area[-thick:], area[:, :thick], area[:, -thick:]):
            edge[:] = colour

    def _drawn_head(self, verdict: StreamVerdict) -> Image.Image:
        """Draw two lines: state, class, p_value; then the frame, and why."""
        unit, width, colour = self._unit, self._canvas.shape[1], COLOURS[verdict.state.name]
        picture = Image.new("RGB", (width, self._head), _BACK)
        draw, large, small = ImageDraw.Draw(picture), self._font(18), self._font(12)
        chip = round(large.getlength("UNKNOWN") + 20 * unit)
        draw.rectangle((0, 0, chip, round(30 * unit)), fill=colour)
        text = (0, 0, 0) if verdict.state.name == "UNSURE" else (255, 255, 255)
        draw.text((chip / 2, 15 * unit), verdict.state.name, text, large, "mm")
        right, middle = width - 8 * unit, 15 * unit
        said = verdict.verdict
        value = verdict.status if said is None else f"p_value {said.p_value:.3f}"
        draw.text((right, middle), value, _TEXT, large, "rm")
        room = right - large.getlength(value) - chip - 24 * unit
        if said is not None:
            doubted = said.is_ood or verdict.state.name == "UNKNOWN"
            name = _fitted(_drawable(said.class_name, said.class_id) + "?" * doubted, large, room)
            draw.text((chip + 10 * unit, middle), name, _DIM if doubted else _TEXT, large, "lm")
        since, clock = max(0.0, verdict.time - verdict.state.since), verdict.frame.source_time
        where = f"frame {verdict.frame.index}" + ("" if clock is None else f"  {clock:.2f} s")
        low = self._head - 12 * unit
        draw.text((right, low), where, _DIM, small, "rm")
        why = f"for {since:.1f} s: {verdict.frame.problem or verdict.state.reason}"
        why = _fitted(_drawable(why), small, right - small.getlength(where) - 24 * unit)
        draw.text((8 * unit, low), why, _DIM, small, "lm")
        return picture

    def _drawn_strip(self, verdict: StreamVerdict) -> Image.Image:
        """Draw the scores of the last frames, newest on the right, over a band with their states."""
        width, height, unit = self._canvas.shape[1], self._strip, self._unit
        picture = Image.new("RGB", (width, height), _BACK)
        draw, small = ImageDraw.Draw(picture), self._font(12)
        band = round(5 * unit)
        top, bottom = round(16 * unit), height - band - round(3 * unit)
        step, first = width / HISTORY, HISTORY - len(self._points)

        def y(score: float) -> float:
            share = (score - self._axis.low) / (self._axis.high - self._axis.low)
            return bottom - min(max(share, 0.0), 1.0) * (bottom - top)

        if self._axis.threshold is not None:
            for x in range(0, width, round(12 * unit)):
                draw.line(
                    (x, y(self._axis.threshold), x + 6 * unit, y(self._axis.threshold)), _DIM, max(1, round(unit))
                )
        for start, run in _runs(self._points):
            left, right = (first + start) * step, (first + start + len(run)) * step
            colour = COLOURS[run[0].state]
            draw.rectangle((left, height - band, right, height), fill=colour)
            line = [((first + start + i + 0.5) * step, y(p.score)) for i, p in enumerate(run) if p.score is not None]
            if run[0].score is None:
                draw.rectangle((left, top, right, bottom), fill=_GRID)  # no score: a gap that is seen
            elif len(line) == 1:
                draw.line((left, line[0][1], right, line[0][1]), _lighter(colour), max(1, round(2 * unit)))
            else:
                draw.line(line, _lighter(colour), max(1, round(2 * unit)))
        said = verdict.verdict
        label = "ood_score" if said is None else f"ood_score {said.ood_score:.4g}"
        if self._axis.threshold is not None:
            label += f"   threshold {self._axis.threshold:.4g}"
        draw.text((8 * unit, 8 * unit), label, _DIM, small, "lm")
        return picture

    def _paste(self, picture: Image.Image, top: int) -> None:
        self._canvas[top : top + picture.height] = np.asarray(picture)

    def _font(self, size: int) -> Any:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(round(size * self._unit))
        return self._fonts[size]


def _runs(points: Iterable[_Point]) -> list[tuple[int, list[_Point]]]:
    """Split into runs of one state, with or without scores; each with the index of its first point."""
    runs: list[tuple[int, list[_Point]]] = []
    for index, point in enumerate(points):
        last = runs[-1][1][-1] if runs else None
        if last is None or last.state != point.state or (last.score is None) != (point.score is None):
            runs.append((index, []))
        runs[-1][1].append(point)
    return runs


def _drawable(text: str, class_id: int | None = None) -> str:
    """Replace what the font has no letter for; a class name that has none at all becomes its number."""
    plain = "".join(letter if letter.isprintable() and letter <= _DRAWABLE else "?" for letter in text)
    return f"class {class_id}" if class_id is not None and not plain.strip("? ") else plain


def _fitted(text: str, font: Any, room: float) -> str:
    """Cut the text to `room` pixels; an ellipsis says that it was cut."""
    text = text[:300]
    if font.getlength(text) <= room:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + "...") <= room else (low, middle - 1)
    return text[:low].rstrip() + "..." if low else ""


def _lighter(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a colour that is seen on the dark strip."""
    first, second, third = (round(part + 0.35 * (255 - part)) for part in colour)
    return first, second, third
