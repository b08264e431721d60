"""Bags that other people's libraries wrote (rosbags, mcap), then damaged ones, and ones that lie about sizes."""

import contextlib
import io
import sqlite3
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image

from grood_edge.errors import SourceError
from grood_edge.runtime.capture import bags
from grood_edge.runtime.capture.bags import is_bag
from grood_edge.runtime.capture.ros_images import BadMessageError, UnknownEncodingError, read_picture
from grood_edge.runtime.capture.sources import CapturedFrame, Source, SourceOptions, open_source
from grood_edge.runtime.capture.stamps import StampClock
from tests.runtime.capture.reading import frames_of

rosbag2 = pytest.importorskip("rosbags.rosbag2", reason="rosbags, which writes the bags of the tests, is not installed")
mcap_writer = pytest.importorskip("mcap.writer", reason="mcap is not installed (extra bag)")

from rosbags.typesys import Stores, get_typestore  # noqa: E402

STORE = get_typestore(Stores.ROS2_HUMBLE)
TYPES: Any = STORE.types
IMAGE, COMPRESSED, STRING = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "std_msgs/msg/String"
PIXELS = default_rng(0).integers(0, 256, (6, 10, 4), dtype=np.uint8)


def header(seconds: int, nanoseconds: int = 0) -> Any:
    stamp = TYPES["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)
    return TYPES["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")


def raw(pixels: np.ndarray, encoding: str, seconds: int = 5, padding: int = 0) -> bytes:
    """Serialise an image, each row followed by `padding` bytes."""
    height, width, channels = pixels.shape
    rows = np.zeros((height, width * channels + padding), np.uint8)
    rows[:, : width * channels] = pixels.reshape(height, -1)
    step = rows.shape[1]
    message = TYPES[IMAGE](header(seconds, 500_000_000), height, width, encoding, 0, step, rows.reshape(-1))
    return bytes(STORE.serialize_cdr(message, IMAGE))


def compressed(form: str, data: bytes, seconds: int = 5) -> bytes:
    message = TYPES[COMPRESSED](header(seconds), form, np.frombuffer(data, np.uint8))
    return bytes(STORE.serialize_cdr(message, COMPRESSED))


def encoded(pixels: np.ndarray, form: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("rgb8", PIXELS[..., :3]),
        ("bgr8", PIXELS[..., 2::-1]),
        ("8UC3", PIXELS[..., 2::-1]),
        ("rgba8", PIXELS[..., :3]),
        ("bgra8", PIXELS[..., 2::-1]),
        ("mono8", PIXELS[..., :1]),
        ("8UC1", PIXELS[..., :1]),
    ],
)
def test_encodings_and_steps(encoding: str, expected: np.ndarray, padding: int) -> None:
    channels = {"rgba8": 4, "bgra8": 4, "mono8": 1, "8UC1": 1}.get(encoding, 3)
    picture = read_picture(IMAGE, raw(PIXELS[..., :channels], encoding, padding=padding))
    assert np.array_equal(picture.image, expected)
    assert picture.image.flags.c_contiguous
    assert picture.stamp == 5.5


def test_big_endian_cdr() -> None:
    text = b"a\0"
    body = struct.pack(">iII", 7, 0, len(text)) + text + b"\0\0"
    body += (
        struct.pack(">II", 1, 2)
        + struct.pack(">I", 6)
        + b"mono8\0"
        + b"\0"
        + b"\0"
        + struct.pack(">II", 2, 2)
        + b"\x09\x08"
    )
    picture = read_picture(IMAGE, b"\0\0\0\0" + body)
    assert (picture.image.tolist(), picture.stamp) == ([[[9], [8]]], 7.0)


def test_jpeg_and_png() -> None:
    png = read_picture(COMPRESSED, compressed("rgb8; png compressed bgr8", encoded(PIXELS[..., :3], "PNG")))
    assert np.array_equal(png.image, PIXELS[..., :3])
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    jpeg = read_picture(COMPRESSED, compressed("jpeg", encoded(smooth, "JPEG")))
    assert np.abs(jpeg.image.astype(int) - smooth).max() <= 3


def test_a_stamp_of_zero_is_none() -> None:
    message = TYPES[IMAGE](header(0), 1, 1, "mono8", 0, 1, np.array([3], np.uint8))
    assert read_picture(IMAGE, bytes(STORE.serialize_cdr(message, IMAGE))).stamp is None


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1", "bayer_rggb8", "yuv422", "", "rgb16"])
def test_other_encodings_are_named(encoding: str) -> None:
    with pytest.raises(UnknownEncodingError, match="is not read; expected rgb8, bgr8"):
        read_picture(IMAGE, raw(PIXELS[..., :3], encoding))


def sized(height: int, width: int, step: int, data: int = 12) -> bytes:
    message = TYPES[IMAGE](header(1), height, width, "rgb8", 0, step, np.zeros(data, np.uint8))
    return bytes(STORE.serialize_cdr(message, IMAGE))


GOOD = raw(PIXELS[..., :3], "rgb8")
ATTACKS: dict[str, tuple[str, bytes]] = {
    "empty": (IMAGE, b""),
    "other-encapsulation": (IMAGE, b"\x00\x09" + GOOD[2:]),
    "zstd": (IMAGE, b"\x28\xb5\x2f\xfd" + GOOD[4:]),
    "cut-off": (IMAGE, GOOD[:-1]),
    "huge-dims": (IMAGE, sized(2**32 - 1, 2**32 - 1, 2**32 - 1)),
    "dims-that-overflow": (IMAGE, sized(2**31, 2, 6)),
    "zero-height": (IMAGE, sized(0, 2, 6)),
    "step-too-small": (IMAGE, sized(2, 2, 5)),
    "step-zero": (IMAGE, sized(2, 2, 0)),
    "step-past-end": (IMAGE, sized(2, 2, 7)),
    "long-frame-id": (IMAGE, b"\0\1\0\0" + struct.pack("<iII", 1, 0, 2**31) + bytes(64)),
    "frame-id-of-a-megabyte": (IMAGE, b"\0\1\0\0" + struct.pack("<iII", 1, 0, 2**20) + bytes(2**20)),
    "no-utf8": (IMAGE, b"\0\1\0\0" + struct.pack("<iII", 1, 0, 4) + b"\xff\xff\xff\xff" + bytes(40)),
    "gif": (COMPRESSED, compressed("gif", encoded(PIXELS[..., :3], "GIF"))),
    "no-image": (COMPRESSED, compressed("jpeg", b"\xff\xd8 nothing")),
    "no-data": (COMPRESSED, compressed("png", b"")),
    "png-bomb": (
        COMPRESSED,
        compressed("png", encoded(np.zeros((1, 1, 3), np.uint8), "PNG")[:16] + struct.pack(">II", 100_000, 100_000)),
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_messages_that_lie_are_no_pictures(name: str) -> None:
    kind, data = ATTACKS[name]
    with pytest.raises(BadMessageError):
        read_picture(kind, data)


def test_every_prefix_and_many_bit_flips_are_refused_or_read() -> None:
    rng = default_rng(1)
    for cut in range(len(GOOD)):
        with pytest.raises(BadMessageError):
            read_picture(IMAGE, GOOD[:cut])
    for _ in range(500):
        broken = bytearray(GOOD)
        broken[rng.integers(0, 60)] ^= 1 << int(rng.integers(0, 8))
        with contextlib.suppress(BadMessageError):
            assert read_picture(IMAGE, bytes(broken)).image.dtype == np.uint8


def write_bag(path: Path, plugin: str, messages: list[tuple[str, str, bytes]], **compression: str) -> Path:
    """Write a ROS 2 bag with rosbags: (topic, type, CDR), logged a second after one another from 100 s on."""
    with rosbag2.Writer(path, version=9, storage_plugin=rosbag2.StoragePlugin[plugin]) as writer:
        known: dict[str, Any] = {}
        for index, (topic, kind, data) in enumerate(messages):
            if topic not in known:
                known[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(known[topic], (100 + index) * 10**9, data)
    return path


def text(words: str) -> tuple[str, str, bytes]:
    return ("/chatter", STRING, bytes(STORE.serialize_cdr(TYPES[STRING](words), STRING)))


def numbered(index: int) -> bytes:
    return raw(np.full((6, 10, 3), index, np.uint8), "rgb8", seconds=50 + index)


CAMERA: list[tuple[str, str, bytes]] = [
    text("start"),
    *[("/camera", IMAGE, numbered(i)) for i in range(5)],
    text("end"),
]


def values(frames: list[CapturedFrame]) -> list[int | None]:
    return [None if f.image is None else int(f.image[0, 0, 0]) for f in frames]


@pytest.mark.parametrize("plugin", ["SQLITE3", "MCAP"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_bag_is_read_as_folder_and_as_file(tmp_path: Path, plugin: str, whole: bool) -> None:
    path = write_bag(tmp_path / "bag", plugin, CAMERA)
    if not whole:
        (path,) = [p for p in path.iterdir() if p.suffix in (".db3", ".mcap")]
    source = open_source(str(path), clock=lambda: 3.0)
    assert isinstance(source, Source)
    assert (source.live, source.color, source.name) == (False, "rgb", f"{path}:/camera")
    frames = frames_of(source)
    assert values(frames) == [0, 1, 2, 3, 4]
    assert [f.source_time for f in frames] == [50.5, 51.5, 52.5, 53.5, 54.5]
    assert {f.captured for f in frames} == {3.0}


def stamped(path: Path, stamps: list[int], logs: list[int] | None = None) -> Path:
    """Write one numbered image a stamp, in seconds; logged a second after one another unless told otherwise."""
    with rosbag2.Writer(path, version=9, storage_plugin=rosbag2.StoragePlugin.SQLITE3) as writer:
        topic = writer.add_connection("/camera", IMAGE, typestore=STORE)
        for index, stamp in enumerate(stamps):
            logged = 100 + index if logs is None else logs[index]
            writer.write(topic, logged * 10**9, raw(np.full((6, 10, 3), index, np.uint8), "rgb8", seconds=stamp))
    return path


@pytest.mark.parametrize(("stamps", "expected"), [
    ([50, 51, 2**31 - 1, 53, 54], [50.5, 51.5, 52.5, 53.5, 54.5]),  # one wild stamp: the log's step
    ([2**31 - 1, 51, 52], [2**31 - 0.5, 2**31 + 0.5, 2**31 + 1.5]),  # the first one: the steps are right all the same
    ([50, 51, 20, 21], [50.5, 51.5, 52.5, 53.5]),  # a clock that was set back
    ([50, 52, 54], [50.5, 52.5, 54.5]),  # a simulation that runs faster than the log
    ([50, 59, 68], [50.5, 51.5, 52.5]),  # so fast that it could not be told from wild stamps
])  # fmt: skip
def test_a_wild_stamp_does_not_carry_the_clock_away(tmp_path: Path, stamps: list[int], expected: list[float]) -> None:
    frames = frames_of(open_source(str(stamped(tmp_path / "bag", stamps))))
    assert [f.source_time for f in frames] == expected


@pytest.mark.parametrize(
    "wild", [{3: 9.0}, {3: 1.2}, dict.fromkeys(range(3, 40), 5.0), dict.fromkeys(range(3, 40), -5.0)]
)
def test_a_stamp_ahead_and_a_clock_that_is_set_neither_hold_nor_turn_the_clock(wild: dict[int, float]) -> None:
    clock = StampClock()
    times = [clock.time_of(50 + index / 10 + wild.get(index, 0.0), 1000 + index / 10) for index in range(40)]
    assert times == pytest.approx([50 + index / 10 for index in range(40)])


def test_a_believed_leap_does_not_hold_the_clock_either() -> None:
    clock = StampClock()
    found = [
        clock.time_of(50 + index / 10 + (0.9 if index == 3 else 0), 1000 + index / 10) or 0.0 for index in range(9)
    ]
    assert found[3] == pytest.approx(51.2)
    assert np.diff(found[3:]) == pytest.approx(np.full(5, 0.1))


def test_late_logs_are_jitter_and_without_a_log_the_stamps_count() -> None:
    clock = StampClock()
    late = (0.0, 0.4, 0.8, 0.7, 0.0, 0.3)  # seconds that a network delayed each message by
    found = [clock.time_of(50 + index / 10, 1000 + index / 10 + late[index]) for index in range(6)]
    assert found == pytest.approx([50 + index / 10 for index in range(6)])
    alone = StampClock()
    assert [alone.time_of(stamp, None) for stamp in (50.0, 53.0, 52.0, 56.0)] == [50.0, 53.0, 53.0, 56.0]


def test_images_beside_a_stray_recording_are_images(tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", "SQLITE3", CAMERA)
    (tmp_path / "bag" / "0.png").write_bytes(encoded(PIXELS[..., :3], "PNG"))
    assert is_bag(tmp_path / "bag")
    (tmp_path / "bag" / "metadata.yaml").unlink()
    assert not is_bag(tmp_path / "bag")
    assert len(frames_of(open_source(str(tmp_path / "bag")))) == 1
    (tmp_path / "bag" / "0.png").unlink()
    assert is_bag(tmp_path / "bag")


def test_a_wild_time_in_the_log_is_passed_over_and_a_gap_is_a_gap(tmp_path: Path) -> None:
    path = stamped(tmp_path / "wild", [50, 51, 52, 53], [100, 101, 9000, 103])
    assert [f.source_time for f in frames_of(open_source(str(path)))] == [50.5, 51.5, 52.5, 53.5]
    path = stamped(tmp_path / "gap", [50, 51, 4000, 4001], [100, 101, 4050, 4051])
    assert [f.source_time for f in frames_of(open_source(str(path)))] == [50.5, 51.5, 4000.5, 4001.5]


def test_a_bag_is_replayed_by_its_stamps(tmp_path: Path) -> None:
    """Its source names no frame rate; a damaged message before the first picture has no time."""
    messages = [("/camera", IMAGE, b"\0\1\0\0junk"), *(("/camera", IMAGE, numbered(i)) for i in range(3))]
    path = write_bag(tmp_path / "bag", "SQLITE3", messages)
    now, waits = [0.0], list[float]()

    class Closed(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            now[0] += timeout or 0.0
            return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grood_edge.runtime.capture.image_source.threading.Event", Closed)
        source = open_source(f"replay:{path}", clock=lambda: now[0])
        frames = frames_of(source)
    assert (source.live, source.fps) == (True, None)
    assert [f.index for f in frames] == [0, 1, 2, 3]
    assert [f.source_time for f in frames] == [None, 50.5, 51.5, 52.5]
    assert [f.captured for f in frames] == [0.0, 0.0, 1.0, 2.0]
    assert waits == [1.0, 1.0]


def test_several_topics_must_be_chosen(tmp_path: Path) -> None:
    png = compressed("png", encoded(PIXELS[..., :3], "PNG"))
    path = write_bag(tmp_path / "bag", "SQLITE3", [*CAMERA, ("/camera/compressed", COMPRESSED, png)])
    with pytest.raises(
        SourceError, match=r"2 image topics .* must be chosen \(--topic\): /camera \(Image\), /camera/comp"
    ):
        open_source(str(path))
    (frame,) = frames_of(open_source(str(path), SourceOptions(topic="/camera/compressed")))
    assert np.array_equal(frame.image if frame.image is not None else (), PIXELS[..., :3])
    with pytest.raises(SourceError, match="'/chatter' is not among them"):
        open_source(str(path), SourceOptions(topic="/chatter"))


def test_no_image_topic_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"has no topic of ROS 2 images among its 1 topics \(expected one of .*CompressedImage"
    ):
        open_source(str(write_bag(tmp_path / "bag", "MCAP", [text("only words")])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no MCAP file, or is damaged at its beginning"),
        (default_rng(0).bytes(1000), "is no MCAP file, or is damaged at its beginning"),
        (b"\x89MCAP0\r\n\x01", "has no topic of ROS 2 images and no other; was it cut off near its beginning"),
    ],
)
def test_what_is_no_recording_is_said(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.mcap").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path / "x.mcap"))


def test_a_damaged_message_is_a_frame_without_image(tmp_path: Path) -> None:
    messages = [("/camera", IMAGE, numbered(0)), ("/camera", IMAGE, b"\0\1\0\0junk"), ("/camera", IMAGE, numbered(2))]
    frames = frames_of(open_source(str(write_bag(tmp_path / "bag", "SQLITE3", messages))))
    assert values(frames) == [0, None, 2]
    assert frames[1].source_time is None  # the log may go by another clock than the pictures
    assert "is no sensor_msgs/msg/Image" in str(frames[1].problem)


def test_a_depth_topic_is_an_error_and_a_late_one_a_problem(tmp_path: Path) -> None:
    depth = raw(PIXELS[..., :2], "16UC1")
    source = open_source(str(write_bag(tmp_path / "bag", "SQLITE3", [("/depth", IMAGE, depth)])))
    with pytest.raises(SourceError, match="topic /depth: encoding '16UC1' is not read"):
        source.read()
    late = write_bag(tmp_path / "late", "SQLITE3", [("/camera", IMAGE, numbered(0)), ("/camera", IMAGE, depth)])
    assert values(frames_of(open_source(str(late)))) == [0, None]


def test_files_of_a_bag_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "bag"
    folder.mkdir()
    for index in (0, 2, 10):
        one = write_bag(tmp_path / f"part{index}", "SQLITE3", [("/camera", IMAGE, numbered(index))])
        (one / f"part{index}.db3").rename(folder / f"bag_{index}.db3")
    assert values(frames_of(open_source(str(folder)))) == [0, 2, 10]


def test_paths_in_the_metadata_are_not_followed(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", "SQLITE3", CAMERA)
    write_bag(tmp_path / "other", "SQLITE3", CAMERA)
    metadata = path / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace("bag.db3", "../other/other.db3"))
    assert values(frames_of(open_source(str(path)))) == [0, 1, 2, 3, 4]
    (path / "bag.db3").unlink()
    with pytest.raises(SourceError, match=r"holds no .mcap and no .db3 file; expected an uncompressed ROS 2 bag"):
        open_source(str(path))


def test_ros1_bags_and_other_databases_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.bag").write_bytes(b"#ROSBAG V2.0\n")
    with pytest.raises(SourceError, match="rosbags-convert"):
        open_source(str(tmp_path / "old.bag"))
    database = sqlite3.connect(tmp_path / "x.db3")
    database.execute("CREATE TABLE topics (id)")
    database.execute("CREATE VIEW messages AS SELECT 1")
    database.commit()
    database.close()
    with pytest.raises(SourceError, match="without the plain tables of a ROS 2 bag"):
        open_source(str(tmp_path / "x.db3"))


@pytest.mark.parametrize(
    "hostile",
    [
        "DROP TABLE messages; CREATE VIRTUAL TABLE messages USING fts5(topic_id, timestamp, data)",
        "ALTER TABLE messages RENAME COLUMN data TO raw; "  # 800 MB in a file of 12 kB
        "ALTER TABLE messages ADD COLUMN data BLOB AS (hex(zeroblob(400000000))) VIRTUAL",
        "ALTER TABLE topics RENAME COLUMN name TO old; "
        "ALTER TABLE topics ADD COLUMN name TEXT AS (hex(zeroblob(400000000))) VIRTUAL",
    ],
    ids=["virtual-table", "computed-data", "computed-topic"],
)
def test_databases_that_compute_what_they_hold_are_refused(hostile: str, tmp_path: Path) -> None:
    (file,) = write_bag(tmp_path / "bag", "SQLITE3", [("/camera", IMAGE, numbered(1))]).glob("*.db3")
    database = sqlite3.connect(file)
    database.executescript(hostile)
    database.close()
    with pytest.raises(SourceError, match="without the plain tables of a ROS 2 bag"):
        open_source(str(file))


@pytest.mark.parametrize("suffix", [".mcap", ".db3"])
@pytest.mark.parametrize("content", [b"", b"junk", bytes(5000), b"\x89MCAP0\r\n" + b"\xff" * 100])
def test_junk_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(SourceError):
        open_source(str(tmp_path / f"x{suffix}"))


def test_a_damaged_database_ends_and_says_so(tmp_path: Path) -> None:
    many = [("/camera", IMAGE, raw(np.full((60, 100, 3), i, np.uint8), "rgb8")) for i in range(20)]
    (file,) = write_bag(tmp_path / "bag", "SQLITE3", many).glob("*.db3")
    content = bytearray(file.read_bytes())
    half = len(content) // 2
    content[half : half + 3 * 4096] = b"\xff" * (3 * 4096)
    file.write_bytes(content)
    *good, last = frames_of(open_source(str(file)))
    assert values(good)[:5] == [0, 1, 2, 3, 4]
    assert len(good) < 20
    assert last.image is None
    assert "is cut off or damaged after" in str(last.problem)
    file.write_bytes(content[:half])
    with pytest.raises(SourceError, match="cannot be read as a bag: database disk image is malformed"):
        open_source(str(file))


def mcap_file(path: Path, chunk_size: int = 1000, **options: Any) -> Path:
    """Write ten numbered images with the mcap package."""
    with open(path, "wb") as file:
        writer = mcap_writer.Writer(file, chunk_size=chunk_size, **options)
        writer.start()
        schema = writer.register_schema(IMAGE, "ros2msg", b"")
        channel = writer.register_channel("/camera", "cdr", schema)
        protobuf = writer.register_channel("/foxglove", "protobuf", schema)
        for index in range(10):
            writer.add_message(channel, index, numbered(index), index)
            writer.add_message(protobuf, index, b"other", index)
        writer.finish()
    return path


COMPRESSIONS = ["NONE", "LZ4", "ZSTD"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("summary", [True, False])
def test_mcap_compressions_with_and_without_summary(tmp_path: Path, compression: str, summary: bool) -> None:
    kind = mcap_writer.CompressionType[compression]
    options = {} if summary else {"repeat_channels": False, "repeat_schemas": False, "use_statistics": False}
    path = mcap_file(tmp_path / "x.mcap", compression=kind, **options)
    assert values(frames_of(open_source(str(path)))) == list(range(10))


def test_with_a_summary_the_topics_cost_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mcap_file(tmp_path / "x.mcap")
    monkeypatch.setattr(bags, "_mcap_records", lambda *_, **__: pytest.fail("all records were read"))
    assert open_source(str(path)).name == f"{path}:/camera"


def test_mcap_without_chunks(tmp_path: Path) -> None:
    assert values(frames_of(open_source(str(mcap_file(tmp_path / "x.mcap", use_chunking=False))))) == list(range(10))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_cut_mcap_ends_and_says_so(tmp_path: Path, compression: str) -> None:
    path = mcap_file(tmp_path / "x.mcap", compression=mcap_writer.CompressionType[compression])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    *good, last = frames_of(open_source(str(path)))
    assert values(good) == list(range(len(good)))
    assert 0 < len(good) < 10
    assert last.image is None
    assert last.problem is not None
    assert last.problem.startswith("x.mcap is cut off or damaged after")


def test_a_damaged_chunk_is_a_frame_without_image(tmp_path: Path) -> None:
    path = mcap_file(tmp_path / "x.mcap", compression=mcap_writer.CompressionType.NONE)
    content = bytearray(path.read_bytes())
    at = content.find(bytes([4] * 180))
    content[at + 90] ^= 1
    path.write_bytes(content)
    frames = frames_of(open_source(str(path)))
    assert None in values(frames)
    assert {0, 1, 2, 7, 8, 9} <= set(values(frames))
    (problem,) = [f.problem for f in frames if f.image is None]
    assert "a chunk of the recording is damaged: crc validation failed" in str(problem)


@pytest.mark.parametrize("compression", ["LZ4", "ZSTD"])
def test_a_chunk_that_unpacks_to_more_than_it_says_is_refused(tmp_path: Path, compression: str) -> None:
    import lz4.frame
    import zstandard
    from mcap.records import Chunk

    pack: dict[str, Callable[[bytes], bytes]] = {"LZ4": lz4.frame.compress, "ZSTD": zstandard.compress}
    bomb = pack[compression](bytes(50_000_000))
    assert len(bomb) < 300_000
    for announced in (1000, 2**40):
        chunk = Chunk(compression.lower(), bomb, 0, 0, 0, announced)
        with pytest.raises(ValueError, match="unpacks to"):
            bags._unpacked(chunk)


def test_a_chunk_of_countless_empty_messages_is_read_one_at_a_time() -> None:
    """A few kB of zstd may hold millions of messages of nothing: as objects they take ten times their bytes."""
    from mcap.records import Chunk

    message = b"\x05" + struct.pack("<Q", 22) + bytes(22)
    chunk = Chunk("", message * 50_000, 0, 0, 0, 31 * 50_000)
    tracemalloc.start()
    assert sum(1 for _ in bags._chunk_records(chunk)) == 50_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # the objects of all are 10 MB


@pytest.mark.parametrize("column", ["name", "type"])
def test_topics_with_endless_texts_are_left_out(column: str, tmp_path: Path) -> None:
    path = write_bag(tmp_path / "bag", "SQLITE3", CAMERA)
    database = sqlite3.connect(next(path.glob("*.db3")))
    database.execute(f"UPDATE topics SET {column} = ?", ("a\0" + "x" * 5000,))  # length() counts one
    database.commit()
    database.close()
    assert bags._db3_topics(next(path.glob("*.db3"))) == {}


def test_messages_above_the_limit_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bag(tmp_path / "bag", "SQLITE3", CAMERA)
    monkeypatch.setattr(bags, "_MAX_BYTES", 200)
    frames = frames_of(open_source(str(path)))
    assert values(frames) == [None] * 5
    assert "bytes; at most 200 are read" in str(frames[0].problem)
