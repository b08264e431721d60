"""From passes over images to fitted statistics and their calibration; shared by `export` and `calibrate`.

Needs no onnx and no torch: `calibrate` runs this on the device.
"""

from dataclasses import dataclass

import numpy as np

from grood_edge.contract import Calibration, Fit, GradientBank
from grood_edge.errors import UsageError
from grood_edge.export.bank import bank_candidates, fit_head
from grood_edge.export.calibration import (
    SMALL_SET,
    Promise,
    calibration_from_scores,
    cross_fitted_scores,
    require_disjoint,
    shipped_scores,
)
from grood_edge.export.dataset import Dataset, LabelSource
from grood_edge.export.features import FeaturePass, FeatureTable, Reading, collect_features, merged
from grood_edge.export.ood_prototype import OodSource
from grood_edge.export.prototypes import require_usable_classes
from grood_edge.ort import OrtModel
from grood_edge.progress import Progress, silent
from grood_edge.scoring import Head
from grood_edge.stored_head import calibration_tensors, model_with_tensors

__all__ = ["FitOptions", "Fitted", "Passes", "calibrated", "coverage_warnings", "fit_statistics", "read_passes"]

MAX_SEED = 2**32 - 1  # what NumPy, scikit-learn and torch all take


@dataclass(frozen=True)
class FitOptions:
    """How statistics are fitted: see `pipeline.ExportOptions` for the words."""

    labels: LabelSource
    bank: int | None
    alpha: float
    delta: float | None
    unseen: bool
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            UsageError: bank, alpha, delta or seed out of range.
        """
        if self.bank is not None and self.bank < 1:
            raise UsageError(f"--bank {self.bank}; expected 'all' or a number of rows from 1")
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if value is not None and not 0 < value < 1:
                raise UsageError(f"--{name} {value}; expected a number above 0 and below 1, such as 0.05")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed {self.seed}; expected a number from 0 to {MAX_SEED}")


@dataclass(frozen=True)
class Passes:
    """One pass over the ID images, and one over separate calibration images when there are any."""

    fit: FeaturePass
    calibration: FeaturePass | None

    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """Return name and reason of every image that could not be read, calibration images included."""
        return self.fit.unreadable + (self.calibration.unreadable if self.calibration is not None else ())

    def everything(self) -> FeatureTable:
        """Return the table of all ID images, those held out included."""
        held_out = self.fit.held_out
        return self.fit.fit if held_out is None else merged(self.fit.fit, held_out)


@dataclass(frozen=True)
class Fitted:
    """Fitted statistics with their contract entries, and what calibrates them.

    Exactly one of `calibration_features` (float32 `[n, d]`, to be scored by the head that ships) and
    `calibration_scores` (float32 `[n]`, cross-fitted) is set.
    """

    head: Head
    bank: GradientBank
    fit: Fit
    promise: Promise
    calibration_digest: str
    calibration_features: np.ndarray | None
    calibration_scores: np.ndarray | None


def read_passes(
    data: Dataset, calibration: Dataset | None, model: OrtModel, reading: Reading, progress: Progress = silent
) -> Passes:
    """Run the classifier graph over all images, once.

    Raises:
        DatasetError: no or unreadable images, or calibration images that are also fit images.
    """
    fit = collect_features(data, model, reading, progress)
    if calibration is None:
        return Passes(fit, None)
    found = collect_features(calibration, model, reading.for_calibration(), progress)
    require_disjoint(fit, found)
    return Passes(fit, found)


def fit_statistics(
    passes: Passes, classes: tuple[str, ...], ood: OodSource, options: FitOptions, progress: Progress = silent
) -> Fitted:
    """Fit prototypes and bank, and choose what calibrates: separate images, a split, or cross-fitting.

    Raises:
        DatasetError: classes that cannot be modelled.
        UsageError: delta was asked for without unseen images.
    """
    held_out = passes.fit.held_out
    provenance = "unseen" if passes.calibration is not None or options.unseen else "seen-in-training"
    method = "separate"
    if passes.calibration is None:
        method = "split" if held_out is not None and held_out.images >= SMALL_SET else "cross-fitted"
    promise = Promise(options.alpha, options.delta, provenance, method)  # type: ignore[arg-type]
    promise.usable_delta()
    table = passes.fit.fit if method == "split" else passes.everything()
    require_usable_classes(table, classes, predicted=options.labels == "predicted")
    features: np.ndarray | None = None
    scores: np.ndarray | None = None
    if passes.calibration is not None:
        features = passes.calibration.fit.features
    elif method == "split" and held_out is not None:
        features = held_out.features
    else:
        scores = cross_fitted_scores(table, ood.position, options.bank, options.seed, progress)
    return Fitted(
        head=fit_head(table, ood.position, options.bank, options.seed),
        bank=_bank_entry(table, options.bank),
        fit=_fit_entry(passes, classes, options),
        promise=promise,
        calibration_digest=(passes.calibration or passes.fit).digest,
        calibration_features=features,
        calibration_scores=scores,
    )


def calibrated(model: bytes, fitted: Fitted) -> tuple[bytes, Calibration]:
    """Score the calibration images with the head in `model`; return the model with the decision, and its entry.

    Raises:
        CalibrationError: n cannot carry alpha and delta.
    """
    scores = fitted.calibration_scores
    if fitted.calibration_features is not None:
        scores = shipped_scores(model, fitted.calibration_features)
    assert scores is not None
    calibration = calibration_from_scores(scores, fitted.promise, fitted.calibration_digest)
    return model_with_tensors(model, calibration_tensors(np.sort(scores), calibration.k)), calibration


def coverage_warnings(passes: Passes, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Warn when calibration images belong, by prediction, to classes that have no prototype: they hide all OOD."""
    if passes.calibration is None:
        return ()
    without = passes.everything().class_counts == 0
    uncovered = passes.calibration.fit.predictions[without[passes.calibration.fit.predictions]]
    if uncovered.size == 0:
        return ()
    names = ", ".join(classes[i] for i in np.unique(uncovered)[:5])
    return (
        f"{uncovered.size} of {passes.calibration.fit.images} calibration images look like classes that have no images "
        f"in --data ({names}); they are scored as strangers, and the threshold rises until real strangers pass. Add "
        "images of these classes to --data, or leave them out of --calibration-data",
    )


def _bank_entry(table: FeatureTable, rows: int | None) -> GradientBank:
    candidates = bank_candidates(table)
    if rows is None or rows >= candidates:
        return GradientBank("all", candidates, candidates)
    return GradientBank("kmeans", rows, candidates)


def _fit_entry(passes: Passes, classes: tuple[str, ...], options: FitOptions) -> Fit:
    everything = passes.everything()
    return Fit(
        images=everything.images,
        unreadable=len(passes.fit.unreadable),
        labels=options.labels,
        accuracy=round(everything.accuracy, 6) if options.labels == "folder" else None,
        seed=options.seed,
        data_digest=passes.fit.digest,
        classes_without_prototype=tuple(c for c, n in zip(classes, everything.class_counts, strict=True) if n == 0),
    )
