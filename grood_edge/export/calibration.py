"""From held-out scores to the calibration that ships: which images, which rule, which promise."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from grood_edge.arrays import IdScores, Labels, Scores
from grood_edge.conformal import rank_for
from grood_edge.contract import Calibration, encode_scores
from grood_edge.errors import CalibrationError, DatasetError, UsageError
from grood_edge.export.bank import HeadPlan, fit_head
from grood_edge.export.features import FeaturePass, FeatureTable, rows_of
from grood_edge.ort import open_ort
from grood_edge.progress import Progress, silent
from grood_edge.scoring import ood_scores
from grood_edge.stored_head import head_model

__all__ = [
    "DEFAULT_DELTA",
    "SMALL_SET",
    "CalibrationScores",
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
    """What the user asked for and what kind of images calibrate.

    delta: None takes the default. marginal: alpha is meant on average over calibration sets, without a confidence.
    per_class: p-values by predicted class (Mondrian).
    """

    alpha: float
    delta: float | None
    provenance: Literal["unseen", "seen-in-training"]
    method: Literal["separate", "split", "cross-fitted"]
    marginal: bool = False
    per_class: bool = False

    def guarantee(self) -> Literal["conformal", "marginal", "approximate", "none"]:
        """Return the strongest guarantee that these images allow."""
        if self.provenance == "seen-in-training":
            return "none"
        if self.method == "cross-fitted":
            return "approximate"
        return "marginal" if self.marginal else "conformal"

    def usable_delta(self) -> float | None:
        """Return the delta of the decision rule; None when no confidence may be stated.

        Raises:
            UsageError: a delta was asked for although the images were seen in training, or with `marginal`.
        """
        if self.marginal and self.delta is not None:
            raise UsageError("--delta states a confidence, and --rule marginal has none; give one of the two")
        if self.provenance == "unseen":
            default = None if self.marginal else DEFAULT_DELTA
            return default if self.delta is None else self.delta
        if self.delta is not None:
            raise UsageError(
                "--delta promises a false-alarm rate, but the calibration images were seen in training, so no rate can "
                "be promised. Give unseen images with --calibration-data DIR; or, if the network was never trained on "
                "--data, say so with --unseen"
            )
        return None


@dataclass(frozen=True)
class CalibrationScores:
    """Held-out scores float32 `[n]`, the predicted class of each int64 `[n]`, and the digest of their images."""

    scores: Scores
    class_ids: Labels
    data_digest: str


def calibration_from_scores(held_out: CalibrationScores, promise: Promise, classes: tuple[str, ...]) -> Calibration:
    """Return the calibration for these held-out scores.

    Raises:
        CalibrationError: n, or with per-class p-values a class, cannot carry alpha and delta; says how many are needed.
        UsageError: delta was asked for without unseen images.
    """
    delta, scores = promise.usable_delta(), held_out.scores
    if scores.size and scores.min() == scores.max():
        raise CalibrationError(
            f"all {scores.size} calibration images have the same score {scores[0]:.4g}: nothing can be told apart. "
            "Check that the calibration images differ, and the classifier's weights"
        )
    rank = rank_for(promise.alpha, delta, scores.size)
    groups: tuple[IdScores, ...] = (scores,)
    ranks: tuple[int, ...] = ()
    if promise.per_class:
        groups = tuple(scores[held_out.class_ids == label] for label in range(len(classes)))
        ranks = _class_ranks(groups, promise.alpha, delta, classes)
    quantiles = np.quantile(scores.astype(np.float64), QUANTILES)
    return Calibration(
        provenance=promise.provenance,
        method=promise.method,
        guarantee=promise.guarantee(),
        alpha=promise.alpha,
        delta=delta,
        n=int(scores.size),
        k=rank,
        class_sizes=tuple(group.size for group in groups) if promise.per_class else (),
        class_ranks=ranks,
        scores=encode_scores(groups),
        data_digest=held_out.data_digest,
        quantiles=tuple(round(float(q), 6) for q in quantiles),
    )


def _class_ranks(
    groups: tuple[IdScores, ...], alpha: float, delta: float | None, classes: tuple[str, ...]
) -> tuple[int, ...]:
    ranks = []
    for name, group in zip(classes, groups, strict=True):
        try:
            ranks.append(rank_for(alpha, delta, group.size))
        except CalibrationError as error:
            raise CalibrationError(f"--per-class: of the images predicted as {name!r}, {error}") from error
    return tuple(ranks)


def shipped_scores(model: bytes, rows: np.ndarray, space: str) -> Scores:
    """Score rows float32 `[n, d]` of the head's input with the very head that ships: `ood_score` float32 `[n]`."""
    head = open_ort(head_model(model))
    other = "logits" if space == "features" else "features"
    width = head.inputs[other][1]
    step = head.batch(_BATCH)
    scores = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        # The score does not read the other output; zeros stand in for it.
        feeds = {space: part, other: np.zeros((len(part), width), np.float32)}
        scores.append(head.run(feeds, ["ood_score"])["ood_score"])
    result: Scores = np.concatenate(scores)
    return result


def cross_fitted_scores(table: FeatureTable, plan: HeadPlan, progress: Progress = silent) -> Scores:
    """Score every image with a head fitted on the other nine folds: float32 `[n]`.

    Prototypes, OOD prototypes, bank and maps are all refitted. (Of `mixup`, the fold's own mixes are dropped; the other
    mixes keep the early class means, in which the fold's images have a part of about 1/n.)

    Folds are drawn within each class. Leaving out the image's own bank row alone would be wrong: its class
    prototype would still contain it.
    """
    fold = np.zeros(len(table.labels), np.int64)
    rng = np.random.default_rng(plan.seed)
    for label in np.unique(table.labels):
        rows = rng.permutation(np.flatnonzero(table.labels == label))
        fold[rows] = (np.arange(len(rows)) + rng.integers(FOLDS)) % FOLDS
    scores = np.zeros(len(fold), np.float32)
    for index in np.unique(fold):
        out = fold == index
        names = tuple(table.names[i] for i in np.flatnonzero(out))
        sources = tuple(source.without_images(names) for source in plan.sources)
        head, _ = fit_head(rows_of(table, ~out), replace(plan, sources=sources))
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
