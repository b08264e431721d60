"""The gradient bank: gradients of the correctly classified images, all of them or their k-means centres."""

import warnings

import numpy as np

from grood_edge.arrays import Features64, Vector64
from grood_edge.errors import DatasetError, MissingExtraError
from grood_edge.export.features import MAX_ROWS, FeatureTable
from grood_edge.export.prototypes import class_prototypes
from grood_edge.scoring import Gradients, Head, OodHead, gradients

__all__ = ["bank_candidates", "fit_head"]

KMEANS_ROWS = 20_000  # candidates that k-means sees; a seeded sample of more
KMEANS_ITERATIONS = 50


def fit_head(table: FeatureTable, ood_position: Vector64 | None, bank_rows: int | None, seed: int) -> Head:
    """Fit prototypes and bank to a table: the whole head, for one OOD prototype.

    Args:
        table: features, labels and predictions of the fit images.
        ood_position: float64 `[d]`; None takes the mean of the class prototypes.
        bank_rows: None keeps the gradient of every correctly classified image; N keeps N k-means centres.
        seed: of k-means.

    Raises:
        DatasetError: no image is classified correctly, or a full bank would be too large.
    """
    prototypes = class_prototypes(table).prototypes
    ood_prototype = prototypes.mean(axis=0) if ood_position is None else ood_position
    features = _bank_candidates(table)
    if bank_rows is None and table.images > MAX_ROWS:
        raise DatasetError(
            f"a full bank of {table.images:,} images does not fit; at most {MAX_ROWS:,} rows are kept. Use --bank N"
        )
    sample = max(KMEANS_ROWS, 2 * (bank_rows or 0))
    if bank_rows is not None and len(features) > sample:
        chosen = np.random.default_rng(seed).choice(len(features), sample, replace=False)
        features = features[np.sort(chosen)]
    g = gradients(features, prototypes, ood_prototype)
    if bank_rows is not None and bank_rows < len(features):
        g = _kmeans(g, bank_rows, seed)
    return Head(prototypes, (OodHead(ood_prototype, g.u, g.log_s),))


def bank_candidates(table: FeatureTable) -> int:
    """Return how many rows a full bank has."""
    return int((table.labels == table.predictions).sum())


def _bank_candidates(table: FeatureTable) -> Features64:
    correct = table.labels == table.predictions
    if not correct.any():
        raise DatasetError("no image is classified correctly; check class order, preprocessing and weights")
    rows: Features64 = table.features[correct].astype(np.float64)
    return rows


def _kmeans(g: Gradients, rows: int, seed: int) -> Gradients:
    """Cluster (u, log s): means of log s, and of u brought back to length one.

    On g itself most rows fall into one cluster as soon as s spans orders of magnitude.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "export", "A k-means bank (--bank N)") from error
    points = np.concatenate([g.u, g.log_s[:, None]], axis=1)
    # One thread: the order of float additions, and with it the artifact's bytes, must not depend on timing.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicates among the images give fewer clusters
        centres = KMeans(rows, n_init=1, max_iter=KMEANS_ITERATIONS, random_state=seed).fit(points).cluster_centers_
    u, log_s = centres[:, :-1], centres[:, -1]
    length = np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-12)
    return Gradients(np.ascontiguousarray(log_s), u / length)
