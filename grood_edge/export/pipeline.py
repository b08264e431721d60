"""The spine: classifier -> features -> statistics -> head -> graph -> verify -> artifact."""

import contextlib
import hashlib
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, load_model_from_string

from grood_edge import __version__
from grood_edge.arrays import Frames, Logits
from grood_edge.artifact import artifact_bytes
from grood_edge.conformal import DecisionRule
from grood_edge.contract import Classifier, Contract
from grood_edge.export.camera import attach_camera, camera_model
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.diagnosis import require_plausible_classes, require_plausible_preprocessing
from grood_edge.export.fit import Passes, calibrated, coverage_warnings, fit_statistics, read_passes
from grood_edge.export.graph import attach_head, base_model, network_input
from grood_edge.export.inputs import (
    ExportOptions,
    Inputs,
    fit_options,
    open_inputs,
    reading_of,
    refuse_own_model,
    reopened,
)
from grood_edge.export.mixup import mixup_source
from grood_edge.export.ood_prototype import (
    AUTO,
    COMBINATION,
    OodSource,
    images_source,
    noise_source,
    plain_source,
    source_names,
)
from grood_edge.export.precision import choose_precision
from grood_edge.export.preflight import preflight
from grood_edge.export.scale import shuffled_features
from grood_edge.export.shards import Workers
from grood_edge.export.spool import SpoolPlan, remove_spools
from grood_edge.export.verify import (
    HALF_LOGIT_TOLERANCE,
    LOGIT_TOLERANCE,
    Verification,
    reopen,
    require_equal_logits,
    require_equal_resize,
    require_equal_scores,
    run_frames,
    verification_frames,
)
from grood_edge.onnx_proto import OPSET
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import Preprocessing
from grood_edge.probes import left_out, make_probes
from grood_edge.progress import Progress, silent
from grood_edge.publishing import check_output, publish
from grood_edge.ray_engine import opened_engine
from grood_edge.scoring import Head
from grood_edge.stored_head import head_from_model

__all__ = ["ExportOptions", "ExportReport", "export_model"]


@dataclass(frozen=True)
class ExportReport:
    """What was written, what it promises, and how it was verified.

    speeds: of `--precision auto`, see `precision.PrecisionChoice`.
    """

    path: Path
    contract: Contract
    verification: Verification
    unreadable: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    speeds: tuple[tuple[str, float], ...] = ()


def export_model(
    model: Any, data: Any, out: Path | str, options: ExportOptions | None = None, progress: Progress = silent
) -> ExportReport:
    """Turn a trained classifier and its images into one verified ONNX file.

    Args:
        model: an nn.Module in eval mode, or a path or name (see `classifier.load_classifier`).
        data: ID images (see `dataset.open_dataset`).
        out: where the artifact is written; nothing is left there when anything fails.
        options: see `ExportOptions`.
        progress: called as the work goes on.

    Raises:
        GroodEdgeError: see `errors`; every message says what to do.
    """
    options = options or ExportOptions()
    out = Path(out)
    check_output(out, options.force)
    refuse_own_model(model, out)
    fitting = fit_options(options)
    inputs = open_inputs(model, data, options, progress)
    chosen = choose_precision(inputs, lambda: reopened(data, options), options, progress)
    inputs = replace(inputs, classifier=chosen.classifier)
    base = base_model(inputs.classifier, inputs.preprocessing)
    graph = base.SerializeToString(deterministic=True)
    bare = open_ort(graph)
    passes = _read_passes(inputs, bare, options, graph, progress)
    sources = _sources(base, bare, passes, (inputs, options), progress)
    progress("fitting statistics", 0, None)
    shuffled = None
    if options.scale == "auto":
        shuffled = shuffled_features(bare, passes.fit, reading_of(inputs, options, hold_out=False), progress)
    fitted = fit_statistics(passes, inputs.classes, sources, fitting, shuffled, progress)
    attached = _attached(base, fitted.head, options.space, len(inputs.classes))
    whole, calibration = calibrated(attached, fitted, inputs.classes, options.space)
    progress("fitting statistics", 1, 1)
    contract = Contract(
        classes=inputs.classes,
        preprocessing=inputs.preprocessing,
        classifier=_classifier_entry(inputs.classifier),
        precision=chosen.entry,
        space=options.space,
        scale=fitted.scale,
        selection=fitted.selection,
        ood_prototypes=tuple(source.entry for source in fitted.sources),
        bank=fitted.bank,
        fit=fitted.fit,
        calibration=calibration,
        stream=None,
        tools=tool_versions(("torch",) if inputs.classifier.source != "onnx" else ()),
        probes=(),
    )
    progress("verifying", 0, None)
    finished = _with_camera(whole, inputs.preprocessing)
    contract, verification = _verified(whole, finished, contract, inputs, passes)
    progress("verifying", 1, 1)
    publish(artifact_bytes(finished, contract), out, options.force, check=reopen)
    if options.spool is not None:
        remove_spools(options.spool)
    unreadable = passes.unreadable() + tuple(entry for source in sources for entry in source.unreadable)
    notes = passes.fit.notes + (passes.calibration.notes if passes.calibration is not None else ())
    warnings = chosen.warnings + notes + coverage_warnings(passes, inputs.classes) + _tensorrt_warnings(finished)
    if options.probes is not None and (note := left_out(inputs.probe_frames, contract.probes)) is not None:
        warnings += (note,)
    return ExportReport(out, contract, verification, unreadable, warnings, chosen.speeds)


def _sources(
    base: ModelProto, bare: OrtModel, passes: Passes, asked: tuple[Inputs, ExportOptions], progress: Progress
) -> tuple[OodSource, ...]:
    """Make the OOD prototypes that were asked for; for `auto` those of the combination."""
    inputs, options = asked
    reading = reading_of(inputs, options, hold_out=False)
    names = source_names(options.ood_prototype)
    sources = []
    for name in COMBINATION if names == (AUTO,) else names:
        if name == "mixup":
            sources.append(mixup_source(base, bare, passes.fit, reading, options.mixup_layer, progress))
        elif name == "noise":
            sources.append(noise_source(bare, reading, progress))
        elif name.startswith("images:"):
            sources.append(images_source(name, bare, reading, progress))
        else:
            sources.append(plain_source(name))
    return tuple(sources)


def _read_passes(inputs: Inputs, bare: OrtModel, options: ExportOptions, graph: bytes, progress: Progress) -> Passes:
    """Run the classifier over all images, and stop when something else fits them clearly better."""
    reading = reading_of(inputs, options, hold_out=inputs.calibration_data is None)
    if options.spool is not None:
        reading = replace(reading, spool=SpoolPlan(options.spool, hashlib.sha256(graph).hexdigest()))
    camera = inputs.preprocessing.camera
    part = None if camera is None else camera_model(inputs.preprocessing).SerializeToString()
    with opened_engine(options.engine, options.ray_address) as cluster:
        if cluster is not None:
            reading = replace(reading, workers=Workers(cluster, graph, part))
        passes = read_passes(inputs.dataset, inputs.calibration_data, bare, reading, progress)
    if options.labels == "folder":
        require_plausible_classes(passes.everything().confusion, inputs.classes)
        samples = passes.fit.check_samples
        require_plausible_preprocessing(inputs.classifier, inputs.preprocessing, samples, progress)
    return passes


def _with_camera(whole: bytes, preprocessing: Preprocessing) -> bytes:
    """Put the camera part before the graph, where a camera was asked for."""
    if preprocessing.camera is None:
        return whole
    model = attach_camera(load_model_from_string(whole), preprocessing)
    return bytes(model.SerializeToString(deterministic=True))


def _verified(
    whole: bytes, finished: bytes, contract: Contract, inputs: Inputs, passes: Passes
) -> tuple[Contract, Verification]:
    """Record the probes, and hold the graph against its definition and against the bare classifier.

    whole: the graph of prepared frames. finished: the same, or with the camera part before it.
    """
    session = open_ort(whole)
    published = session if finished is whole else open_ort(finished)
    probes = make_probes(
        inputs.probe_frames,
        lambda frames: run_frames(published, frames, len(frames)),
        contract,
        head_from_model(whole),
    )
    contract = replace(contract, probes=probes)
    frames = verification_frames(passes.fit.check_samples, inputs.preprocessing)
    verification = require_equal_scores(session, whole, contract, frames)
    expected = _classifier_logits(inputs.classifier, inputs.preprocessing, frames)
    half = inputs.classifier.input_type == TensorProto.FLOAT16
    tolerance = HALF_LOGIT_TOLERANCE if half else LOGIT_TOLERANCE
    logit_error = require_equal_logits(run_frames(session, frames, 1), expected, tolerance)
    require_equal_resize(finished, inputs.preprocessing, passes.fit.check_samples, tolerance)
    return contract, replace(verification, largest_logit_error=logit_error)


def _tensorrt_warnings(whole: bytes) -> tuple[str, ...]:
    """Say what TensorRT would refuse; onnxruntime runs the artifact all the same."""
    refused = [finding.sentence for finding in preflight(load_model_from_string(whole)) if finding.kind == "refused"]
    if not refused:
        return ()
    more = f" (and {len(refused) - 1} more: grood-edge compile --check)" if len(refused) > 1 else ""
    return (f"TensorRT would refuse this artifact: {refused[0]}{more}",)


def tool_versions(extra: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the versions of the packages that had a part in an artifact."""
    names = ("numpy", "pillow", "onnx", "onnxruntime", "onnxruntime-gpu", "scikit-learn", *extra)
    versions = {"grood-edge": __version__}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _attached(base: ModelProto, head: Head, space: str, classes: int) -> bytes:
    """Serialise base and head, with an empty calibration that `calibrated` replaces."""
    empty = DecisionRule((np.zeros(1, np.float32),), (1,), np.zeros(classes, np.int32))
    return bytes(attach_head(base, head, space, empty).SerializeToString(deterministic=True))


def _classifier_entry(classifier: ClassifierGraph) -> Classifier:
    return Classifier(
        source=classifier.source,
        layout=classifier.layout,
        bgr=classifier.bgr,
        batch="dynamic" if classifier.dynamic_batch else "1",
        opset=OPSET,
        features_tensor=classifier.features_tensor,
        features_pooled=classifier.pooling != "none",
        logits_tensor=classifier.logits_tensor,
        dimension=classifier.dimension,
    )


def _classifier_logits(classifier: ClassifierGraph, preprocessing: Preprocessing, frames: Frames) -> Logits:
    """Run the bare classifier on images that NumPy normalised: independent of the artifact's own nodes."""
    images = network_input(classifier, preprocessing, frames)
    model = open_ort(classifier.model.SerializeToString())
    rows = [
        model.run({classifier.input_name: image[None]}, [classifier.logits_tensor])[classifier.logits_tensor]
        for image in images
    ]
    return np.concatenate(rows).reshape(len(frames), -1).astype(np.float32)
