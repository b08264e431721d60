"""ROS 2 image messages, as they lie in a bag: CDR bytes to a picture. Every length is checked before it is believed."""

import struct
from dataclasses import dataclass

import numpy as np

from grood_edge.images import MAX_PIXELS, UnreadableImageError, decode_image

__all__ = ["IMAGE_TYPES", "BadMessageError", "Picture", "UnknownEncodingError", "read_picture"]

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
_MAX_TEXT = 4096
_CHANNELS = {"rgb8": 3, "bgr8": 3, "8UC3": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "8UC1": 1}


class BadMessageError(Exception):
    """One message that is no picture; it becomes a frame with this problem."""


class UnknownEncodingError(BadMessageError):
    """A picture in an encoding that is not read: depth, Bayer patterns, YUV, 16 bits."""


@dataclass(frozen=True)
class Picture:
    """A decoded message.

    image: uint8 `[h, w, 3]` RGB or `[h, w, 1]`; read-only where it is the message's own memory. stamp: seconds of the
    message's header, None where it is zero.
    """

    image: np.ndarray
    stamp: float | None


def read_picture(message_type: str, data: bytes) -> Picture:
    """Decode a serialised message of one of `IMAGE_TYPES`.

    Raises:
        UnknownEncodingError: pixels of another kind than 8-bit RGB, BGR, RGBA, BGRA or grey.
        BadMessageError: the message is damaged, or contradicts itself.
    """
    try:
        cdr = _Cdr(data)
        seconds, nanoseconds = cdr.number("i"), cdr.number("I")
        cdr.text()  # frame_id
        stamp = seconds + nanoseconds / 1e9 if seconds or nanoseconds else None
        return Picture(_compressed(cdr) if "Compressed" in message_type else _raw(cdr), stamp)
    except (struct.error, UnicodeDecodeError) as error:
        raise BadMessageError(f"a message of {len(data)} bytes is no {message_type}: {error}") from error


def _raw(cdr: "_Cdr") -> np.ndarray:
    height, width, encoding = cdr.number("I"), cdr.number("I"), cdr.text()
    cdr.number("B")  # is_bigendian: no matter for bytes
    step, pixels = cdr.number("I"), cdr.octets()
    channels = _CHANNELS.get(encoding)
    if channels is None:
        raise UnknownEncodingError(
            f"encoding {encoding[:40]!r} is not read; expected {', '.join(_CHANNELS)}. Record the topic of a node that "
            "converts it (image_proc)"
        )
    row = width * channels
    if not 0 < height * width <= MAX_PIXELS or step < row or len(pixels) < step * (height - 1) + row:
        raise BadMessageError(
            f"an image of {width}x{height} {encoding} in {len(pixels)} bytes, {step} a row; expected at least {row} a "
            f"row, and at most {MAX_PIXELS:,} pixels"
        )
    flat = np.frombuffer(pixels, np.uint8)
    strides = (step, channels, 1)
    image = np.lib.stride_tricks.as_strided(flat, (height, width, channels), strides, writeable=False)
    if encoding in ("bgr8", "bgra8", "8UC3"):  # OpenCV's name for its own order
        image = image[..., 2::-1]
    return np.ascontiguousarray(image[..., :3])


def _compressed(cdr: "_Cdr") -> np.ndarray:
    form = cdr.text()
    if "compressedDepth" in form or form.startswith("16UC1"):
        raise UnknownEncodingError(f"format {form[:40]!r} is a depth image; expected JPEG or PNG of 8 bits")
    try:
        return decode_image(bytes(cdr.octets()))
    except UnreadableImageError as error:
        raise BadMessageError(f"a compressed image cannot be decoded: {error}") from error


class _Cdr:
    """Reads CDR, the serialisation of ROS 2: numbers aligned to their size, counted from behind the header."""

    def __init__(self, data: bytes) -> None:
        if len(data) < 4 or data[0] != 0 or data[1] not in (0, 1):
            raise BadMessageError(f"a message begins with {data[:4].hex() or 'nothing'}; expected CDR (0000 or 0001)")
        self._data = memoryview(data)[4:]
        self._order = "<" if data[1] else ">"
        self._at = 0

    def number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        self._at += -self._at % size
        value = struct.unpack_from(self._order + kind, self._data, self._at)[0]
        self._at += size
        return int(value)

    def octets(self) -> memoryview:
        """Return a sequence of bytes, as a view."""
        count = self.number("I")
        if count > len(self._data) - self._at:
            raise BadMessageError(f"{count} bytes are announced where {len(self._data) - self._at} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def text(self) -> str:
        octets = self.octets()
        if len(octets) > _MAX_TEXT:
            raise BadMessageError(f"a text of {len(octets)} bytes; expected at most {_MAX_TEXT}")
        return bytes(octets).rstrip(b"\0").decode()
