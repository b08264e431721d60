"""Synthetic classes of known shape, as tables of features: where the truth has to be known."""

from dataclasses import dataclass

import numpy as np

from grood_edge.export.features import FeatureTable
from grood_edge.export.reservoir import Rows
from grood_edge.export.table import Gatherer


@dataclass(frozen=True)
class Gaussians:
    """Classes around `centers` `[k, d]`, isotropic."""

    centers: np.ndarray
    spread: float = 1.0

    def draw(self, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
        """Return one image's features a label, float32 `[n, d]`."""
        noise = self.spread * rng.standard_normal((len(labels), self.centers.shape[1]))
        features: np.ndarray = (self.centers[labels] + noise).astype(np.float32)
        return features

    def nearest(self, features: np.ndarray) -> np.ndarray:
        """Return the nearest class: what a perfect classifier would say."""
        distance = ((features[:, None, :].astype(np.float64) - self.centers[None]) ** 2).sum(axis=2)
        classes: np.ndarray = distance.argmin(axis=1).astype(np.int64)
        return classes

    def table(self, rng: np.random.Generator, labels: np.ndarray) -> FeatureTable:
        """Return a table of as many new images."""
        features = self.draw(rng, labels)
        return table_of(features, labels, self.nearest(features), len(self.centers))


def table_of(
    features: np.ndarray, labels: np.ndarray, predictions: np.ndarray | None = None, classes: int = 0
) -> FeatureTable:
    """Return the table of one pass; images are called 0, 1, 2, ..."""
    classes = classes or int(labels.max()) + 1
    given = labels.astype(np.int64)
    names = tuple(str(i) for i in range(len(given)))
    gatherer = Gatherer(classes, len(given), 0, stratified=False)
    found = given if predictions is None else predictions.astype(np.int64)
    gatherer.add(Rows(features.astype(np.float32), given, found, names))
    return gatherer.table()


def centers(rng: np.random.Generator, classes: int, dimension: int, norm: float) -> np.ndarray:
    """Return class centres of about the same length, as after a ReLU."""
    raw = np.abs(rng.standard_normal((classes, dimension)))
    scaled: np.ndarray = norm * raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return scaled


__all__ = ["Gaussians", "centers", "table_of"]
