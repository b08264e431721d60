"""Frames around alarms: which, whole, within their bytes, and nobody else's files touched."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

from grood_edge.errors import OutputError, UsageError
from grood_edge.publishing import published
from grood_edge.runtime.decision import StateName
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry import alarm_frames
from grood_edge.telemetry.alarm_folder import AlarmFolder
from grood_edge.telemetry.alarm_frames import AROUND, AlarmFrames, open_alarm_frames
from grood_edge.telemetry.record import RECORD_SCHEMA
from tests.telemetry.conftest import Camera, small_disk, verdict_of, write_all

START = 1_000_000.0  # seconds of the monotonic clock


def stream(video: list[np.ndarray], alarms: tuple[int, ...], frames: int = 40) -> Iterator[StreamVerdict]:
    """Frames that become UNKNOWN at each of `alarms`, for three frames."""
    before: StateName = "KNOWN"
    for index in range(frames):
        state: StateName = "UNKNOWN" if any(alarm <= index < alarm + 3 for alarm in alarms) else "KNOWN"
        image = video[index % len(video)]
        yield verdict_of(index, image, state, changed=state != before, captured=START + index / 25)
        before = state


def saved(folder: Path) -> list[list[int]]:
    """The frames of each alarm, oldest first; each picture is whole and has its document, and nothing else is there."""
    alarms = []
    for alarm in sorted(folder.iterdir()):
        names = sorted(path.name for path in alarm.iterdir())
        indices = sorted({int(name.split(".")[0]) for name in names})
        assert names == [f"{index:08d}.{suffix}" for index in indices for suffix in ("jpg", "json")]
        for index in indices:
            with Image.open(alarm / f"{index:08d}.jpg") as picture:
                picture.load()
        alarms.append(indices)
    return alarms


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def opened(folder: Path, **options: Any) -> AlarmFrames:
    return open_alarm_frames(f"save:{folder}", Camera(), **options)


def test_frames_around_an_alarm(tmp_path: Path, video: list[np.ndarray]) -> None:
    frames = opened(tmp_path / "alarms")
    write_all(frames, stream(video, (15,)))
    frames.close()
    frames.close()
    assert saved(tmp_path / "alarms") == [list(range(15 - AROUND, 15 + AROUND + 1))]
    (alarm,) = (tmp_path / "alarms").iterdir()
    assert alarm.name.endswith("Z-00000015")
    with Image.open(alarm / "00000017.jpg") as picture:
        difference = np.asarray(picture).astype(int) - video[17][..., ::-1]
    assert np.abs(difference).mean() < 2
    document = json.loads((alarm / "00000017.json").read_text())
    assert document.pop("picture_bytes") == (alarm / "00000017.jpg").stat().st_size
    jsonschema.validate(document, RECORD_SCHEMA)
    assert (document["index"], document["state"]["name"]) == (17, "UNKNOWN")


def test_no_more_than_two_frames_are_written_at_a_time(tmp_path: Path, video: list[np.ndarray]) -> None:
    frames = opened(tmp_path / "alarms")
    before = 0
    for verdict in stream(video, (15,)):
        frames.write(verdict)
        now = len(list(tmp_path.rglob("*.jpg")))
        assert now - before <= 2
        before = now
    assert before == 2 * AROUND + 1  # all there before the end


def test_alarm_during_an_alarm_has_its_own_folder_and_no_frame_twice(tmp_path: Path, video: list[np.ndarray]) -> None:
    frames = opened(tmp_path / "alarms")
    write_all(frames, stream(video, (5, 12, 37)))
    frames.close()
    assert saved(tmp_path / "alarms") == [list(range(12)), list(range(12, 23)), list(range(27, 40))]


def test_frame_is_copied(tmp_path: Path, video: list[np.ndarray]) -> None:
    """A source that reads every frame into one buffer."""
    frames, buffer = opened(tmp_path / "alarms"), np.empty_like(video[0])
    for verdict in stream(video, (15,)):
        np.copyto(buffer, video[verdict.frame.index])
        again = verdict_of(verdict.frame.index, buffer, verdict.state.name, changed=verdict.changed, captured=START)
        frames.write(again)
    frames.close()
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as picture:
            difference = np.asarray(picture).astype(int) - video[int(path.stem)][..., ::-1]
        assert np.abs(difference).mean() < 2, path


def test_grey_frames_and_frames_without_a_picture(tmp_path: Path, video: list[np.ndarray]) -> None:
    frames = opened(tmp_path / "alarms")
    frames.write(verdict_of(0, None, "NO-VIEW", "INVALID", captured=START))
    frames.write(verdict_of(1, video[1][..., :1], captured=START))
    frames.write(verdict_of(2, video[2][..., 1], "UNKNOWN", changed=True, captured=START))
    frames.close()
    (alarm,) = (tmp_path / "alarms").iterdir()
    assert sorted(os.listdir(alarm)) == [
        *("00000000.json", "00000001.jpg", "00000001.json", "00000002.jpg", "00000002.json")
    ]
    assert json.loads((alarm / "00000000.json").read_text())["picture_bytes"] == 0
    with Image.open(alarm / "00000001.jpg") as picture:
        assert picture.mode == "L"


def test_memory_is_bounded(tmp_path: Path, video: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm_frames, "RING_BYTES", 3 * video[0].nbytes + 1)
    frames = opened(tmp_path / "alarms")
    write_all(frames, stream(video, (15,)))
    frames.close()
    assert saved(tmp_path / "alarms") == [list(range(12, 15 + AROUND + 1))]


def test_pixels_of_the_ring_are_reused(tmp_path: Path, video: list[np.ndarray]) -> None:
    frames = opened(tmp_path / "alarms")
    seen = set()
    for verdict in stream(video, ()):
        frames.write(verdict)
        seen |= {id(kept.image) for kept in frames._ring}
    assert len(seen) == AROUND


class TestDisk:
    def test_oldest_alarms_make_room(self, tmp_path: Path, video: list[np.ndarray]) -> None:
        most = 2_000_000
        frames = opened(tmp_path / "alarms", disk_bytes=most)
        for verdict in stream(video, (20, 60, 100, 140), 170):
            frames.write(verdict)
            assert bytes_in(tmp_path) <= most
        frames.close()
        alarms = saved(tmp_path / "alarms")
        assert 1 <= len(alarms) < 4
        assert alarms[-1] == list(range(130, 151))
        assert bytes_in(tmp_path) <= most

    def test_alarms_of_earlier_runs_count(self, tmp_path: Path, video: list[np.ndarray]) -> None:
        folder = tmp_path / "alarms"
        first = opened(folder)
        write_all(first, stream(video, (15,)))
        first.close()
        earlier = next(iter(folder.iterdir())).name
        second = opened(folder, disk_bytes=bytes_in(folder) + 100_000)
        later = (
            verdict_of(i, video[i], "UNKNOWN" if i == 5 else "KNOWN", changed=i == 5, captured=START + 9e4)
            for i in range(20)
        )
        write_all(second, later)
        second.close()
        assert earlier not in os.listdir(folder)
        assert len(saved(folder)) == 1

    def test_files_of_others_stay(self, tmp_path: Path, video: list[np.ndarray]) -> None:
        folder = tmp_path / "alarms"
        frames = opened(folder)
        write_all(frames, stream(video, (15,)))
        frames.close()
        old = next(iter(folder.iterdir()))
        theirs = {
            folder / "notes.txt": b"mine",
            old / "label.txt": b"a dog",
            old / "00000005.png": b"a crop",
            old / "00000016.jpg": b"painted over",  # no longer the picture that the document states
            old / "00009999.jpg": b"no document",
            old / "00009997.json": b"[" * 100_000,
            folder / "alarm-of-the-neighbours" / "00000001.json": b'{"picture_bytes": 0}',
        }
        for path, content in theirs.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "00000001.json").write_bytes(b'{"picture_bytes": 0}')
        (folder / "alarm-20200101T000000000000Z-00000001").symlink_to(outside)
        again = opened(folder, disk_bytes=1_900_000)
        write_all(again, stream(video, (20, 60, 100), 130))
        again.close()
        left = {path.name for path in old.iterdir()}
        assert left == {"00000005.png", "00000016.jpg", "00009997.json", "00009999.jpg", "label.txt"}
        for path, content in theirs.items():
            assert path.read_bytes() == content, path
        assert (outside / "00000001.json").exists()

    def test_what_a_killed_write_left_counts_and_goes(
        self, tmp_path: Path, video: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between document and picture, and in the middle of a picture, as `kill -9` leaves it."""

        class KilledError(BaseException):
            pass

        folder, whole = tmp_path / "alarms", published

        @contextlib.contextmanager
        def killed(path: Path, force: bool) -> Iterator[Path]:
            if path.suffix == ".jpg":
                raise KilledError
            with whole(path, force) as temporary:
                yield temporary

        monkeypatch.setattr(alarm_frames, "published", killed)
        with pytest.raises(KilledError):
            write_all(opened(folder), stream(video, (15,)))
        monkeypatch.setattr(alarm_frames, "published", whole)
        (old,) = folder.iterdir()
        (old / ".00000006.jpg.ab_c1234.jpg").write_bytes(bytes(1_900_000))
        assert sum(AlarmFolder(folder, 10)._sizes.values()) == bytes_in(folder) > 1_900_000
        again = opened(folder, disk_bytes=2_000_000)
        write_all(again, stream(video, (20,)))
        again.close()
        assert not old.exists()
        assert bytes_in(folder) <= 2_000_000

    def test_one_alarm_larger_than_all(self, tmp_path: Path, video: list[np.ndarray]) -> None:
        frames = opened(tmp_path / "alarms", disk_bytes=300_000)
        with pytest.raises(OutputError, match="the frames of one alarm do not fit"):
            write_all(frames, stream(video, (15,)))
        assert bytes_in(tmp_path) <= 300_000
        saved(tmp_path / "alarms")

    def test_full_disk_leaves_whole_pictures(self, tmp_path: Path, video: list[np.ndarray]) -> None:
        with small_disk(tmp_path / "disk", 1) as disk:
            frames = opened(disk / "alarms")
            with pytest.raises(OutputError, match="the disk is full"):
                write_all(frames, stream(video, (10, 14, 18, 22, 26, 30)))
            frames.close()  # what still waits would not fit either
            pictures = [path for path in (disk / "alarms").rglob("*") if path.is_file()]
            assert len(pictures) > 30
            for path in pictures:
                assert not path.name.startswith(".")
                if path.suffix == ".jpg":
                    with Image.open(path) as picture:
                        picture.load()
                else:
                    assert json.loads(path.read_text())["source"] == "bikes.mp4"
                    assert path.with_suffix(".jpg").exists()

    def test_a_picture_that_does_not_fit_takes_its_document_along(
        self, tmp_path: Path, video: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, pictures = published, list[Path]()

        @contextlib.contextmanager
        def full(path: Path, force: bool) -> Iterator[Path]:
            pictures.extend([path] if path.suffix == ".jpg" else [])
            if len(pictures) == 4:
                raise OutputError(f"cannot write {path}: the disk is full")
            with whole(path, force) as temporary:
                yield temporary

        monkeypatch.setattr(alarm_frames, "published", full)
        frames = opened(tmp_path / "alarms")
        with pytest.raises(OutputError, match="the disk is full"):
            write_all(frames, stream(video, (15,)))
        frames.close()  # raises nothing that would hide the first reason
        assert len(pictures) == 4
        assert saved(tmp_path / "alarms") == [[5, 6, 7]]
        assert sum(frames._folder._sizes.values()) == bytes_in(tmp_path)


@pytest.mark.parametrize("action", ["save:", "save", "stop", "SAVE:x", ""])
def test_other_actions(action: str) -> None:
    with pytest.raises(UsageError, match="expected save:DIR"):
        open_alarm_frames(action, Camera())


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("missing/alarms", "file", "file/alarms"):
        with pytest.raises(OutputError, match="cannot make the folder"):
            opened(tmp_path / name)


def test_a_camera_that_stands_still_overwrites_nothing(tmp_path: Path, video: list[np.ndarray]) -> None:
    frames = opened(tmp_path / "alarms")
    write_all(frames, stream(video, (12,), frames=15))
    for _ in range(5):  # the last index again, without its picture
        frames.write(verdict_of(14, None, "UNKNOWN", status="STALE", captured=START + 14 / 25))
    frames.close()
    (alarm,) = saved(tmp_path / "alarms")
    assert alarm == list(range(2, 15))
    (folder,) = (tmp_path / "alarms").iterdir()
    assert json.loads((folder / "00000014.json").read_text())["status"] == "OK"
