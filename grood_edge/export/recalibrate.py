"""Refit an existing artifact on new ID images: its statistics, or only its calibration. Runs on the device.

Needs neither torch nor onnx (a k-means bank needs scikit-learn): the nodes stay, initializers are replaced.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grood_edge.artifact import Artifact, artifact_bytes, read_artifact
from grood_edge.camera_part import camera_part, open_camera, prepared_model
from grood_edge.contract import MAX_SKETCH, Contract, Fit, OodPrototype, Probe, encode_array
from grood_edge.export.calibration import Promise
from grood_edge.export.dataset import LabelSource, open_dataset
from grood_edge.export.features import Reading
from grood_edge.export.fit import BankSize, FitOptions, Fitted, Passes, calibrated, fit_statistics, read_passes
from grood_edge.export.ood_prototype import AUTO, OodSource
from grood_edge.export.selection import MOST_ROWS
from grood_edge.export.shards import Workers, require_listing
from grood_edge.export.verify import Verification, reopen, require_equal_scores, run_frames, verification_frames
from grood_edge.frame_hashes import require_new_frames
from grood_edge.ort import OrtModel, open_ort
from grood_edge.probes import decode_png, make_probes
from grood_edge.progress import Progress, silent
from grood_edge.publishing import check_output, publish
from grood_edge.ray_engine import Engine, opened_engine, require_engine
from grood_edge.scoring import Head, OodHead
from grood_edge.stored_head import head_from_model, head_tensors, model_with_tensors

__all__ = ["RecalibrateOptions", "RecalibrateReport", "recalibrate"]

ARTIFACTS_OWN = "as in the artifact"  # sources are kept, not chosen again: the graph has nodes for them


@dataclass(frozen=True)
class RecalibrateOptions:
    """How to recalibrate. alpha and delta: None keeps the artifact's own (delta 0.05 where it has none).

    threshold_only: keep prototypes and bank, replace the calibration scores alone. marginal: alpha on average, without
    a confidence. per_class: p-values by predicted class. None keeps the artifact's own rule. engine: `ray` spreads the
    pass over `data` on a cluster, that of `ray_address` or one on this machine.
    """

    threshold_only: bool = False
    labels: LabelSource = "folder"
    alpha: float | None = None
    delta: float | None = None
    marginal: bool | None = None
    per_class: bool | None = None
    seed: int = 0
    force: bool = False
    allow_unreadable: bool = False
    engine: Engine = "local"
    ray_address: str | None = None


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
    require_engine(options.engine, options.ray_address)
    target = Path(path) if out is None else Path(out)
    artifact = read_artifact(Path(path))
    check_output(target, options.force or out is None)
    before = artifact.contract
    fit_options = _fit_options(before, options)
    dataset = open_dataset(
        data, "predicted" if options.threshold_only else options.labels, before.classes, options.seed
    )
    if options.engine == "ray":
        require_listing(dataset)
    graph = prepared_model(artifact.model, before.preprocessing)
    model = open_ort(graph)
    refit = not options.threshold_only
    reading = Reading(
        before.preprocessing,
        len(before.classes),
        hold_out=refit,
        seed=options.seed,
        allow_unreadable=options.allow_unreadable,
        space=before.space,
        stratified=refit,
        camera=open_camera(artifact.model, before.preprocessing),
        keep_frames=False,
    )
    camera = None if before.preprocessing.camera is None else camera_part(artifact.model)
    with opened_engine(options.engine, options.ray_address) as cluster:
        if cluster is not None:
            reading = replace(reading, workers=Workers(cluster, graph, camera))
        passes = read_passes(dataset, None, model, reading, progress)
    require_new_frames(before.fit, passes.fit.frame_hashes, "images", "images")
    progress("fitting statistics", 0, None)
    fitted = _fitted(artifact, passes, options.threshold_only, fit_options)
    stored = artifact.model
    if not options.threshold_only:
        stored = model_with_tensors(stored, head_tensors(fitted.head))
    stored, calibration = calibrated(stored, fitted, before.classes, before.space)
    progress("fitting statistics", 1, 1)
    contract = replace(before, calibration=calibration, bank=fitted.bank, fit=fitted.fit, stream=None)
    session = open_ort(stored)
    contract = replace(contract, probes=_again(session, contract, head_from_model(stored)))
    frames = verification_frames(passes.fit.check_samples, before.preprocessing)
    if before.preprocessing.camera is not None:
        session = open_ort(prepared_model(stored, before.preprocessing))
    verification = require_equal_scores(session, stored, contract, frames)
    publish(artifact_bytes(stored, contract), target, options.force or out is None, check=reopen)
    return RecalibrateReport(target, before, contract, verification, passes.fit.unreadable, _warnings(before))


def _warnings(before: Contract) -> tuple[str, ...]:
    if before.stream is None:
        return ()
    return (
        "the calibration on episodes was dropped, because it was of the old scores: measure it again with grood-edge "
        "calibrate MODEL --episodes DIR",
    )


def _with_old_images(fit: Fit, before: Fit) -> Fit:
    """Keep the hashes of the images that the artifact was fitted on before: the network may have learned from them."""
    both = np.unique(np.concatenate([fit.sketch_hashes(), before.sketch_hashes()]))[:MAX_SKETCH]
    return replace(fit, sketch=encode_array(both.astype("<u8")))


def _fit_options(before: Contract, options: RecalibrateOptions) -> FitOptions:
    bank: BankSize = before.bank.rows if before.bank.choice == "kmeans" else before.bank.choice
    if bank == "all" and before.bank.asked == AUTO:
        bank = max(MOST_ROWS, before.bank.rows)  # more images than that become k-means rows, as `auto` would have it
    calibration = before.calibration
    marginal = options.marginal
    if marginal is None:
        marginal = calibration.guarantee == "marginal" and options.delta is None
    return FitOptions(
        ood_prototype=before.selection.asked,
        scale=before.scale.value,
        bank=bank,
        bank_dtype=before.bank.dtype,
        space=before.space,
        keep_paths=bool(before.bank.paths),
        labels=options.labels,
        alpha=calibration.alpha if options.alpha is None else options.alpha,
        delta=options.delta if marginal or options.delta is not None else calibration.delta,
        marginal=marginal,
        per_class=bool(calibration.class_sizes) if options.per_class is None else options.per_class,
        unseen=True,
        seed=options.seed,
    )


def _fitted(artifact: Artifact, passes: Passes, threshold_only: bool, fit_options: FitOptions) -> Fitted:
    before = artifact.contract
    head = head_from_model(artifact.model)
    sources = tuple(map(_kept_source, before.ood_prototypes, head.ood_heads))
    if not threshold_only:
        as_before = replace(fit_options, ood_prototype=ARTIFACTS_OWN)
        fitted = fit_statistics(passes, before.classes, sources, as_before)
        bank = replace(fitted.bank, asked=before.bank.asked, reason="of the kind that the artifact had")
        return replace(
            fitted,
            selection=before.selection,
            scale=before.scale,
            bank=bank,
            fit=_with_old_images(fitted.fit, before.fit),
        )
    promise = Promise(
        fit_options.alpha, fit_options.delta, "unseen", "separate", fit_options.marginal, fit_options.per_class
    )
    return Fitted(
        head=head,
        sources=sources,
        selection=before.selection,
        scale=before.scale,
        bank=before.bank,
        fit=before.fit,
        promise=promise,
        calibration_digest=passes.fit.digest,
        calibration_classes=passes.fit.fit.predictions,
        calibration_rows=passes.fit.fit.features,
        calibration_scores=None,
    )


def _kept_source(entry: OodPrototype, ood_head: OodHead) -> OodSource:
    """The prototypes of mean and origin follow from the class prototypes; the others stay where they are."""
    return OodSource(entry, None if entry.source in ("mean", "origin") else ood_head.prototype)


def _again(session: OrtModel, contract: Contract, head: Head) -> tuple[Probe, ...]:
    """Record the same probe frames with the outputs that they give now."""
    frames = [(probe.name, decode_png(probe.png, contract.preprocessing)) for probe in contract.probes]
    return make_probes(frames, lambda batch: run_frames(session, batch, len(batch)), contract, head)
