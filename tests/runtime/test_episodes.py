"""Calibrating on episodes: real digits as video, through a session, into a file that opens and answers as before."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from grood_edge.artifact import Artifact, artifact_bytes, read_artifact
from grood_edge.camera_part import simulated_frame
from grood_edge.cli import app
from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError, OutputError, UsageError, VerificationError
from grood_edge.export import RecalibrateOptions, recalibrate
from grood_edge.images import find_images, load_image
from grood_edge.preprocessing import Color
from grood_edge.runtime import episodes as module
from grood_edge.runtime import open_session
from grood_edge.runtime.capture import sources
from grood_edge.runtime.capture.sources import CapturedFrame
from grood_edge.runtime.decision import parse_decision
from grood_edge.runtime.e_cusum import largest_evidence, log_e_value
from grood_edge.runtime.episodes import EpisodeOptions, calibrate_episodes
from grood_edge.runtime.selftest import MODEL
from tests.test_camera_part import SELFTEST_CAMERA, with_camera

FPS = 10.0


class ListSource:
    """Frames named in a text file, one a line; a line that is no file is a damaged frame."""

    live = False

    def __init__(self, path: Path, fps: float | None = FPS, color: Color = "rgb") -> None:
        self.name, self.fps, self.color = path.name, fps, color
        self._lines = path.read_text().splitlines()
        self._next = 0
        self.closed = False

    def read(self) -> CapturedFrame | None:
        if self._next == len(self._lines):
            return None
        index, self._next = self._next, self._next + 1
        path = Path(self._lines[index])
        image = load_image(path) if path.is_file() else None
        return CapturedFrame(image, index, 0.0, index / FPS, self.name, None if path.is_file() else "damaged")

    def close(self) -> None:
        self.closed = True


Write = Callable[[str, list[list[Path]]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, episodes: list[list[Path]]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for index, frames in enumerate(episodes):
            (folder / f"{index:03d}.txt").write_text("\n".join(map(str, frames)))
        return folder

    return written


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(MODEL.read_bytes())
    return path


@pytest.fixture(scope="module")
def id_images(digits: DemoImages) -> list[Path]:
    return find_images(digits.test)


def drawn(images: list[Path], episodes: int, frames: int, repeat: int = 1, seed: int = 0) -> list[list[Path]]:
    """Episodes of random images, each shown `repeat` frames long."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(images), (episodes, frames // repeat))
    return [[images[i] for i in row for _ in range(repeat)] for row in picks]


def test_episodes_set_interval_and_maxima_and_change_nothing_else(
    artifact: Path, write: Write, id_images: list[Path]
) -> None:
    """Every image lasts two frames, so frames two apart are independent."""
    before = read_artifact(artifact)
    shown = drawn(id_images, 8, 60, repeat=2)
    report = calibrate_episodes(artifact, write("episodes", shown), open_episode=ListSource)
    after = read_artifact(artifact)
    stream = after.contract.stream
    assert stream is not None
    assert after.contract == report.contract == replace(before.contract, stream=stream)
    assert after.graph_digest == before.graph_digest
    assert (stream.fps, stream.episodes, stream.frames) == (FPS, 8, 8 * 60)
    assert stream.interval == stream.correlation == 0.2
    with open_session(MODEL) as session:
        log_e = [np.array([log_e_value(session.predict(load_image(p)).p_value) for p in one]) for one in shown[:3]]
    for values in log_e:
        assert any(largest_evidence(values, 2) == pytest.approx(m) for m in stream.maxima)
    assert report.hours == pytest.approx(8 * 60 / FPS / 3600)
    assert report.threshold is None
    assert [rate.set_to for rate in report.rates] == [0.1, 1.0, 8.0]
    shown_table = CliRunner().invoke(app, ["inspect", str(artifact)], env={"COLUMNS": "200"}).output
    assert "8 episodes, 480 frames at 10 a second; a frame every 0.2 s is fed" in shown_table
    assert report.rates[-1].alarms == 0
    assert report.rates[-1].lower == pytest.approx(report.hours / -math.log(0.05))
    assert report.rates[-1].upper == math.inf
    assert "8 episodes hardly show" in report.warnings[0]
    decision = parse_decision("e-cusum:hours=1", after.contract)
    assert "fed every 0.2 s" in decision.start(0.0).state.reason


def test_short_episodes_set_no_decimation_and_say_why(artifact: Path, write: Write, id_images: list[Path]) -> None:
    report = calibrate_episodes(artifact, write("short", drawn(id_images, 60, 10)), open_episode=ListSource)
    assert report.stream.interval is report.stream.correlation is None
    assert "at least 30" in report.correlation.reason
    assert report.threshold == pytest.approx(report.stream.maxima[0])
    assert report.needed == 59
    decision = parse_decision("e-cusum:hours=1", read_artifact(artifact).contract)
    assert "threshold by episode" in decision.start(0.0).state.reason


def test_frames_that_are_no_view_are_counted_and_not_scored(
    artifact: Path, write: Write, id_images: list[Path], tmp_path: Path
) -> None:
    """A black, a saturated and a frozen stretch change no figure of the scored frames."""
    for name, level in (("black", 0), ("white", 255)):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(tmp_path / f"{name}.png")
    shown = drawn(id_images, 3, 40)
    blind = [tmp_path / "black.png"] * 4 + [tmp_path / "white.png"] * 2
    first, *others = shown
    mixed = [[*first[:20], *blind, *first[20:], *first[-1:] * 8], *others]
    plain = calibrate_episodes(artifact, write("plain", shown), tmp_path / "a.onnx", open_episode=ListSource)
    report = calibrate_episodes(artifact, write("mixed", mixed), tmp_path / "b.onnx", open_episode=ListSource)
    assert plain.unhealthy == {}
    assert report.unhealthy == {"BLACK": 4, "SATURATED": 2, "FROZEN": 4}
    assert report.stream.frames == plain.stream.frames + 4
    with pytest.raises(DatasetError, match="no frame that could be scored: all are unreadable, black"):
        calibrate_episodes(artifact, black_only(tmp_path), options=EpisodeOptions(fps=FPS))


def black_only(folder: Path) -> Path:
    episode = folder / "dark" / "one"
    episode.mkdir(parents=True)
    for index in range(3):
        (episode / f"{index}.png").write_bytes((folder / "black.png").read_bytes())
    return folder / "dark"


def test_few_episodes_carry_no_threshold_and_are_warned_about(
    artifact: Path, write: Write, id_images: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    report = calibrate_episodes(artifact, write("few", drawn(id_images, 4, 50, seed=1)), out, open_episode=ListSource)
    assert report.path == out
    assert report.threshold is None
    assert report.stream.interval is not None
    assert "4 episodes hardly show" in report.warnings[0]
    assert read_artifact(artifact).contract.stream is None
    assert read_artifact(out).contract.stream == report.stream
    with pytest.raises(OutputError, match="exists"):
        calibrate_episodes(artifact, tmp_path / "few", out, open_episode=ListSource)


def test_bgr_frames_and_grey_ones_are_scored_alike(artifact: Path, write: Write, id_images: list[Path]) -> None:
    folder = write("bgr", drawn(id_images, 2, 40))
    rgb = calibrate_episodes(artifact, folder, open_episode=ListSource).stream
    bgr = calibrate_episodes(artifact, folder, open_episode=lambda p: ListSource(p, color="bgr")).stream
    assert rgb == bgr


def test_damaged_frames_are_gaps_and_refused_when_many(artifact: Path, write: Write, id_images: list[Path]) -> None:
    shown = drawn(id_images, 3, 70)
    shown[0][10:12] = [Path("gone.png")] * 2
    report = calibrate_episodes(artifact, write("some", shown), open_episode=ListSource)
    assert report.stream.frames == 208
    assert report.unreadable == tuple((f"000.txt[{i}]", "damaged") for i in range(10, 12))
    shown[1][10:12] = [Path("gone.png")] * 2
    before = artifact.read_bytes()
    with pytest.raises(DatasetError, match="4 of 210 frames cannot be read"):
        calibrate_episodes(artifact, write("many", shown), open_episode=ListSource)
    assert artifact.read_bytes() == before
    options = EpisodeOptions(allow_unreadable=True)
    allowed = calibrate_episodes(artifact, artifact.parent / "many", None, options, open_episode=ListSource)
    assert allowed.stream.frames == 206


def test_what_the_artifact_was_fitted_on_is_refused(artifact: Path, write: Write, digits: DemoImages) -> None:
    shown = drawn(find_images(digits.train), 2, 20)
    with pytest.raises(DatasetError, match="are among those that this artifact was fitted on"):
        calibrate_episodes(artifact, write("train", shown), open_episode=ListSource)


def test_rates_are_needed_and_must_agree(artifact: Path, write: Write, id_images: list[Path]) -> None:
    folder = write("rates", drawn(id_images, 2, 10))

    def differing(path: Path) -> ListSource:
        return ListSource(path, 10.0 + (path.name > "000.txt"))

    with pytest.raises(UsageError, match="None frames a second; say it with --fps"):
        calibrate_episodes(artifact, folder, open_episode=lambda p: ListSource(p, None))
    with pytest.raises(DatasetError, match="has 11 frames a second, and those before it 10"):
        calibrate_episodes(artifact, folder, open_episode=differing)
    report = calibrate_episodes(artifact, folder, None, EpisodeOptions(fps=5.0), open_episode=differing)
    assert report.stream.fps == 5


def test_folders_that_hold_no_episodes_are_refused(artifact: Path, tmp_path: Path, write: Write) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        calibrate_episodes(artifact, tmp_path / "nothing", open_episode=ListSource)
    with pytest.raises(DatasetError, match="has 0 episodes"):
        calibrate_episodes(artifact, write("empty", []), open_episode=ListSource)
    with pytest.raises(DatasetError, match="no frame that could be scored"):
        calibrate_episodes(artifact, write("gone", [[Path("gone.png")]]), open_episode=ListSource)
    pipeline = write("pipeline", [])
    (pipeline / "a ! b").write_text("")
    with pytest.raises(DatasetError, match="is no episode"):
        calibrate_episodes(artifact, pipeline, open_episode=ListSource)


def test_an_episode_that_is_there_twice_is_refused(artifact: Path, write: Write, id_images: list[Path]) -> None:
    with pytest.raises(DatasetError, match=r"000\.txt and 001\.txt are the same frames"):
        calibrate_episodes(artifact, write("twice", drawn(id_images, 1, 5) * 2), open_episode=ListSource)


def test_episodes_that_alarm_all_the_time_are_no_id_video(artifact: Path, write: Write, digits: DemoImages) -> None:
    folder = write("foreign", drawn(find_images(digits.near), 2, 60))
    warnings = calibrate_episodes(artifact, folder, open_episode=ListSource).warnings
    assert any("do not look like the calibration images" in warning for warning in warnings)


def test_sources_are_closed_whatever_happens(artifact: Path, write: Write, id_images: list[Path]) -> None:
    opened: list[ListSource] = []

    def opening(path: Path) -> ListSource:
        opened.append(ListSource(path))
        if len(opened) == 3:
            raise KeyboardInterrupt
        return opened[-1]

    before = artifact.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        calibrate_episodes(artifact, write("stopped", drawn(id_images, 4, 5)), open_episode=opening)
    assert [source.closed for source in opened] == [True, True, False]
    assert artifact.read_bytes() == before


def test_a_file_that_does_not_answer_as_before_is_not_published(
    artifact: Path, write: Write, id_images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = artifact.read_bytes()

    def other(model: bytes, contract: object) -> bytes:
        probes = tuple(replace(probe, ood_score=probe.ood_score + 1) for probe in report.contract.probes)
        return artifact_bytes(model, replace(report.contract, probes=probes))

    folder = write("episodes", drawn(id_images, 2, 40))
    report = calibrate_episodes(artifact, folder, artifact.parent / "good.onnx", open_episode=ListSource)
    monkeypatch.setattr(module, "artifact_bytes", other)
    with pytest.raises(VerificationError, match="does not answer like"):
        calibrate_episodes(artifact, folder, open_episode=ListSource)
    assert artifact.read_bytes() == before


def test_calibration_on_training_images_is_said(artifact: Path, write: Write, id_images: list[Path]) -> None:
    found: Artifact = read_artifact(artifact)
    calibration = replace(found.contract.calibration, provenance="seen-in-training", guarantee="none", delta=None)
    artifact.write_bytes(artifact_bytes(found.model, replace(found.contract, calibration=calibration)))
    report = calibrate_episodes(artifact, write("episodes", drawn(id_images, 12, 31)), open_episode=ListSource)
    assert "seen in training" in report.warnings[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "neither of --data and --episodes"),
        (["--data", "x", "--episodes", "y"], "both of --data and --episodes"),
        (["--episodes", "y", "--alpha", "0.1", "--threshold-only"], "takes no --threshold-only, --alpha"),
        (["--data", "x", "--fps", "3"], "--fps is of --episodes"),
        (["--episodes", "nowhere"], "cannot read the episodes in nowhere"),
    ],
)
def test_the_command_refuses_what_does_not_fit(options: list[str], message: str, artifact: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", str(artifact), *options])
    assert result.exit_code in (1, 2)
    assert message in result.output


def test_the_command_prints_what_was_measured(
    artifact: Path, write: Write, id_images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_open_source", ListSource)
    folder = write("episodes", drawn(id_images, 3, 40))
    result = CliRunner().invoke(app, ["calibrate", str(artifact), "--episodes", str(folder)])
    assert result.exit_code == 0, result.output
    for part in ("3, 120 frames scored", "need 59 episodes, here are 3", "e-cusum:hours=8", "at least 0.0011 h"):
        assert part in result.output
    result = CliRunner().invoke(app, ["calibrate", str(artifact), "--episodes", str(folder), "--json"])
    assert '"episodes_needed": 59' in result.stdout
    assert '"upper": null' in result.stdout


def test_recalibration_drops_the_episodes_and_says_so(
    artifact: Path, write: Write, id_images: list[Path], digits: DemoImages
) -> None:
    options = RecalibrateOptions(threshold_only=True)
    assert recalibrate(artifact, digits.calibration, options=options).warnings == ()
    calibrate_episodes(artifact, write("episodes", drawn(id_images, 2, 10)), open_episode=ListSource)
    report = recalibrate(artifact, digits.calibration, options=options)
    assert "calibration on episodes was dropped" in report.warnings[0]
    assert read_artifact(artifact).contract.stream is None


@pytest.mark.skipif(not hasattr(sources, "open_source"), reason="open_source is not in this branch yet")
def test_folders_of_images_are_episodes(artifact: Path, tmp_path: Path, id_images: list[Path]) -> None:
    shown = drawn(id_images, 2, 12)
    for index, frames in enumerate(shown):
        (tmp_path / "episodes" / str(index)).mkdir(parents=True)
        for number, path in enumerate(frames):
            Image.open(path).save(tmp_path / "episodes" / str(index) / f"{number:03d}.png")
    report = calibrate_episodes(artifact, tmp_path / "episodes", None, EpisodeOptions(fps=FPS))
    assert report.stream.frames == 24


@pytest.mark.parametrize("layout", ["rgb", "bgr", "gray"])
def test_episodes_of_an_artifact_for_a_camera(
    layout: Literal["rgb", "bgr", "gray"], tmp_path: Path, write: Write, id_images: list[Path]
) -> None:
    """Whatever order its raw frames have, the same images of any size have the same evidence."""
    shown = drawn(id_images, 2, 40)
    camera = replace(SELFTEST_CAMERA, layout=layout)
    path = tmp_path / "camera.onnx"
    path.write_bytes(with_camera(read_artifact(MODEL), camera))
    plain = calibrate_episodes(MODEL, write("plain", shown), tmp_path / "plain.onnx", open_episode=ListSource)
    report = calibrate_episodes(path, write("shown", shown), open_episode=ListSource)
    assert report.stream.maxima == pytest.approx(plain.stream.maxima, abs=1e-6)
    assert report.stream.data_digest == plain.stream.data_digest
    said = "80 frames of another size than the camera's 48x64 (height x width) were resized"
    assert any(warning.startswith(said) for warning in report.warnings)
    assert not any("resized" in warning for warning in plain.warnings)


def test_a_colour_camera_is_not_turned_twice(tmp_path: Path, write: Write, id_images: list[Path]) -> None:
    shown: list[list[Path]] = []
    for episode in drawn(id_images, 2, 20):
        shown.append([])
        for index, source in enumerate(episode):
            coloured = simulated_frame(load_image(source), SELFTEST_CAMERA) * np.array([1, 1, 0], np.uint8)
            shown[-1].append(tmp_path / f"{len(shown)}-{index}.png")
            Image.fromarray(coloured).save(shown[-1][-1])
    maxima = []
    for layout in ("rgb", "bgr"):
        path = tmp_path / f"{layout}.onnx"
        path.write_bytes(with_camera(read_artifact(MODEL), replace(SELFTEST_CAMERA, layout=layout)))
        maxima.append(calibrate_episodes(path, write(layout, shown), open_episode=ListSource).stream.maxima)
    assert maxima[0] == pytest.approx(maxima[1], abs=1e-5)
