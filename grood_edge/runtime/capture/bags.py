"""Recordings of robots: .mcap files and ROS 2 bags (folders of .mcap or .db3). Untrusted; nothing is unpacked to disk.

The files are read as they are: what a bag's metadata.yaml says, other paths above all, is not needed.
"""

import io
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grood_edge.errors import MissingExtraError, SourceError
from grood_edge.images import IMAGE_SUFFIXES
from grood_edge.runtime.capture.ros_images import IMAGE_TYPES, BadMessageError, UnknownEncodingError, read_picture
from grood_edge.runtime.capture.sources import Clock, Shot, Source, StreamedSource
from grood_edge.runtime.capture.stamps import StampClock

__all__ = ["is_bag", "open_bag"]

_SUFFIXES = (".mcap", ".db3")
_MAX_BYTES = 256 << 20  # of one record, one unpacked chunk, one message
_MAX_TOPICS = 10_000
_MAGIC = b"\x89MCAP0\r\n"  # https://mcap.dev/spec#magic
_MAX_NAME = 1000  # of a topic or its type


@dataclass(frozen=True)
class Entry:
    """A message of the topic: `data` None where it is damaged (`problem`). logged: seconds."""

    data: bytes | None
    logged: float | None
    problem: str = ""


def is_bag(path: Path) -> bool:
    """Say whether a path is an .mcap or .db3 file, or a folder with a metadata.yaml, or with some and no images."""
    if path.is_dir():
        if (path / "metadata.yaml").is_file():
            return True
        images = any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir())  # a stray .mcap among them
        return not images and bool(_storage_files(path))
    return path.suffix.lower() in (*_SUFFIXES, ".bag")


def open_bag(path: Path, topic: str | None = None, clock: Clock = time.monotonic) -> Source:
    """Open the images of one topic; RGB or grey. `source_time` is the stamp in the header, else the time of logging.

    A stamp that moves a second further than the log does, or back, is not believed: see `StampClock`.
    A message that is no picture is a frame without image; where the recording was cut off, a last such frame says so.

    Args:
        path: an .mcap or .db3 file, or a bag's folder, whose files are read in the order of their numbers.
        topic: of type Image or CompressedImage; None takes the only one.
        clock: stamps `captured`.

    Raises:
        SourceError: it is no such recording, is compressed, has no such topic, or several where none was chosen.
        MissingExtraError: it is an .mcap, and the package mcap is not installed.
    """
    files = _storage_files(path) if path.is_dir() else [path]
    if not files or path.suffix.lower() == ".bag":
        raise SourceError(
            f"{path} holds no .mcap and no .db3 file; expected an uncompressed ROS 2 bag. Unpack *.zstd with zstd -d; "
            "convert a ROS 1 bag with rosbags-convert"
        )
    topics: dict[str, str] = {}
    try:
        for file in files:
            topics |= _mcap_topics(file) if file.suffix.lower() == ".mcap" else _db3_topics(file)
    except (SourceError, MissingExtraError):
        raise
    except Exception as error:  # mcap, struct and sqlite3 raise anything on damaged files
        raise SourceError(f"{path} cannot be read as a bag: {error or type(error).__name__}") from error
    chosen = _choose_topic(path, topics, topic)
    return StreamedSource(f"{path}:{chosen}", _shots(files, chosen, topics[chosen]), clock=clock)


def _storage_files(folder: Path) -> list[Path]:
    files = [p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file()]
    return sorted(files, key=lambda p: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", p.name)])


def _choose_topic(path: Path, topics: dict[str, str], wanted: str | None) -> str:
    images = sorted(name for name, kind in topics.items() if kind in IMAGE_TYPES)
    if wanted in images:
        return str(wanted)
    if wanted is None and len(images) == 1:
        return images[0]
    if not images:
        others = f" among its {len(topics)} topics" if topics else " and no other; was it cut off near its beginning?"
        raise SourceError(f"{path} has no topic of ROS 2 images{others} (expected one of {', '.join(IMAGE_TYPES)})")
    listed = ", ".join(f"{name} ({topics[name].rpartition('/')[2]})" for name in images[:20])
    asked = "a topic must be chosen (--topic)" if wanted is None else f"{wanted!r} is not among them"
    raise SourceError(f"{path} has {len(images)} image topics of ROS 2 messages and {asked}: {listed}")


def _shots(files: list[Path], topic: str, kind: str) -> Iterator[Shot]:
    clock = StampClock()
    for file in files:
        read = _mcap_messages if file.suffix.lower() == ".mcap" else _db3_messages
        count = 0
        try:
            for entry in read(file, topic):
                yield _shot(entry, kind, topic, clock, first=count == 0)
                count += 1
        except SourceError:
            raise
        except Exception as error:  # as in open_bag
            reason = str(error) or type(error).__name__
            yield Shot(None, None, f"{file.name} is cut off or damaged after {count} images: {reason}", True)


def _shot(entry: Entry, kind: str, topic: str, clock: StampClock, first: bool) -> Shot:
    if entry.data is None:
        return Shot(None, None, entry.problem)
    try:
        picture = read_picture(kind, entry.data)
    except UnknownEncodingError as error:
        if first:  # a topic that was chosen wrongly, not damage
            raise SourceError(f"topic {topic}: {error}") from error
        return Shot(None, None, str(error))
    except BadMessageError as error:
        return Shot(None, None, str(error))
    return Shot(picture.image, clock.time_of(picture.stamp, entry.logged))


def _db3(file: Path) -> sqlite3.Connection:
    # immutable: no journal is written beside the bag, and none is believed
    uri = f"{file.absolute().as_uri()}?mode=ro&immutable=1"
    database = sqlite3.connect(uri, uri=True, check_same_thread=False)
    try:
        database.execute("PRAGMA trusted_schema=OFF")
        # Views, virtual tables (page 0) and computed columns run what the file says: 8 kB of them take gigabytes.
        tables = (
            "SELECT count(*) FROM sqlite_master WHERE type='table' AND rootpage>0 AND name IN ('topics','messages')"
        )
        computed = (
            "SELECT count(*) FROM sqlite_master m, pragma_table_xinfo(m.name) c WHERE m.type='table' AND c.hidden>0"
        )
        if database.execute(tables).fetchone() != (2,) or database.execute(computed).fetchone() != (0,):
            raise SourceError(f"{file} is a database without the plain tables of a ROS 2 bag")
    except BaseException:
        database.close()
        raise
    return database


def _db3_topics(file: Path) -> dict[str, str]:
    database = _db3(file)
    try:
        rows = database.execute(
            "SELECT name, type FROM topics WHERE serialization_format = 'cdr' "  # length() of a text ends at a NUL
            "AND length(CAST(name AS BLOB)) < ? AND length(CAST(type AS BLOB)) < ? LIMIT ?",
            (_MAX_NAME, _MAX_NAME, _MAX_TOPICS),
        )
        return {str(name): str(kind) for name, kind in rows}
    finally:
        database.close()


def _db3_messages(file: Path, topic: str) -> Iterator[Entry]:
    database = _db3(file)
    try:
        rows = database.execute(
            "SELECT timestamp, length(data), CASE WHEN length(data) <= ? THEN data END FROM messages WHERE topic_id IN "
            "(SELECT id FROM topics WHERE name = ?) ORDER BY messages.rowid",  # as recorded; sorting takes memory
            (_MAX_BYTES, topic),
        )
        for timestamp, size, data in rows:
            logged = timestamp / 1e9 if isinstance(timestamp, int) else None
            problem = f"a message of {size} bytes; at most {_MAX_BYTES} are read"
            yield Entry(data, logged) if isinstance(data, bytes) else Entry(None, logged, problem)
    finally:
        database.close()


def _mcap_topics(file: Path) -> dict[str, str]:
    """Return the topics from the summary at the end, or, in a recording that was cut off, from all records."""
    _require_mcap()
    from mcap.reader import SeekingReader
    from mcap.records import Channel, Schema

    with open(file, "rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise SourceError(f"{file} is no MCAP file, or is damaged at its beginning: it does not start like one")
        opened.seek(0)
        summary = None
        if file.stat().st_size > 0:
            try:
                summary = SeekingReader(opened, record_size_limit=_MAX_BYTES).get_summary()
            except Exception:  # no whole end: the records are what there is
                summary = None
        records: Iterable[Any]
        if summary is not None and summary.channels:
            records = (*summary.schemas.values(), *summary.channels.values())
        else:
            records = _mcap_records(file, forgiving=True)
        kinds: dict[int, str] = {}
        topics: dict[str, int] = {}  # their texts alone: records of a packed chunk may hold 256 MiB each
        for record in records:
            if isinstance(record, Schema) and len(record.name) < _MAX_NAME:
                kinds[record.id] = record.name
            elif isinstance(record, Channel) and len(record.topic) < _MAX_NAME and len(topics) < _MAX_TOPICS:
                topics |= {record.topic: record.schema_id} if record.message_encoding == "cdr" else {}
    return {topic: kinds[kind] for topic, kind in topics.items() if kind in kinds}


def _mcap_messages(file: Path, topic: str) -> Iterator[Entry]:
    from mcap.records import Channel, Message

    ids: set[int] = set()
    for record in _mcap_records(file, forgiving=False):
        if isinstance(record, Channel):
            (ids.add if record.topic == topic else ids.discard)(record.id)
        elif isinstance(record, Message) and record.channel_id in ids:
            yield Entry(record.data, record.log_time / 1e9)
        elif isinstance(record, Entry):
            yield record


def _mcap_records(file: Path, forgiving: bool) -> Iterator[Any]:
    """Iterate over schemas, channels and messages in the order of the file; a damaged chunk is one damaged `Entry`.

    Args:
        file: the recording.
        forgiving: end quietly where it is cut off.
    """
    from mcap.records import Chunk, DataEnd
    from mcap.stream_reader import StreamReader

    with open(file, "rb") as opened:
        try:
            for record in StreamReader(opened, emit_chunks=True, record_size_limit=_MAX_BYTES).records:
                if isinstance(record, DataEnd):
                    return
                if not isinstance(record, Chunk):
                    yield record
                    continue
                try:
                    yield from _chunk_records(replace(record, compression="", data=_unpacked(record)))
                except Exception as error:  # lz4, zstandard and struct each raise their own
                    logged = record.message_start_time / 1e9
                    yield Entry(None, logged, f"a chunk of the recording is damaged: {error}")
        except Exception:
            if not forgiving:
                raise


def _chunk_records(chunk: Any) -> Iterator[Any]:
    """Iterate over the records of an unpacked chunk, one object at a time: millions of empty ones fit in few bytes."""
    from mcap.opcode import Opcode
    from mcap.records import Channel, Message, Schema
    from mcap.stream_reader import get_chunk_data_stream

    stream, size = get_chunk_data_stream(chunk, validate_crc=True)
    while stream.count < size:
        code, length = stream.read1(), stream.read8()
        if code == Opcode.MESSAGE:
            yield Message.read(stream, length)
        elif code == Opcode.CHANNEL:
            yield Channel.read(stream)
        elif code == Opcode.SCHEMA:
            yield Schema.read(stream)
        else:
            stream.read(length)


def _unpacked(chunk: Any) -> bytes:
    """Unpack a chunk within its announced size, which is bounded: a few bytes may claim to be gigabytes."""
    size = chunk.uncompressed_size
    if size > _MAX_BYTES:
        raise ValueError(f"it unpacks to {size} bytes; at most {_MAX_BYTES} are taken")
    if chunk.compression == "lz4":
        import lz4.frame

        data: bytes = lz4.frame.LZ4FrameDecompressor().decompress(chunk.data, max_length=size + 1)
    elif chunk.compression == "zstd":
        import zstandard

        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(chunk.data)) as stream:
            data = stream.read(size + 1)
    elif chunk.compression == "":
        data = chunk.data
    else:
        raise ValueError(f"compression {chunk.compression[:20]!r}; expected lz4, zstd or none")
    if len(data) != size:
        raise ValueError(f"it unpacks to {len(data)} bytes or more, and announces {size}")
    return data


def _require_mcap() -> None:
    try:
        import mcap.reader  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("mcap", "bag", "reading .mcap recordings") from error
