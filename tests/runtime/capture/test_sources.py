"""Which kind of source a text names, and the sources that need no device: image files, arrays, replays."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grood_edge.errors import DatasetError, SourceError, UsageError
from grood_edge.runtime.capture.image_source import iterator_source, open_images, replay
from grood_edge.runtime.capture.mailbox import Capture, FramePolicy
from grood_edge.runtime.capture.sources import Shot, Source, SourceOptions, StreamedSource, open_source
from tests.runtime.capture.reading import frames_of, require_closing_wakes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, the second of them cut off."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, name in enumerate(("a.png", "b.jpg", "c.png")):
        Image.fromarray(np.full((20, 30, 3), (60 * index, 10, 20), np.uint8)).save(folder / name)
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:200])
    return folder


def test_a_folder_delivers_its_images_and_names_the_damaged_one(images: Path) -> None:
    source = open_source(str(images), SourceOptions(fps=4.0), clock=lambda: 7.0)
    assert isinstance(source, Source)
    assert (source.live, source.fps, source.color, source.name) == (False, 4.0, "rgb", str(images))
    first, second, third = frames_of(source)
    assert source.read() is None
    assert first.image is not None
    assert third.image is not None
    assert [f.index for f in (first, second, third)] == [0, 1, 2]
    assert [f.source_time for f in (first, second, third)] == [0.0, 0.25, 0.5]
    assert first.captured == 7.0
    assert third.image[0, 0].tolist() == [120, 10, 20]
    assert second.image is None
    assert second.problem is not None
    assert second.problem.startswith("b.jpg cannot be decoded: ")


def test_globs_and_single_files_are_images(images: Path) -> None:
    assert len(frames_of(open_source(f"{images}/*.png"))) == 2
    (only,) = frames_of(open_source(str(images / "a.png")))
    assert only.source_time is None


@pytest.mark.parametrize(
    "spec",
    [
        "http://127.0.0.1/a.mp4",
        "https://example.org/stream",
        "ftp://x/y.avi",
        "concat:a.mp4|b.mp4",
        "file:/etc/passwd",
        "tcp://127.0.0.1:5000",
        "udp://@239.0.0.1:1234",
        "data:video/mp4;base64,AAAA",
        "subfile,,start,0,end,9,,:a.mp4",
        "replay:http://127.0.0.1/a.mp4",
        "srt://x",
    ],
)
def test_other_protocols_are_refused(spec: str) -> None:
    with pytest.raises(SourceError, match=r"expected a folder or glob|matches no image"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["nothing-here", "frame%03d.png", "*.png", "", "/dev/null/x.mp4"])
def test_what_is_not_there_is_said(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError):
        open_source(spec)


def test_a_pattern_opens_no_image_sequence(images: Path) -> None:
    (images / "a.png").rename(images / "f001.png")
    with pytest.raises(SourceError, match="expected a folder or glob"):
        open_source(str(images / "f%03d.png"))


def test_no_fifo_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        open_source(str(tmp_path / "pipe.mp4"))


@pytest.mark.parametrize("wrong", [{"fps": 0.0}, {"fps": 1e6}, {"reconnects": -1}, {"timeout": 0.0}])
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="expected"):
        SourceOptions(**wrong)  # type: ignore[arg-type]


def test_no_images_is_a_dataset_error_in_python(tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        open_images(str(tmp_path))


def test_an_iterator_keeps_times_and_reports_what_is_no_array() -> None:
    arrays = [np.zeros((4, 4), np.uint8), "text", np.ones((4, 4, 3), np.uint8)]
    source = iterator_source(iter(arrays), fps=10.0, color="bgr", name="mine")  # type: ignore[arg-type]
    frames = frames_of(source)
    assert (source.name, source.color, source.live) == ("mine", "bgr", False)
    assert [f.source_time for f in frames] == [0.0, 0.1, 0.2]
    assert frames[0].image is arrays[0]
    assert (frames[1].image, frames[1].problem) == (None, "str instead of a NumPy array")


def test_a_replay_takes_its_time_and_drops_frames_as_a_camera_would() -> None:
    arrays = [np.full((4, 4), i, np.uint8) for i in range(20)]
    source = replay(iterator_source(arrays, fps=200.0))
    assert source.live
    start = time.monotonic()
    with Capture(source, FramePolicy("newest")) as capture:
        seen = []
        for frame in capture:
            seen.append(frame)
            time.sleep(0.02)
    assert time.monotonic() - start >= 19 / 200
    assert capture.captured == 20
    assert 3 <= capture.dropped == 20 - len(seen)
    for frame in seen:
        assert frame.source_time is not None
        assert frame.captured - start >= frame.source_time


def test_replay_spec_needs_times(images: Path) -> None:
    with pytest.raises(SourceError, match="has no times of its own"):
        open_source(f"replay:{images}")
    source = open_source(f"replay:{images}", SourceOptions(fps=500.0))
    assert len(frames_of(source)) == 3
    with pytest.raises(SourceError, match="is live already"):
        replay(source)


def test_closing_wakes_a_replay_that_waits() -> None:
    source = replay(iterator_source([np.zeros((4, 4), np.uint8)] * 2, fps=0.01))
    assert source.read() is not None
    require_closing_wakes(source)
    assert source.read() is None


def test_a_source_is_released_once_and_never_while_it_is_read() -> None:
    started, go_on = threading.Event(), threading.Event()
    released: list[str] = []

    def shots() -> Iterator[Shot]:
        started.set()
        go_on.wait(10)
        released.append("still reading")
        yield Shot(None, None, "nothing")

    source = StreamedSource("slow", shots(), release=lambda: released.append("released"))
    reading = threading.Thread(target=source.read)
    reading.start()
    started.wait(5)
    source.close()
    assert released == []
    go_on.set()
    reading.join(5)
    source.close()
    assert released == ["still reading", "released"]
    assert source.read() is None


def test_an_error_releases_the_source() -> None:
    released: list[int] = []

    def shots(error: Exception) -> Iterator[Shot]:
        yield Shot(None, None)
        raise error

    source = StreamedSource("bad", shots(SourceError("gone")), release=lambda: released.append(1))
    assert source.read() is not None
    with pytest.raises(SourceError, match="gone"):
        source.read()
    assert (released, source.read()) == ([1], None)
