"""The GROOD equations, once, in NumPy float64: the definition that every graph and engine is held against.

Source: ElAraby et al., "GROOD: GRadient-Aware Out-of-Distribution Detection", arXiv 2312.14427, in the closed
form of its gradient. With features h, class prototypes p_j and OOD prototype p_ood:

    l_j = -||h - p_j||                       plain L2, j = 1..C and ood
    g   = d cross_entropy(softmax(l), predicted class) / d p_ood = s u
    s   = softmax(l)_ood,   u = (h - p_ood) / ||h - p_ood||
    S   = min_i ||g - g_i||                  over the gradient bank; log S is the score, higher = more OOD

so that a gradient is one scalar (log s) and one unit vector (u), and
S^2 = min_i [(s - s_i)^2 + 2 s s_i (1 - u.u_i)]. Everything stays in the log domain: s underflows long before
its logarithm loses meaning. Without a bank the score is log s itself.

A scale a of the distances (ours; the paper has 1) stands in l_j = -a ||h - p_j||: it changes s, and not u.

With several OOD prototypes (ours, not the paper's) every one has its own gradients, seen from one bank of feature
rows, and ood_score = sum_k T_k(log S_k) with fixed increasing maps T_k, whose slopes far out add up to 1: a difference
of scores means as much as one of log S.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from grood_edge.arrays import Bank, Features64, LogScale, Prototypes, Scores64, Vector64

__all__ = [
    "IDENTITY",
    "INVALID_SCORE",
    "MIN_RELATIVE_DISTANCE",
    "MIN_RELATIVE_GAP",
    "BankDtype",
    "Head",
    "Nearest",
    "OodHead",
    "ScoreMap",
    "SeenBank",
    "class_distances",
    "log_distances",
    "log_s_of",
    "nearest_gap",
    "nearest_rows",
    "nearest_rows_by_scale",
    "ood_scores",
    "ood_scores_by_scale",
    "pieces",
]

INVALID_SCORE = 3.4e38  # ood_score of a frame whose features or logits are not finite
MIN_RELATIVE_GAP = 1e-12  # floor of S^2 / max(s, s_i)^2: at the floor two gradients are called identical
# Nearer to p_ood than this share of the bank's median distance, u is no direction any more (and float32 could not
# tell it from rounding); such a frame must come out OOD, not ID.
MIN_RELATIVE_DISTANCE = 1e-3
_SMALLEST = 1e-30  # keeps 0 / 0 away where all bank rows equal the OOD prototype
_PIECE = 64  # rows whose differences stay in the cache
_BLOCK = 512  # rows of features at a time: bounds memory at 512 x bank rows

BankDtype = Literal["int8", "float32"]


@dataclass(frozen=True)
class ScoreMap:
    """The map T of one OOD head, increasing and piecewise linear: bias + slope x + sum_j weights_j max(x - knots_j, 0).

    `knots` and `weights` float64 `[q]`; a weight may be negative, as long as T increases.
    """

    bias: float
    slope: float
    knots: Vector64
    weights: Vector64

    def __call__(self, scores: Scores64) -> Scores64:
        """Return T of each score, float64 `[n]`."""
        mapped: Scores64 = self.bias + self.slope * scores
        for knot, weight in zip(self.knots, self.weights, strict=True):
            mapped = mapped + weight * np.maximum(scores - knot, 0.0)
        return mapped

    def slope_at(self, scores: Scores64) -> Scores64:
        """Return the slope of T at each score, float64 `[n]`."""
        slopes: Scores64 = self.slope + (scores[:, None] > self.knots[None, :]) @ self.weights
        return slopes

    def scaled(self, factor: float) -> "ScoreMap":
        """Return the map times a positive factor."""
        return ScoreMap(factor * self.bias, factor * self.slope, self.knots, factor * self.weights)


IDENTITY = ScoreMap(0.0, 1.0, np.zeros(0), np.zeros(0))


@dataclass(frozen=True)
class OodHead:
    """One OOD prototype float64 `[d]`, log s of the bank rows seen from it float64 `[m]`, and the map of its score."""

    prototype: Vector64
    bank_log_s: LogScale
    score_map: ScoreMap = IDENTITY


@dataclass(frozen=True)
class Head:
    """All that the score needs: class prototypes float64 `[k, d]`, one bank, and one `OodHead` per OOD prototype.

    `bank` float64 `[m, d]`: feature rows; the gradients' directions are those from the OOD prototype to them. Without
    rows (m = 0) the score is log s. `bank_dtype` says how a file stores the rows. `scale`: a of the distances.
    """

    prototypes: Prototypes
    bank: Bank
    ood_heads: tuple[OodHead, ...]
    bank_dtype: BankDtype = "float32"
    scale: float = 1.0


@dataclass(frozen=True)
class Nearest:
    """What one OOD head says about each sample, float64 `[n]` each.

    `log_s`; `score` = log S; `row` int64, the nearest bank row (-1 without a bank); `gap` = S^2 / max(s, s_i)^2 there
    (1 without a bank): float32 arithmetic gives log S to about 2e-7 / gap.
    """

    log_s: Scores64
    score: Scores64
    row: np.ndarray
    gap: Scores64


def ood_scores(features: Features64, head: Head) -> Scores64:
    """Return `ood_score` of each row, float64 `[n]`; higher is more OOD."""
    return ood_scores_by_scale(features, [head])[0]


def ood_scores_by_scale(features: Features64, heads: Sequence[Head]) -> list[Scores64]:
    """Return the same for each of some heads that differ in nothing but scale, log s and maps."""
    totals = np.zeros((len(heads), len(features)))
    for index, found in enumerate(nearest_rows_by_scale(features, heads)):
        for ood_head, nearest in zip(heads[index].ood_heads, found, strict=True):
            totals[index] += ood_head.score_map(nearest.score)
    return list(totals)


def nearest_rows(features: Features64, head: Head) -> tuple[Nearest, ...]:
    """Return, for each OOD head, log s, log S and the nearest bank row of each sample."""
    return nearest_rows_by_scale(features, [head])[0]


def nearest_rows_by_scale(features: Features64, heads: Sequence[Head]) -> list[tuple[Nearest, ...]]:
    """Return the same for each of some heads that differ in nothing but scale, log s and maps.

    Distances and cosines, which take nearly all of the time, are then the same for all of them.
    """
    prototypes, ood_heads = heads[0].prototypes, heads[0].ood_heads
    center = prototypes.mean(axis=0)
    bank = heads[0].bank - center
    seen = [SeenBank.of(bank, ood_head.prototype - center) for ood_head in ood_heads]
    parts: list[list[list[Nearest]]] = [[[] for _ in ood_heads] for _ in heads]
    for start in range(0, max(1, len(features)), _BLOCK):
        block = features[start : start + _BLOCK]
        centred = block - center
        distances, products = _centred_distances(centred, prototypes - center), centred @ bank.T
        for k, bank_seen in enumerate(seen):
            ood_distance, cosine = _lengths(block, ood_heads[k].prototype), bank_seen.cosine(centred, products)
            for head, found in zip(heads, parts, strict=True):
                log_s = log_s_of(distances, ood_distance, head.scale)
                found[k].append(_nearest(cosine, log_s, head.ood_heads[k].bank_log_s))
    return [tuple(_joined(blocks) for blocks in found) for found in parts]


def nearest_gap(features: Features64, head: Head) -> Scores64:
    """Return the smallest gap of each sample over the OOD heads, float64 `[n]`: how far float32 can be trusted."""
    gaps: Scores64 = np.min([nearest.gap for nearest in nearest_rows(features, head)], axis=0)
    return gaps


@dataclass(frozen=True)
class SeenBank:
    """The bank as one OOD prototype sees it; rows and prototype are relative to any one centre.

    `lengths` float64 `[m]` = ||b_i - p||, at least `least`: nearer than that a vector is no direction.
    """

    prototype: Vector64
    lengths: LogScale
    offset: LogScale
    least: float

    @staticmethod
    def of(bank: Bank, prototype: Vector64) -> "SeenBank":
        """Look at the rows float64 `[m, d]` from the prototype `[d]`."""
        lengths = _lengths(bank, prototype)
        least = max(MIN_RELATIVE_DISTANCE * float(np.median(lengths)), _SMALLEST) if len(bank) else _SMALLEST
        return SeenBank(prototype, np.maximum(lengths, least), prototype @ prototype - bank @ prototype, least)

    def cosine(self, features: Features64, products: np.ndarray) -> np.ndarray:
        """Return u.u_i, float64 `[n, m]`, from the products h.b_i: one product serves every OOD prototype."""
        ood_distance = np.maximum(_lengths(features, self.prototype), self.least)
        numerator = products - (features @ self.prototype)[:, None] + self.offset[None, :]
        cosine: np.ndarray = numerator / ood_distance[:, None] / self.lengths[None, :]
        return cosine


def class_distances(features: Features64, prototypes: Prototypes) -> np.ndarray:
    """Return ||h - p_j||, float64 `[n, k]`."""
    # Centred first, so that the expanded square loses no more than float64 can spare; one product for all classes.
    center = prototypes.mean(axis=0)
    return _centred_distances(features - center, prototypes - center)


def _centred_distances(h: Features64, p: Prototypes) -> np.ndarray:
    squares = np.einsum("nd,nd->n", h, h)[:, None] + np.einsum("kd,kd->k", p, p)[None, :] - 2.0 * (h @ p.T)
    nearest = squares.argmin(axis=1)
    for rows in pieces(len(h)):
        direct = h[rows] - p[nearest[rows]]
        squares[np.arange(rows.start, rows.stop), nearest[rows]] = np.einsum("nd,nd->n", direct, direct)
    distances: np.ndarray = np.sqrt(np.maximum(squares, 0.0))
    return distances


def pieces(count: int) -> Iterator[slice]:
    """Divide samples 0..count into a few at a time, for what is computed row by row.

    Differences of all of them take longer to bring into memory than to compute.
    """
    bounds = np.linspace(0, count, max(1, count // _PIECE) + 1).astype(np.int64).tolist()
    for start, stop in itertools.pairwise(bounds):
        yield slice(start, stop)


def log_s_of(distances: np.ndarray, ood_distance: Scores64, scale: float) -> Scores64:
    """Return log s = -a d_ood - logsumexp_j(-a d_j) over class distances `[n, k]` and the OOD distance `[n]`."""
    everything = scale * np.concatenate([distances, ood_distance[:, None]], axis=1)
    nearest = everything.min(axis=1)
    log_s: Scores64 = nearest - scale * ood_distance - np.log(np.exp(nearest[:, None] - everything).sum(axis=1))
    return log_s


def log_distances(cosine: np.ndarray, log_s: np.ndarray, bank_log_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log ||g - g_i|| and the gap ||g - g_i||^2 / max(s, s_i)^2 of gradients at cosine u.u_i (broadcasting)."""
    ratio = np.exp(-np.abs(log_s - bank_log_s))
    gap = np.maximum((1.0 - ratio) ** 2 + 2.0 * ratio * np.maximum(1.0 - cosine, 0.0), MIN_RELATIVE_GAP)
    return np.maximum(log_s, bank_log_s) + 0.5 * np.log(gap), gap


def _nearest(cosine: np.ndarray, log_s: Scores64, bank_log_s: LogScale) -> Nearest:
    if cosine.shape[1] == 0:
        return Nearest(log_s, log_s, np.full(len(log_s), -1), np.ones(len(log_s)))
    score, row, gap = np.empty(len(log_s)), np.empty(len(log_s), np.int64), np.empty(len(log_s))
    for part in pieces(len(log_s)):
        distance, gaps = log_distances(cosine[part], log_s[part, None], bank_log_s[None, :])
        row[part] = distance.argmin(axis=1)
        at = (np.arange(len(distance)), row[part])
        score[part], gap[part] = distance[at], gaps[at]
    return Nearest(log_s, score, row, gap)


def _lengths(points: Features64, origin: Vector64) -> Scores64:
    """Return ||x - origin|| of each row."""
    lengths = np.empty(len(points))
    for rows in pieces(len(points)):
        v = points[rows] - origin
        lengths[rows] = np.einsum("nd,nd->n", v, v)
    return np.sqrt(lengths, out=lengths)


def _joined(blocks: list[Nearest]) -> Nearest:
    return Nearest(*(np.concatenate([getattr(b, name) for b in blocks]) for name in ("log_s", "score", "row", "gap")))
