"""Where the OOD prototype comes from: the mean of the class prototypes, noise images, or the user's own images."""

from dataclasses import dataclass

import numpy as np

from grood_edge.arrays import Frames, Vector64
from grood_edge.contract import OodPrototype
from grood_edge.errors import UsageError
from grood_edge.export.dataset import open_dataset
from grood_edge.export.features import Reading, collect_features
from grood_edge.ort import OrtModel
from grood_edge.progress import Progress, silent

__all__ = ["OodSource", "noise_images", "ood_source", "require_known_source"]

NOISE_ROUNDS = 10
NOISE_PER_ROUND = 100
NOISE_KEPT = 10
_KERNEL = (5, 7)  # height, width of the Gaussian blur, in pixels
_SIGMA = (0.2, 5.0)


@dataclass(frozen=True)
class OodSource:
    """The OOD prototype's entry in the contract, and its position: None means "mean of the class prototypes".

    `unreadable` names the images of `images:DIR` that could not be read, with the reason.
    """

    entry: OodPrototype
    position: Vector64 | None
    unreadable: tuple[tuple[str, str], ...] = ()


def ood_source(text: str, model: OrtModel, reading: Reading, progress: Progress = silent) -> OodSource:
    """Make the OOD prototype that `--ood-prototype` names: `mean`, `noise` or `images:DIR`.

    Raises:
        UsageError: another name.
        DatasetError: the folder of `images:DIR` cannot be used.
    """
    require_known_source(text)
    if text == "mean":
        return OodSource(OodPrototype("mean", 0, False), None)
    if text == "noise":
        position = _noise_prototype(model, reading, progress)
        return OodSource(OodPrototype("noise", NOISE_ROUNDS * NOISE_KEPT, False), position)
    found = collect_features(open_dataset(text.removeprefix("images:"), "predicted"), model, reading, progress)
    position = found.fit.class_sums.sum(axis=0) / found.fit.images
    return OodSource(OodPrototype("images", found.fit.images, True), position, found.unreadable)


def require_known_source(text: str) -> None:
    """Check the name of a source, and that the folder of `images:DIR` has images, before any work.

    Raises:
        UsageError: another name.
        DatasetError: the folder cannot be used.
    """
    if text.startswith("images:"):
        open_dataset(text.removeprefix("images:"), "predicted")
    elif text not in ("mean", "noise"):
        raise UsageError(f"--ood-prototype {text!r} is unknown; expected mean, noise or images:DIR")


def noise_images(rng: np.random.Generator, count: int, height: int, width: int, channels: int) -> Frames:
    """Return uniform noise, blurred with a 5x7 Gaussian of random sigma in 0.2..5: uint8 `[count, h, w, c]`.

    Source: the authors' synthetic noise, arXiv 2312.14427 and its OpenOOD postprocessor.
    """
    images = rng.random((count, height, width, channels), dtype=np.float32)
    sigma = rng.uniform(*_SIGMA, size=count)
    for axis, size in ((1, _KERNEL[0]), (2, _KERNEL[1])):
        images = _blurred(images, axis, size, sigma)
    return np.rint(255 * images).astype(np.uint8)


def _blurred(images: np.ndarray, axis: int, size: int, sigma: np.ndarray) -> np.ndarray:
    offsets = np.arange(size) - size // 2
    weights = np.exp(-0.5 * (offsets[None, :] / sigma[:, None]) ** 2)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    widths = [(0, 0)] * 4
    widths[axis] = (size // 2, size // 2)
    padded = np.pad(images, widths, mode="symmetric")
    length = images.shape[axis]
    parts = (np.take(padded, range(i, i + length), axis=axis) * weights[:, i, None, None, None] for i in range(size))
    blurred: np.ndarray = np.stack(list(parts)).sum(axis=0)
    return blurred


def _noise_prototype(model: OrtModel, reading: Reading, progress: Progress) -> Vector64:
    """Mean feature of the 10 least ID-like images (lowest logsumexp of the logits) of each round of 100."""
    rng = np.random.default_rng(reading.seed)
    kept = []
    batch = 1 if next(iter(model.inputs.values()))[0] == 1 else NOISE_PER_ROUND
    p = reading.preprocessing
    for index in range(NOISE_ROUNDS):
        frames = noise_images(rng, NOISE_PER_ROUND, p.height, p.width, p.channels)
        runs = [
            model.run({"image": frames[i : i + batch]}, ["features", "logits"]) for i in range(0, len(frames), batch)
        ]
        features = np.concatenate([run["features"] for run in runs]).astype(np.float64)
        logits = np.concatenate([run["logits"] for run in runs]).astype(np.float64)
        energy = np.logaddexp.reduce(logits, axis=1)
        kept.append(features[np.argsort(energy, kind="stable")[:NOISE_KEPT]])
        progress("noise images for the OOD prototype", index + 1, NOISE_ROUNDS)
    mean: Vector64 = np.concatenate(kept).mean(axis=0)
    return mean
