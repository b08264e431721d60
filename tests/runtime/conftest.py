"""Artifacts of the runtime's tests: colour photos, a network that overflows, one for single images alone."""

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import skimage
import torch
from onnx import helper, numpy_helper
from PIL import Image
from torch import nn

from grood_edge.arrays import Frame
from grood_edge.artifact import Artifact, artifact_bytes, read_artifact
from grood_edge.export import ExportOptions, PreprocessingOptions, export_model
from grood_edge.images import find_images, load_image
from grood_edge.preprocessing import preprocess_frame, resolve_preprocessing
from grood_edge.runtime.compile import NO_DEVICE, CompileOptions, compile_artifact
from grood_edge.runtime.engine_spec import BuildSpec
from grood_edge.runtime.trt_api import TrtApi, load_api
from tests.runtime.engines import EngineFile
from tests.shared import made_once

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png")
COLOR_OPTIONS = PreprocessingOptions(input_size=(48, 48))  # preset imagenet: short side 55, centre crop
CROPS = {"train": 50, "calibration": 30, "test": 20}  # of each photo
OVERFLOW_LEVEL = 204  # a frame of this grey level overflows float32 in the network below


@dataclass(frozen=True)
class ColorPhotos:
    """Class folders of colour crops from three photos, and the artifact of a network trained on them."""

    folder: Path
    artifact: Path

    def test_frames(self) -> list[Frame]:
        return [load_image(path) for path in find_images(self.folder / "test")]


class ColorNetwork(nn.Module):
    """RGB images `[N, 3, 48, 48]`, normalised as for ImageNet, to three logits; 24 features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 24), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(24, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(images))
        return logits


def _write_crops(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for photo in PHOTOS:
        with Image.open(Path(skimage.__file__).parent / "data" / photo) as image:
            rgb = image.convert("RGB")
        for part, count in CROPS.items():
            target = folder / part / photo.split(".")[0]
            target.mkdir(parents=True)
            for index in range(count):
                w, h = (int(v) for v in rng.integers(90, 200, 2))
                left, top = int(rng.integers(0, rgb.width - w)), int(rng.integers(0, rgb.height - h))
                rgb.crop((left, top, left + w, top + h)).save(target / f"{index:03d}.png")


def _trained_color_network(train: Path) -> ColorNetwork:
    p = resolve_preprocessing(COLOR_OPTIONS, 3, (None, None))
    paths = [(path, label) for label, c in enumerate(sorted(train.iterdir())) for path in find_images(c)]
    frames = np.stack([preprocess_frame(load_image(path), p) for path, _ in paths]).astype(np.float32)
    normalised = (frames - np.array(p.mean, np.float32)) / np.array(p.std, np.float32)
    images = torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)))
    labels = torch.tensor([label for _, label in paths])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ColorNetwork().train()
        optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(60):
            loss = nn.functional.cross_entropy(network(images), labels)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return network.eval()


def _make_color_artifact(folder: Path) -> None:
    _write_crops(folder)
    network = _trained_color_network(folder / "train")
    options = ExportOptions(calibration_data=folder / "calibration", preprocessing=COLOR_OPTIONS)
    export_model(network, folder / "train", folder / "color.onnx", options)


@pytest.fixture(scope="session")
def color_photos(tmp_path_factory: pytest.TempPathFactory) -> ColorPhotos:
    folder = made_once(tmp_path_factory, "color", _make_color_artifact)
    return ColorPhotos(folder, folder / "color.onnx")


@pytest.fixture(scope="session")
def overflowing_path(tmp_path_factory: pytest.TempPathFactory, artifact_path: Path) -> Path:
    """The digit artifact, its features times a factor: 1 for digits, infinite for frames of mean level 204."""
    artifact = read_artifact(artifact_path)
    model = onnx.load_model_from_string(artifact.model)
    features = f"classifier/{artifact.contract.classifier.features_tensor}"
    constants = {"level": OVERFLOW_LEVEL / 255, "width": 20.0, "one": 1.0, "steepness": 100.0}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.float32), f"test/{name}") for name, value in constants.items()
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], np.int64), "test/axes"))
    factor = [
        ("ReduceMean", ["preprocess/div_2", "test/axes"], "mean"),
        ("Sub", ["test/mean", "test/level"], "difference"),
        ("Abs", ["test/difference"], "distance"),
        ("Mul", ["test/distance", "test/width"], "scaled"),
        ("Sub", ["test/one", "test/scaled"], "closeness"),
        ("Relu", ["test/closeness"], "near"),
        ("Mul", ["test/near", "test/steepness"], "exponent"),
        ("Exp", ["test/exponent"], "grid"),
        ("Flatten", ["test/grid"], "factor"),
        ("Mul", [features, "test/factor"], "features"),
    ]
    nodes = list(model.graph.node)
    at = next(i for i, node in enumerate(nodes) if features in node.output) + 1
    for node in nodes[at:]:
        node.input[:] = ["test/features" if name == features else name for name in node.input]
    added = [helper.make_node(operator, inputs, [f"test/{output}"]) for operator, inputs, output in factor]
    model.graph.ClearField("node")
    model.graph.node.extend([*nodes[:at], *added, *nodes[at:]])
    path = tmp_path_factory.mktemp("overflow") / "a.onnx"
    path.write_bytes(artifact_bytes(model.SerializeToString(), artifact.contract))
    return path


@pytest.fixture(scope="session")
def single_path(tmp_path_factory: pytest.TempPathFactory, artifact_path: Path) -> Path:
    """The digit artifact with its batch fixed at 1, as export leaves it where a network allows nothing else."""
    artifact = read_artifact(artifact_path)
    model = onnx.load_model_from_string(artifact.model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    classifier = dataclasses.replace(artifact.contract.classifier, batch="1")
    contract = dataclasses.replace(artifact.contract, classifier=classifier)
    path = tmp_path_factory.mktemp("single") / "a.onnx"
    path.write_bytes(artifact_bytes(model.SerializeToString(), contract))
    return path


@pytest.fixture(scope="session")
def digit_artifact(artifact_path: Path) -> Artifact:
    return read_artifact(artifact_path)


@pytest.fixture(scope="session")
def user_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home for engine key and timing cache; the key is `data/grood-edge/engine.key`."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(home / "data"))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        yield home


@pytest.fixture(scope="session")
def rtx() -> TrtApi:
    pytest.importorskip("tensorrt_rtx")
    return load_api("tensorrt-rtx")


@pytest.fixture(scope="session")
def built_engine(
    tmp_path_factory: pytest.TempPathFactory,
    artifact_path: Path,
    digit_artifact: Artifact,
    rtx: TrtApi,
    user_home: Path,
) -> EngineFile:
    """An engine for SM86 and SM89, built by `compile`. Read-only: copy it before spoiling it."""
    folder = tmp_path_factory.mktemp("engine")
    model = Path(shutil.copy(artifact_path, folder / "digits.onnx"))
    compiled = compile_artifact(model, rtx, NO_DEVICE, CompileOptions(BuildSpec(targets=("SM86", "SM89"))))
    return EngineFile(compiled.path, digit_artifact, rtx)
