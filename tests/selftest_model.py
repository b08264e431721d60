"""Makes grood_edge/runtime/selftest.onnx, the artifact of `grood-edge selftest`: python -m tests.selftest_model

A small residual network on digits; random seeded backbone, last layer by least squares (tests/export/backbones.py).
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from grood_edge.demo.images import write_images
from grood_edge.export import ExportOptions, export_model
from grood_edge.images import find_images, load_image
from grood_edge.runtime.selftest import MODEL
from tests.export import backbones
from tests.export.conftest import DIGIT_PREPROCESSING


class Small(nn.Sequential):
    """12 channels, one residual branch, 24 features."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), backbones._Residual(12, 24, 2),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(384, 48), nn.ReLU(),
        )  # fmt: skip


def make(path: Path) -> None:
    """Export it to `path`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        images = write_images(Path(name) / "images")
        paths = find_images(images.train)
        names = sorted(path.name for path in images.train.iterdir())
        frames = np.stack([load_image(path) for path in paths])
        labels = np.array([names.index(path.parent.name) for path in paths])
        backbones.BACKBONES["small"] = Small
        network = backbones.fitted_network("small", frames, labels)
        options = ExportOptions(
            preprocessing=DIGIT_PREPROCESSING, calibration_data=images.calibration, bank=64, force=True
        )
        report = export_model(network, images.train, path, options)
    print(report.path, report.path.stat().st_size, report.contract.fit.accuracy)


if __name__ == "__main__":
    make(MODEL)
