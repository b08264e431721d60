"""An artifact for a camera: its part of the graph cut off or alone, frames and images in sessions, recalibration.

The packaged artifact of grey 32x32 digits, given a camera.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner, Result

from grood_edge.artifact import Artifact, artifact_bytes, read_artifact
from grood_edge.camera_part import CAMERA, PREPARED, open_camera, prepared_frame, simulated_frame, without_camera
from grood_edge.cli import app
from grood_edge.errors import ArtifactError, FrameError
from grood_edge.export import RecalibrateOptions, recalibrate
from grood_edge.export.camera import attach_camera
from grood_edge.export.verify import run_frames
from grood_edge.ort import open_ort
from grood_edge.preprocessing import (
    Camera,
    preprocess_frame,
)
from grood_edge.probes import make_probes, replay_probes, synthetic_frames
from grood_edge.runtime import Session, open_session
from grood_edge.runtime.selftest import MODEL

SELFTEST_CAMERA = Camera(48, 64, "rgb")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def plain() -> Artifact:
    return read_artifact(MODEL)


def with_camera(plain: Artifact, camera: Camera) -> bytes:
    """What export writes: the camera part attached, probes of the camera's size."""
    p = replace(plain.contract.preprocessing, camera=camera)
    model = attach_camera(onnx.load_model_from_string(plain.model), p).SerializeToString(deterministic=True)
    session, contract = open_ort(model), replace(plain.contract, preprocessing=p)
    probes = make_probes(synthetic_frames(p), lambda frames: run_frames(session, frames, len(frames)), contract)
    return artifact_bytes(model, replace(contract, probes=probes))


@pytest.fixture(scope="module")
def path(plain: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("camera") / "camera.onnx"
    path.write_bytes(with_camera(plain, SELFTEST_CAMERA))
    return path


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """Digits as a camera of 48x64 pixels sees them, in colour."""
    digits = np.rint(load_digits().images[:12] * 255 / 16).astype(np.uint8)
    return [simulated_frame(digit, SELFTEST_CAMERA) * np.array([1, 1, 0], np.uint8) for digit in digits]


@pytest.fixture(scope="module")
def host() -> Iterator[Session]:
    """The packaged artifact, which leaves resize and crop to the host."""
    with open_session(MODEL) as session:
        yield session


@pytest.fixture(scope="module")
def strict(path: Path) -> Iterator[Session]:
    """The camera's artifact, as a robot opens it."""
    with open_session(path) as session:
        yield session


def test_cutting_gives_the_bytes_that_were_there(plain: Artifact, path: Path) -> None:
    attached = read_artifact(path)
    cut = without_camera(attached.model, attached.contract.preprocessing)
    assert artifact_bytes(cut, plain.contract) == artifact_bytes(plain.model, plain.contract)


def test_the_probes_are_raw_frames(strict: Session) -> None:
    report = replay_probes(strict.contract, strict.backend.run, "cpu")
    assert report.passed
    assert len(report.rows) > 10
    assert strict.contract.preprocessing.input_shape == (48, 64, 3)


def test_predict_takes_the_cameras_frames_alone(
    path: Path, strict: Session, host: Session, frames: list[np.ndarray]
) -> None:
    p = strict.contract.preprocessing
    part = open_camera(read_artifact(path).model, p)
    for frame in frames:
        prepared = prepared_frame(frame, p, part)
        assert np.abs(prepared.astype(int) - preprocess_frame(frame, p)).max() <= 1
        expected = host.infer_prepared(prepared[None])
        assert strict.predict(frame).ood_score == pytest.approx(float(expected.ood_score[0]), abs=1e-4)
    for wrong in (np.zeros((720, 1280, 3), np.uint8), frames[0][..., :1], frames[0][..., 0]):
        with pytest.raises(FrameError, match=rf"shape \[{wrong.shape[0]}, .*expected uint8 \[48, 64, 3\]"):
            strict.predict(wrong)


def test_only_differing_channel_orders_are_turned(
    plain: Artifact, path: Path, strict: Session, frames: list[np.ndarray]
) -> None:
    other = path.with_name("bgr.onnx")
    other.write_bytes(with_camera(plain, replace(SELFTEST_CAMERA, layout="bgr")))
    turned = [frame[..., ::-1] for frame in frames]
    expected = [verdict.ood_score for verdict in strict.predict_batch(frames)]
    with open_session(other) as of_bgr:
        found = [of_bgr.predict_batch(turned)]  # nothing said: in the camera's own order
    with open_session(other, color="rgb") as of_bgr:
        found.append(of_bgr.predict_batch(frames))
    with open_session(other, color="bgr") as of_bgr:
        found.append(of_bgr.predict_batch(turned))
        wrong = of_bgr.predict(frames[0]).ood_score
    with open_session(path, color="bgr") as of_rgb:
        found.append(of_rgb.predict_batch(turned))
    for verdicts in found:
        np.testing.assert_allclose([verdict.ood_score for verdict in verdicts], expected, atol=1e-4)
    assert wrong != pytest.approx(expected[0], abs=1e-2)  # the frames are coloured: their order does matter


def test_images_of_any_size(path: Path, strict: Session, host: Session, frames: list[np.ndarray]) -> None:
    """Other sizes go to the host's resize, frames of the camera through the graph's."""
    others = [np.asarray(Image.fromarray(frame).resize((90, 70))) for frame in frames]
    expected = host.infer(others).ood_score
    with open_session(path, any_size=True) as session:
        np.testing.assert_array_equal(session.infer(others).ood_score, expected)
        both = session.infer([frames[0], others[0]])
        assert both.ood_score[0] == pytest.approx(strict.predict(frames[0]).ood_score, abs=1e-5)
        grey = others[0][..., 0]
        assert session.predict(grey) == host.predict(grey)
    with open_session(path, any_size=True, color="bgr") as session:
        np.testing.assert_array_equal(session.infer([o[..., ::-1] for o in others]).ood_score, expected)


def test_score_and_verify_on_the_command_line(path: Path, tmp_path: Path, frames: list[np.ndarray]) -> None:
    for index, frame in enumerate(frames):
        image = Image.fromarray(frame)
        (image if index % 2 else image.resize((30, 40))).save(tmp_path / f"{index}.png")
    scored = json.loads(run("score", path, tmp_path, "--json").stdout)
    assert scored["images"] == len(frames)
    assert run("verify", path).exit_code == 0


def test_recalibrates(path: Path, tmp_path: Path) -> None:
    """On images that the artifact has not seen, some of the camera's size."""
    digits = [np.roll(np.rint(d * 255 / 16).astype(np.uint8), 1, axis=1) for d in load_digits().images[:140]]
    folder = tmp_path / "new"
    folder.mkdir()
    for index, digit in enumerate(digits):
        frame = digit if index % 4 else simulated_frame(digit, SELFTEST_CAMERA)
        Image.fromarray(frame).save(folder / f"{index}.png")
    out = tmp_path / "again.onnx"
    report = recalibrate(path, folder, out, RecalibrateOptions(threshold_only=True))
    assert report.contract.calibration.n == 140
    assert report.contract.preprocessing.camera == SELFTEST_CAMERA
    with open_session(out) as session:
        assert replay_probes(session.contract, session.backend.run, "cpu").passed


def test_a_contract_without_its_camera_part_is_refused(plain: Artifact, path: Path) -> None:
    attached = read_artifact(path)
    model = onnx.load_model_from_string(attached.model)
    with pytest.raises(ArtifactError, match="it has"):  # a graph without the part takes other images
        read_artifact(artifact_bytes(plain.model, attached.contract))
    outside = onnx.ModelProto()
    outside.CopyFrom(model)
    for node in outside.graph.node:
        node.name = node.name.replace(CAMERA, "preprocess/")
    with pytest.raises(ArtifactError, match="crosses the edge of the camera part"):
        read_artifact(artifact_bytes(outside.SerializeToString(), attached.contract))
    second = onnx.ModelProto()
    second.CopyFrom(model)
    second.graph.node.append(helper.make_node("Cast", ["image"], ["x"], name="classifier/x", to=TensorProto.FLOAT))
    with pytest.raises(ArtifactError, match="tensor 'image' crosses"):
        read_artifact(artifact_bytes(second.SerializeToString(), attached.contract))
    nameless = onnx.ModelProto()
    nameless.CopyFrom(model)
    for node in nameless.graph.node:
        node.input[:] = [name.replace(PREPARED, "elsewhere") for name in node.input]
        node.output[:] = [name.replace(PREPARED, "elsewhere") for name in node.output]
    with pytest.raises(ArtifactError, match="no node of the graph gives 'camera/prepared'"):
        read_artifact(artifact_bytes(nameless.SerializeToString(), attached.contract))
