"""Sources without a device: image files, arrays in memory, and a recording played as if it were live."""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from grood_edge.errors import SourceError
from grood_edge.images import UnreadableImageError, find_images, load_image
from grood_edge.preprocessing import Color
from grood_edge.runtime.capture.sources import CapturedFrame, Clock, Shot, Source, StreamedSource

__all__ = ["iterator_source", "open_images", "replay"]


def open_images(spec: str, fps: float | None = None, clock: Clock = time.monotonic) -> Source:
    """Open an image file, a folder (searched recursively) or a glob, in the order of the paths; RGB.

    A file that cannot be decoded is a frame without image whose `problem` names it.

    Args:
        spec: what is searched.
        fps: gives the frames a `source_time`; they are read as fast as they are taken all the same.
        clock: stamps `captured`.

    Raises:
        DatasetError: no image is there.
    """
    return StreamedSource(spec, _load(find_images(spec), fps), fps=fps, clock=clock)


def _load(paths: list[Path], fps: float | None) -> Iterator[Shot]:
    for index, path in enumerate(paths):
        at = None if fps is None else index / fps
        try:
            shot = Shot(load_image(path), at)
        except UnreadableImageError as error:
            shot = Shot(None, at, f"{path.name} cannot be decoded: {error}")
        yield shot


def iterator_source(
    frames: Iterable[np.ndarray], fps: float | None = None, color: Color = "rgb", name: str = "frames"
) -> Source:
    """Make a source of arrays that your own code takes: uint8 `[h, w, 3]`, `[h, w, 1]` or `[h, w]`.

    An array must not be changed after it was handed over. What the iterable raises, the consumer gets.

    Args:
        frames: read in the thread of the capture, as fast as they are taken.
        fps: gives the frames a `source_time`.
        color: channel order of the arrays.
        name: of the source, in logs.
    """
    return StreamedSource(name, _count(frames, fps), fps=fps, color=color)


def _count(frames: Iterable[np.ndarray], fps: float | None) -> Iterator[Shot]:
    for index, frame in enumerate(frames):
        at = None if fps is None else index / fps
        is_array = isinstance(frame, np.ndarray)
        yield Shot(frame, at) if is_array else Shot(None, at, f"{type(frame).__name__} instead of a NumPy array")


def replay(source: Source, fps: float | None = None, clock: Clock = time.monotonic) -> Source:
    """Play a recording as if it were live: each frame comes when it is due, whether or not anybody is ready for it.

    Args:
        source: a file; it is closed with this one. Up to its first picture it is read at once, to see whether it has
            times.
        fps: frames a second; None keeps the distances of the frames' `source_time`.
        clock: seconds; when frames are due, and `captured`.

    Raises:
        SourceError: the source is live already, has no times and no fps was given, or cannot be read.
    """
    try:
        head = [] if source.live else _up_to_a_picture(source)
    except BaseException:
        source.close()
        raise
    timed = not head or head[-1].image is None or head[-1].source_time is not None
    if source.live or (fps is None and not timed):
        source.close()
        reason = "is live already" if source.live else "has no times of its own; say how many frames a second (fps)"
        raise SourceError(f"{source.name} cannot be replayed: it {reason}")
    closed = threading.Event()
    return StreamedSource(
        source.name,
        _when_due(itertools.chain(head, _rest(source)), fps, closed, clock),
        live=True,
        fps=fps or source.fps,
        color=source.color,
        closed=closed,
        release=source.close,
        clock=clock,
    )


def _rest(source: Source) -> Iterator[CapturedFrame]:
    while (frame := source.read()) is not None:
        yield frame


def _up_to_a_picture(source: Source) -> list[CapturedFrame]:
    """Read the first frame that has a picture, and what damage comes before it."""
    head: list[CapturedFrame] = []
    for frame in _rest(source):
        head.append(frame)
        if frame.image is not None:
            break
    return head


def _when_due(
    frames: Iterable[CapturedFrame], fps: float | None, closed: threading.Event, clock: Clock
) -> Iterator[Shot]:
    start, first = clock(), None
    for frame in frames:
        at = frame.source_time if fps is None else frame.index / fps
        if at is not None:
            first = at if first is None else first
            wait = start + at - first - clock()
            if wait > 0 and closed.wait(wait):
                return
        yield Shot(frame.image, at, frame.problem, frame.cut_off)
