"""Targets that read recordings: ROS 2 messages, bags, videos."""

import io
import re
import sqlite3
import struct
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mcap.writer import CompressionType, Writer

from grood_edge.runtime.capture.ros_images import BadMessageError, read_picture
from grood_edge.runtime.capture.sources import open_source
from grood_edge.runtime.capture.video import open_opencv
from tests.fuzz.data import MOST_FRAMES, encoded, photo
from tests.fuzz.formats import mutate_mcap
from tests.fuzz.guard import Target
from tests.fuzz.mutations import mutate_bytes, packed_number

RAW, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"


def raw_message() -> bytes:
    pixels = np.asarray(photo(10, 6))
    text = struct.pack("<iII", 5, 7, 4) + b"cam\0" + struct.pack("<III", 6, 10, 5) + b"rgb8\0" + b"\0\0\0"
    return b"\0\1\0\0" + text + struct.pack("<II", 30, pixels.size) + pixels.tobytes()


def compressed_message(data: bytes) -> bytes:
    return (
        b"\0\1\0\0"
        + struct.pack("<iIII", 5, 7, 1, 0)
        + struct.pack("<I", 5)
        + b"jpeg\0\0\0\0"
        + struct.pack("<I", len(data))
        + data
    )


def messages(folder: Path) -> Sequence[bytes]:
    return [
        raw_message(),
        raw_message(),
        compressed_message(encoded(photo(), "PNG")),
        compressed_message(encoded(photo(), "JPEG")),
    ]


def mutate_message(random: Random, data: bytes) -> bytes:
    """Overwrite one of the aligned numbers at its beginning, or anything."""
    if random.random() < 0.4:
        return mutate_bytes(random, data)
    at = 4 + 4 * random.randrange(14)
    return data[:at] + packed_number(random, 4) + data[at + 4 :]


def read_message(data: bytes) -> None:
    for kind in (RAW, COMPRESSED):
        try:
            read_picture(kind, data)
        except BadMessageError:
            continue


def mcap_files(folder: Path) -> Sequence[bytes]:
    found = []
    for compression in CompressionType:
        for chunks in (True, False):
            out = io.BytesIO()
            writer: Any = Writer(out, chunk_size=4000, compression=compression, use_chunking=chunks, enable_crcs=False)
            writer.start("ros2", "test")
            kinds = [writer.register_schema(name, "ros2msg", b"") for name in (RAW, "std_msgs/msg/String")]
            images, texts = (
                writer.register_channel(n, "cdr", k) for n, k in zip(("/image", "/text"), kinds, strict=True)
            )
            for index in range(4):
                writer.add_message(images, index * 10**8, raw_message(), index * 10**8)
                writer.add_message(texts, index * 10**8, b"\0\1\0\0\1\0\0\0\0", index * 10**8)
            writer.finish()
            found.append(out.getvalue())
    return found


def read_mcap(data: bytes) -> None:
    read_source("bag.mcap", data)


def read_source(name: str, data: bytes) -> None:
    Path(name).write_bytes(data)
    source = open_source(name)
    try:
        for _ in range(MOST_FRAMES):
            if source.read() is None:
                return
    finally:
        source.close()


def db3_files(folder: Path) -> Sequence[bytes]:
    """Bags of SQLite: one as rosbag2 writes it, and one whose messages are computed, 800 MB each."""
    found = []
    tables = (
        "CREATE TABLE topics(id INTEGER PRIMARY KEY,name TEXT,type TEXT,serialization_format TEXT);"
        "CREATE TABLE messages(id INTEGER PRIMARY KEY,topic_id INTEGER,timestamp INTEGER,data BLOB);"
        f"INSERT INTO topics VALUES(1,'/image','{RAW}','cdr');"
    )
    computed = (
        "ALTER TABLE messages RENAME COLUMN data TO raw;"
        "ALTER TABLE messages ADD COLUMN data BLOB AS (hex(zeroblob(400000000))) VIRTUAL;"
    )
    rows = [
        (1, 10**9, raw_message()),
        (1, "text", b"\0\1"),
        (1, -1, "text"),
        (1, 2**62, None),
        (9, 0, b""),
        (1, 1.5, b""),
    ]
    for index, more in enumerate(("", computed)):
        path = folder / f"{index}.db3"
        database = sqlite3.connect(path)
        database.executescript(tables)
        database.executemany("INSERT INTO messages(topic_id,timestamp,data) VALUES(?,?,?)", rows)
        database.commit()
        database.executescript(more)
        database.close()
        found.append(path.read_bytes())
        path.unlink()
    return [found[0], found[0], found[1]]


def read_db3(data: bytes) -> None:
    read_source("bag.db3", data)


def videos(folder: Path) -> Sequence[bytes]:
    cv2 = open_opencv("the tests")
    frame, found = np.asarray(photo(64, 48))[..., ::-1], []
    for name, code in (("a.avi", "MJPG"), ("b.avi", "FFV1"), ("c.mp4", "mp4v"), ("d.mkv", "MJPG")):
        path = folder / name
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, (64, 48))
        for index in range(6):
            writer.write(np.ascontiguousarray(np.roll(frame, 3 * index, axis=1)))
        writer.release()
        found.append(path.read_bytes())
    # Matroska's random numbers, and checksums over them, which FFmpeg does not look at: the same in every run
    numbers = rb"(?s)(\x73\xa4\x90).{16}|(\x73\xc5\x88|\x63\xc5\x88).{8}|(\xbf\x84).{4}"
    fixed = re.sub(numbers, lambda m: (m[1] or m[2] or m[3]).ljust(len(m[0]), b"\1"), found[-1][:600])
    return [*found[:-1], fixed + found[-1][600:]]


def read_video(data: bytes) -> None:
    read_source("video.avi" if data[:4] == b"RIFF" else "video.mp4", data)


TARGETS = (
    Target("message", messages, mutate_message, read_message, memory=300, quick=400),
    Target("mcap", mcap_files, mutate_mcap, read_mcap, memory=600, seconds=10, quick=60),
    Target("db3", db3_files, mutate_bytes, read_db3, memory=600, seconds=10, quick=120),
    Target("video", videos, mutate_bytes, read_video, memory=900, seconds=30, quick=24),
)
