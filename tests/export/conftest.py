"""Fixtures of the export tests: the digit network as files, and one pass over its images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from grood_edge.demo.images import DemoImages
from grood_edge.demo.network import DigitNetwork
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, load_classifier
from grood_edge.export.dataset import open_dataset
from grood_edge.export.features import FeaturePass, Reading, collect_features
from grood_edge.export.graph import base_model
from grood_edge.images import find_images, load_image
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import Preprocessing, PreprocessingOptions, resolve_preprocessing
from tests.export.networks import legacy_onnx

DIGIT_PREPROCESSING = PreprocessingOptions(input_size=(32, 32), mean=(0.0,), std=(1.0,))


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Tiny networks train faster on one thread, and the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digit_onnx(tmp_path_factory: pytest.TempPathFactory, network: DigitNetwork) -> Path:
    """The digit network as .onnx: the quickest way to export it."""
    images = np.zeros((1, 1, 32, 32), np.float32)
    return legacy_onnx(network, tmp_path_factory.mktemp("onnx") / "digits.onnx", images, open_batch=True)


Batches = list[tuple[np.ndarray, np.ndarray]]


def in_memory(folder: Path) -> Batches:
    """Read class folders once, so that many exports need not decode the same files again."""
    names = sorted(path.name for path in folder.iterdir())
    paths = find_images(folder)
    labels = np.array([names.index(path.parent.name) for path in paths])
    order = np.random.default_rng(0).permutation(len(paths))
    return [(np.stack([load_image(paths[i]) for i in order]), labels[order])]


@pytest.fixture(scope="session")
def train_batches(digits: DemoImages) -> Batches:
    return in_memory(digits.train)


@pytest.fixture(scope="session")
def calibration_batches(digits: DemoImages) -> Batches:
    """Unseen digits; export takes their frames and leaves their labels."""
    return in_memory(digits.calibration)


@pytest.fixture(scope="session")
def fresh_batches(digits: DemoImages) -> Batches:
    """The test digits, for an artifact to be refitted on."""
    return in_memory(digits.test)


@pytest.fixture(scope="session")
def digit_graph(digit_onnx: Path) -> ClassifierGraph:
    return load_classifier(digit_onnx, ClassifierOptions())


@pytest.fixture(scope="session")
def digit_preprocessing() -> Preprocessing:
    return resolve_preprocessing(DIGIT_PREPROCESSING, 1, (32, 32))


@pytest.fixture(scope="session")
def digit_model(digit_graph: ClassifierGraph, digit_preprocessing: Preprocessing) -> OrtModel:
    """The graph without a head: `image` to `features` and `logits`."""
    return open_ort(base_model(digit_graph, digit_preprocessing).SerializeToString())


@pytest.fixture(scope="session")
def digit_pass(digits: DemoImages, digit_model: OrtModel, digit_preprocessing: Preprocessing) -> FeaturePass:
    """One pass over the training digits, nothing held out."""
    return collect_features(open_dataset(digits.train, "folder"), digit_model, Reading(digit_preprocessing, 7))
