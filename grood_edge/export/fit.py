"""From passes over images to fitted statistics and their calibration; shared by `export` and `calibrate`.

Needs no onnx and no torch: `calibrate` runs this on the device.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from grood_edge.arrays import Features
from grood_edge.contract import MAX_SKETCH, Calibration, Fit, GradientBank, Scale, Selection, encode_array
from grood_edge.contract_reader import MAX_TEXT, is_plain_name
from grood_edge.contract_rules import MAX_SCALE, MIN_SCALE
from grood_edge.errors import DatasetError, UsageError
from grood_edge.export.bank import BankRows, HeadPlan, bank_candidates, fit_head
from grood_edge.export.calibration import (
    SMALL_SET,
    CalibrationScores,
    Promise,
    calibration_from_scores,
    cross_fitted_scores,
    require_disjoint,
    shipped_scores,
)
from grood_edge.export.dataset import Dataset, LabelSource
from grood_edge.export.features import FeaturePass, FeatureTable, Reading, collect_features, merged
from grood_edge.export.ood_prototype import AUTO, OodSource
from grood_edge.export.prototypes import require_usable_classes
from grood_edge.export.scale import choose_scale
from grood_edge.export.selection import BankChoice, SourceChoice, choose_bank, choose_sources
from grood_edge.ort import OrtModel
from grood_edge.progress import Progress, silent
from grood_edge.scoring import BankDtype, Head
from grood_edge.stored_head import calibration_tensors, model_with_tensors

__all__ = [
    "BankSize",
    "FitOptions",
    "Fitted",
    "Passes",
    "ScaleOption",
    "Space",
    "calibrated",
    "coverage_warnings",
    "fit_statistics",
    "read_passes",
]

MAX_SEED = 2**32 - 1  # what NumPy, scikit-learn and torch all take
MAX_KEPT_PATHS = 20_000  # a contract has 16 MB for everything

BankSize = Literal["auto", "all", "none"] | int
Space = Literal["features", "logits"]
ScaleOption = Literal["auto"] | float


@dataclass(frozen=True)
class FitOptions:
    """How statistics are fitted: see `pipeline.ExportOptions` for the words."""

    ood_prototype: str
    bank: BankSize
    bank_dtype: BankDtype
    space: Space
    scale: ScaleOption
    keep_paths: bool
    labels: LabelSource
    alpha: float
    delta: float | None
    marginal: bool
    per_class: bool
    unseen: bool
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted.

        Raises:
            UsageError: bank, alpha, delta or seed out of range.
        """
        if isinstance(self.bank, int) and self.bank < 1:
            raise UsageError(f"--bank {self.bank}; expected auto, all, none or a number of rows from 1")
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if value is not None and not 0 < value < 1:
                raise UsageError(f"--{name} {value}; expected a number above 0 and below 1, such as 0.05")
        if self.scale != "auto" and not MIN_SCALE <= self.scale <= MAX_SCALE:
            raise UsageError(f"--scale {self.scale}; expected auto or a number from {MIN_SCALE:g} to {MAX_SCALE:g}")
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

    def separate(self) -> FeatureTable:
        """Return the table of the separate calibration images."""
        assert self.calibration is not None
        return self.calibration.fit


@dataclass(frozen=True)
class Fitted:
    """Fitted statistics with their contract entries, and what calibrates them.

    `calibration_rows` float32 `[n, d]` are to be scored by the head that ships; `calibration_scores` float32 `[n]` are
    there instead when they were cross-fitted. `calibration_classes` int64 `[n]`: the predicted classes.
    """

    head: Head
    sources: tuple[OodSource, ...]
    scale: Scale
    selection: Selection
    bank: GradientBank
    fit: Fit
    promise: Promise
    calibration_digest: str
    calibration_classes: np.ndarray
    calibration_rows: np.ndarray | None
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
    passes: Passes,
    classes: tuple[str, ...],
    sources: tuple[OodSource, ...],
    options: FitOptions,
    shuffled: Features | None = None,
    progress: Progress = silent,
) -> Fitted:
    """Choose scale, OOD prototypes and bank, fit the head, and choose what calibrates.

    What calibrates is separate images, a split, or cross-fitted scores of all images. `shuffled` float32 `[q, d]` are
    features of shuffled fit images, which choose the scale where it is `auto`.

    Raises:
        DatasetError: classes that cannot be modelled, a full bank that does not fit, or names of images that cannot be
            kept.
        UsageError: delta was asked for without unseen images.
    """
    held_out = passes.fit.held_out
    promise = _promise(passes, options)
    table = passes.fit.fit if promise.method == "split" else passes.everything()
    require_usable_classes(table, classes, predicted=options.labels == "predicted")
    plan = HeadPlan(sources, None, options.bank_dtype, options.seed)
    scale = Scale(1.0, str(options.scale), "as asked for", ())
    if options.scale != "auto":
        scale = replace(scale, value=float(options.scale))
    elif shuffled is not None:
        scale = choose_scale(passes.fit.fit, shuffled, plan, progress)
    plan = replace(plan, scale=scale.value)
    chosen = SourceChoice(sources, Selection(_without_paths(options.ood_prototype), "as asked for", 0, 0, ()))
    if options.ood_prototype == AUTO:
        chosen = choose_sources(passes.fit.fit, sources, plan, progress)
    plan = replace(plan, sources=chosen.sources)
    if options.bank == "auto":
        size = choose_bank(passes.fit.fit, plan, options.alpha, progress, chosen.full_auroc)
    else:
        size = _bank_size(table, options.bank)
    plan = replace(plan, rows=size.rows)
    rows, scores = None, None
    if promise.method == "cross-fitted":
        if len(table.labels) < table.images:
            raise DatasetError(
                f"{table.images:,} images of many small classes leave too few to hold out, and too many to cross-fit "
                f"({len(table.labels):,} feature rows were kept). Give calibration images with --calibration-data, or "
                "keep more rows with --max-bank-source"
            )
        calibrating, scores = table, cross_fitted_scores(table, plan, progress)
    else:
        calibrating = held_out if passes.calibration is None and held_out is not None else passes.separate()
        rows = calibrating.features
    head, bank_rows = fit_head(table, plan)
    return Fitted(
        head=head,
        sources=chosen.sources,
        scale=scale,
        selection=chosen.selection,
        bank=_bank_entry(table, head, bank_rows, size, options),
        fit=_fit_entry(passes, classes, options),
        promise=promise,
        calibration_digest=(passes.calibration or passes.fit).digest,
        calibration_classes=calibrating.predictions,
        calibration_rows=rows,
        calibration_scores=scores,
    )


def calibrated(model: bytes, fitted: Fitted, classes: tuple[str, ...], space: Space) -> tuple[bytes, Calibration]:
    """Score the calibration images with the head in `model`; return the model with the decision, and its entry.

    Raises:
        CalibrationError: n cannot carry alpha and delta.
    """
    scores = fitted.calibration_scores
    if fitted.calibration_rows is not None:
        scores = shipped_scores(model, fitted.calibration_rows, space)
    assert scores is not None
    held_out = CalibrationScores(scores, fitted.calibration_classes, fitted.calibration_digest)
    calibration = calibration_from_scores(held_out, fitted.promise, classes)
    return model_with_tensors(model, calibration_tensors(calibration.rule(len(classes)))), calibration


def _without_paths(ood_prototype: str) -> str:
    """A folder's path is nobody's business but the user's."""
    return ",".join("images" if name.startswith("images:") else name for name in ood_prototype.split(","))


def _promise(passes: Passes, options: FitOptions) -> Promise:
    held_out = passes.fit.held_out
    provenance: Literal["unseen", "seen-in-training"] = (
        "unseen" if passes.calibration is not None or options.unseen else "seen-in-training"
    )
    method: Literal["separate", "split", "cross-fitted"] = "separate"
    if passes.calibration is None:
        method = "split" if held_out is not None and held_out.images >= SMALL_SET else "cross-fitted"
    promise = Promise(options.alpha, options.delta, provenance, method, options.marginal, options.per_class)
    promise.usable_delta()
    return promise


def _bank_size(table: FeatureTable, asked: Literal["all", "none"] | int) -> BankChoice:
    """Return the size that was asked for."""
    kept = int((table.labels == table.predictions).sum())
    if asked == "none":
        return BankChoice(0, "as asked for: the score is log s", ())
    if asked == "all" and kept < bank_candidates(table):
        raise DatasetError(
            f"--bank all: {bank_candidates(table):,} images are classified correctly, and {kept:,} feature rows were "
            "kept. Use --bank auto or --bank N, or keep more rows with --max-bank-source"
        )
    rows = None if asked == "all" or asked >= kept else asked
    return BankChoice(rows, "as asked for", ())


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


def _bank_entry(table: FeatureTable, head: Head, rows: BankRows, size: BankChoice, options: FitOptions) -> GradientBank:
    count = len(head.bank)
    choice: Literal["all", "kmeans", "none"] = "none" if count == 0 else "all" if size.rows is None else "kmeans"
    return GradientBank(
        choice=choice,
        rows=count,
        candidates=bank_candidates(table),
        dtype=options.bank_dtype,
        asked=str(options.bank),
        reason=size.reason,
        trials=size.trials,
        classes=encode_array(rows.row_classes().astype("<i4")) if count else "",
        paths=_kept_names(rows) if count and options.keep_paths else (),
    )


def _kept_names(rows: BankRows) -> tuple[str, ...]:
    """Return the name behind each row. What a reader of contracts would refuse must not be written."""
    if rows.count > MAX_KEPT_PATHS:
        raise DatasetError(
            f"--keep-paths with a bank of {rows.count:,} rows; expected at most {MAX_KEPT_PATHS:,}. Make the bank "
            "smaller with --bank N, or export without --keep-paths"
        )
    names = rows.nearest_names()
    for name in names:
        if not is_plain_name(name):
            raise DatasetError(
                f"--keep-paths cannot keep the name of image {name!r}; expected at most {MAX_TEXT:,} characters, "
                "all of them readable text. Rename it, or export without --keep-paths"
            )
    return names


def _fit_entry(passes: Passes, classes: tuple[str, ...], options: FitOptions) -> Fit:
    everything = passes.everything()
    return Fit(
        images=everything.images,
        unreadable=len(passes.fit.unreadable),
        labels=options.labels,
        accuracy=round(everything.accuracy, 6) if options.labels == "folder" else None,
        seed=options.seed,
        data_digest=passes.fit.digest,
        sketch=encode_array(np.unique(passes.fit.frame_hashes)[:MAX_SKETCH].astype("<u8")),
        classes_without_prototype=tuple(c for c, n in zip(classes, everything.class_counts, strict=True) if n == 0),
    )
