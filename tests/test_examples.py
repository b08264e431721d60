"""The examples, run as they stand on what they are for."""

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import cv2
import numpy as np
import onnxruntime
import pytest
from PIL import Image
from rosbags.rosbag2 import Reader, Writer
from rosbags.typesys import Stores, get_typestore

from grood_edge.artifact import artifact_bytes, read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.errors import SourceError
from grood_edge.images import find_images, load_image
from grood_edge.runtime import open_session
from grood_edge.runtime.selftest import MODEL
from tests.test_camera_part import SELFTEST_CAMERA, with_camera
from tests.videos import frames_of, packaged_video

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def digit(digits: DemoImages) -> Path:
    """The handwritten digit that the artifact finds most usual."""
    paths = find_images(digits.test)[:40]
    with open_session(MODEL) as session:
        return max(paths, key=lambda path: session.predict(load_image(path)).p_value)


def test_the_file_needs_nothing_but_onnxruntime(digit: Path) -> None:
    source = (EXAMPLES / "ort_only.py").read_text()
    assert "import grood_edge" not in source
    assert "from grood_edge" not in source
    below_the_imports = source.partition("from PIL import Image, ImageOps\n")[2].splitlines()
    assert sum(bool(line) for line in below_the_imports) <= 20
    with open_session(MODEL) as session:
        verdict = session.predict(np.asarray(Image.open(digit)))
    assert not verdict.is_ood
    assert run("ort_only.py", MODEL, digit).strip() == f"{verdict.class_name} (p {verdict.p_value:.3f})"


def test_the_file_of_a_camera_takes_its_frames_with_nothing_but_onnxruntime(tmp_path: Path) -> None:
    path, street = tmp_path / "camera.onnx", cv2.resize(next(frames_of(packaged_video("bikes.mp4"))), (64, 48))
    path.write_bytes(with_camera(read_artifact(MODEL), SELFTEST_CAMERA))
    cv2.imwrite(str(tmp_path / "street.png"), street)
    cv2.imwrite(str(tmp_path / "large.png"), np.repeat(street, 2, axis=0))
    with open_session(path, color="bgr") as session:
        verdict = session.predict(street)
    said = f"unknown; nearest class {verdict.class_name} (p {verdict.p_value:.3f})"
    assert run("ort_only.py", path, tmp_path / "street.png").strip() == said
    refused = subprocess.run(
        [sys.executable, str(EXAMPLES / "ort_only.py"), str(path), str(tmp_path / "large.png")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert refused.stderr.strip().endswith("this artifact takes its camera's (64, 48)")


def test_opencv_loop_and_robot_loop_read_a_video(tmp_path: Path) -> None:
    video = tmp_path / "short.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"FFV1"), 25.0, (640, 272))
    for index, frame in enumerate(frames_of(packaged_video("bikes.mp4"))):
        if index == 12:
            break
        writer.write(frame)
    writer.release()
    lines = run("opencv_loop.py", MODEL, video).splitlines()
    assert len(lines) == 12
    assert all("unknown" in line for line in lines)  # a street is no digit
    said = run("robot_loop.py", MODEL, video)
    assert "STOP: UNKNOWN" in said
    assert said.splitlines()[-1] == "STOP: the loop has ended"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SourceError])
def test_the_robot_is_left_standing_whatever_ends_the_loop(
    error: type[BaseException], digit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, on_change: Callable[[SimpleNamespace], None]) -> None:
        on_change(SimpleNamespace(time=1.0, state=SimpleNamespace(name="KNOWN", reason="a cup")))
        raise error("it is gone")

    monkeypatch.setattr("grood_edge.runtime.stream.verdicts", broken)
    monkeypatch.setattr(sys, "argv", ["robot_loop.py", str(MODEL), str(digit)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(error, match="it is gone"):
        runpy.run_path(str(EXAMPLES / "robot_loop.py"), run_name="__main__")
    first, last = capsys.readouterr().out.splitlines()
    assert (first.split(":")[0], last) == ("go", "STOP: the loop has ended")


@pytest.mark.parametrize("filter_", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", ["stretch", "center", "letterbox"])
def test_the_file_alone_sees_what_the_session_sees(
    crop: Literal["stretch", "center", "letterbox"], filter_: Literal["bilinear", "bicubic"], digit: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Also images on their side by EXIF, of any proportions, in colour, with transparency."""
    artifact = read_artifact(MODEL)
    short_side = 36 if crop == "center" else None
    p = replace(artifact.contract.preprocessing, crop=crop, short_side=short_side, filter=filter_)
    (tmp_path / "model.onnx").write_bytes(artifact_bytes(artifact.model, replace(artifact.contract, preprocessing=p)))
    wide = Image.open(digit).convert("L").resize((200, 137))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "turned.jpg", exif=exif)
    wide.save(tmp_path / "wide.png")
    wide.convert("RGBA").save(tmp_path / "rgba.png")
    wide.resize((9, 400)).save(tmp_path / "thin.png")
    wide.resize((90, 576)).save(tmp_path / "tie.png")  # 5.0 columns of 32 rows, and 36 x 230.4
    seen: list[np.ndarray] = []
    whole = onnxruntime.InferenceSession.run

    def noted(session: onnxruntime.InferenceSession, names: Any, feed: dict[str, np.ndarray]) -> Any:
        seen.append(feed["image"])
        return whole(session, names, feed)

    with open_session(tmp_path / "model.onnx") as session:
        for path in sorted([*tmp_path.glob("*.png"), *tmp_path.glob("*.jpg")]):
            verdict = session.predict(load_image(path))
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", ["ort_only.py", str(tmp_path / "model.onnx"), str(path)])
                patch.setattr(onnxruntime.InferenceSession, "run", noted)
                runpy.run_path(str(EXAMPLES / "ort_only.py"), run_name="__main__")
            said = capsys.readouterr().out
            assert verdict.class_name in said
            assert said.startswith("unknown") == verdict.is_ood
            prepared = session.prepare(load_image(path))
            assert np.abs(seen[-1][0].astype(int) - prepared.astype(int)).max() <= 1, path
    assert len(seen) == 5


def test_the_ros_node_judges_a_recorded_bag(digit: Path, tmp_path: Path) -> None:
    store = get_typestore(Stores.ROS2_HUMBLE)
    image_type, time_type, header_type = (
        store.types[name] for name in ("sensor_msgs/msg/Image", "builtin_interfaces/msg/Time", "std_msgs/msg/Header")
    )
    known = np.asarray(Image.open(digit))
    street = next(frames_of(packaged_video("bikes.mp4")))
    with Writer(tmp_path / "bag", version=9) as bag:
        topic = bag.add_connection("/image", "sensor_msgs/msg/Image", typestore=store)
        for index in range(16):
            shown, encoding = (known, "mono8") if index < 8 else (street, "bgr8")
            pixels = np.array(shown)
            pixels[0, 0] = index  # a camera that repeats itself is FROZEN
            message = image_type(
                header=header_type(stamp=time_type(sec=index, nanosec=0), frame_id="camera"), height=pixels.shape[0],
                width=pixels.shape[1], encoding=encoding, is_bigendian=0, step=pixels.strides[0], data=pixels.ravel(),
            )  # fmt: skip
            bag.write(topic, index * 10**9, store.serialize_cdr(message, message.__msgtype__))
    judged = []
    judge = example("ros2_node").Judge(str(MODEL), 0.0)
    with Reader(tmp_path / "bag") as recorded:
        for _, logged, raw in recorded.messages():
            judged.append(judge.image(bytes(raw), logged / 1e9))
    assert judge.silence(15.4) is None
    level, sentence, fields = judge.silence(15.6)
    assert (level, fields["state"]) == (2, "NO-VIEW")
    assert "no valid frame for 0.60 s; the newest is STALE" in sentence
    level, sentence, _ = judge.image(b"\0\1\0\0junk", 15.7)
    assert (level, "cannot be read" in sentence) == (2, True)
    for index in range(8):
        level, sentence, _ = judge.image(serialised(np.zeros((48, 64, 3), np.uint8)), 16 + index / 10)
    assert (level, sentence.split(",")[0]) == (2, "NO-VIEW: FROZEN")
    assert "NO-VIEW: BLACK" in judge.image(serialised(np.zeros((24, 32, 3), np.uint8)), 17.0)[1]
    judge.session.close()
    levels = [level for level, _, _ in judged]
    assert levels[7] == 0
    assert judged[7][2]["state"] == "KNOWN"
    assert levels[15] == 1
    assert judged[15][1].startswith("UNKNOWN: ")


def test_the_ros_node_says_that_the_camera_is_not_the_artifacts(tmp_path: Path) -> None:
    path = tmp_path / "camera.onnx"
    path.write_bytes(with_camera(read_artifact(MODEL), SELFTEST_CAMERA))
    street = next(frames_of(packaged_video("bikes.mp4")))
    judge = example("ros2_node").Judge(str(path), 0.0)
    level, sentence, _ = judge.image(serialised(street), 0.1)
    assert (level, "272x640 (height x width); expected 48x64" in sentence) == (2, True)
    level, sentence, _ = judge.image(serialised(np.ascontiguousarray(street[:48, :64, :1])), 0.2)
    assert (level, "expected uint8 [48, 64, 3]" in sentence) == (2, True)
    judge.session.close()


def serialised(pixels: np.ndarray) -> bytes:
    store = get_typestore(Stores.ROS2_HUMBLE)
    stamp = store.types["builtin_interfaces/msg/Time"](sec=1, nanosec=0)
    message = store.types["sensor_msgs/msg/Image"](
        header=store.types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera"), height=pixels.shape[0],
        width=pixels.shape[1], encoding="bgr8" if pixels.shape[2] == 3 else "mono8", is_bigendian=0,
        step=pixels.strides[0], data=pixels.ravel(),
    )  # fmt: skip
    return bytes(store.serialize_cdr(message, "sensor_msgs/msg/Image"))


def example(name: str) -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
