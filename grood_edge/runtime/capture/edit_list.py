"""How many frames of an .mp4 its edit list shows: players leave the others out, which its announced count includes."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["shown_frames"]

_MAX_MOOV = 64 << 20  # bytes of the part without pictures
_MAX_BOXES = 10_000  # beside one another
_MAX_FRAMES = 10_000_000


def shown_frames(path: Path) -> int | None:
    """Count the frames of the first video track that the edit list of an ISO file (.mp4, .mov) shows.

    None where there is no edit list, where the file is of another kind, and where its boxes contradict each other.
    """
    try:
        moov = _moov(path)
        return None if moov is None else _shown(moov)
    except (OSError, struct.error, ValueError, LookupError, ZeroDivisionError, OverflowError):
        return None


def _moov(path: Path) -> memoryview | None:
    """Read the box that describes the tracks, wherever it stands; nothing of the pictures is read."""
    with path.open("rb") as file:
        for _ in range(_MAX_BOXES):
            head = file.read(8)
            if len(head) < 8:
                return None
            size, kind = struct.unpack(">I4s", head)
            inside = struct.unpack(">Q", file.read(8))[0] - 16 if size == 1 else size - 8
            if kind == b"moov":
                return memoryview(file.read(inside)) if 0 < inside <= _MAX_MOOV else None
            if inside < 0:  # a size of 0 means up to the end
                return None
            file.seek(inside, 1)
    return None


def _shown(moov: memoryview) -> int | None:
    tracks = [box for kind, box in _boxes(moov) if kind == b"trak"]
    track = next((box for box in tracks if bytes(_inside(box, b"mdia", b"hdlr")[8:12]) == b"vide"), None)
    if track is None:
        return None
    edits = _inside(track, b"edts", b"elst")
    per_second, media_per_second = (_units(box) for box in (_inside(moov, b"mvhd"), _inside(track, b"mdia", b"mdhd")))
    times = np.sort(_frame_times(_inside(track, b"mdia", b"minf", b"stbl")))  # 10,000 edits of 10,000,000 frames
    count, form = struct.unpack_from(">I", edits, 4)[0], ">Qqhh" if edits[0] else ">Iihh"
    if count > _MAX_BOXES:
        return None
    shown = 0
    for index in range(count):
        lasts, start, _, _ = struct.unpack_from(form, edits, 8 + index * struct.calcsize(form))
        end = start + lasts * media_per_second / per_second if lasts else np.inf
        first, last = np.searchsorted(times, [start, end])
        shown += 0 if start < 0 else max(0, int(last) - int(first))
    return shown


def _frame_times(table: memoryview) -> np.ndarray:
    """Return when each frame is shown, in the track's own unit."""
    times = np.cumsum(_runs(_inside(table, b"stts")))
    times = np.concatenate(([0], times[:-1]))
    boxes = dict(_boxes(table))
    return times + _runs(boxes[b"ctts"])[: times.size] if b"ctts" in boxes else times


def _runs(box: memoryview) -> np.ndarray:
    """Unpack a table of (how many frames, value)."""
    pairs = np.frombuffer(box[8:], ">i4").reshape(-1, 2).astype(np.int64)
    if (pairs[:, 0] < 0).any() or pairs[:, 0].sum() > _MAX_FRAMES:
        raise ValueError("more frames than are looked at")
    return np.repeat(pairs[:, 1], pairs[:, 0])


def _units(header: memoryview) -> int:
    """Return units a second, of a header in its narrow or its wide form."""
    return int(struct.unpack_from(">I", header, 20 if header[0] else 12)[0])


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = 0
    for _ in range(_MAX_BOXES):
        if at + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, at)
        if size < 8:
            raise ValueError("a box that is smaller than its own head")
        yield kind, data[at + 8 : at + size]
        at += size


def _inside(data: memoryview, *names: bytes) -> memoryview:
    """Return the first box of that name, in the first of the name before it, and so on."""
    for name in names:
        found = next((box for kind, box in _boxes(data) if kind == name), None)
        if found is None:
            raise LookupError(name)
        data = found
    return data
