"""From held-out scores to the calibration that ships: which images, which rule, which promise."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from grood_edge.arrays import Scores, Vector64
from grood_edge.conformal import rank_for
from grood_edge.contract import Calibration, encode_scores
from grood_edge.errors import DatasetError, UsageError
from grood_edge.export.bank import fit_head
from grood_edge.export.features import FeaturePass, FeatureTable, rows_of
from grood_edge.ort import open_ort
from grood_edge.progress import Progress, silent
from grood_edge.scoring import ood_scores
from grood_edge.stored_head import head_model

__all__ = [
    "DEFAULT_DELTA",
    "SMALL_SET",
    "Promise",
    "calibration_from_scores",
    "cross_fitted_scores",
    "require_disjoint",
    "shipped_scores",
]

DEFAULT_DELTA = 0.05
SMALL_SET = 300  # below this many held-out images, cross-fitting has more power than a split
FOLDS = 10
OVERLAP_LIMIT = 0.01
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_BATCH = 256


@dataclass(frozen=True)
class Promise:
    """What the user asked for (alpha; delta None: the default) and what kind of images calibrate."""

    alpha: float
    delta: float | None
    provenance: Literal["unseen", "seen-in-training"]
    method: Literal["separate", "split", "cross-fitted"]

    def guarantee(self) -> Literal["conformal", "approximate", "none"]:
        """Return the strongest guarantee that these images allow."""
        if self.provenance == "seen-in-training":
            return "none"
        return "approximate" if self.method == "cross-fitted" else "conformal"

    def usable_delta(self) -> float | None:
        """Return the delta of the decision rule; None when nothing may be promised.

        Raises:
            UsageError: a delta was asked for although the images were seen in training.
        """
        if self.provenance == "unseen":
            return DEFAULT_DELTA if self.delta is None else self.delta
        if self.delta is not None:
            raise UsageError(
                "--delta promises a false-alarm rate, but the calibration images were seen in training, so no rate can "
                "be promised. Give unseen images with --calibration-data DIR; or, if the network was never trained on "
                "--data, say so with --unseen"
            )
        return None


def calibration_from_scores(scores: Scores, promise: Promise, data_digest: str) -> Calibration:
    """Return the calibration for these held-out scores, float32 `[n]`.

    Raises:
        CalibrationError: n cannot carry alpha and delta; says how many images are needed.
        UsageError: delta was asked for without unseen images.
    """
    delta = promise.usable_delta()
    rank = rank_for(promise.alpha, delta, scores.size)
    quantiles = np.quantile(scores.astype(np.float64), QUANTILES)
    return Calibration(
        provenance=promise.provenance,
        method=promise.method,
        guarantee=promise.guarantee(),
        alpha=promise.alpha,
        delta=delta,
        n=int(scores.size),
        k=rank,
        scores=encode_scores(scores),
        data_digest=data_digest,
        quantiles=tuple(round(float(q), 6) for q in quantiles),
    )


def shipped_scores(model: bytes, features: np.ndarray) -> Scores:
    """Score features float32 `[n, d]` with the very head that ships: `ood_score` float32 `[n]`."""
    head = open_ort(head_model(model))
    classes = head.inputs["logits"][1]
    step = 1 if head.inputs["features"][0] == 1 else _BATCH
    scores = []
    for start in range(0, len(features), step):
        rows = features[start : start + step]
        # The score does not read the logits; zeros stand in for them.
        feeds = {"features": rows, "logits": np.zeros((len(rows), classes), np.float32)}
        scores.append(head.run(feeds, ["ood_score"])["ood_score"])
    result: Scores = np.concatenate(scores)
    return result


def cross_fitted_scores(
    table: FeatureTable, ood_position: Vector64 | None, bank_rows: int | None, seed: int, progress: Progress = silent
) -> Scores:
    """Score every image with a head fitted on the other nine folds: float32 `[n]`.

    Folds are drawn within each class. Leaving out the image's own bank row alone would be wrong: its class
    prototype would still contain it.
    """
    fold = np.zeros(len(table.labels), np.int64)
    rng = np.random.default_rng(seed)
    for label in np.unique(table.labels):
        rows = rng.permutation(np.flatnonzero(table.labels == label))
        fold[rows] = (np.arange(len(rows)) + rng.integers(FOLDS)) % FOLDS
    scores = np.zeros(len(fold), np.float32)
    for index in np.unique(fold):
        out = fold == index
        head = fit_head(rows_of(table, ~out), ood_position, bank_rows, seed)
        progress("cross-fitting", int(index) + 1, FOLDS)
        scores[out] = ood_scores(table.features[out].astype(np.float64), head)
    return scores


def require_disjoint(fit: FeaturePass, calibration: FeaturePass) -> None:
    """Refuse calibration images that were fitted on: their scores say nothing about new frames.

    Raises:
        DatasetError: more than 1 % of the calibration images are also among the fit images.
    """
    shared = int(np.isin(calibration.frame_hashes, fit.frame_hashes).sum())
    if shared > OVERLAP_LIMIT * len(calibration.frame_hashes):
        raise DatasetError(
            f"{shared} of {len(calibration.frame_hashes)} calibration images are also among the fit images; they "
            "must be new to the network and to the fit. Remove them from one of the two folders"
        )
