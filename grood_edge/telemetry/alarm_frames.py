"""`--on-unknown save:DIR`: the frames around each change to UNKNOWN, within a number of bytes on disk."""

import collections
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grood_edge.errors import OutputError, UsageError
from grood_edge.publishing import published, write_error
from grood_edge.runtime.capture.sources import Source
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry.alarm_folder import AlarmFolder, alarm_name
from grood_edge.telemetry.picture import jpeg, picture_of
from grood_edge.telemetry.record import json_bytes, record_of

__all__ = ["AlarmFrames", "open_alarm_frames"]

AROUND = 10  # frames before the change, and as many after it
RING_BYTES = 128 * 2**20  # of pixels waiting; with larger frames fewer stay
DISK_BYTES = 2**30
QUALITY = 95  # of the JPEG
_AT_ONCE = 2  # frames written while one is looked at, so that an alarm does not hold the loop up


def open_alarm_frames(action: str, source: Source, disk_bytes: int = DISK_BYTES) -> "AlarmFrames":
    """Check the folder of `save:DIR`, made with the first alarm; those of earlier runs count into `disk_bytes`.

    Raises:
        UsageError: another action, or no folder.
        OutputError: the folder cannot be made, read or written.
    """
    kind, _, name = action.partition(":")
    if kind != "save" or not name:
        raise UsageError(f"--on-unknown got {action!r}; expected save:DIR, such as save:alarms")
    path = Path(name)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise OutputError(f"cannot make the folder {path}: it is a file; name another one")
    there = path if os.path.isdir(path) else path.absolute().parent
    if not os.path.isdir(there):
        raise OutputError(f"cannot make the folder {path}: {there} is no folder; create it first")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {there} is not writable; name another one")
    return AlarmFrames(AlarmFolder(path, disk_bytes), source)


@dataclass(frozen=True)
class _Kept:
    document: dict[str, Any]
    image: np.ndarray | None


class AlarmFrames:
    """Keeps the last frames, and when the state becomes UNKNOWN writes them, that one and those that follow.

    An alarm during an alarm begins a folder of its own; no frame stands in two.
    """

    def __init__(self, folder: AlarmFolder, source: Source) -> None:
        self._folder = folder
        self._color = source.color
        self._ring: collections.deque[_Kept] = collections.deque()
        self._ring_bytes = 0
        self._pending: collections.deque[tuple[str, _Kept]] = collections.deque()
        self._alarm = ""
        self._newest = -1
        self._left = 0  # frames that the alarm still waits for

    def write(self, verdict: StreamVerdict) -> None:
        """Keep a copy of the frame, and write what waits, at most two frames at a time.

        Raises:
            OutputError: the disk is full, or one alarm is larger than all that may be used.
        """
        again = verdict.frame.index == self._newest
        self._newest = verdict.frame.index
        if not (again and verdict.frame.image is None):  # a camera that stands still repeats its last index
            self._keep(verdict)
        for _ in range(min(_AT_ONCE, len(self._pending))):
            self._save(*self._pending.popleft())

    def _keep(self, verdict: StreamVerdict) -> None:
        document, image = record_of(verdict), picture_of(verdict.frame)
        if verdict.changed and verdict.state.name == "UNKNOWN":
            self._alarm = alarm_name(document["time"], verdict.frame.index)
            self._left = AROUND + 1
            self._pending.extend((self._alarm, one) for one in self._ring)
            self._ring.clear()
            self._ring_bytes = 0
        if self._left:
            self._left -= 1
            self._pending.append((self._alarm, _Kept(document, None if image is None else image.copy())))
        else:
            self._remember(document, image)

    def close(self) -> None:
        """Write what waits.

        Raises:
            OutputError: as in `write`.
        """
        self._ring.clear()
        self._ring_bytes = 0
        while self._pending:
            self._save(*self._pending.popleft())

    def _remember(self, document: dict[str, Any], image: np.ndarray | None) -> None:
        """Copy a frame into the ring: once that is full, into the pixels of its oldest."""
        copy = self._forget() if len(self._ring) == AROUND else None
        if image is None:
            copy = None
        elif copy is not None and copy.shape == image.shape:
            np.copyto(copy, image)
        else:
            copy = image.copy()
        self._ring.append(_Kept(document, copy))
        self._ring_bytes += 0 if copy is None else copy.nbytes
        while self._ring_bytes > RING_BYTES:
            self._forget()

    def _forget(self) -> np.ndarray | None:
        image = self._ring.popleft().image
        self._ring_bytes -= 0 if image is None else image.nbytes
        return image

    def _save(self, alarm: str, kept: _Kept) -> None:
        try:
            self._write_pair(alarm, kept)
        except OutputError:
            self._pending.clear()  # what still waits would fail alike, and hide the first reason
            raise

    def _write_pair(self, alarm: str, kept: _Kept) -> None:
        name = f"{kept.document['index']:08d}"
        picture = b"" if kept.image is None else jpeg(kept.image, self._color, QUALITY)
        document = {**kept.document, "picture_bytes": len(picture)}
        text = json_bytes(document) + b"\n"
        folder = self._folder.make_room(alarm, len(picture) + len(text))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(folder, error, "the frames of earlier alarms are whole") from error
        # The document first: a picture that a kill left without one would be taken for somebody else's, and stay.
        self._write(alarm, folder / f"{name}.json", text)
        if picture:
            try:
                self._write(alarm, folder / f"{name}.jpg", picture)
            except OutputError:
                (folder / f"{name}.json").unlink(missing_ok=True)
                self._folder.count(alarm, -len(text))
                raise

    def _write(self, alarm: str, path: Path, data: bytes) -> None:
        with published(path, force=True) as temporary:
            temporary.write_bytes(data)
        self._folder.count(alarm, len(data))
