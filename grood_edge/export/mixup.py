"""Synthetic OOD images, after the paper: each one mixed with the class that it is confused with most.

z = 0.5 z + 0.5 P[second most likely class], P the class means at the layer where z is taken; then the rest of the
network (arXiv 2312.14427). The paper mixes early (`early`). Mixing at the features separates near-OOD better on every
network that was measured (docs/method.md), and is the default. Where no early tensor can be mixed, images are.
"""

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto

from grood_edge.arrays import Frames, Labels
from grood_edge.contract import OodPrototype
from grood_edge.export.features import FeaturePass, Reading
from grood_edge.export.ood_prototype import Mixes, OodSource
from grood_edge.export.tap import Tap, cut, find_tap
from grood_edge.ort import OrtModel, open_ort
from grood_edge.progress import Progress, silent

__all__ = ["EARLY", "FEATURES", "MIXED_IMAGES", "mixup_source"]

FEATURES, EARLY = "features", "early"
MIXED_IMAGES = 256  # spread over the classes; their mean moves little beyond that
LABEL = "mixing images for the OOD prototype"
_BATCH = 32


def mixup_source(
    base: ModelProto,
    model: OrtModel,
    fitted: FeaturePass,
    reading: Reading,
    layer: str,
    progress: Progress = silent,
) -> OodSource:
    """Return the source `mixup`: the mean feature of mixed fit images.

    Args:
        base: the graph without the head (`graph.base_model`).
        model: the same, opened.
        fitted: the pass over the fit images; its frames are mixed.
        reading: how that pass read: its space is the mixes' too.
        layer: `features`, `early` (the first tensor that can be mixed), or the classifier's tensor to mix at.
        progress: called as the work goes on.

    Raises:
        ClassifierError: `layer` cannot be mixed.
    """
    chosen = _spread(fitted.frame_labels, MIXED_IMAGES)
    tap = None if layer == FEATURES else find_tap(base, reading.class_count, None if layer == EARLY else layer)
    if layer == FEATURES:
        features, other = _mixed_features(model, fitted, chosen, reading, progress)
    elif tap is None:
        features, other = _mixed_images(model, fitted, chosen, reading, progress)
    else:
        features, other = _mixed_at(base, tap, fitted, chosen, reading, progress)
    where = reading.space if layer == FEATURES else "image" if tap is None else tap.tensor.removeprefix("classifier/")
    own = fitted.frame_labels[chosen]
    names = tuple(fitted.frame_names[i] for i in chosen)
    entry = OodPrototype("mixup", len(chosen), False, where)
    return OodSource(entry, mixes=Mixes(features, own, other, names))


def _mixed_features(
    model: OrtModel, fitted: FeaturePass, chosen: np.ndarray, reading: Reading, progress: Progress
) -> tuple[np.ndarray, Labels]:
    """Return the features of some images mixed with class prototypes, `[q, d]`, and the classes mixed in."""
    table, labels = fitted.fit, fitted.frame_labels
    present = np.flatnonzero(table.class_counts)
    features, other = [], []
    for rows in _batches(model, chosen, progress, 0):
        outputs = model.run({"image": fitted.frames[rows]}, list({reading.space, "logits"}))
        second = _second_class(outputs["logits"], labels[rows], present)
        prototypes = table.class_sums[second] / table.class_counts[second, None]
        features.append((0.5 * outputs[reading.space] + 0.5 * prototypes).astype(np.float32))
        other.append(second)
    return np.concatenate(features), np.concatenate(other)


def _mixed_at(
    base: ModelProto, tap: Tap, fitted: FeaturePass, chosen: np.ndarray, reading: Reading, progress: Progress
) -> tuple[np.ndarray, Labels]:
    """Return features `[q, d]` of the mixes at the tap, and the classes mixed in."""
    front, back = (open_ort(part.SerializeToString()) for part in cut(base, tap))
    frames, labels = fitted.frames, fitted.frame_labels
    present = np.unique(labels)
    early = np.zeros((len(present), *tap.shape), np.float32)
    slot = np.searchsorted(present, labels)
    for rows in _batches(front, np.arange(len(frames)), progress, 0):
        values = front.run({"image": frames[rows]})[tap.tensor]
        for row, value in zip(rows, values, strict=True):
            early[slot[row]] += value
    early /= np.bincount(slot).reshape(-1, *(1 for _ in tap.shape))
    features, other = [], []
    for rows in _batches(front, chosen, progress, len(frames)):
        z = front.run({"image": frames[rows]})[tap.tensor]
        second = _second_class(back.run({tap.tensor: z}, ["logits"])["logits"], labels[rows], present)
        mixed = 0.5 * z + 0.5 * early[np.searchsorted(present, second)]
        features.append(back.run({tap.tensor: mixed}, [reading.space])[reading.space])
        other.append(second)
    return np.concatenate(features), np.concatenate(other)


def _mixed_images(
    model: OrtModel, fitted: FeaturePass, chosen: np.ndarray, reading: Reading, progress: Progress
) -> tuple[np.ndarray, Labels]:
    """The same with the mean of two pictures: each with a random one of the class it is most likely confused with."""
    frames, labels = fitted.frames, fitted.frame_labels
    rng, present = np.random.default_rng(reading.seed), np.unique(labels)
    features, other = [], []
    for rows in _batches(model, chosen, progress, len(frames)):
        second = _second_class(model.run({"image": frames[rows]}, ["logits"])["logits"], labels[rows], present)
        partners = np.array([rng.choice(np.flatnonzero(labels == label)) for label in second])
        features.append(model.run({"image": _halves(frames[rows], frames[partners])}, [reading.space])[reading.space])
        other.append(second)
    return np.concatenate(features), np.concatenate(other)


def _halves(a: Frames, b: Frames) -> Frames:
    mixed: Frames = ((a.astype(np.uint16) + b + 1) // 2).astype(np.uint8)
    return mixed


def _second_class(logits: np.ndarray, own: Labels, present: np.ndarray) -> Labels:
    """Return the most likely class beside the image's own, among those that have images."""
    candidates = logits[:, present].astype(np.float64)
    candidates[present[None, :] == own[:, None]] = -np.inf
    second: Labels = present[candidates.argmax(axis=1)].astype(np.int64)
    return second


def _spread(labels: Labels, count: int) -> np.ndarray:
    """Choose up to `count` images, the first ones of every class in turn."""
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        turn[rows] = np.arange(len(rows))
    chosen: np.ndarray = np.sort(np.argsort(turn, kind="stable")[:count])
    return chosen


def _batches(model: OrtModel, rows: np.ndarray, progress: Progress, first: int) -> Iterator[np.ndarray]:
    step = model.batch(_BATCH)
    for start in range(0, len(rows), step):
        progress(LABEL, first + start, None)
        yield rows[start : start + step]
