"""Where the OOD prototypes come from: `mean`, `mixup`, `noise`, `origin`, or the user's own `images:DIR`."""

from dataclasses import dataclass, replace
from itertools import compress

import numpy as np

from grood_edge.arrays import Features, Frames, Labels, Prototypes, Vector64
from grood_edge.contract import OodPrototype
from grood_edge.contract_rules import MAX_OOD_PROTOTYPES
from grood_edge.errors import UsageError
from grood_edge.export.dataset import open_dataset
from grood_edge.export.features import Reading, collect_features
from grood_edge.ort import OrtModel
from grood_edge.progress import Progress, silent

__all__ = [
    "AUTO",
    "COMBINATION",
    "Mixes",
    "OodSource",
    "images_source",
    "noise_images",
    "noise_source",
    "plain_source",
    "source_names",
]

AUTO = "auto"
COMBINATION = ("mean", "mixup", "origin")
NOISE_ROUNDS = 10
NOISE_PER_ROUND = 100
NOISE_KEPT = 10
_NAMES = ("mean", "mixup", "noise", "origin")
_KERNEL = (5, 7)  # height, width of the Gaussian blur, in pixels
_SIGMA = (0.2, 5.0)


@dataclass(frozen=True)
class Mixes:
    """Features of mixed images, float32 `[q, d]`; the class and the name of the image, and the class mixed in."""

    features: Features
    own: Labels
    other: Labels
    names: tuple[str, ...]


@dataclass(frozen=True)
class OodSource:
    """One OOD prototype's entry in the contract, and what its position follows from.

    `position` where it does not depend on the classes, `mixes` for `mixup`; neither for `mean` and `origin`.
    `unreadable` names the images of `images:DIR` that could not be read, with the reason.
    """

    entry: OodPrototype
    position: Vector64 | None = None
    mixes: Mixes | None = None
    unreadable: tuple[tuple[str, str], ...] = ()

    def at(self, prototypes: Prototypes) -> Vector64:
        """Return the OOD prototype, float64 `[d]`, beside these class prototypes `[k, d]`."""
        if self.position is not None:
            return self.position
        if self.mixes is not None:
            mean: Vector64 = self.mixes.features.astype(np.float64).mean(axis=0)
            return mean
        center: Vector64 = prototypes.mean(axis=0)
        return center if self.entry.source == "mean" else np.zeros_like(center)

    def without_class(self, label: int) -> "OodSource":
        """Return the source as if a class did not exist."""
        if self.mixes is None:
            return self
        return self._kept((self.mixes.own != label) & (self.mixes.other != label))

    def without_images(self, names: tuple[str, ...]) -> "OodSource":
        """Return the source without mixes of these images."""
        if self.mixes is None:
            return self
        return self._kept(~np.isin(np.array(self.mixes.names), np.array(names)))

    def _kept(self, keep: np.ndarray) -> "OodSource":
        assert self.mixes is not None
        if keep.all() or not keep.any():  # some mixes are needed: with none left, all of them are the best guess
            return self
        m = self.mixes
        names = tuple(compress(m.names, keep))
        return replace(self, mixes=Mixes(m.features[keep], m.own[keep], m.other[keep], names))


def source_names(text: str) -> tuple[str, ...]:
    """Read `--ood-prototype`: `auto`, or names separated by commas; folders of `images:DIR` are looked into.

    Raises:
        UsageError: an unknown or repeated name, or `auto` beside others.
        DatasetError: a folder cannot be used.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name.startswith("images:"):
            open_dataset(name.removeprefix("images:"), "predicted")
        elif name not in (*_NAMES, AUTO):
            raise UsageError(
                f"--ood-prototype {text!r}: {name!r} is unknown; expected auto, or some of {', '.join(_NAMES)} and "
                "images:DIR, separated by commas"
            )
    if len(names) > MAX_OOD_PROTOTYPES:
        raise UsageError(f"--ood-prototype names {len(names)} sources; expected at most {MAX_OOD_PROTOTYPES}")
    if len(set(names)) < len(names) or (AUTO in names and len(names) > 1):
        raise UsageError(f"--ood-prototype {text!r}; expected every source once, and auto alone")
    return names


def plain_source(name: str) -> OodSource:
    """Return the source `mean` or `origin`: it needs no images."""
    return OodSource(OodPrototype(name, 0, False, None))  # type: ignore[arg-type]


def images_source(name: str, model: OrtModel, reading: Reading, progress: Progress = silent) -> OodSource:
    """Return the source `images:DIR`: the mean feature of the user's own OOD images.

    Raises:
        DatasetError: the folder cannot be used.
    """
    found = collect_features(open_dataset(name.removeprefix("images:"), "predicted"), model, reading, progress)
    position = found.fit.class_sums.sum(axis=0) / found.fit.images
    return OodSource(OodPrototype("images", found.fit.images, True, None), position, unreadable=found.unreadable)


def noise_source(model: OrtModel, reading: Reading, progress: Progress = silent) -> OodSource:
    """Return the source `noise`: the 10 least ID-like images (lowest logsumexp of the logits) of each round of 100."""
    rng = np.random.default_rng(reading.seed)
    kept = []
    batch = model.batch(NOISE_PER_ROUND)
    p = reading.preprocessing
    for index in range(NOISE_ROUNDS):
        frames = noise_images(rng, NOISE_PER_ROUND, p.height, p.width, p.channels)
        runs = [
            model.run({"image": frames[i : i + batch]}, [reading.space, "logits"]) for i in range(0, len(frames), batch)
        ]
        features = np.concatenate([run[reading.space] for run in runs]).astype(np.float64)
        logits = np.concatenate([run["logits"] for run in runs]).astype(np.float64)
        energy = np.logaddexp.reduce(logits, axis=1)
        kept.append(features[np.argsort(energy, kind="stable")[:NOISE_KEPT]])
        progress("noise images for the OOD prototype", index + 1, NOISE_ROUNDS)
    position: Vector64 = np.concatenate(kept).mean(axis=0)
    return OodSource(OodPrototype("noise", NOISE_ROUNDS * NOISE_KEPT, False, None), position)


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
