"""The statistics of one pass over images: exact sums and counts of all of them, and a bounded sample of their rows."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from grood_edge.arrays import ClassCounts, Features, Labels, Prototypes
from grood_edge.export.reservoir import Reservoir, Rows

__all__ = ["FeatureTable", "Gatherer", "merged", "rows_of"]


@dataclass(frozen=True)
class FeatureTable:
    """Statistics of one pass over images.

    features float32 `[n, d]`, labels and predictions int64 `[n]`, names (n of them): the kept rows, in the order of
    the stream. class_sums float64 `[k, d]` and class_counts int64 `[k]`: over all `images`, by label. confusion counts
    (label, prediction) pairs.
    """

    features: Features
    labels: Labels
    predictions: Labels
    class_sums: Prototypes
    class_counts: ClassCounts
    images: int
    confusion: Counter[tuple[int, int]]
    names: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of images whose prediction is their label."""
        return sum(n for (label, prediction), n in self.confusion.items() if label == prediction) / max(1, self.images)


class Gatherer:
    """Takes batches of rows; keeps float64 sums over every image and at most `max_rows` rows.

    `stratified`: the kept rows cover the classes as evenly as their counts allow, uniformly within each class, which
    suits a bank. Otherwise they are a uniform sample of the stream, as conformal calibration needs it.
    """

    def __init__(self, class_count: int, max_rows: int, seed: int, stratified: bool) -> None:
        self.counts = np.zeros(class_count, np.int64)
        self.reservoir = Reservoir(class_count if stratified else 1, max_rows, seed)
        self._stratified = stratified
        self._confusion: Counter[tuple[int, int]] = Counter()
        self._sums: np.ndarray | None = None

    def add(self, rows: Rows) -> None:
        """Take one batch."""
        if self._sums is None:
            self._sums = np.zeros((len(self.counts), rows.features.shape[1]))
        _add_by_label(self._sums, rows)
        self.counts += np.bincount(rows.labels, minlength=len(self.counts))
        self._confusion.update(zip(rows.labels.tolist(), rows.predictions.tolist(), strict=True))
        self.reservoir.add(rows, rows.labels if self._stratified else np.zeros_like(rows.labels))

    def table(self) -> FeatureTable:
        """Return what was gathered."""
        rows = self.reservoir.rows()
        sums = np.zeros((len(self.counts), rows.features.shape[1])) if self._sums is None else self._sums
        images = int(self.counts.sum())
        return FeatureTable(
            rows.features, rows.labels, rows.predictions, sums, self.counts, images, self._confusion, rows.names
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
        names=a.names + b.names,
    )


def rows_of(table: FeatureTable, keep: np.ndarray) -> FeatureTable:
    """Return a table of the chosen rows alone; only for tables that kept every row."""
    names = tuple(np.array(table.names, object)[keep].tolist())
    rows = Rows(table.features[keep], table.labels[keep], table.predictions[keep], names)
    gatherer = Gatherer(len(table.class_counts), max(1, len(rows.labels)), 0, stratified=False)
    gatherer.add(rows)
    return gatherer.table()


def _add_by_label(sums: np.ndarray, rows: Rows) -> None:
    """Add each row to its label's sum, in float64: `np.add.at` takes ten times as long."""
    if not rows.labels.size:
        return
    order = np.argsort(rows.labels, kind="stable")
    labels = rows.labels[order]
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    sums[labels[starts]] += np.add.reduceat(rows.features[order].astype(np.float64), starts, axis=0)
