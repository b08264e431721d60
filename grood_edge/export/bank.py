"""The gradient bank and the head: prototypes, OOD prototypes and bank rows, fitted to a table of features.

The bank is made of the correctly classified images, or of k-means centres of them. Which images a row is made of is
kept, so that an image or a class can be left out of it afterwards.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np

from grood_edge.arrays import Features, Features64, Labels, Prototypes, Scores64, Vector64
from grood_edge.errors import DatasetError, MissingExtraError
from grood_edge.export.features import FeatureTable
from grood_edge.export.ood_prototype import OodSource
from grood_edge.export.prototypes import class_prototypes
from grood_edge.export.score_map import fitted_map
from grood_edge.scoring import BankDtype, Head, OodHead, SeenBank, class_distances, log_distances, log_s_of, pieces
from grood_edge.stored_head import rounded_rows

__all__ = ["BankRows", "HeadPlan", "bank_candidates", "bank_rows", "fit_head", "head_of", "heads_by_scale"]

KMEANS_ITERATIONS = 10
MAP_IMAGES = 1000  # bank images that a score map is fitted on
MAP_BLOCK = 256  # of them against all bank rows at a time
KMEANS_DIRECTIONS = 64  # principal directions of u that clusters are looked for in
BLOCK = 1024  # images in float64 at a time: all of them would be the largest part of what a device has
FULL_KMEANS = 100_000_000  # images x centres; beyond, MiniBatchKMeans: faster, and worse in sparse regions


@dataclass(frozen=True)
class HeadPlan:
    """What a head is fitted from.

    sources: one OOD prototype each. rows: k-means rows; None keeps every gradient, 0 none (the score is then log s).
    scale: a of the distances.
    """

    sources: tuple[OodSource, ...]
    rows: int | None
    dtype: BankDtype
    seed: int
    scale: float = 1.0


@dataclass(frozen=True)
class BankRows:
    """The images that the bank is made of, and the row that each is part of.

    features float32 `[n, d]`, labels int64 `[n]`, names `[n]`; assignment int64 `[n]` to rows 0..m-1.
    """

    features: Features
    labels: Labels
    names: tuple[str, ...]
    assignment: np.ndarray

    @property
    def count(self) -> int:
        """Number of rows m."""
        return int(self.assignment.max(initial=-1)) + 1

    def means(self, values: np.ndarray) -> np.ndarray:
        """Return the mean of `values` `[n, ...]` in each row, float64 `[m, ...]`."""
        order = np.argsort(self.assignment, kind="stable")
        starts = np.searchsorted(self.assignment[order], np.arange(self.count))
        means = np.empty((self.count, *values.shape[1:]))
        for rows in _blocks_of_rows(starts, len(order)):
            first, end = starts[rows.start], starts[rows.stop] if rows.stop < self.count else len(order)
            part = values[order[first:end]].astype(np.float64)
            if len(part) == len(means[rows]):  # each row one image, as in a full bank
                means[rows] = part
            else:
                np.add.reduceat(part, starts[rows] - first, axis=0, out=means[rows])
        counts = np.bincount(self.assignment, minlength=self.count)
        means /= counts.reshape(-1, *(1 for _ in means.shape[1:]))
        return means

    def without_class(self, label: int) -> "BankRows":
        """Return the bank as if a class did not exist."""
        keep = self.labels != label
        names = tuple(compress(self.names, keep))
        assignment = np.unique(self.assignment[keep], return_inverse=True)[1].reshape(-1)
        return BankRows(self.features[keep], self.labels[keep], names, assignment)

    def row_classes(self) -> np.ndarray:
        """Return the class that most images of each row belong to, int32 `[m]`."""
        votes = np.zeros((self.count, int(self.labels.max(initial=0)) + 1), np.int32)
        np.add.at(votes, (self.assignment, self.labels), 1)
        classes: np.ndarray = votes.argmax(axis=1).astype(np.int32)
        return classes

    def nearest_names(self) -> tuple[str, ...]:
        """Return, for each row, the name of the nearest image of the row's class."""
        means, distance = self.means(self.features), np.zeros(len(self.features))
        for block in _blocks(len(distance)):
            distance[block] = np.linalg.norm(self.features[block] - means[self.assignment[block]], axis=1)
        of_other_class = self.labels != self.row_classes()[self.assignment]
        order = np.lexsort((distance, of_other_class, self.assignment))
        first = order[np.searchsorted(self.assignment[order], np.arange(self.count))]
        return tuple(self.names[i] for i in first)


def fit_head(table: FeatureTable, plan: HeadPlan) -> tuple[Head, BankRows]:
    """Fit prototypes, OOD prototypes, bank and maps to a table of features, labels and predictions.

    Raises:
        DatasetError: no image is classified correctly.
        MissingExtraError: a k-means bank without scikit-learn.
    """
    prototypes = class_prototypes(table).prototypes
    rows = bank_rows(table, prototypes, plan)
    return head_of(rows, prototypes, plan), rows


def bank_candidates(table: FeatureTable) -> int:
    """Return how many images are classified correctly."""
    return sum(n for (label, prediction), n in table.confusion.items() if label == prediction)


def bank_rows(table: FeatureTable, prototypes: Prototypes, plan: HeadPlan) -> BankRows:
    """Choose the images of the bank and the row of each."""
    correct = table.labels == table.predictions
    if not correct.any():
        raise DatasetError("no image is classified correctly; check class order, preprocessing and weights")
    features, labels = table.features[correct], table.labels[correct]
    names = tuple(compress(table.names, correct))
    assignment = np.arange(len(labels))
    if plan.rows is not None and 0 < plan.rows < len(labels):
        assignment = _clusters(features, prototypes, plan)
    return BankRows(features, labels, names, assignment)


def head_of(rows: BankRows, prototypes: Prototypes, plan: HeadPlan, with_maps: bool = True) -> Head:
    """Return the head with these rows, seen from the plan's OOD prototypes beside these class prototypes."""
    return heads_by_scale(rows, prototypes, plan, (plan.scale,), with_maps)[0]


def heads_by_scale(
    rows: BankRows, prototypes: Prototypes, plan: HeadPlan, scales: Sequence[float], with_maps: bool = True
) -> list[Head]:
    """Return the head of each scale. Distances do not depend on it, and are computed once for all of them."""
    positions = [source.at(prototypes) for source in plan.sources]
    log_s = np.empty((len(scales), len(positions), len(rows.features)))
    for block in _blocks(len(rows.features)):
        log_s[:, :, block] = _log_s_seen_from(positions, rows.features[block].astype(np.float64), prototypes, scales)
    bank = np.zeros((0, prototypes.shape[1]))
    if plan.rows != 0:
        bank = rounded_rows(rows.means(rows.features), prototypes, plan.dtype)
    heads = []
    for scale, of_scale in zip(scales, log_s, strict=True):
        means = [rows.means(values) if plan.rows != 0 else np.zeros(0) for values in of_scale]
        ood_heads = tuple(OodHead(p, values) for p, values in zip(positions, means, strict=True))
        heads.append(Head(prototypes, bank, ood_heads, plan.dtype, scale))
    if len(positions) == 1 or not with_maps:
        return heads
    return [_mapped(head, s) for head, s in zip(heads, _own_row_left_out(rows, heads, plan.seed), strict=True)]


def _mapped(head: Head, scores: list[Scores64]) -> Head:
    """Return the head with maps that are fitted to the scores of each of its OOD heads."""
    maps = [fitted_map(of_one) for of_one in scores]
    scale = 1.0 / sum(m.slope + float(m.weights.sum()) for m in maps)
    ood_heads = tuple(replace(h, score_map=m.scaled(scale)) for h, m in zip(head.ood_heads, maps, strict=True))
    return replace(head, ood_heads=ood_heads)


def _own_row_left_out(rows: BankRows, heads: list[Head], seed: int) -> list[list[Scores64]]:
    """Score some bank images with each head, as if an image had no part in its row: one array a head and OOD head.

    The heads differ in nothing but scale, log s and maps.
    """
    sample = np.arange(len(rows.features))
    if len(sample) > MAP_IMAGES:
        sample = np.sort(np.random.default_rng(seed).choice(sample, MAP_IMAGES, replace=False))
    x, own = rows.features[sample].astype(np.float64), rows.assignment[sample]
    bank, positions = heads[0].bank, [h.prototype for h in heads[0].ood_heads]
    log_s = _log_s_seen_from(positions, x, heads[0].prototypes, [head.scale for head in heads])
    if len(bank) == 0 or len(rows.features) < 2:
        return log_s
    size = np.bincount(rows.assignment)[own].astype(np.float64)
    others = np.maximum(size - 1, 1)
    rest = (size[:, None] * bank[own] - x) / others[:, None] if size.max() > 1 else None
    products = x @ bank.T
    scores = [[np.empty(len(x)) for _ in positions] for _ in heads]
    for k, p in enumerate(positions):
        seen = SeenBank.of(bank, p)
        # A row of one image has no others: it is left out, whatever stands for it.
        rest_cosine = np.ones(len(x)) if rest is None else _cosine_seen_from(p, x, rest, seen.least)
        for start in range(0, len(x), MAP_BLOCK):
            part = slice(start, start + MAP_BLOCK)
            cosine = seen.cosine(x[part], products[part])
            for head, of_head, found in zip(heads, log_s, scores, strict=True):
                ls, bank_log_s = of_head[k][part], head.ood_heads[k].bank_log_s
                rest_log_s = (size[part] * bank_log_s[own[part]] - ls) / others[part]
                to_rest, _ = log_distances(rest_cosine[part], ls, rest_log_s)
                distance, _ = log_distances(cosine, ls[:, None], bank_log_s[None, :])
                distance[np.arange(len(distance)), own[part]] = np.where(size[part] > 1, to_rest, np.inf)
                found[k][part] = distance.min(axis=1)
    return scores


def _cosine_seen_from(position: Vector64, x: Features64, y: Features64, least: float) -> Scores64:
    """Return the cosine of the angle between each x and its y; a distance below `least` counts as `least`."""
    cosine = np.empty(len(x))
    for part in pieces(len(x)):
        v, w = x[part] - position, y[part] - position
        length = np.maximum(np.linalg.norm(v, axis=1), least) * np.maximum(np.linalg.norm(w, axis=1), least)
        cosine[part] = np.einsum("nd,nd->n", v, w) / length
    return cosine


def _log_s_seen_from(
    positions: list[Vector64], x: Features64, prototypes: Prototypes, scales: Sequence[float]
) -> list[list[Scores64]]:
    """Return log s of each sample, one array a scale and OOD prototype."""
    distances = class_distances(x, prototypes)
    ood_distances = np.empty((len(positions), len(x)))
    for part in pieces(len(x)):
        for position, found in zip(positions, ood_distances, strict=True):
            found[part] = np.linalg.norm(x[part] - position, axis=1)
    return [[log_s_of(distances, ood_distance, scale) for ood_distance in ood_distances] for scale in scales]


def _blocks(count: int) -> Iterator[slice]:
    """Divide 0..count into blocks of `BLOCK`; the last one has what is left, up to twice as much.

    A short block could go another way through BLAS, and its last bits would not be those of the whole.
    """
    for start in range(0, max(1, count // BLOCK) * BLOCK, BLOCK):
        yield slice(start, start + BLOCK if start + 2 * BLOCK <= count else count)


def _blocks_of_rows(starts: np.ndarray, images: int) -> Iterator[slice]:
    """Divide bank rows, whose images begin at `starts` int64 `[m]`, into blocks of about `BLOCK` images."""
    bounds = np.unique(np.append(np.searchsorted(starts, np.arange(0, images, BLOCK)), len(starts))).tolist()
    for first, end in itertools.pairwise(bounds):
        yield slice(first, end)


def _clusters(features: Features, prototypes: Prototypes, plan: HeadPlan) -> np.ndarray:
    """Cluster the images by (u, log s) of the first OOD prototype; return the row of each image.

    On g itself most images fall into one cluster as soon as s spans orders of magnitude.
    """
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus
        from sklearn.decomposition import PCA
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "export", "A k-means bank (--bank N)") from error
    assert plan.rows is not None
    position = plan.sources[0].at(prototypes)
    u, log_s = np.empty(features.shape), np.empty(len(features))
    for block in _blocks(len(features)):
        x = features[block].astype(np.float64)
        v = np.subtract(x, position, out=u[block])
        length = np.linalg.norm(v, axis=1)
        v /= np.maximum(length, 1e-30)[:, None]
        log_s[block] = log_s_of(class_distances(x, prototypes), length, plan.scale)
    # One thread: the order of float additions, and with it the artifact's bytes, must not depend on timing.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicates among the images give fewer clusters
        if min(u.shape) > KMEANS_DIRECTIONS:  # directions of gradients lie in few dimensions: see docs/method.md
            pca = PCA(KMEANS_DIRECTIONS, copy=False, svd_solver="randomized", random_state=plan.seed)
            u = pca.fit_transform(u)
        points = np.concatenate([u, log_s[:, None]], axis=1)
        kind = KMeans if len(u) * plan.rows <= FULL_KMEANS else MiniBatchKMeans
        # k-means++ spreads centres into sparse regions, where decisions fall; one trial a centre is enough for that.
        start, _ = kmeans_plusplus(points, plan.rows, random_state=plan.seed, n_local_trials=1)
        found = kind(plan.rows, init=start, n_init=1, max_iter=KMEANS_ITERATIONS, random_state=plan.seed)
        labels = found.fit(points).labels_
    return np.unique(labels, return_inverse=True)[1].reshape(-1)
