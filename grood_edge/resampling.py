"""Pillow's resampling of a part of a frame, and where that part lands: only the pixels that count are touched.

The axes are resampled in a fixed order, columns first: Pillow 13 began to choose it by the frame's shape, and filters
that overshoot give other pixels then, by up to 50 grey levels. Rows and columns beyond the filter's reach are left out
before Pillow reads the frame; the result stays the same to the bit.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = ["FILTERS", "Placement", "SourceSpan", "resample"]

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SUPPORT = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # pixels that a filter reaches, at scale 1
_MAX_STEP = (1 << 31) - 1  # bytes from row to row; Pillow's is a C int
_TALL = 100  # a kept part this many times higher than wide is resampled rows first


@dataclass(frozen=True)
class SourceSpan:
    """One axis of a resize: the source pixels from `low` to `high` become `out` pixels, from pixel `start` on.

    `low` and `high` are edges in source pixels, of `size`; Pillow rounds them to float32.
    """

    size: int
    low: float
    high: float
    start: int
    out: int

    @property
    def scale(self) -> float:
        """Source pixels an output pixel."""
        return float(np.float32(self.high) - np.float32(self.low)) / self.out

    def within_reach(self, support: int) -> "SourceSpan":
        """Return the span over the pixels alone that a filter reaches; `first` tells where they begin."""
        first = self.first(support)
        last = min(self.size, math.ceil(self.high + support * max(1.0, self.scale)) + 1)
        # the difference of a float32 and a smaller integer is a float32: nothing is rounded once more
        low, high = (float(np.float32(edge)) - first for edge in (self.low, self.high))
        return SourceSpan(last - first, low, high, self.start, self.out)

    def first(self, support: int) -> int:
        """Return the first source pixel that a filter may reach."""
        return max(0, math.floor(self.low - support * max(1.0, self.scale)) - 1)


@dataclass(frozen=True)
class Placement:
    """Which part of a frame is kept, and where it lands in the classifier's input."""

    rows: SourceSpan
    columns: SourceSpan


def resample(pixels: np.ndarray, placement: Placement, name: str, mode: str, order: str = "RGB") -> Image.Image:
    """Return the kept part of a frame as an image of `columns.out` x `rows.out` pixels.

    Args:
        pixels: uint8 `[h, w]` or `[h, w, 3]`.
        placement: of a frame of that size.
        name: the filter, a key of `FILTERS`.
        mode: `L` or `RGB`; other frames are converted first.
        order: `RGB` or `BGR`, of the channels of `pixels`.
    """
    rows, columns = placement.rows, placement.columns
    tall = rows.high - rows.low > _TALL * (columns.high - columns.low)
    if name in _SUPPORT:  # nearest adds its steps up, so that it would round otherwise from another start
        y, x = rows.first(_SUPPORT[name]), columns.first(_SUPPORT[name])
        rows, columns = rows.within_reach(_SUPPORT[name]), columns.within_reach(_SUPPORT[name])
        pixels = pixels[y : y + rows.size, x : x + columns.size]
    image = _image(pixels, order)
    if image.mode != mode:
        image = image.convert(mode)
    size, resampling = (columns.out, rows.out), FILTERS[name]
    if tall:  # columns first would need far more memory
        between = image.resize((columns.size, rows.out), resampling, box=(0, rows.low, columns.size, rows.high))
        return between.resize(size, resampling, box=(columns.low, 0, columns.high, rows.out))
    between = image.resize((columns.out, rows.size), resampling, box=(columns.low, 0, columns.high, rows.size))
    return between.resize(size, resampling, box=(0, rows.low, columns.out, rows.high))


def _image(pixels: np.ndarray, order: str) -> Image.Image:
    """Return the pixels as an image. Pillow reads the rows where they are: a crop's need not be copied together."""
    (height, width), (step, *inner) = pixels.shape[:2], pixels.strides
    mode, raw, channels = ("L", "L", 1) if pixels.ndim == 2 else ("RGB", order, 3)
    apart = not pixels.flags.c_contiguous and inner in ([1], [3, 1]) and width * channels <= step <= _MAX_STEP
    if apart:
        length = (height - 1) * step + width * channels
        memory = np.lib.stride_tricks.as_strided(pixels, (length,), (1,), writeable=False)
        return Image.frombytes(mode, (width, height), memory, "raw", raw, step, 1)
    return Image.frombuffer(mode, (width, height), np.ascontiguousarray(pixels), "raw", raw, 0, 1)
