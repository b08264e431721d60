"""The images, the network and the artifacts that the benchmarks share; all from packages, nothing is downloaded.

Ten classes of JPEG, 480x640: crops of ten photos that scikit-image carries. A frozen EfficientNet-Lite0 with a linear
layer fitted to 20 crops a class. Two artifacts with all of about 1,000 fit images in the bank: `paper.onnx` (one OOD
prototype, float32 rows: the published method) and `three.onnx` (three OOD prototypes, int8 rows: what `export` makes by
default, but with every row). Both have scale 1: others' ways of computing the score underflow where it is large.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from animals import OPTIONS, trained_network
from photos import NAMES, write_photos

from grood_edge.artifact import read_artifact
from grood_edge.export import ClassifierOptions, ExportOptions, export_model
from grood_edge.export.classifier import load_classifier
from grood_edge.export.graph import base_model
from grood_edge.export.torch_classifier import onnx_from_torch
from grood_edge.images import find_images, load_image
from grood_edge.ort import open_ort
from grood_edge.preprocessing import preprocess_frame, resolve_preprocessing

FILES = ("fit", "calibration", "test", "lite0.onnx", "base.onnx", "paper.onnx", "three.onnx")
EACH = {"train": 20, "fit": 100, "calibration": 12, "test": 10}  # crops of each photo


@dataclass(frozen=True)
class Setting:
    """Folders of class folders, and ONNX files.

    classifier: image float32 `[N, 3, 224, 224]` to logits. base: image uint8 `[N, 224, 224, 3]` to logits and features;
    the artifacts are `base` with a head.
    """

    fit: Path
    calibration: Path
    test: Path
    classifier: Path
    base: Path
    paper: Path
    three: Path


def prepared(work: Path, each: dict[str, int] | None = None) -> Setting:
    """Return what is in `work`, or make it: about a minute."""
    setting = Setting(*(work / name for name in FILES))
    if setting.three.exists():
        return setting
    for seed, (part, count) in enumerate((each or EACH).items()):
        write_photos(work / part, count * len(NAMES), seed)
    traced, _ = onnx_from_torch(trained_network(work / "train"), None, None)
    setting.classifier.write_bytes(traced.SerializeToString())
    classifier = load_classifier(setting.classifier, ClassifierOptions())
    base = base_model(classifier, resolve_preprocessing(OPTIONS, 3, (None, None)))
    setting.base.write_bytes(base.SerializeToString())
    common: dict[str, Any] = {
        "preprocessing": OPTIONS,
        "calibration_data": setting.calibration,
        "bank": "all",
        "scale": 1.0,
        "force": True,  # a part of `make bench` that was stopped may have left one
    }
    paper = ExportOptions(**common, ood_prototype="mean", bank_dtype="float32")
    three = ExportOptions(**common, ood_prototype="mean,mixup,origin")
    for path, options in ((setting.paper, paper), (setting.three, three)):
        export_model(setting.classifier, setting.fit, path, options)
    return setting


def test_frames(setting: Setting) -> list[np.ndarray]:
    """Return the decoded test images, uint8 `[480, 640, 3]`."""
    return [load_image(path) for path in find_images(setting.test)]


def test_features(setting: Setting) -> np.ndarray:
    """Return the features of the test images, float32 `[n, 1280]`."""
    p = read_artifact(setting.paper).contract.preprocessing
    images = np.stack([preprocess_frame(frame, p) for frame in test_frames(setting)])
    return open_ort(setting.base.read_bytes(), threads=1).run({"image": images}, ["features"])["features"]
