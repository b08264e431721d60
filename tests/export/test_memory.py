"""How the memory of `calibrate` grows with the number of images: features, not pixels, and few copies of those."""

import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from grood_edge.demo.images import DemoImages
from grood_edge.export.features import FeaturePass, FeatureTable
from grood_edge.export.fit import FitOptions, Passes, fit_statistics
from grood_edge.export.ood_prototype import plain_source
from grood_edge.images import find_images

SIDE = 512  # of a raw frame: 256 KB
FEW, MANY = 500, 2_500
BOUND = 100  # megabytes; the raw frames alone would be 512 more, and what may wait to be taken is 64

SCRIPT = """
import resource, sys
from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate
recalibrate(sys.argv[1], sys.argv[2], sys.argv[3], RecalibrateOptions(labels="predicted", threshold_only=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(artifact: Path, folder: Path, out: Path) -> float:
    """Calibrate in a process of its own; return its peak in megabytes."""
    command = [sys.executable, "-c", SCRIPT, *map(str, (artifact, folder, out))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout) / (1024 if sys.platform == "linux" else 1024**2)


def test_calibrate_does_not_keep_the_images(artifact_path: Path, digits: DemoImages, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    for path in find_images(digits.test)[:50]:
        with Image.open(path) as image:
            image.resize((SIDE, SIDE)).save(tmp_path / "large" / f"{path.parent.name}-{path.name}")
    large = find_images(tmp_path / "large")
    peaks = []
    for count in (FEW, MANY):
        folder = tmp_path / str(count)
        folder.mkdir()
        for index in range(count):
            (folder / f"{index:05d}.png").symlink_to(large[index % len(large)])
        peaks.append(peak(artifact_path, folder, tmp_path / f"{count}.onnx"))
    assert peaks[1] - peaks[0] < BOUND


DIMENSION = 512
BYTES = 20 * DIMENSION  # for each image; its float32 row is 4 for each feature, so this is four more of them

CLASSES = tuple("0123456")


def wide(table: FeatureTable, images: int) -> FeatureTable:
    """Return so many images: the digits' features again and again, each with a little noise, and more columns."""
    rng = np.random.default_rng(0)
    source = np.arange(images) % len(table.labels)
    labels = table.labels[source]
    features = rng.normal(0, 0.01, (images, DIMENSION)).astype(np.float32)
    features += np.resize(table.features[source], features.shape)
    sums = np.stack([features[labels == label].sum(axis=0, dtype=np.float64) for label in range(len(CLASSES))])
    confusion = Counter(zip(labels.tolist(), labels.tolist(), strict=True))
    names = tuple(map(str, range(images)))
    return FeatureTable(features, labels, labels, sums, np.bincount(labels, minlength=7), images, confusion, names)


def test_statistics_are_fitted_without_many_copies_of_the_rows(digit_pass: FeaturePass) -> None:
    options = FitOptions(
        ood_prototype="mean,origin",
        bank=64,
        bank_dtype="int8",
        space="features",
        scale=1.0,
        keep_paths=False,
        labels="folder",
        alpha=0.05,
        delta=None,
        marginal=False,
        per_class=False,
        unseen=True,
        seed=0,
    )
    sources = (plain_source("mean"), plain_source("origin"))
    held_out = wide(digit_pass.fit, 300)
    peaks = []
    for images in (400, 4_000, 12_000):  # the first loads modules
        passes = Passes(replace(digit_pass, fit=wide(digit_pass.fit, images), held_out=held_out), None)
        tracemalloc.start()
        fit_statistics(passes, CLASSES, sources, options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1]) / 8_000 < BYTES
