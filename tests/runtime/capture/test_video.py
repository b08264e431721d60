"""Videos and cameras through OpenCV: real files, damaged files, files that want more, cameras that are not there."""

import http.server
import itertools
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grood_edge.errors import MissingExtraError, SourceError
from grood_edge.runtime.capture import video
from grood_edge.runtime.capture.edit_list import shown_frames
from grood_edge.runtime.capture.mailbox import Capture, FramePolicy
from grood_edge.runtime.capture.sources import Source, SourceOptions, open_source
from tests.runtime.capture.reading import frames_of, require_closing_wakes
from tests.videos import packaged_video

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (extra video)")


def squares(path: Path, fourcc: str, count: int = 40) -> Path:
    """Write a video of a square that moves right, two pixels a frame."""
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*fourcc), 20.0, (128, 96))
    assert writer.isOpened()
    for index in range(count):
        image = np.full((96, 128, 3), (200, 40, 10), np.uint8)
        image[30:60, 2 * index : 2 * index + 30] = (10, 40, 250)
        writer.write(image)
    writer.release()
    return path


def test_a_real_video_is_read_whole() -> None:
    path = packaged_video("bikes.mp4")
    source = open_source(str(path), clock=lambda: 5.0)
    assert isinstance(source, Source)
    assert (source.live, source.fps, source.color, source.name) == (False, 25.0, "bgr", str(path))
    frames = frames_of(source)
    assert [f.index for f in frames] == list(range(250))
    assert [f.source_time for f in frames] == pytest.approx([i / 25 for i in range(250)])
    assert {f.image.shape for f in frames if f.image is not None} == {(272, 640, 3)}
    assert {(f.captured, f.problem) for f in frames} == {(5.0, None)}


@pytest.mark.parametrize(("suffix", "fourcc"), [(".avi", "MJPG"), (".mp4", "mp4v"), (".mkv", "MJPG")])
def test_colours_are_bgr_and_frames_own_their_memory(tmp_path: Path, suffix: str, fourcc: str) -> None:
    frames = frames_of(open_source(str(squares(tmp_path / f"v{suffix}", fourcc))))
    assert len(frames) == 40
    images = [f.image for f in frames if f.image is not None]
    assert np.abs(images[0][5, 5].astype(int) - (200, 40, 10)).max() < 12
    assert np.abs(images[0][45, 15].astype(int) - (10, 40, 250)).max() < 12
    assert np.abs(images[39][45, 90].astype(int) - (10, 40, 250)).max() < 12


def test_damaged_packets_are_frames_without_image() -> None:
    whole = bytearray(packaged_video("bikes.mp4").read_bytes())
    start = whole.find(b"mdat") + (len(whole) - whole.find(b"mdat")) // 2
    whole[start : start + 3000] = random.Random(0).randbytes(3000)
    with written(whole) as path:
        frames = frames_of(open_source(str(path)))
    assert len(frames) == 250
    bad = [f.index for f in frames if f.image is None]
    assert bad == [120, 121, 122, 123]
    assert {f.problem for f in frames if f.image is None} == {"a packet of the video could not be decoded"}
    assert [f.index for f in frames] == list(range(250))
    times = [f.source_time for f in frames if f.source_time is not None]
    assert len(times) == 250
    assert times == sorted(times)


class written:  # noqa: N801
    """A file with that content, in a folder that is deleted."""

    def __init__(self, content: bytes | bytearray, name: str = "v.mp4") -> None:
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / name
        self._path.write_bytes(content)

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


@pytest.mark.parametrize(("suffix", "fourcc"), [(".avi", "MJPG"), (".mkv", "MJPG")])
def test_a_video_that_was_cut_off_ends_and_says_so(tmp_path: Path, suffix: str, fourcc: str) -> None:
    content = squares(tmp_path / f"v{suffix}", fourcc).read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(content[: len(content) // 2])
    *good, last = frames_of(open_source(str(tmp_path / f"cut{suffix}")))
    whole = [f for f in good if f.image is not None]
    assert 10 <= len(whole) <= 25
    if suffix == ".avi":  # its header announces how many; Matroska's index at the end is gone
        assert last.problem is not None
        assert last.problem.endswith("of 40 announced frames: cut off or damaged")
        assert last.image is None
        assert last.index == len(good)


def test_a_cut_mp4_has_no_index_and_cannot_be_opened(tmp_path: Path) -> None:
    content = packaged_video("bikes.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=r"an .mp4 that was cut off has no index"):
        open_source(str(tmp_path / "cut.mp4"))


def edited(content: bytes, start: float, seconds: float) -> bytes:
    """Let the edit list of bikes.mp4 (10 s, 25 frames a second) show `seconds` from `start` on."""
    at = content.index(b"elst") + 12
    return content[:at] + struct.pack(">Ii", round(1000 * seconds), 1024 + round(12800 * start)) + content[at + 8 :]


def index_first(content: bytes) -> bytes:
    """Move the index of bikes.mp4 before the pictures, as videos for the web have it: cut off, it can be opened."""
    moov, mdat = content.index(b"moov") - 4, content.index(b"mdat") - 4
    index = bytearray(content[moov:])
    at = index.index(b"stco") + 12
    index[at : at + 4] = struct.pack(">I", struct.unpack_from(">I", index, at)[0] + len(index))
    return content[:mdat] + bytes(index) + content[mdat:moov]


@pytest.mark.parametrize(("start", "seconds", "shown"), [(0.0, 5.0, 125), (5.0, 5.0, 125), (7.0, 10.0, 75)])
def test_what_an_edit_list_leaves_out_is_not_missed(start: float, seconds: float, shown: int) -> None:
    with written(edited(packaged_video("bikes.mp4").read_bytes(), start, seconds)) as path:
        assert shown_frames(path) == shown
        frames = frames_of(open_source(str(path)))
    assert len(frames) == shown
    assert not any(frame.cut_off or frame.problem for frame in frames)


@pytest.mark.parametrize("seconds", [10.0, 5.0])
def test_an_mp4_with_its_index_first_that_was_cut_off_says_so(seconds: float) -> None:
    content = edited(index_first(packaged_video("bikes.mp4").read_bytes()), 0.0, seconds)
    with written(content[: len(content) // 4]) as path:
        last = frames_of(open_source(str(path)))[-1]
    assert last.cut_off
    assert f"of {25 * seconds:.0f} announced frames" in str(last.problem)


def test_a_damaged_edit_list_is_none(tmp_path: Path) -> None:
    content = packaged_video("bikes.mp4").read_bytes()
    moov, path, rng = content.index(b"moov") - 4, tmp_path / "v.mp4", random.Random(0)
    path.write_bytes(content)
    assert shown_frames(path) == 250
    for _ in range(300):
        broken = bytearray(content[moov:])
        for _ in range(3):
            broken[rng.randrange(8, 700)] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(content[:32] + broken)
        found = shown_frames(path)
        assert found is None or 0 <= found <= 10_000_000
    for other in (b"", b"RIFF", b"\0\0\0\1moov", b"\0\0\0\1moov" + b"\xff" * 8, b"\0\0\0\x08moov"):
        path.write_bytes(other)
        assert shown_frames(path) is None


def box(name: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + name + content


def test_a_small_file_of_many_edits_and_frames_is_counted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 kB that say 5,000 edits of 10,000,000 frames each: looked up, and not compared one by one (5e10 of them)."""
    frames, edits = 10_000_000, 5_000
    times = struct.pack(">IIIII", 0, 0, 0, 1000, 0)
    moov = box(
        b"moov",
        box(b"mvhd", times),
        box(
            b"trak",
            box(b"edts", box(b"elst", struct.pack(">II", 0, edits), struct.pack(">Iihh", 5, 10, 1, 0) * edits)),
            box(
                b"mdia",
                box(b"mdhd", times),
                box(b"hdlr", bytes(8), b"vide"),
                box(b"minf", box(b"stbl", box(b"stts", bytes(8), struct.pack(">ii", frames, 1)))),
            ),
        ),
    )
    (tmp_path / "v.mp4").write_bytes(moov)
    monkeypatch.setattr(np, "count_nonzero", None)  # which looks at all of them
    assert shown_frames(tmp_path / "v.mp4") == 5 * edits


class Server(http.server.HTTPServer):
    """Counts who asks."""

    asked: list[str]


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            one.asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    one = Server(("127.0.0.1", 0), Handler)
    one.asked = []
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield one
    one.shutdown()
    thread.join()
    one.server_close()


PLAYLISTS = {
    "net.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:PORT/a.ts\n#EXT-X-ENDLIST\n",
    "local.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nv.avi\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile v.avi\n",
    "list.mp4": "ffconcat version 1.0\nfile v.avi\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video PORT RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "dash.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>http://127.0.0.1:PORT/d.mp4</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "text.mp4": "no video at all",
    "empty.mp4": "",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_files_that_name_other_files_or_hosts_are_refused(tmp_path: Path, server: Server, name: str) -> None:
    squares(tmp_path / "v.avi", "MJPG", 3)
    (tmp_path / name).write_text(PLAYLISTS[name].replace("PORT", str(server.server_port)))
    before = os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS")
    with pytest.raises(SourceError, match="cannot be opened as a video"):
        open_source(str(tmp_path / name))
    assert server.asked == []
    assert os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS") == before


def test_the_refusal_is_ours_and_not_ffmpegs_own(tmp_path: Path) -> None:
    """Without the list of containers OpenCV opens such a list: the test above can fail."""
    squares(tmp_path / "v.avi", "MJPG", 3)
    (tmp_path / "list.mp4").write_text(PLAYLISTS["list.mp4"])
    capture = cv2.VideoCapture(str(tmp_path / "list.mp4"), cv2.CAP_FFMPEG, [])
    assert capture.isOpened()
    capture.release()


def test_frames_beyond_the_pixel_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_PIXELS", 128 * 96 - 1)
    with pytest.raises(SourceError, match="128x96 pixels; expected 1 to 12,287"):
        open_source(str(squares(tmp_path / "v.avi", "MJPG", 3)))


def test_nothing_is_printed_by_opencv_or_ffmpeg(tmp_path: Path) -> None:
    whole = bytearray(packaged_video("bikes.mp4").read_bytes())
    whole[250_000:253_000] = bytes(3000)
    (tmp_path / "bad.mp4").write_bytes(whole)
    (tmp_path / "none.mp4").write_text("nothing")
    code = (
        "from grood_edge.errors import SourceError\nfrom grood_edge.runtime.capture.sources import open_source\n"
        "s = open_source('bad.mp4')\nwhile s.read(): pass\n"
        "for spec in ('none.mp4', '77', 'v4l2:///dev/null', 'rtsp://127.0.0.1:9/x'):\n"
        "    try: open_source(spec)\n    except SourceError: pass\n    else: raise SystemExit(spec)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("spec", ["77", "v4l2:///dev/video77", "/dev/video77", "v4l2:///etc/passwd", "v4l2://../x"])
def test_a_camera_that_is_not_there_is_said(spec: str) -> None:
    with pytest.raises(SourceError, match=r"is no device; expected 0 or v4l2:///dev/video0. Cameras here: "):
        open_source(spec)


def test_a_device_that_is_no_camera_is_said() -> None:
    with pytest.raises(SourceError, match="/dev/null cannot be opened: no video capture device"):
        open_source("v4l2:///dev/null")


def test_rtsp_without_a_server_fails_soon_and_keeps_the_password() -> None:
    with pytest.raises(SourceError, match=r"rtsp://127.0.0.1:9/live does not answer") as caught:
        open_source("rtsp://admin:secret@127.0.0.1:9/live", SourceOptions(timeout=1.0))
    assert "secret" not in str(caught.value)


def test_gstreamer_is_missed_in_words() -> None:
    if "GStreamer:                   YES" in cv2.getBuildInformation():
        pytest.skip("this OpenCV has GStreamer")
    with pytest.raises(SourceError, match="was built without GStreamer"):
        open_source("videotestsrc ! videoconvert ! appsink")


def test_without_opencv_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "v.mp4").write_bytes(b"x")
    with pytest.raises(MissingExtraError, match=r"grood-edge\[video\]"):
        open_source(str(tmp_path / "v.mp4"))


class FakeDevice:
    """What cv2.VideoCapture is to a camera: some frames, then none."""

    def __init__(self, frames: int) -> None:
        self.left = frames
        self.released = False

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, np.zeros((4, 4, 3), np.uint8)) if self.left >= 0 else (False, None)

    def get(self, _: int) -> float:
        return 30.0

    def release(self) -> None:
        self.released = True


def camera(monkeypatch: pytest.MonkeyPatch, devices: list[FakeDevice | None], **options: float) -> Source:
    """Open a camera whose device is each of these in turn; None: it cannot be opened. No waiting between them."""
    opened = itertools.chain(devices, itertools.repeat(None))
    monkeypatch.setattr(video, "_open", lambda *_: next(opened))
    monkeypatch.setattr(video, "_FIRST_DELAY", 0.001)
    return open_source("rtsp://user:pw@camera/1", SourceOptions(**options))  # type: ignore[arg-type]


def test_a_camera_is_opened_again_and_each_attempt_is_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [FakeDevice(2), None, FakeDevice(0), FakeDevice(1)]
    source = camera(monkeypatch, devices, reconnects=3)
    assert (source.live, source.fps, source.name) == (True, 30.0, "rtsp://camera/1")
    frames = []
    with pytest.raises(SourceError, match="vanished: it gave no frame, and 3 attempts"):  # noqa: PT012
        while (frame := source.read()) is not None:
            frames.append(frame)
    again = [(f.problem or "").removeprefix("the camera gives no frame; opening it again, attempt ") for f in frames]
    assert again == ["", "", "1 of 3", "2 of 3", "3 of 3", "", "1 of 3", "2 of 3", "3 of 3"]
    assert [f.index for f in frames] == list(range(9))
    assert all(d.released for d in devices if d is not None)


def test_no_reconnects_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    source = camera(monkeypatch, [FakeDevice(1)], reconnects=0)
    with Capture(source, FramePolicy("every", 4)) as capture:
        assert next(capture).image is not None
        with pytest.raises(SourceError, match="vanished"):
            next(capture)


def test_closing_ends_the_wait_before_a_new_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    source = camera(monkeypatch, [FakeDevice(0)])
    monkeypatch.setattr(video, "_FIRST_DELAY", 60.0)
    monkeypatch.setattr(video, "_LONGEST_DELAY", 60.0)
    assert source.read() is not None
    require_closing_wakes(source)


def test_a_users_own_ffmpeg_options_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "format_whitelist;mov")
    assert len(frames_of(open_source(str(squares(tmp_path / "v.avi", "MJPG", 3))))) == 3
    assert os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] == "format_whitelist;mov"


def test_a_name_that_is_not_utf8_is_a_sentence(tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"v\xff.avi")
    name.write_bytes(squares(tmp_path / "v.avi", "MJPG", 3).read_bytes())
    with pytest.raises(SourceError, match="is not UTF-8, and OpenCV cannot take it"):
        open_source(str(name))


def test_a_replay_keeps_that_its_recording_was_cut_off(tmp_path: Path) -> None:
    whole = squares(tmp_path / "v.avi", "MJPG", 40).read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    last = frames_of(open_source(f"replay:{tmp_path / 'cut.avi'}", SourceOptions(fps=2000.0)))[-1]
    assert last.cut_off
    assert last.problem is not None
