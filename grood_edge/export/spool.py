"""What a pass has read so far, on disk: after Ctrl-C the same export goes on where it stopped, to the same bytes.

One append-only file a pass: a line with the digest of all that the features depend on, then one record for every whole
batch with its features, labels, predictions, frame hashes, names, unreadable images and the frames that were kept.
A batch that was cut off or damaged fails its length or CRC and ends the file; the images from there on are read again.
Batches end at fixed places of the data set, so the network sees the same ones with and without an interruption.
"""

import contextlib
import hashlib
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.errors import DatasetError, OutputError, UsageError
from grood_edge.export.reservoir import Rows
from grood_edge.publishing import publish
from grood_edge.versions import numeric_versions

__all__ = ["BatchShape", "Spool", "SpoolPlan", "SpooledBatch", "check_spool_folder", "opened_spool", "remove_spools"]

MAX_TEXT = 64 << 20  # bytes of names in a record, and
MAX_DIMENSION = 1 << 20  # features of an image, beyond which a record is taken for damaged
_MAGIC = b"grood-edge spool 2 "
_HEADER = len(_MAGIC) + 64 + 1  # the digest in hex, and a line feed
_HEAD = struct.Struct("<IIIII")  # CRC-32 of what follows it, images, d, kept frames, bytes of text
_ROW = 8 + 8 + 8  # bytes of frame hash, label and prediction
_NAMES = ("fit", "calibration")


@dataclass(frozen=True)
class SpoolPlan:
    """Where a pass is spooled: the user's folder, the SHA-256 of the graph that runs, and which pass it is."""

    folder: Path
    graph: str
    name: Literal["fit", "calibration"] = "fit"

    @property
    def path(self) -> Path:
        """Return the path of the spool's only file."""
        return self.folder / f"{self.name}.spool"


@dataclass(frozen=True)
class BatchShape:
    """The most images of a batch, the number of classes, and height, width and channels of a preprocessed frame."""

    images: int
    class_count: int
    frame: tuple[int, int, int]


@dataclass(frozen=True)
class SpooledBatch:
    """A whole batch: its rows, frame hashes uint64 `[n]`, the frames kept of it, and images that failed before it."""

    rows: Rows
    hashes: np.ndarray
    frames: Frames
    unreadable: tuple[tuple[str, str], ...]


def check_spool_folder(folder: Path) -> None:
    """Make the folder when it is missing, and find out before the work whether it can be used.

    Raises:
        UsageError: it is a file, or holds files of these names that no spool wrote.
        OutputError: it cannot be made or written.
    """
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"--spool {folder} is a file; expected a folder") from error
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder} for --spool: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {folder} is not writable; choose another one for --spool")
    for name in _NAMES:
        _stored_digest(folder / f"{name}.spool")


def remove_spools(folder: Path) -> None:
    """Remove the spools of a folder, and nothing else."""
    for name in _NAMES:
        path = folder / f"{name}.spool"
        with contextlib.suppress(UsageError, OSError):  # not ours; or it stays: the result is there
            if _stored_digest(path) is not None:
                path.unlink()


@contextlib.contextmanager
def opened_spool(path: Path, inputs: Mapping[str, Any], shape: BatchShape) -> Iterator["Spool"]:
    """Open the spool of a pass, or begin one when there is none for these inputs.

    Args:
        path: the spool's file.
        inputs: all that the features depend on, as JSON values.
        shape: of a batch.

    Raises:
        UsageError: the file was not written by a spool, or another process uses it.
        OutputError: it cannot be read or written.
    """
    everything = [_MAGIC.decode(), dict(inputs), asdict(shape), numeric_versions()]
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    stored = _stored_digest(path)
    if stored != digest:
        _refuse_used(path)
        publish(_MAGIC + digest.encode() + b"\n", path, force=stored is not None)
    try:
        file = path.open("r+b")
    except OSError as error:
        raise OutputError(f"cannot open the spool {path}: {error.strerror or error}") from error
    with file:
        _lock(file, path)
        yield Spool(file, path, shape, replaced=stored not in (None, digest))


class Spool:
    """An open spool: first `read` until it gives None, then `append`. `replaced`: it held something else before."""

    def __init__(self, file: BinaryIO, path: Path, shape: BatchShape, replaced: bool) -> None:
        self.replaced = replaced
        self._file, self._path, self._shape = file, path, shape
        self._size = os.fstat(file.fileno()).st_size
        self._dimension: int | None = None
        file.seek(_HEADER)

    def read(self) -> SpooledBatch | None:
        """Return the next whole batch; None at the end, where damaged and cut-off records are dropped."""
        start = self._file.tell()
        try:
            batch = self._next()
            if batch is None:
                self._file.seek(start)
                self._file.truncate()
        except OSError as error:
            raise OutputError(f"cannot read the spool {self._path}: {error.strerror or error}") from error
        return batch

    def append(self, batch: SpooledBatch) -> None:
        """Store a whole batch.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        text = json.dumps([batch.rows.names, batch.unreadable]).encode()
        rows = batch.rows
        parts = (batch.hashes, rows.labels, rows.predictions, rows.features, batch.frames)
        body = b"".join([*(np.ascontiguousarray(part).tobytes() for part in parts), text])
        sizes = (*rows.features.shape, len(batch.frames), len(text))
        try:
            self._file.write(_HEAD.pack(_crc(sizes, body), *sizes) + body)
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot write the spool {self._path}: {error.strerror or error}. What it holds is kept: the same "
                "command goes on from there"
            ) from error

    def _next(self) -> SpooledBatch | None:
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        crc, *sizes = _HEAD.unpack(head)
        images, dimension, kept, text = sizes
        length = images * (_ROW + 4 * dimension) + kept * math.prod(self._shape.frame) + text
        if not kept <= images <= self._shape.images or images == 0 or dimension > MAX_DIMENSION or text > MAX_TEXT:
            return None
        if length > self._size - self._file.tell() or self._dimension not in (None, dimension):
            return None
        body = self._file.read(length)
        if len(body) < length or _crc(sizes, body) != crc:
            return None
        self._dimension = dimension
        return self._parsed(body, images, dimension, kept)

    def _parsed(self, body: bytes, n: int, dimension: int, kept: int) -> SpooledBatch | None:
        place = 0

        def array(dtype: str, *shape: int) -> np.ndarray:
            nonlocal place
            values = np.frombuffer(body, dtype, math.prod(shape), place).reshape(shape)
            place += values.nbytes
            return values

        hashes, labels, predictions = array("<u8", n), array("<i8", n), array("<i8", n)
        features, frames = array("<f4", n, dimension), array("u1", kept, *self._shape.frame)
        ids = np.concatenate([labels, predictions])
        text = _parsed_text(body[place:], n)
        if text is None or ids.min() < 0 or ids.max() >= self._shape.class_count:
            return None
        return SpooledBatch(Rows(features, labels, predictions, text[0]), hashes, frames, text[1])

    def refuse(self) -> None:
        """Refuse a batch whose parts do not agree.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(f"the spool {self._path} contradicts itself; remove that file and start again")


def _crc(sizes: Any, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<IIII", *sizes)))


def _parsed_text(text: bytes, count: int) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]] | None:
    """Return names and unreadable images; None when a record holds something else."""
    try:
        names, unreadable = json.loads(text)
        pairs = tuple((name, reason) for name, reason in unreadable)
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or len(names) != count:
        return None
    if not all(isinstance(value, str) for value in (*names, *(value for pair in pairs for value in pair))):
        return None
    return tuple(names), pairs


def _stored_digest(path: Path) -> str | None:
    """Return the digest of the spool that lies there; None when there is nothing.

    Raises:
        UsageError: something else lies there.
        OutputError: it cannot be read.
    """
    try:
        if not path.is_file() and not path.exists():
            return None
        if path.is_file():
            with path.open("rb") as file:
                header = file.read(_HEADER)
            if header.startswith(_MAGIC[:17]) and header.endswith(b"\n"):
                return header[len(_MAGIC) : -1].decode("ascii", "replace")
    except OSError as error:
        raise OutputError(f"cannot read the spool {path}: {error.strerror or error}") from error
    raise UsageError(f"{path} was not written by --spool and is left as it is; choose another folder for --spool")


def _refuse_used(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("r+b") as file:
        _lock(file, path)


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep two exports from writing one spool; the lock ends with the process."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another export uses the spool {path}; wait for it, or choose another folder") from error
    except OSError:  # a file system without locks
        return
