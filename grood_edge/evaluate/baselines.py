"""Other OOD scores from the same features and logits, for comparison. Higher = more OOD in all of them.

| name | score | source |
|---|---|---|
| MSP | -max softmax | Hendrycks, Gimpel, arXiv 1610.02136 |
| max logit | -max logit | Hendrycks et al., arXiv 1911.11132 |
| energy | -logsumexp(logits) | Liu et al., arXiv 2010.03759 |
| nearest prototype | distance to the nearest class mean | Snell et al., arXiv 1703.05175 |
| KNN | distance to the 10th nearest fit image, features on the unit sphere | Sun et al., arXiv 2204.06507 |
| Mahalanobis | distance to the nearest class mean under one shared covariance | Lee et al., arXiv 1807.03888 |
| ViM | alpha ||residual of h outside the principal space|| - logsumexp(logits) | Wang et al., arXiv 2203.10807 |
| SCALE | energy of W h e^r + b, r = sum(h) / sum(largest 15 % of h) | Xu et al., arXiv 2310.00227 (ICLR 2024) |
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from grood_edge.arrays import Features, Features64, Labels, Logits, Prototypes, Scores
from grood_edge.evaluate.linear import LinearLayer

__all__ = ["BASELINES", "Baselines", "FitRows", "build_baselines"]

BASELINES = ("MSP", "max logit", "energy", "nearest prototype", "KNN", "Mahalanobis", "ViM", "SCALE")

NEIGHBOURS = 10
SCALE_PERCENTILE = 85
MAX_DIMENSION = 8192  # of features for which a covariance is formed: 512 MB in float64
NO_FIT = "needs the images that were fitted on: give them with --fit DIR"
TOO_WIDE = f"needs a covariance of more than {MAX_DIMENSION} features squared"

Score = Callable[[Features, Logits], np.ndarray]


@dataclass(frozen=True)
class FitRows:
    """What the baselines know about the fitted images.

    features float32 `[m, d]` and logits float32 `[m, k]` of a seeded sample, labels int64 `[m]`; class_means
    float64 `[c, d]` over all images of the c classes that have any.
    """

    features: Features
    logits: Logits
    labels: Labels
    class_means: np.ndarray
    digest: str
    images: int


@dataclass(frozen=True)
class Baselines:
    """Scores by name, and the baselines that had to be left out, with the reason."""

    scores: dict[str, Score]
    left_out: tuple[tuple[str, str], ...]

    def __call__(self, features: Features, logits: Logits) -> dict[str, Scores]:
        """Return float32 scores `[n]` by name."""
        with np.errstate(all="ignore"):  # rows that are not finite are replaced by the caller
            return {name: score(features, logits).astype(np.float32) for name, score in self.scores.items()}


def build_baselines(fit: FitRows | None, linear: LinearLayer | None, no_linear: str, features: Features) -> Baselines:
    """Prepare every baseline that can be had.

    Args:
        fit: the fitted images; None leaves out the baselines that need them.
        linear: the last layer; None leaves out those that need it.
        no_linear: the reason why there is no `linear`.
        features: some ID features `[n, d]`: SCALE is for features without negative values.
    """
    scores: dict[str, Score] = {"MSP": _msp, "max logit": _max_logit, "energy": lambda _, z: -_logsumexp(z)}
    left_out: list[tuple[str, str]] = []
    wide = features.shape[1] > MAX_DIMENSION
    if fit is None:
        left_out += [(name, NO_FIT) for name in ("nearest prototype", "KNN", "Mahalanobis")]
    else:
        scores["nearest prototype"] = _nearest(fit.class_means)
        scores["KNN"] = _knn(fit.features)
        if wide:
            left_out.append(("Mahalanobis", TOO_WIDE))
        else:
            scores["Mahalanobis"] = _mahalanobis(fit)
    if linear is None or fit is None or wide:
        left_out.append(("ViM", no_linear if linear is None else NO_FIT if fit is None else TOO_WIDE))
    else:
        scores["ViM"] = _vim(fit, linear)
    if linear is None:
        left_out.append(("SCALE", no_linear))
    elif (features < 0).any():
        left_out.append(("SCALE", "is defined for features without negative values (after a ReLU)"))
    else:
        scores["SCALE"] = _scale(linear)
    return Baselines(scores, tuple(left_out))


def _msp(_: Features, logits: Logits) -> np.ndarray:
    """The same order as -max softmax, which saturates at -1: log of (1 - p) / p for the largest probability p."""
    ordered = np.sort(logits.astype(np.float64), axis=1)
    return _logsumexp(ordered[:, :-1]) - ordered[:, -1]


def _max_logit(_: Features, logits: Logits) -> np.ndarray:
    result: np.ndarray = -logits.max(axis=1)
    return result


def _logsumexp(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.float64)
    largest = wide.max(axis=1)
    result: np.ndarray = largest + np.log(np.exp(wide - largest[:, None]).sum(axis=1))
    return result


def _nearest(points: Prototypes) -> Score:
    return lambda features, _: _distances(features.astype(np.float64), points).min(axis=1)


def _knn(fit_features: Features) -> Score:
    known = _unit(fit_features)
    rank = min(NEIGHBOURS, len(known)) - 1

    def score(features: Features, _: Logits) -> np.ndarray:
        cosines = _unit(features) @ known.T
        farthest = np.partition(-cosines, rank, axis=1)[:, rank]  # minus the cosine of the 10th nearest
        result: np.ndarray = np.sqrt(np.maximum(2 + 2 * farthest, 0))
        return result

    return score


def _unit(rows: Features) -> Features:
    result: Features = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    return result


def _mahalanobis(fit: FitRows) -> Score:
    """Whiten by the covariance around the class means (pseudo-inverse), then take the nearest whitened mean."""
    present = np.unique(fit.labels)
    means = np.stack([fit.features[fit.labels == label].mean(axis=0, dtype=np.float64) for label in present])
    centred = fit.features - means[np.searchsorted(present, fit.labels)]
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps * 10
    whiten = vectors[:, kept] / np.sqrt(values[kept])
    points = means @ whiten
    return lambda features, _: _distances(features.astype(np.float64) @ whiten, points).min(axis=1)


def _vim(fit: FitRows, linear: LinearLayer) -> Score:
    """Residual outside the principal space around the point where W h + b is smallest, scaled to the largest logit."""
    dimension = fit.features.shape[1]
    origin = -np.linalg.pinv(linear.weight.astype(np.float64)) @ linear.bias
    centred = fit.features - origin
    _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))  # ascending: the residual space comes first
    residual_space = vectors[:, : dimension - _principal_size(dimension)]
    norms = np.linalg.norm(centred @ residual_space, axis=1)
    alpha = fit.logits.max(axis=1).mean(dtype=np.float64) / max(float(norms.mean()), 1e-12)

    def score(features: Features, logits: Logits) -> np.ndarray:
        residual = np.linalg.norm((features - origin) @ residual_space, axis=1)
        result: np.ndarray = alpha * residual - _logsumexp(logits)
        return result

    return score


def _principal_size(dimension: int) -> int:
    """The paper's choice: 1000 of 2048 and more, 512 of 768 and more, else half."""
    return 1000 if dimension >= 2048 else 512 if dimension >= 768 else dimension // 2


def _scale(linear: LinearLayer) -> Score:
    def score(features: Features, _: Logits) -> np.ndarray:
        dimension = features.shape[1]
        kept = dimension - round(dimension * SCALE_PERCENTILE / 100)
        largest = np.partition(features, dimension - kept, axis=1)[:, dimension - kept :]
        sums = features.sum(axis=1, dtype=np.float64), np.maximum(largest.sum(axis=1, dtype=np.float64), 1e-12)
        factor = np.exp(sums[0] / sums[1])[:, None]
        return -_logsumexp((features * factor) @ linear.weight.T.astype(np.float64) + linear.bias)

    return score


def _distances(rows: Features64, points: Prototypes) -> np.ndarray:
    squares = (rows**2).sum(axis=1)[:, None] - 2 * rows @ points.T + (points**2).sum(axis=1)
    result: np.ndarray = np.sqrt(np.maximum(squares, 0))
    return result
