"""Run the classifier graph that ships over the images, and keep what the statistics need: one pass, bounded memory.

Kept are float64 class sums and counts over all images, and a seeded reservoir of feature rows (d floats each).
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from grood_edge.arrays import ClassCounts, Features, Frames, InputFrame, Labels, Prototypes
from grood_edge.errors import ClassifierError, DatasetError
from grood_edge.export.dataset import Dataset, Sample
from grood_edge.images import UNREADABLE_LIMIT, name_some
from grood_edge.ort import OrtModel
from grood_edge.preprocessing import Preprocessing, preprocess_frame
from grood_edge.progress import Progress, silent

__all__ = ["FeaturePass", "FeatureTable", "Reading", "collect_features", "merged"]

BATCH = 32
MAX_ROWS = 100_000  # feature rows kept; sums and counts always cover every image
HELD_OUT_EVERY = 5  # in a split, every fifth image of a class calibrates
CHECK_SAMPLES = 256  # raw frames kept for verification and diagnosis, whatever the number of images,
CHECK_BYTES = 256 << 20  # and however large they are


@dataclass(frozen=True)
class FeatureTable:
    """Statistics of one pass over images.

    features float32 `[n, d]`, labels and predictions int64 `[n]`: the kept rows. class_sums float64 `[k, d]` and
    class_counts int64 `[k]`: over all `images`, by label. confusion counts (label, prediction) pairs.
    """

    features: Features
    labels: Labels
    predictions: Labels
    class_sums: Prototypes
    class_counts: ClassCounts
    images: int
    confusion: Counter[tuple[int, int]]

    @property
    def accuracy(self) -> float:
        """Share of images whose prediction is their label."""
        return sum(n for (label, prediction), n in self.confusion.items() if label == prediction) / max(1, self.images)


@dataclass(frozen=True)
class FeaturePass:
    """What one pass found: `fit` rows, `held_out` rows (None without a split), and the images that failed.

    `check_samples` are some raw samples for verification; `frame_hashes` uint64 `[n]` are BLAKE2b of the
    preprocessed frames, to find images that two passes share; `digest` is the SHA-256 of the sorted hashes: the same
    images give the same digest in any order and with any labels.
    """

    fit: FeatureTable
    held_out: FeatureTable | None
    unreadable: tuple[tuple[str, str], ...]
    check_samples: tuple[Sample, ...]
    digest: str
    frame_hashes: np.ndarray


@dataclass(frozen=True)
class Reading:
    """How a pass reads: preprocessing, number of classes, whether to hold images out, seed, what to tolerate."""

    preprocessing: Preprocessing
    class_count: int
    hold_out: bool = False
    seed: int = 0
    allow_unreadable: bool = False


def collect_features(dataset: Dataset, model: OrtModel, reading: Reading, progress: Progress = silent) -> FeaturePass:
    """Run `model` (`image` to `features` and `logits`) over the data set.

    Without a label a sample takes its prediction. With `hold_out`, every fifth image of each class goes to
    `held_out` instead of `fit`.

    Raises:
        DatasetError: no images, labels out of range, or more than 1 % unreadable.
        ClassifierError: features or logits that are not finite.
    """
    unreadable: list[tuple[str, str]] = []
    check = _CheckSamples()
    hashes = array("Q")
    fit = _Gatherer(reading.class_count, reading.seed)
    held = _Gatherer(reading.class_count, reading.seed + 1)
    label = f"reading {dataset.name}"
    batch = 1 if next(iter(model.inputs.values()))[0] == 1 else BATCH
    done = 0
    samples = dataset.samples(lambda name, reason: unreadable.append((name, reason)))
    for group, frames in _batches(samples, reading, batch, check):
        outputs = model.run({"image": frames}, ["features", "logits"])
        features, logits = outputs["features"], outputs["logits"]
        _require_finite(features, logits, group)
        predictions = logits.argmax(axis=1).astype(np.int64)
        labels = np.array(
            [p if s.label is None else s.label for s, p in zip(group, predictions, strict=True)], np.int64
        )
        hashes.extend(int.from_bytes(hashlib.blake2b(f.tobytes(), digest_size=8).digest(), "little") for f in frames)
        held_out = _held_out(labels, fit, held) if reading.hold_out else np.zeros(len(labels), bool)
        fit.add(features[~held_out], labels[~held_out], predictions[~held_out])
        held.add(features[held_out], labels[held_out], predictions[held_out])
        done += len(group)
        progress(label, done, dataset.count)
    _require_readable(dataset, done, unreadable, reading.allow_unreadable)
    return FeaturePass(
        fit=fit.table(),
        held_out=held.table() if reading.hold_out else None,
        unreadable=tuple(unreadable),
        check_samples=tuple(check.kept),
        digest=hashlib.sha256(np.sort(np.array(hashes, "<u8")).tobytes()).hexdigest(),
        frame_hashes=np.array(hashes, np.uint64),
    )


def merged(a: FeatureTable, b: FeatureTable) -> FeatureTable:
    """Return the table of both sets of images."""
    return FeatureTable(
        features=np.concatenate([a.features, b.features]),
        labels=np.concatenate([a.labels, b.labels]),
        predictions=np.concatenate([a.predictions, b.predictions]),
        class_sums=a.class_sums + b.class_sums,
        class_counts=a.class_counts + b.class_counts,
        images=a.images + b.images,
        confusion=a.confusion + b.confusion,
    )


def rows_of(table: FeatureTable, keep: np.ndarray) -> FeatureTable:
    """Return a table of the chosen rows alone; only for tables that kept every row."""
    features, labels, predictions = table.features[keep], table.labels[keep], table.predictions[keep]
    gatherer = _Gatherer(len(table.class_counts), 0)
    gatherer.add(features, labels, predictions)
    return gatherer.table()


@dataclass
class _CheckSamples:
    """The first raw samples, as many as a fixed amount of memory holds."""

    kept: list[Sample] = field(default_factory=list)
    size: int = 0

    def offer(self, sample: Sample) -> None:
        if len(self.kept) < CHECK_SAMPLES and self.size + sample.frame.nbytes <= CHECK_BYTES:
            self.kept.append(sample)
            self.size += sample.frame.nbytes


@dataclass
class _Gatherer:
    """Sums over every image, and a reservoir of rows (Vitter's algorithm R, seeded)."""

    class_count: int
    seed: int
    images: int = 0
    chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)
    sums: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.class_count, np.int64)
        self._rng = np.random.default_rng(self.seed)

    def add(self, features: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> None:
        if self.sums is None:
            self.sums = np.zeros((self.class_count, features.shape[1]))
        np.add.at(self.sums, labels, features.astype(np.float64))
        np.add.at(self.counts, labels, 1)
        self.confusion.update(zip(labels.tolist(), predictions.tolist(), strict=True))
        room = max(0, min(len(labels), MAX_ROWS - self.images))
        if room:
            self.chunks.append((features[:room].copy(), labels[:room].copy(), predictions[:room].copy()))
        for row in range(room, len(labels)):
            slot = int(self._rng.integers(0, self.images + row + 1))
            if slot < MAX_ROWS:
                for target, source in zip(self._one_chunk(), (features, labels, predictions), strict=True):
                    target[slot] = source[row]
        self.images += len(labels)

    def table(self) -> FeatureTable:
        features, labels, predictions = self._one_chunk()
        sums = np.zeros((self.class_count, features.shape[1])) if self.sums is None else self.sums
        return FeatureTable(features, labels, predictions, sums, self.counts, self.images, self.confusion)

    def _one_chunk(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if len(self.chunks) != 1:
            empty = np.zeros((0, 0 if self.sums is None else self.sums.shape[1]), np.float32)
            none = np.zeros(0, np.int64)
            parts = list(zip(*self.chunks, strict=True)) or [(empty,), (none,), (none,)]
            self.chunks = [(np.concatenate(parts[0]), np.concatenate(parts[1]), np.concatenate(parts[2]))]
        return self.chunks[0]


def _batches(
    samples: Iterator[Sample], reading: Reading, size: int, check: "_CheckSamples"
) -> Iterator[tuple[list[Sample], Frames]]:
    """Resize at once and drop the raw frame: a batch of camera frames would be a hundred times larger."""
    group: list[Sample] = []
    frames: list[InputFrame] = []
    for sample in samples:
        if sample.label is not None and not 0 <= sample.label < reading.class_count:
            raise DatasetError(
                f"{sample.name} has label {sample.label}, but the classifier has {reading.class_count} classes"
            )
        check.offer(sample)
        frames.append(preprocess_frame(sample.frame, reading.preprocessing))
        group.append(replace(sample, frame=frames[-1]))
        if len(group) == size:
            yield group, np.stack(frames)
            group, frames = [], []
    if group:
        yield group, np.stack(frames)


def _held_out(labels: np.ndarray, fit: _Gatherer, held: _Gatherer) -> np.ndarray:
    """Mark every fifth image of each class, counted over the whole pass."""
    seen = fit.counts + held.counts
    chosen = np.zeros(len(labels), bool)
    for row, label in enumerate(labels):
        seen[label] += 1
        chosen[row] = seen[label] % HELD_OUT_EVERY == 0
    return chosen


def _require_finite(features: np.ndarray, logits: np.ndarray, group: list[Sample]) -> None:
    good = np.isfinite(features).all(axis=1) & np.isfinite(logits).all(axis=1)
    if not good.all():
        names = [sample.name for sample, ok in zip(group, good, strict=True) if not ok]
        raise ClassifierError(
            f"the classifier gives NaN or Inf for {len(names)} of {len(group)} images, such as {names[0]}; "
            "check its weights and the preprocessing (--preprocess, --mean, --std)"
        )


def _require_readable(dataset: Dataset, done: int, unreadable: list[tuple[str, str]], allow: bool) -> None:
    total = done + len(unreadable)
    if total == 0:
        raise DatasetError(f"{dataset.name} gave no images")
    if len(unreadable) > UNREADABLE_LIMIT * total and not (allow and done):
        raise DatasetError(
            f"{len(unreadable)} of {total} images in {dataset.name} cannot be read: {name_some(unreadable)}. "
            "Repair or remove them, or go on without them with --allow-unreadable"
        )
