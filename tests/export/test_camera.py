"""Resize and crop inside the graph: equal to the host and to Pillow, and proved at export."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import skimage
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner, Result

from grood_edge.artifact import read_artifact
from grood_edge.camera_part import CAMERA, PREPARED, open_camera, prepared_frame
from grood_edge.cli import app
from grood_edge.errors import UsageError
from grood_edge.export import pipeline as pipeline_module
from grood_edge.export.batches import frame_hashes
from grood_edge.export.camera import attach_camera, camera_model
from grood_edge.export.preflight import preflight
from grood_edge.images import find_images, load_image
from grood_edge.ort import open_ort
from grood_edge.preprocessing import (
    Camera,
    Preprocessing,
    PreprocessingOptions,
    preprocess_frame,
    resolve_preprocessing,
)
from grood_edge.probes import encode_png, synthetic_frames
from grood_edge.runtime import open_session
from tests.test_preprocessing import torchvision_rule

CROPS: tuple[Literal["center", "letterbox", "stretch"], ...] = ("center", "letterbox", "stretch")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    path = Path(skimage.__file__).parent / "data" / "coffee.png"
    return np.asarray(Image.open(path).convert("RGB").resize((1280, 720)))


def preprocessing(camera: Camera, height: int, width: int, channels: int, crop: Any, margin: int = 0) -> Preprocessing:
    short = max(height, width) + margin if crop == "center" else None
    zero, one = (100.4,) * channels, (1.0,) * channels
    return Preprocessing("custom", height, width, channels, "bilinear", crop, short, zero, one, camera)


def in_graph(p: Preprocessing, frames: np.ndarray) -> np.ndarray:
    """Run the camera part alone, in onnxruntime."""
    found = open_ort(camera_model(p).SerializeToString()).run({"image": frames})[PREPARED]
    np.testing.assert_array_equal(found, np.rint(found))  # whole grey levels
    return found.astype(int)


def random_cases(photo: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, Preprocessing]]:
    """RGB or grey frames of random sizes: photographs, noise, and black and white alone; random inputs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = (int(v) for v in rng.integers(1, (60, 300, 720)[i % 3], 2))
        layout: Any = ("rgb", "bgr", "gray")[rng.integers(3)]
        out_h, out_w, channels, margin = (int(v) for v in (*rng.integers(1, 130, 2), rng.choice([1, 3]), i % 60))
        p = preprocessing(Camera(height, width, layout), out_h, out_w, channels, CROPS[i % 3], margin)
        frame = photo[:height, :width] if i % 2 else rng.integers(0, 256, (height, width, 3), np.uint8)
        if i % 11 == 0:
            frame = (frame > 128).astype(np.uint8) * 255
        yield (frame[..., :1] if layout == "gray" else frame), p


def test_pixels_on_200_random_sizes(photo: np.ndarray) -> None:
    """Against the host, and against Pillow's own resize and crop of the whole picture where it has one."""
    compared = 0
    for frame, p in random_cases(photo, 200):
        raw = frame[..., ::-1] if p.camera is not None and p.camera.layout == "bgr" else frame
        both = in_graph(p, np.stack([raw, raw[::-1]]))
        for found, rgb in zip(both, (frame, frame[::-1]), strict=True):
            assert np.abs(found - preprocess_frame(rgb, p)).max() <= 1, p
        if p.crop != "letterbox" and frame.shape[2] == 3 == p.channels:
            assert np.abs(both[0] - torchvision_rule(Image.fromarray(frame), p)).max() <= 1, p
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_extreme_frames_of_720p(crop: Any, channels: int) -> None:
    p = preprocessing(Camera(720, 1280, "rgb"), 224, 224, channels, crop, 32)
    columns = np.broadcast_to((np.arange(1280) % 2 * 255).astype(np.uint8)[None, :, None], (720, 1280, 3))
    rows = np.broadcast_to((np.arange(720) % 3 * 127).astype(np.uint8)[:, None, None], (720, 1280, 3))
    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)
    frames = np.stack([np.zeros_like(noise), np.full_like(noise, 255), noise, columns, rows])
    for found, frame in zip(in_graph(p, frames), frames, strict=True):
        assert np.abs(found - preprocess_frame(frame, p)).max() <= 1


def test_a_camera_of_the_input_size_is_left_alone(photo: np.ndarray) -> None:
    frame = photo[:48, :64]
    p = preprocessing(Camera(48, 64, "bgr"), 48, 64, 3, "stretch")
    np.testing.assert_array_equal(in_graph(p, frame[None, ..., ::-1])[0], frame)


def test_nodes_are_named_and_tensorrt_takes_them() -> None:
    for layout, channels, crop in (("bgr", 3, "center"), ("rgb", 1, "letterbox"), ("gray", 3, "letterbox")):
        camera: Any = Camera(72, 128, layout)  # type: ignore[arg-type]
        model = camera_model(preprocessing(camera, 37, 32, channels, crop))
        names = [*(n.name for n in model.graph.node), *(t.name for t in model.graph.initializer)]
        names += [output for node in model.graph.node for output in node.output]
        assert all(name.startswith(CAMERA) for name in names)
        assert preflight(model) == ()


def test_becomes_an_engine() -> None:
    from tests.rtx import build_rtx

    for layout, channels, crop in (("bgr", 3, "center"), ("rgb", 1, "letterbox")):
        camera: Any = Camera(72, 128, layout)  # type: ignore[arg-type]
        verdict = build_rtx(camera_model(preprocessing(camera, 37, 32, channels, crop)))
        assert (verdict.stage, verdict.message) == ("built", "")


def test_the_largest_camera_needs_little_memory() -> None:
    """The weights grow with the camera's sides, not with its pixels or with the input's."""
    model = camera_model(preprocessing(Camera(2048, 16_384, "rgb"), 224, 16_384, 3, "stretch"))
    assert len(model.SerializeToString()) < 8 << 20


@pytest.mark.parametrize("size", [(0, 640), (480, 16_385), (16_384, 16_384), (-1, 5)])
def test_cameras_that_are_none(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"expected sides of 1 to 16,384 .* at most 33,554,432 pixels"):
        Camera(*size, "rgb")


@pytest.mark.parametrize("name", ["bicubic", "lanczos", "nearest"])
def test_other_filters_are_refused(name: Any) -> None:
    options = PreprocessingOptions(filter=name, camera=Camera(72, 128, "rgb"))
    with pytest.raises(UsageError, match=f"the filter is {name}, .*--camera-size.*--filter bilinear"):
        resolve_preprocessing(options, 3, (None, None))
    with pytest.raises(UsageError, match="the filter is bicubic"):  # of a preset
        resolve_preprocessing(replace(options, filter=None, preset="efficientnet-lite"), 3, (None, None))


def test_probes_of_large_cameras_fit() -> None:
    p = preprocessing(Camera(1080, 1920, "rgb"), 224, 224, 3, "center", 32)
    sizes = [len(encode_png(frame)) for _, frame in synthetic_frames(p)]
    assert sum(sizes) < 512 << 10


# The whole export, on a network of one convolution that tells three colours apart


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def colours(rng: np.random.Generator, label: int, height: int, width: int) -> np.ndarray:
    base = np.full(3, 70.0) + 90 * np.eye(3)[label] + rng.normal(0, 12, 3)
    return np.clip(rng.normal(base, 15, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def colour_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes; every second image has the camera's size, 45x80."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 24), ("calibration", 20)):
        for label, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                frame = colours(rng, 2 - label, *((45, 80) if i % 2 else (50, 60)))
                Image.fromarray(frame).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def colour_onnx(colour_images: Path) -> Path:
    """Six random filters, pooled; the last layer is the three channels' means, turned about."""
    rng = np.random.default_rng(1)
    kernel = rng.normal(0, 0.1, (6, 3, 3, 3)).astype(np.float32)
    kernel[:3, :, 1, 1] += np.eye(3, dtype=np.float32)[::-1]
    last = np.eye(6, 3, dtype=np.float32) * 4
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "last"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 24, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(last, "last")],
    )
    path = colour_images / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def arguments(model: Path, images: Path, out: Path) -> list[str | Path]:
    calibration: list[str | Path] = ["--calibration-data", images / "calibration", "--out", out]
    (images / "classes.txt").write_text("blue\ngreen\nred\n")
    fit: list[str | Path] = ["--mean", "0", "--std", "1", "--ood-prototype", "mean", "--scale", "1"]
    fit += ["--labels", "predicted", "--classes", images / "classes.txt"]
    return ["export", model, "--data", images / "train", *calibration, *fit]


def test_export_with_a_camera(colour_onnx: Path, colour_images: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    more = ("--camera-size", "45x80", "--layout", "bgr", "--crop", "letterbox")
    result = run(*arguments(colour_onnx, colour_images, out), *more)
    assert result.exit_code == 0, result.output
    artifact = read_artifact(out)
    p = artifact.contract.preprocessing
    assert (p.camera, p.crop) == (Camera(45, 80, "bgr"), "letterbox")
    part = open_camera(artifact.model, p)
    images = [load_image(file) for file in find_images(colour_images / "train")]
    prepared = np.stack([prepared_frame(image, p, part) for image in images])
    assert (prepared != np.stack([preprocess_frame(image, p) for image in images])).any()
    assert set(artifact.contract.fit.sketch_hashes()) == set(frame_hashes(prepared))  # they went through the graph
    with open_session(out, color="rgb") as session:
        frame = images[1]
        assert frame.shape == (45, 80, 3)
        assert session.predict(frame).class_name == "blue"
    evaluated = run("evaluate", out, "--id", colour_images / "calibration", "--ood", f"x={colour_images / 'train'}")
    assert evaluated.exit_code == 0, evaluated.output


def test_an_unequal_resize_is_not_published(
    colour_onnx: Path, colour_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(model: onnx.ModelProto, p: Preprocessing) -> onnx.ModelProto:
        attached = attach_camera(model, p)
        for tensor in attached.graph.initializer:
            if tensor.name == f"{CAMERA}rows_weights":
                weights = np.roll(numpy_helper.to_array(tensor), 1, axis=2)  # one source row further down
                tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
        return attached

    monkeypatch.setattr(pipeline_module, "attach_camera", faulty)
    out = tmp_path / "model.onnx"
    result = run(*arguments(colour_onnx, colour_images, out), "--camera-size", "45x80")
    assert result.exit_code != 0
    assert "grey levels" in result.output
    assert not list(tmp_path.iterdir())


REFUSED = [
    (["--layout", "bgr"], "--camera-size 720x1280"),
    (["--camera-size", "720"], "expected 720x1280"),
    (["--camera-size", "axb"], "expected 720x1280"),
    (["--camera-size", "99999x2"], "sides of 1 to 16,384"),
    (["--camera-size", "45x80", "--filter", "bicubic"], "--filter bilinear"),
    (["--crop", "letterbox", "--resize", "30"], "cannot be used with --crop letterbox"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_options_that_contradict(
    colour_onnx: Path, colour_images: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    result = run(*arguments(colour_onnx, colour_images, tmp_path / "model.onnx"), *more)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
