"""Refit an existing artifact on new ID images: its statistics, or only its calibration. Runs on the device.

Needs neither torch nor onnx (a k-means bank needs scikit-learn): the nodes stay, initializers are replaced.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grood_edge.artifact import Artifact, artifact_bytes, read_artifact
from grood_edge.contract import Contract, Probe
from grood_edge.errors import DatasetError
from grood_edge.export.calibration import Promise
from grood_edge.export.dataset import LabelSource, open_dataset
from grood_edge.export.features import Reading
from grood_edge.export.fit import FitOptions, Fitted, Passes, calibrated, fit_statistics, read_passes
from grood_edge.export.ood_prototype import OodSource
from grood_edge.export.verify import Verification, reopen, require_equal_scores, run_frames, verification_frames
from grood_edge.ort import OrtModel, open_ort
from grood_edge.probes import decode_png, make_probes
from grood_edge.progress import Progress, silent
from grood_edge.publishing import check_output, publish
from grood_edge.scoring import Head, nearest_gap
from grood_edge.stored_head import head_from_model, head_tensors, model_with_tensors

__all__ = ["RecalibrateOptions", "RecalibrateReport", "recalibrate"]

SAME_GRADIENT = 1e-5  # of E: float32 keeps an image's own bank row within 1e-6, other images are above 1e-4
KNOWN_LIMIT = 0.01


@dataclass(frozen=True)
class RecalibrateOptions:
    """How to recalibrate. alpha and delta: None keeps the artifact's own (delta 0.05 where it has none).

    threshold_only: keep prototypes and bank, replace the calibration scores alone.
    """

    threshold_only: bool = False
    labels: LabelSource = "folder"
    alpha: float | None = None
    delta: float | None = None
    seed: int = 0
    force: bool = False
    allow_unreadable: bool = False


@dataclass(frozen=True)
class RecalibrateReport:
    """What was written, what it replaces, and how it was verified."""

    path: Path
    before: Contract
    contract: Contract
    verification: Verification
    unreadable: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def recalibrate(
    path: Path | str,
    data: Any,
    out: Path | str | None = None,
    options: RecalibrateOptions | None = None,
    progress: Progress = silent,
) -> RecalibrateReport:
    """Refit an artifact on ID images that its network was never trained on.

    Args:
        path: the artifact.
        data: new ID images (see `dataset.open_dataset`).
        out: where the new artifact is written; None replaces `path`, once the new one is verified.
        options: see `RecalibrateOptions`.
        progress: called as the work goes on.

    Raises:
        GroodEdgeError: see `errors`; the artifact is left as it was.
    """
    options = options or RecalibrateOptions()
    target = Path(path) if out is None else Path(out)
    artifact = read_artifact(Path(path))
    check_output(target, options.force or out is None)
    before = artifact.contract
    fit_options = _fit_options(before, options)
    dataset = open_dataset(
        data, "predicted" if options.threshold_only else options.labels, before.classes, options.seed
    )
    model = open_ort(artifact.model)
    refit = not options.threshold_only
    reading = Reading(
        before.preprocessing, len(before.classes), refit, options.seed, options.allow_unreadable, stratified=refit
    )
    passes = read_passes(dataset, None, model, reading, progress)
    _require_new_images(artifact, passes)
    progress("fitting statistics", 0, None)
    fitted = _fitted(artifact, passes, options.threshold_only, fit_options)
    stored = artifact.model
    if not options.threshold_only:
        stored = model_with_tensors(stored, head_tensors(fitted.head))
    stored, calibration = calibrated(stored, fitted)
    progress("fitting statistics", 1, 1)
    contract = replace(before, calibration=calibration, bank=fitted.bank, fit=fitted.fit)
    session = open_ort(stored)
    contract = replace(contract, probes=_again(session, contract, head_from_model(stored)))
    frames = verification_frames(passes.fit.check_samples, before.preprocessing)
    verification = require_equal_scores(session, stored, contract, frames)
    publish(artifact_bytes(stored, contract), target, options.force or out is None, check=reopen)
    return RecalibrateReport(target, before, contract, verification, passes.fit.unreadable, ())


def _require_new_images(artifact: Artifact, passes: Passes) -> None:
    """Refuse images that the artifact was fitted on: they would turn "no guarantee" into a false one.

    The same set is found by its digest, a part of it by gradients that stand in the bank (a k-means bank hides them).

    Raises:
        DatasetError: says how many of the images are known.
    """
    features = passes.everything().features.astype(np.float64)
    known = int((nearest_gap(features, head_from_model(artifact.model)) < SAME_GRADIENT).sum())
    if passes.fit.digest == artifact.contract.fit.data_digest:
        known = len(features)
    if known > KNOWN_LIMIT * len(features):
        raise DatasetError(
            f"{known} of {len(features)} images are among those that this artifact was fitted on; their scores say "
            "nothing about new frames. Give images that neither the network nor the artifact has seen"
        )


def _fit_options(before: Contract, options: RecalibrateOptions) -> FitOptions:
    return FitOptions(
        labels=options.labels,
        bank=before.bank.rows if before.bank.choice == "kmeans" else None,
        alpha=before.calibration.alpha if options.alpha is None else options.alpha,
        delta=before.calibration.delta if options.delta is None else options.delta,
        unseen=True,
        seed=options.seed,
    )


def _fitted(artifact: Artifact, passes: Passes, threshold_only: bool, fit_options: FitOptions) -> Fitted:
    before = artifact.contract
    head = head_from_model(artifact.model)
    if threshold_only:
        return Fitted(
            head=head,
            bank=before.bank,
            fit=before.fit,
            promise=Promise(fit_options.alpha, fit_options.delta, "unseen", "separate"),
            calibration_digest=passes.fit.digest,
            calibration_features=passes.fit.fit.features,
            calibration_scores=None,
        )
    (entry,) = before.ood_prototypes
    position = None if entry.source == "mean" else head.only().prototype
    return fit_statistics(passes, before.classes, OodSource(entry, position), fit_options)


def _again(session: OrtModel, contract: Contract, head: Head) -> tuple[Probe, ...]:
    """Record the same probe frames with the outputs that they give now."""
    frames = [(probe.name, decode_png(probe.png, contract.preprocessing)) for probe in contract.probes]
    scores, rank = contract.calibration.sorted_scores(), contract.calibration.k
    return make_probes(frames, lambda batch: run_frames(session, batch, len(batch)), scores, rank, head)
