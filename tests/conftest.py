"""Fixtures that many tests share: real digits, a network trained on them, and the artifact made of both."""
# ruff: noqa: E402

import signal
from pathlib import Path

# Whatever the package imports while jaxtyping's hook is at work is compiled anew: it looks for bytecode of its own.
import beartype  # noqa: F401
import onnx  # noqa: F401
import pytest
import sklearn.datasets  # noqa: F401
import torch  # noqa: F401

from tests import hook

hook.install()

from grood_edge.demo.images import DemoImages, write_images
from grood_edge.demo.network import DigitNetwork, trained_network
from grood_edge.export import ExportOptions, PreprocessingOptions, export_model

# A shell that starts the suite in the background leaves SIGINT ignored, and commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

DIGIT_OPTIONS = ExportOptions(preprocessing=PreprocessingOptions(input_size=(32, 32), mean=(0.0,), std=(1.0,)))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DemoImages:
    """Folders of PNG: digits 0-6 in train, calibration and test; 7-9 near; photo crops and noise far."""
    return write_images(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def network(digits: DemoImages) -> DigitNetwork:
    """A small CNN trained on digits 0-6, in eval mode; inputs [N, 1, 32, 32], 64 features, 7 classes."""
    return trained_network(digits.train)


@pytest.fixture(scope="session")
def artifact_path(tmp_path_factory: pytest.TempPathFactory, digits: DemoImages, network: DigitNetwork) -> Path:
    """The artifact of that network, calibrated on unseen digits. Read-only: copy it before changing it."""
    path = tmp_path_factory.mktemp("artifact") / "digits.onnx"
    options = ExportOptions(calibration_data=digits.calibration, preprocessing=DIGIT_OPTIONS.preprocessing)
    export_model(network, digits.train, path, options)
    return path
