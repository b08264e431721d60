"""`grood-edge watch` on real videos: what goes wrong in front of the camera is found, and it always ends cleanly."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import mcap.reader
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from grood_edge.artifact import read_artifact
from grood_edge.cli import app
from grood_edge.errors import OutputError, SourceError, UsageError
from grood_edge.export import ExportOptions, PreprocessingOptions, export_model
from grood_edge.images import find_images, load_image
from grood_edge.preprocessing import Color, preprocess_frame, resolve_preprocessing
from grood_edge.runtime.capture import video as video_sources
from grood_edge.runtime.capture.health import HealthRules
from grood_edge.runtime.capture.image_source import iterator_source
from grood_edge.runtime.capture.mailbox import Capture, FramePolicy
from grood_edge.runtime.capture.sources import CapturedFrame
from grood_edge.runtime.decision import parse_decision
from grood_edge.runtime.drift import Drift
from grood_edge.runtime.selftest import MODEL
from grood_edge.runtime.session import open_session
from grood_edge.runtime.stream import StreamRules, StreamVerdict, stream_rules, verdicts
from grood_edge.telemetry.screen import status_line
from grood_edge.telemetry.watching import Tally, watch
from tests.export.backbones import fitted_network
from tests.telemetry.conftest import verdict_of
from tests.test_camera_part import SELFTEST_CAMERA, with_camera
from tests.videos import Segment, frames_of, injected, packaged_video, write_video

STREET, MEADOW, STRANGER = "bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"
SMALL = PreprocessingOptions(input_size=(32, 32), mean=(0.0,), std=(1.0,), crop="stretch")
RECIPE = (Segment("black", 14, 19), Segment("frozen", 30, 39), Segment("foreign", 50, 58))


def part_of(index: int) -> str:
    """Blocks of five frames: half of them for the fit, a quarter to calibrate, a quarter to be watched."""
    return ("fit", "fit", "calibration", "watched")[index // 5 % 4]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A street and a meadow, learned and calibrated from blocks of frames of two videos."""
    work = tmp_path_factory.mktemp("street")
    for name, video in (("street", STREET), ("meadow", MEADOW)):
        for index, frame in enumerate(frames_of(packaged_video(video))):
            folder = work / part_of(index) / name
            folder.mkdir(parents=True, exist_ok=True)
            grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
            Image.fromarray(cv2.resize(grey, (160, 90), interpolation=cv2.INTER_AREA)).save(folder / f"{index:04d}.png")
    paths = find_images(work / "fit")
    preprocessing = resolve_preprocessing(SMALL, 1, (None, None))
    frames = np.stack([preprocess_frame(load_image(path), preprocessing) for path in paths])
    network = fitted_network("resnet", frames, np.array([int(path.parent.name == "street") for path in paths]))
    options = ExportOptions(preprocessing=SMALL, calibration_data=work / "calibration", rule="marginal")
    export_model(network, work / "fit", work / "model.onnx", options)
    return work / "model.onnx"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blocks of the street that nobody has learned from, with black, frozen and foreign segments put in."""
    work = tmp_path_factory.mktemp("video")
    plain, mixed = work / "plain.avi", work / "mixed.avi"
    unseen = (f for i, f in enumerate(frames_of(packaged_video(STREET))) if part_of(i) == "watched")
    write_video(plain, unseen, 25.0)
    write_video(mixed, injected(plain, packaged_video(STRANGER), RECIPE), 25.0, RECIPE)
    return mixed


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["watch", *map(str, arguments)], env={"COLUMNS": "200"})


def rows_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_every_segment_is_found_and_nothing_else(artifact: Path, video: Path, tmp_path: Path) -> None:
    log, recipe = tmp_path / "log.jsonl", json.loads(video.with_suffix(".json").read_text())
    result = run(artifact, video, "--decision", "hysteresis:enter=0.02,k=3,n=4", "--log", log, "--json")
    assert result.exit_code == 0, result.output
    rows, summary = rows_of(log), json.loads(result.stdout)
    assert [row["index"] for row in rows] == list(range(60)) == list(range(summary["frames"]))
    assert [(s["kind"], s["first"], s["last"]) for s in recipe] == [(s.kind, s.first, s.last) for s in RECIPE]
    black, frozen, foreign = (rows[s.first : s.last + 1] for s in RECIPE)
    assert [row["status"] for row in black] == ["BLACK"] * 5 + ["FROZEN"]  # the sixth repeats five
    assert [row["status"] for row in frozen[-5:]] == ["FROZEN"] * 5
    assert any(row["state"]["name"] == "UNKNOWN" for row in foreign)
    assert all("ood_score" not in row for row in rows if row["status"] != "OK")
    assert {row["problem"] for row in frozen[-5:]} == {"identical to each of the last 5 frames"}
    assert {"problem" in row for row in rows} == {row["status"] != "OK" for row in rows}
    alarms = [row["index"] for row in rows if row["changed"] and row["state"]["name"] == "UNKNOWN"]
    assert len(alarms) == 1
    assert 50 <= alarms[0] <= 54
    assert all(row["status"] == "OK" for row in rows if not any(s.first <= row["index"] <= s.last for s in RECIPE))
    assert summary["statuses"] == {
        status: sum(row["status"] == status for row in rows) for status in summary["statuses"]
    }
    assert summary["changes"] == sum(row["changed"] for row in rows)
    assert summary["ended"] == "the source has ended"


def test_all_outputs_at_once_and_the_table(artifact: Path, video: Path, tmp_path: Path) -> None:
    names = {"--log": "a.jsonl", "--mcap": "a.mcap", "--record": "a.mp4"}
    outputs = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    arguments: list[str | Path] = [
        artifact,
        video,
        "--decision",
        "per-frame",
        *outputs,
        "--on-unknown",
        f"save:{tmp_path / 'alarms'}",
    ]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "changes of state" in result.output
    assert sum(1 for _ in frames_of(tmp_path / "a.mp4")) == 60
    with (tmp_path / "a.mcap").open("rb") as file:
        documents = [json.loads(message.data) for _, _, message in mcap.reader.make_reader(file).iter_messages()]
    rows = rows_of(tmp_path / "a.jsonl")
    assert [{**row, "time": ""} for row in documents] == [{**row, "time": ""} for row in rows]
    assert list((tmp_path / "alarms").iterdir())
    before = {name: (tmp_path / name).read_bytes() for name in names.values()}
    again = run(*arguments)
    assert (again.exit_code, "use --force" in again.output) == (4, True), again.output
    assert before == {name: (tmp_path / name).read_bytes() for name in names.values()}


def test_a_video_that_was_cut_off_says_so(artifact: Path, tmp_path: Path) -> None:
    cut, log = tmp_path / "cut.avi", tmp_path / "log.jsonl"
    write_video(tmp_path / "whole.avi", (f for i, f in enumerate(frames_of(packaged_video(STREET))) if i < 40), 25.0)
    data = (tmp_path / "whole.avi").read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    result = run(artifact, cut, "--log", log)
    assert result.exit_code == 3, result.output
    rows = rows_of(log)
    assert 5 < len(rows) < 40
    assert rows[-1]["status"] == "INVALID"
    assert rows[-1]["problem"] in result.output


def test_damaged_frames_in_the_middle_are_invalid_and_the_stream_goes_on(artifact: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "frames", tmp_path / "log.jsonl"
    folder.mkdir()
    for index, frame in enumerate(frames_of(packaged_video(STREET))):
        if index == 8:
            break
        cv2.imwrite(str(folder / f"{index}.png"), frame)
    damaged = folder / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    result = run(artifact, folder, "--fps", "10", "--log", log)
    assert result.exit_code == 0, result.output
    rows = rows_of(log)
    assert [row["status"] for row in rows] == ["OK"] * 4 + ["INVALID"] + ["OK"] * 3
    assert "4.png" in rows[4]["problem"]
    assert [row["source_time"] for row in rows] == pytest.approx([index / 10 for index in range(8)])


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "terminated"),
    ],
)
def test_signals_end_it_with_readable_files(number: int, code: int, word: str, tmp_path: Path) -> None:
    log, recording, channel = tmp_path / "a.jsonl", tmp_path / "a.mp4", tmp_path / "a.mcap"
    command = [
        sys.executable, "-m", "grood_edge", "watch", MODEL, f"replay:{packaged_video(STREET)}", "--json",
        "--log", log, "--record", recording, "--mcap", channel,
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and len(log.read_bytes().splitlines()) > 10):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    summary, rows = json.loads(out), rows_of(log)
    assert summary["ended"] == word
    assert all(0 <= change["time"] < 60 for change in summary["transitions"])  # since the start
    assert summary["transitions"]
    assert 10 < len(rows) < 250
    assert len(rows) - 1 <= summary["frames"] <= len(rows) + 1
    assert sum(1 for _ in frames_of(recording)) >= 10
    with channel.open("rb") as file:
        assert sum(1 for _ in mcap.reader.make_reader(file).iter_messages()) >= 10
    assert "Traceback" not in err


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["nothing.mp4"], 3, "nothing.mp4"),
    ([MODEL.name, "--decision", "guess"], 3, "source"),
    (["http://example.org/camera"], 3, "http"),
    (["{video}", "--decision", "guess"], 2, "--decision 'guess'; expected"),
    (["{video}", "--decision", "e-cusum"], 2, "how many hours"),
    (["{video}", "--policy", "some"], 2, "frame policy 'some'; expected"),
    (["{video}", "--metrics", "here"], 2, "--metrics got 'here'"),
    (["{video}", "--on-unknown", "shout"], 2, "expected save:DIR"),
    (["{video}", "--log", "no/such/log.jsonl"], 4, "does not exist; create it first"),
    (["{video}", "--log", "log.txt"], 2, ".jsonl"),
    (["{video}", "--alpha", "0.0001"], 1, "alpha"),
    (["{video}", "--fps", "-1"], 2, "fps is -1"),
    (["{video}", "--fps", "10"], 2, "has 25 frames a second, and its own times"),
    (["{video}", "--topic", "/camera"], 2, "is no bag; leave --topic out"),
    (["{video}", "--max-age", "-1"], 2, "--max-age -1; expected seconds above 0"),
])  # fmt: skip
def test_wrong_use_gets_a_sentence(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(MODEL, *[part.format(video=packaged_video(STREET)) for part in arguments])
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert list(tmp_path.iterdir()) == []


class Camera:
    """A live camera that delivers real frames and then vanishes, as the sources' own do after their last try."""

    name, live = "camera", True
    fps: float | None = 25.0
    color: Color = "bgr"

    def __init__(self, frames: int) -> None:
        self._frames: Iterator[np.ndarray] = frames_of(packaged_video(STREET))
        self._left = frames
        self.closed = False

    def read(self) -> CapturedFrame | None:
        if self._left == 0:
            raise SourceError("camera vanished: it was opened again 6 times")
        self._left -= 1
        return CapturedFrame(next(self._frames), 9 - self._left, time.monotonic(), None, self.name)

    def close(self) -> None:
        self.closed = True


class Kept:
    """Takes verdicts until it is full."""

    def __init__(self, most: int = 1000) -> None:
        self.verdicts: list[StreamVerdict] = []
        self.closed = 0
        self._most = most

    def write(self, verdict: StreamVerdict) -> None:
        if len(self.verdicts) == self._most:
            raise OutputError("the disk is full")
        self.verdicts.append(verdict)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(("most", "error"), [(1000, SourceError), (4, OutputError)])
def test_whatever_fails_everything_is_closed(most: int, error: type[Exception]) -> None:
    camera, first, second, tally = Camera(10), Kept(), Kept(most), Tally()
    changes: list[str] = []
    with (
        open_session(MODEL, color="bgr") as session,
        Capture(camera, FramePolicy("every", 4), stall_after=0.5) as capture,
    ):
        rules = StreamRules(parse_decision("per-frame", session.contract), HealthRules())
        stream = verdicts(session, capture, rules, on_change=lambda found: changes.append(found.state.name))
        with pytest.raises(error):
            watch(stream, [first, second], tally, lambda _: None)
    assert camera.closed
    assert (first.closed, second.closed) == (1, 1)
    assert [found.frame.index for found in first.verdicts] == list(range(10 if error is SourceError else 5))
    assert tally.summary("x").frames == len(first.verdicts)
    assert len(changes) == tally.summary("x").changes >= 1


@pytest.mark.parametrize("decision", ["per-frame", "hysteresis:no-view=0.2", "e-cusum:hours=1,no-view=0.2"])
def test_a_camera_that_stands_still_is_no_view_and_is_not_scored(decision: str) -> None:
    class Stuck(Camera):
        def read(self) -> CapturedFrame | None:
            while self._left == 0 and not self.closed:
                time.sleep(0.005)
            return None if self.closed else super().read()

    seen: list[StreamVerdict] = []
    with (
        open_session(MODEL, color="bgr") as session,
        Capture(Stuck(3), FramePolicy("every", 4), stall_after=0.1) as capture,
    ):
        rules = StreamRules(parse_decision(decision, session.contract, 25.0), HealthRules(max_age=0.1))
        for found in verdicts(session, capture, rules):
            seen.append(found)
            if len(seen) == 8:
                break
    assert [found.status for found in seen[-2:]] == ["STALE", "STALE"]
    assert seen[-1].state.name == "NO-VIEW"
    assert seen[-1].verdict is None
    assert seen[-1].age > 0.1


def test_an_output_that_is_what_is_watched_is_refused(tmp_path: Path) -> None:
    video = tmp_path / "mine.mp4"
    video.write_bytes(packaged_video(STREET).read_bytes())
    before = video.read_bytes()
    for source, out in ((video, video), (f"replay:{video}", video), (tmp_path, video)):
        result = run(MODEL, source, "--fps", "10", "--record", out, "--force")
        assert (result.exit_code, "name another output" in result.output) == (2, True), result.output
    assert video.read_bytes() == before


def test_nothing_is_written_into_a_watched_folder_nor_through_links_in_a_circle(tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    cv2.imwrite(str(frames / "0.png"), next(frames_of(packaged_video(STREET))))
    (tmp_path / "into.jsonl").symlink_to(frames / "new.jsonl")  # leads nowhere so far
    for option, out in (
        ("--log", frames / "log.jsonl"),
        ("--log", tmp_path / "into.jsonl"),
        ("--on-unknown", f"save:{frames / 'alarms'}"),
    ):
        result = run(MODEL, frames, "--fps", "10", option, out)
        assert (result.exit_code, "name another output" in result.output) == (2, True), result.output
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    result = run(MODEL, frames, "--fps", "10", "--log", tmp_path / "circle.jsonl")
    assert (result.exit_code, "choose another output path" in result.output) == (4, True), result.output
    assert sorted(path.name for path in frames.iterdir()) == ["0.png"]
    (tmp_path / "new.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert run(MODEL, frames, "--fps", "10", "--log", tmp_path / "new.jsonl", "--force").exit_code == 0


def test_a_damaged_last_image_is_invalid_and_no_failure(tmp_path: Path) -> None:
    for index, frame in zip(range(3), frames_of(packaged_video(STREET)), strict=False):
        cv2.imwrite(str(tmp_path / f"{index}.png"), frame)
    (tmp_path / "2.png").write_bytes(b"no picture")
    result = run(MODEL, tmp_path, "--fps", "10", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["statuses"] == {"OK": 2, "INVALID": 1}


def test_a_rate_that_is_assumed_is_said_once_and_carries_no_promise(tmp_path: Path) -> None:
    images = list(itertools.islice(frames_of(packaged_video(STREET)), 3))
    for index, frame in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{index}.png"), frame)
    result = run(MODEL, tmp_path)
    assert (result.exit_code, result.output.count("they count as 30 a second")) == (0, 1), result.output
    assert "they count as" not in run(MODEL, tmp_path, "--fps", "10").output
    with open_session(MODEL) as session, Capture(iterator_source(images), FramePolicy("every", 4)) as capture:
        rules = StreamRules(parse_decision("e-cusum:hours=1", session.contract, 30.0), HealthRules(max_age=None))
        with pytest.raises(UsageError, match=r"say how many frames a second there are \(--fps\)"):
            next(verdicts(session, capture, rules))


def test_a_camera_of_the_wrong_size_says_why_nothing_was_scored(tmp_path: Path) -> None:
    model, frames = tmp_path / "camera.onnx", tmp_path / "frames"
    model.write_bytes(with_camera(read_artifact(MODEL), SELFTEST_CAMERA))
    frames.mkdir()
    cv2.imwrite(str(frames / "0.png"), next(frames_of(packaged_video(STREET))))
    result = run(model, frames, "--fps", "10")
    assert result.exit_code == 0, result.output
    assert "272x640 (height x width); expected 48x64" in result.output
    assert json.loads(run(model, frames, "--fps", "10", "--json").stdout)["problems"].keys() == {"INVALID"}


def test_a_full_disk_ends_with_code_4_and_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = itertools.chain([10**12] * 6, itertools.repeat(0))
    monkeypatch.setattr("grood_edge.telemetry.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=next(free)))
    log, recording = tmp_path / "a.jsonl", tmp_path / "a.mkv"
    result = run(MODEL, packaged_video(STREET), "--log", log, "--record", recording)
    assert result.exit_code == 4, result.output
    assert "is nearly full: 0 MiB are free" in result.output
    assert "changes of state" in result.output
    assert len(rows_of(log)) - 1 == sum(1 for _ in frames_of(recording)) >= 2


def test_a_camera_that_vanishes_ends_with_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self) -> None:
            self.left = itertools.islice(frames_of(packaged_video(STREET)), 3)

        def read(self) -> tuple[bool, np.ndarray | None]:
            frame = next(self.left, None)
            return frame is not None, frame

        def get(self, _: int) -> float:
            return 25.0

        def release(self) -> None:
            pass

    opened = itertools.chain([Device()], itertools.repeat(None))
    monkeypatch.setattr(video_sources, "_open", lambda *_: next(opened))
    monkeypatch.setattr(video_sources, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(video_sources, "_LONGEST_DELAY", 0.001)
    log = tmp_path / "a.jsonl"
    result = run(MODEL, "rtsp://user:secret@camera/1", "--policy", "every", "--log", log)
    assert result.exit_code == 3, result.output
    assert "vanished: it gave no frame, and 6 attempts" in result.output
    assert "secret" not in result.output
    assert [row["status"] for row in rows_of(log)] == ["OK"] * 3 + ["INVALID"] * 6


class Bag:
    """A recording whose pictures carry seconds since boot; the second one is damaged, the third of another colour."""

    name, live = "bag", False
    fps: float | None = None
    color: Color = "rgb"

    def __init__(self, images: list[np.ndarray | None]) -> None:
        self._images = images
        self._next = 0

    def read(self) -> CapturedFrame | None:
        if self._next == len(self._images):
            return None
        index, self._next = self._next, self._next + 1
        image = self._images[index]
        return CapturedFrame(image, index, time.monotonic(), None if image is None else 100 + index / 10, self.name)

    def close(self) -> None:
        pass


def test_damage_keeps_the_clock_and_another_shape_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "camera.onnx"
    path.write_bytes(with_camera(read_artifact(MODEL), SELFTEST_CAMERA))
    street = cv2.resize(next(frames_of(packaged_video(STREET))), (64, 48))
    images = [street, None, street[..., :1], np.ascontiguousarray(street[::-1])]
    with open_session(path) as session, Capture(Bag(images), FramePolicy("every", 4)) as capture:
        rules = stream_rules(session.contract, capture.source, "per-frame")
        assert rules.health == HealthRules(max_age=None, shape=(48, 64))
        found = list(verdicts(session, capture, rules))
    assert [one.time for one in found] == [100.0, 100.0, 100.2, 100.3]
    assert [one.status for one in found] == ["OK", "INVALID", "INVALID", "OK"]
    assert "expected uint8 [48, 64, 3]" in str(found[2].frame.problem)


def test_drift_is_said_once_with_its_figure(capsys: pytest.CaptureFixture[str]) -> None:
    drift = Drift(0.41, 1e-9, 0.006, 200, 12.5, measured=False)
    with status_line() as report:
        for index in range(3):
            report(verdict_of(index, drift=drift))
    said = capsys.readouterr().err
    assert said.count("DRIFT") == 1
    assert "distance 0.41" in said
    assert "not kept without episodes" in said
