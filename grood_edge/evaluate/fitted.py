"""The images that an artifact was fitted on, once more: KNN, Mahalanobis, ViM and nearest prototype learn from them."""

from array import array
from dataclasses import dataclass, field, replace

import numpy as np

from grood_edge.arrays import Features, Labels, Logits
from grood_edge.errors import DatasetError
from grood_edge.evaluate.baselines import FitRows
from grood_edge.evaluate.passes import BATCH_BYTES, BATCH_IMAGES
from grood_edge.export.dataset import Sample, open_dataset
from grood_edge.frame_hashes import digest_of, frame_hash
from grood_edge.progress import Progress, silent
from grood_edge.runtime.session import Session

__all__ = ["collect_fit"]

MAX_ROWS = 20_000
MAX_BYTES = 512 << 20


def collect_fit(session: Session, data: str, seed: int = 0, progress: Progress = silent) -> FitRows:
    """Run the session over the images that `grood-edge export --data` got, labels read as export read them.

    Class means cover every image; the rows are a seeded reservoir of at most 20,000, and of at most 512 MB.

    Raises:
        DatasetError: no images, labels out of range, or no image with finite features.
    """
    contract = session.contract
    dataset = open_dataset(data, contract.fit.labels, contract.classes, seed)
    reservoir = _Reservoir(len(contract.classes), seed)
    unreadable: list[str] = []
    hashes = array("Q")
    group: list[Sample] = []
    size = done = 0

    def prepared(sample: Sample) -> Sample:
        return replace(sample, frame=session.prepare(sample.frame))

    for sample in dataset.samples(lambda name, _: unreadable.append(name), prepared):
        hashes.append(frame_hash(sample.frame))
        group.append(sample)
        size += sample.frame.nbytes
        done += 1
        if len(group) == BATCH_IMAGES or size >= BATCH_BYTES:
            _run(session, group, reservoir)
            group, size = [], 0
            progress("reading the fitted images", done, dataset.count)
    if group:
        _run(session, group, reservoir)
    progress("reading the fitted images", done, done)
    if not reservoir.images:
        raise DatasetError(f"--fit {data} gave no image with finite features; expected the images that export got")
    return reservoir.rows(digest_of(np.array(hashes, np.uint64)))


def _run(session: Session, group: list[Sample], reservoir: "_Reservoir") -> None:
    outputs = session.infer_prepared(np.stack([sample.frame for sample in group]))
    labels = np.array(
        [c if s.label is None else s.label for s, c in zip(group, outputs.class_id, strict=True)], np.int64
    )
    if ((labels < 0) | (labels >= len(session.contract.classes))).any():
        known = len(session.contract.classes)
        raise DatasetError(f"--fit has labels {labels.min()} to {labels.max()}, but the artifact has {known} classes")
    good = outputs.valid
    reservoir.add(outputs.features[good], outputs.logits[good], labels[good])


@dataclass
class _Reservoir:
    """Class sums over every image, and rows by Vitter's algorithm R."""

    class_count: int
    seed: int
    images: int = 0
    _kept: list[tuple[Features, Logits, np.int64]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._sums: np.ndarray | None = None
        self._counts = np.zeros(self.class_count, np.int64)

    def add(self, features: Features, logits: Logits, labels: Labels) -> None:
        if self._sums is None:
            self._sums = np.zeros((self.class_count, features.shape[1]))
        np.add.at(self._sums, labels, features.astype(np.float64))
        np.add.at(self._counts, labels, 1)
        most = min(MAX_ROWS, MAX_BYTES // (4 * features.shape[1]))
        for row in range(len(labels)):
            self.images += 1
            entry = (features[row].copy(), logits[row].copy(), labels[row])
            if len(self._kept) < most:
                self._kept.append(entry)
            elif (slot := int(self._rng.integers(0, self.images))) < most:
                self._kept[slot] = entry

    def rows(self, digest: str) -> FitRows:
        assert self._sums is not None
        features, logits, labels = zip(*self._kept, strict=True)
        present = self._counts > 0
        return FitRows(
            features=np.stack(features),
            logits=np.stack(logits),
            labels=np.array(labels, np.int64),
            class_means=self._sums[present] / self._counts[present][:, None],
            digest=digest,
            images=self.images,
        )
