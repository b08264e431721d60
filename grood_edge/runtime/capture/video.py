"""Video files and cameras through OpenCV, which is imported here alone. A file opens no other file and no network."""

import contextlib
import glob
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grood_edge.errors import GroodEdgeError, MissingExtraError, SourceError
from grood_edge.images import MAX_PIXELS
from grood_edge.runtime.capture.edit_list import shown_frames
from grood_edge.runtime.capture.sources import Clock, Shot, Source, SourceOptions, StreamedSource

__all__ = ["open_camera", "open_opencv", "open_video", "require_utf8"]

# Containers only: playlists (hls, dash, concat, sdp) and image sequences name other files and hosts.
_CONTAINERS = "mov,avi,matroska,webm,mpegts,mpeg,mpegvideo,h264,hevc,m4v,flv,ogg,asf,mjpeg,gif,ivf"
_FILE_OPTIONS = f"format_whitelist;{_CONTAINERS}|protocol_whitelist;file"
_RTSP_OPTIONS = "rtsp_transport;tcp|protocol_whitelist;rtsp,rtsps,rtp,tcp,tls,udp"
_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
_environment = threading.Lock()
_LOOK_AHEAD = 256  # packets that fail in a row and still may be followed by a good one
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 8.0  # seconds before a camera is opened again; doubled each time


def open_video(path: Path, clock: Clock = time.monotonic) -> Source:
    """Open a video file; BGR. `source_time` is the position.

    A packet that cannot be decoded is a frame without image. If the file ends clearly before the number of frames it
    announces, less those that its edit list leaves out, a last frame without image says so.

    Raises:
        SourceError: it is no video that FFmpeg reads, is a playlist, or its frames are too large.
        MissingExtraError: OpenCV is not installed.
    """
    cv2 = open_opencv("reading videos and cameras")
    capture = _open(cv2, str(path.absolute()), cv2.CAP_FFMPEG, [], _FILE_OPTIONS)
    if capture is None:
        raise SourceError(
            f"{path} cannot be opened as a video: no container of {_CONTAINERS} that FFmpeg can read (an .mp4 that was "
            "cut off has no index; playlists are refused, because they name other files and hosts). Play it with "
            f"ffplay to see why, or convert it: ffmpeg -i {path.name} copy.mp4"
        )
    width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if not 0 < width * height <= MAX_PIXELS:
        capture.release()
        raise SourceError(f"{path} has frames of {width}x{height} pixels; expected 1 to {MAX_PIXELS:,} pixels")
    fps = _positive(capture.get(cv2.CAP_PROP_FPS))
    return StreamedSource(
        str(path),
        _read_file(cv2, capture, shown_frames(path)),
        fps=fps,
        color="bgr",
        release=capture.release,
        clock=clock,
    )


def open_camera(spec: str, options: SourceOptions, clock: Clock = time.monotonic) -> Source:
    """Open `0`, `v4l2:///dev/video0`, `/dev/video0`, `rtsp://...` or a GStreamer pipeline; BGR.

    A camera that stops is opened again after 0.5 s, 1 s, 2 s, ... at most 8 s; each time a frame without image says so.
    After `options.reconnects` times in a row without a frame, `read` raises `SourceError`.

    Raises:
        SourceError: it is not there, is no camera, or this OpenCV cannot open it.
        MissingExtraError: OpenCV is not installed.
    """
    cv2 = open_opencv("reading videos and cameras")
    name, connect = _connection(cv2, spec, options)
    capture = connect()
    if capture is None:
        raise SourceError(_not_opened(cv2, spec, name))
    live, closed = _Live(cv2, capture), threading.Event()
    return StreamedSource(
        name,
        _read_camera(live, connect, name, options.reconnects, closed),
        live=True,
        fps=_positive(capture.get(cv2.CAP_PROP_FPS)),
        color="bgr",
        closed=closed,
        release=live.release,
        clock=clock,
    )


def open_opencv(purpose: str) -> Any:
    """Return the module cv2, silent unless the user set its own variables: errors and problems say what goes wrong.

    Raises:
        MissingExtraError: OpenCV is not installed.
    """
    if "cv2" not in sys.modules:
        os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET; read when FFmpeg is first used
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError("opencv-python-headless", "video", purpose) from error
    return cv2


def require_utf8(name: str, kind: type[GroodEdgeError]) -> None:
    """Refuse a name that would end the process inside OpenCV; the error is of the given kind."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise kind(f"the name {name!a} is not UTF-8, and OpenCV cannot take it; choose another") from error


def _open(cv2: Any, what: str | int, api: int, parameters: list[int], options: str | None) -> Any:
    """Return an opened VideoCapture, or None. FFmpeg's options are read from the environment, so opening is locked."""
    require_utf8(str(what), SourceError)
    with _environment:
        before = os.environ.get(_OPTIONS)
        if options is not None:
            os.environ[_OPTIONS] = options
        try:
            capture = cv2.VideoCapture(what, api, parameters)
        except cv2.error:
            return None
        finally:
            if options is not None:
                os.environ.pop(_OPTIONS, None) if before is None else os.environ.update({_OPTIONS: before})
    if capture.isOpened():
        return capture
    capture.release()
    return None


def _read_file(cv2: Any, capture: Any, shown: int | None) -> Iterator[Shot]:
    announced, count, at = capture.get(cv2.CAP_PROP_FRAME_COUNT), 0, None
    announced = announced if shown is None else min(announced, shown)
    while True:
        failed = 0
        while failed < _LOOK_AHEAD and not capture.grab():  # False for a bad packet and for the end of the file alike
            failed += 1
        if failed == _LOOK_AHEAD:
            break
        for _ in range(failed):
            yield Shot(None, at, "a packet of the video could not be decoded")
        at = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        good, image = capture.retrieve()
        yield Shot(image, at) if good else Shot(None, at, "a frame of the video could not be converted")
        count += failed + 1
    if count < 0.99 * announced - 1:  # some containers only estimate how many there are
        yield Shot(
            None, at, f"the video ends after {count} of {announced:.0f} announced frames: cut off or damaged", True
        )


class _Live:
    """The capture of a camera, which may be replaced by a new one."""

    def __init__(self, cv2: Any, capture: Any) -> None:
        self._cv2 = cv2
        self.capture: Any = capture

    def read(self) -> Shot | None:
        """Return a frame with the camera's own time, where it has one; None where it gives none."""
        good, image = (False, None) if self.capture is None else self.capture.read()
        if not good:
            return None
        return Shot(image, _positive(self.capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1000))

    def release(self) -> None:
        capture, self.capture = self.capture, None
        if capture is not None:
            capture.release()


def _read_camera(
    live: _Live, connect: Callable[[], Any], name: str, reconnects: int, closed: threading.Event
) -> Iterator[Shot]:
    attempt = 0
    while True:
        shot = live.read()
        if shot is not None:
            attempt = 0
            yield shot
            continue
        live.release()
        if attempt == reconnects:
            raise SourceError(
                f"{name} vanished: it gave no frame, and {reconnects} attempts to open it again failed. Check cable, "
                "power and network, and start again"
            )
        attempt += 1
        yield Shot(None, None, f"the camera gives no frame; opening it again, attempt {attempt} of {reconnects}")
        if closed.wait(min(_FIRST_DELAY * 2 ** min(attempt - 1, 10), _LONGEST_DELAY)):
            return
        live.capture = connect()


def _connection(cv2: Any, spec: str, options: SourceOptions) -> tuple[str, Callable[[], Any]]:
    """Return the name of a camera, without its password, and how to open it."""
    if " ! " in spec:
        _require_gstreamer(cv2)
        return "gstreamer", lambda: _open(cv2, spec, cv2.CAP_GSTREAMER, [], None)
    if spec.startswith(("rtsp:", "rtsps:")):
        milliseconds = int(1000 * options.timeout)
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, milliseconds, cv2.CAP_PROP_READ_TIMEOUT_MSEC, milliseconds]
        own = None if _OPTIONS in os.environ else _RTSP_OPTIONS  # the user's own are left as they are
        return re.sub(r"//[^/]*@", "//", spec), lambda: _open(cv2, spec, cv2.CAP_FFMPEG, limits, own)
    device = spec.removeprefix("v4l2:").replace("///", "/", 1)
    if not (device.isdecimal() and len(device) <= 4):
        _require_device(spec, device)
        return device, lambda: _open(cv2, device, cv2.CAP_V4L2, [], None)
    if sys.platform == "linux":
        _require_device(spec, f"/dev/video{int(device)}")
    api = cv2.CAP_V4L2 if sys.platform == "linux" else cv2.CAP_ANY
    return f"camera {int(device)}", lambda: _open(cv2, int(device), api, [], None)


def _require_device(spec: str, device: str) -> None:
    there = ", ".join(sorted(glob.glob("/dev/video*"))) or "none"
    with contextlib.suppress(OSError):
        if re.fullmatch(r"/dev/[\w/.:-]+", device) and stat.S_ISCHR(os.stat(device).st_mode):
            return
    raise SourceError(
        f"{spec!r} is no camera: {device!r} is no device; expected 0 or v4l2:///dev/video0. Cameras here: {there}. "
        "In a container, hand the device in (docker run --device /dev/video0)"
    )


def _require_gstreamer(cv2: Any) -> None:
    found = re.search(r"GStreamer:\s*(\w+)", cv2.getBuildInformation())
    if found is None or found.group(1) != "YES":
        raise SourceError(
            f"this OpenCV ({cv2.__version__}) was built without GStreamer, as all of PyPI's are, and cannot run a "
            "pipeline. Use an OpenCV that has it (JetPack's or Debian's python3-opencv, or your own build)"
        )


def _not_opened(cv2: Any, spec: str, name: str) -> str:
    if " ! " in spec:
        return (
            "GStreamer cannot start the pipeline; try it with gst-launch-1.0, and end it in 'videoconvert ! "
            "video/x-raw,format=BGR ! appsink drop=true max-buffers=1'"
        )
    if spec.startswith("rtsp"):
        return f"{name} does not answer as an RTSP camera; check address, user, password and that ffplay shows it"
    return (
        f"{name} cannot be opened: no video capture device, used by another program, or not readable by this user "
        f"(group video). OpenCV {cv2.__version__}; v4l2-ctl --list-devices shows what is there"
    )


def _positive(number: float) -> float | None:
    return float(number) if np.isfinite(number) and number > 0 else None
