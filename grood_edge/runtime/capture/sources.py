"""Where frames come from: one `Source` whatever it is, each frame with the time at which it was taken."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from grood_edge.errors import SourceError, UsageError
from grood_edge.images import IMAGE_SUFFIXES
from grood_edge.preprocessing import Color

__all__ = ["CapturedFrame", "Clock", "Shot", "Source", "SourceOptions", "StreamedSource", "open_source"]

Clock = Callable[[], float]


@dataclass(frozen=True)
class CapturedFrame:
    """A frame as it came, with its times.

    image: uint8 `[h, w, 3]` in the source's channel order, `[h, w, 1]` or `[h, w]`; None where the source delivered
    something that is no picture (`problem` says what). index: counted from 0 in the source, damaged frames included.
    captured: seconds of `time.monotonic()` when it arrived here. source_time: seconds on the source's own clock (a
    video's position, a bag's stamp), None where it has none. source: name. problem: why it is no picture, or, in a
    stream's verdict, why it was not scored. cut_off: the recording ends here, too early.
    """

    image: np.ndarray | None
    index: int
    captured: float
    source_time: float | None
    source: str
    problem: str | None = None
    cut_off: bool = False


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


@dataclass(frozen=True)
class SourceOptions:
    """What a source's text does not say.

    topic: of a bag; None takes its only image topic. fps: frames a second of an image folder, None where they have no
    times. reconnects: how often in a row a live source is opened again before it counts as gone. timeout: seconds
    within which a network camera must open, and deliver each frame.

    Raises:
        UsageError: a number out of its range.
    """

    topic: str | None = None
    fps: float | None = None
    reconnects: int = 6
    timeout: float = 5.0

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps <= 10_000:
            raise UsageError(f"fps is {self.fps:g}; expected more than 0 and at most 10,000 frames a second")
        if not 0 <= self.reconnects <= 1000 or not 0.1 <= self.timeout <= 3600:
            raise UsageError(
                f"reconnects is {self.reconnects} and timeout {self.timeout:g} s; expected 0 to 1000 times and 0.1 to "
                "3600 s"
            )


@dataclass(frozen=True)
class Shot:
    """One frame of a source before it is counted and stamped; fields as in `CapturedFrame`."""

    image: np.ndarray | None
    source_time: float | None
    problem: str | None = None
    cut_off: bool = False


class StreamedSource:
    """A `Source` around an iterator of shots: counts them, stamps them, and releases what they come from, once.

    The iterator runs in the thread that reads. `closed` is set by `close`: an iterator that waits must wait for it.
    What is being read is only released after the read, because OpenCV and generators break otherwise.
    """

    def __init__(
        self,
        name: str,
        shots: Iterator[Shot],
        *,
        live: bool = False,
        fps: float | None = None,
        color: Color = "rgb",
        closed: threading.Event | None = None,
        release: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.name = name
        self.live = live
        self.fps = fps
        self.color: Color = color
        self._shots = shots
        self._closed = closed or threading.Event()
        self._release: Callable[[], None] | None = release
        self._clock = clock
        self._reading = threading.Lock()
        self._index = 0

    def read(self) -> CapturedFrame | None:
        """Return the next frame; None at the end, or once closed. Raises what the iterator raises."""
        try:
            with self._reading:
                shot = None if self._closed.is_set() else next(self._shots, None)
                if shot is None or self._closed.is_set():
                    self._closed.set()
                    return None
                index, self._index = self._index, self._index + 1
                return CapturedFrame(
                    shot.image, index, self._clock(), shot.source_time, self.name, shot.problem, shot.cut_off
                )
        except BaseException:
            self._closed.set()
            raise
        finally:
            if self._closed.is_set():
                self._free()

    def close(self) -> None:
        """End a read that waits, and release the device: at once, or when the read in progress is over."""
        self._closed.set()
        self._free()

    def _free(self) -> None:
        if self._reading.acquire(blocking=False):
            try:
                release, self._release = self._release, None
                if release is not None:
                    release()
            finally:
                self._reading.release()


_DEFAULTS = SourceOptions()
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_KNOWN = (
    "expected a folder or glob of images, a video file, a camera (0 or v4l2:///dev/video0), rtsp://..., a GStreamer "
    "pipeline ('... ! appsink'), an .mcap or .db3 file, a ROS 2 bag folder, or replay: before one of the files"
)


def open_source(spec: str, options: SourceOptions = _DEFAULTS, clock: Clock = time.monotonic) -> Source:
    """Open the source that a text names; `docs/sources.md` lists the kinds.

    Raises:
        SourceError: there is nothing of that name, it cannot be opened, or it would reach out to a network.
        MissingExtraError: it needs the extra `video` or `bag`.
        UsageError: a topic of what is no bag.
    """
    if not spec:
        raise SourceError(f"the source is empty; {_KNOWN}")
    if spec.startswith("replay:"):
        from grood_edge.runtime.capture.image_source import replay

        return replay(open_source(spec.removeprefix("replay:"), options, clock), options.fps, clock)
    if spec.isdecimal() or spec.startswith(("v4l2:", "rtsp:", "rtsps:", "/dev/")) or " ! " in spec:
        from grood_edge.runtime.capture.video import open_camera

        _require_no_topic(spec, options)
        return open_camera(spec, options, clock)
    if os.path.lexists(spec):
        return _open_path(Path(spec), options, clock)
    if scheme := _SCHEME.match(spec):
        raise SourceError(f"{spec!r} is no source: {scheme.group()!r} is not opened from here; {_KNOWN}")
    return _open_images(spec, options, clock)


def _open_path(path: Path, options: SourceOptions, clock: Clock) -> Source:
    from grood_edge.runtime.capture.bags import is_bag, open_bag

    if is_bag(path):
        return open_bag(path, options.topic, clock)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return _open_images(str(path), options, clock)
    if not path.is_file():
        raise SourceError(f"{path} is neither a file nor a folder; {_KNOWN}")
    from grood_edge.runtime.capture.video import open_video

    _require_no_topic(str(path), options)
    return open_video(path, clock)


def _open_images(spec: str, options: SourceOptions, clock: Clock) -> Source:
    from grood_edge.errors import DatasetError
    from grood_edge.runtime.capture.image_source import open_images

    try:
        source = open_images(spec, options.fps, clock)
    except DatasetError as error:
        raise SourceError(f"{error}. As a source of frames: {_KNOWN}") from error
    _require_no_topic(spec, options)
    return source


def _require_no_topic(spec: str, options: SourceOptions) -> None:
    if options.topic is not None:
        raise UsageError(f"a topic ({options.topic}) is chosen, but {spec} is no bag; leave --topic out")
