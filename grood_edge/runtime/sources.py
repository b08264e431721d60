"""Where frames come from: one `Source` whatever it is, each frame with the time at which it was taken."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

__all__ = ["CapturedFrame", "Color", "Source"]

Color = Literal["rgb", "bgr"]


@dataclass(frozen=True)
class CapturedFrame:
    """A frame as it came, with its times.

    image: uint8 `[h, w, 3]` in the source's channel order, `[h, w, 1]` or `[h, w]`; None where the source delivered
    something that is no picture (`problem` says what). index: counted from 0 in the source, damaged frames included.
    captured: seconds of `time.monotonic()` when it arrived here. source_time: seconds on the source's own clock (a
    video's position, a bag's stamp), None where it has none. source: name.
    """

    image: np.ndarray | None
    index: int
    captured: float
    source_time: float | None
    source: str
    problem: str | None = None


@runtime_checkable
class Source(Protocol):
    """Delivers frames one by one. A Protocol because users bring their own, and tests run without cameras.

    name: for logs. live: frames come whether or not they are read (a camera), or wait (a file). fps: frames a second
    that it means to deliver, None where unknown. color: channel order of its frames.
    """

    name: str
    live: bool
    fps: float | None
    color: Color

    def read(self) -> CapturedFrame | None:
        """Wait for the next frame; None at the end of a file. A camera that vanishes raises `SourceError`."""

    def close(self) -> None:
        """Release the device; wakes a `read` that waits. Called once or more, from any thread."""


Clock = Callable[[], float]
