"""The spine: classifier -> features -> statistics -> head -> graph -> verify -> artifact."""

import contextlib
import hashlib
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from grood_edge import __version__
from grood_edge.arrays import Frames, InputFrame, Logits
from grood_edge.artifact import artifact_bytes
from grood_edge.contract import Classifier, Contract
from grood_edge.contract_reader import MAX_PROBES, MAX_TEXT, is_plain_name
from grood_edge.errors import DatasetError, OutputError, UsageError
from grood_edge.export.calibration import Promise
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, load_classifier
from grood_edge.export.dataset import Dataset, LabelSource, open_dataset, restart_of
from grood_edge.export.diagnosis import require_plausible_classes, require_plausible_preprocessing
from grood_edge.export.features import DEFAULT_ROWS, MAX_ROWS, Reading
from grood_edge.export.fit import (
    FitOptions,
    Passes,
    calibrated,
    coverage_warnings,
    fit_statistics,
    read_passes,
)
from grood_edge.export.graph import attach_head, base_model
from grood_edge.export.ood_prototype import ood_source, require_known_source
from grood_edge.export.spool import SpoolPlan, check_spool_folder, remove_spools
from grood_edge.export.verify import (
    HALF_LOGIT_TOLERANCE,
    LOGIT_TOLERANCE,
    Verification,
    reopen,
    require_equal_logits,
    require_equal_scores,
    run_frames,
    verification_frames,
)
from grood_edge.images import UnreadableImageError, find_images, load_image
from grood_edge.onnx_proto import OPSET
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import (
    PRESETS,
    Preprocessing,
    PreprocessingOptions,
    preprocess_frame,
    resolve_preprocessing,
)
from grood_edge.probes import make_probes, synthetic_frames
from grood_edge.progress import Progress, silent
from grood_edge.publishing import check_output, publish
from grood_edge.scoring import Head
from grood_edge.stored_head import head_from_model

__all__ = ["ExportOptions", "ExportReport", "export_model"]

MIN_ROWS = 2_000  # of --max-bank-source: sets that are small enough to be cross-fitted keep every row


@dataclass(frozen=True)
class ExportOptions:
    """How to export. The defaults suit a classifier with class folders.

    calibration_data: images the network was never trained on; None splits or cross-fits `data`.
    classes: names in the classifier's order; None takes the sorted folder names.
    labels: `folder`, or `predicted` for unlabelled frames. ood_prototype: `mean`, `noise` or `images:DIR`.
    bank: k-means rows; None keeps every gradient. alpha: accepted false-alarm rate. delta: the risk that the rate
    is above alpha after all; None is 0.05 where a promise is possible. unseen: `data` was not trained on.
    max_bank_source: feature rows that are kept, spread over the classes, for the bank to be made of. spool: a folder
    for what has been read; an interrupted export goes on from there, and removes it at the end.
    """

    calibration_data: Any = None
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    classes: tuple[str, ...] | None = None
    labels: LabelSource = "folder"
    ood_prototype: str = "mean"
    bank: int | None = None
    max_bank_source: int = DEFAULT_ROWS
    alpha: float = 0.05
    delta: float | None = None
    unseen: bool = False
    probes: Path | None = None
    seed: int = 0
    force: bool = False
    allow_unreadable: bool = False
    spool: Path | None = None


@dataclass(frozen=True)
class ExportReport:
    """What was written, what it promises, and how it was verified."""

    path: Path
    contract: Contract
    verification: Verification
    unreadable: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


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
    _refuse_own_model(model, out)
    fit_options = _fit_options(options)
    inputs = _open_inputs(model, data, options, progress)
    base = base_model(inputs.classifier, inputs.preprocessing)
    graph = base.SerializeToString(deterministic=True)
    bare = open_ort(graph)
    passes = _read_passes(inputs, bare, options, graph, progress)
    reading = _reading(inputs, options, hold_out=False)
    ood = ood_source(options.ood_prototype, bare, reading, progress)
    progress("fitting statistics", 0, None)
    fitted = fit_statistics(passes, inputs.classes, ood, fit_options, progress)
    whole, calibration = calibrated(_attached(base, fitted.head), fitted)
    progress("fitting statistics", 1, 1)
    contract = Contract(
        classes=inputs.classes,
        preprocessing=inputs.preprocessing,
        classifier=_classifier_entry(inputs.classifier),
        precision="fp32",
        ood_prototypes=(ood.entry,),
        bank=fitted.bank,
        fit=fitted.fit,
        calibration=calibration,
        tools=tool_versions(("torch",) if inputs.classifier.source != "onnx" else ()),
        probes=(),
    )
    progress("verifying", 0, None)
    contract, verification = _verified(whole, contract, inputs, passes)
    progress("verifying", 1, 1)
    publish(artifact_bytes(whole, contract), out, options.force, check=reopen)
    if options.spool is not None:
        remove_spools(options.spool)
    unreadable = passes.unreadable() + ood.unreadable
    notes = passes.fit.notes + (passes.calibration.notes if passes.calibration is not None else ())
    return ExportReport(out, contract, verification, unreadable, notes + coverage_warnings(passes, inputs.classes))


@dataclass(frozen=True)
class _Inputs:
    """All that the user handed in, opened and checked before any long work."""

    dataset: Dataset
    calibration_data: Dataset | None
    classifier: ClassifierGraph
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    probe_frames: list[tuple[str, InputFrame]]


def _open_inputs(model: Any, data: Any, options: ExportOptions, progress: Progress) -> _Inputs:
    require_known_source(options.ood_prototype)
    dataset = open_dataset(data, options.labels, options.classes, options.seed)
    if not MIN_ROWS <= options.max_bank_source <= MAX_ROWS:
        expected = f"a number of rows from {MIN_ROWS:,} to {MAX_ROWS:,}"
        raise UsageError(f"--max-bank-source {options.max_bank_source}; expected {expected}")
    if options.bank is None and (dataset.count or 0) > options.max_bank_source:
        raise UsageError(
            f"--bank all would need a row for each of {dataset.count:,} images, but --max-bank-source keeps "
            f"{options.max_bank_source:,} (at most {MAX_ROWS:,}); use --bank N or raise --max-bank-source"
        )
    calibration_data = _calibration_dataset(options)
    if options.spool is not None:
        for restartable in (dataset, calibration_data):
            if restartable is not None:
                restart_of(restartable)
        check_spool_folder(options.spool)
    progress("loading the classifier", 0, None)
    classifier = _classifier(model, options)
    progress("loading the classifier", 1, 1)
    classes = _class_names(dataset, options.classes, classifier.class_count)
    preprocessing = resolve_preprocessing(
        options.preprocessing, classifier.channels, (classifier.height, classifier.width)
    )
    probe_frames = _probe_frames(options.probes, preprocessing)
    return _Inputs(dataset, calibration_data, classifier, classes, preprocessing, probe_frames)


def _reading(inputs: _Inputs, options: ExportOptions, hold_out: bool) -> Reading:
    count = inputs.classifier.class_count
    return Reading(
        inputs.preprocessing,
        count,
        hold_out,
        options.seed,
        options.allow_unreadable,
        max_rows=options.max_bank_source,
    )


def _read_passes(inputs: _Inputs, bare: OrtModel, options: ExportOptions, graph: bytes, progress: Progress) -> Passes:
    """Run the classifier over all images, and stop when something else fits them clearly better."""
    reading = _reading(inputs, options, hold_out=inputs.calibration_data is None)
    if options.spool is not None:
        reading = replace(reading, spool=SpoolPlan(options.spool, hashlib.sha256(graph).hexdigest()))
    passes = read_passes(inputs.dataset, inputs.calibration_data, bare, reading, progress)
    if options.labels == "folder":
        require_plausible_classes(passes.everything().confusion, inputs.classes)
        samples = passes.fit.check_samples
        require_plausible_preprocessing(inputs.classifier, inputs.preprocessing, samples, progress)
    return passes


def _verified(whole: bytes, contract: Contract, inputs: _Inputs, passes: Passes) -> tuple[Contract, Verification]:
    """Record the probes, and hold the graph against its definition and against the bare classifier."""
    session = open_ort(whole)
    probes = make_probes(
        inputs.probe_frames,
        lambda frames: run_frames(session, frames, len(frames)),
        contract.calibration.sorted_scores(),
        contract.calibration.k,
        head_from_model(whole),
    )
    contract = replace(contract, probes=probes)
    frames = verification_frames(passes.fit.check_samples, inputs.preprocessing)
    verification = require_equal_scores(session, whole, contract, frames)
    expected = _classifier_logits(inputs.classifier, inputs.preprocessing, frames)
    half = inputs.classifier.input_type == TensorProto.FLOAT16
    tolerance = HALF_LOGIT_TOLERANCE if half else LOGIT_TOLERANCE
    logit_error = require_equal_logits(run_frames(session, frames, 1), expected, tolerance)
    return contract, replace(verification, largest_logit_error=logit_error)


def tool_versions(extra: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the versions of the packages that had a part in an artifact."""
    names = ("numpy", "pillow", "onnx", "onnxruntime", "onnxruntime-gpu", "scikit-learn", *extra)
    versions = {"grood-edge": __version__}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _attached(base: ModelProto, head: Head) -> bytes:
    """Serialise base and head, with an empty calibration that `calibrated` replaces."""
    whole = attach_head(base, head, np.zeros(1, np.float32), 1)
    return bytes(whole.SerializeToString(deterministic=True))


def _refuse_own_model(model: Any, out: Path) -> None:
    if isinstance(model, str | Path) and Path(model).exists() and Path(model).resolve() == out.resolve():
        raise OutputError(f"{out} is the classifier itself; choose another output, so that the classifier is kept")


def _fit_options(options: ExportOptions) -> FitOptions:
    if options.calibration_data is None and not options.unseen:
        Promise(options.alpha, options.delta, "seen-in-training", "split").usable_delta()
    return FitOptions(
        labels=options.labels,
        bank=options.bank,
        alpha=options.alpha,
        delta=options.delta,
        unseen=options.unseen,
        seed=options.seed,
    )


def _calibration_dataset(options: ExportOptions) -> Dataset | None:
    if options.calibration_data is None:
        return None
    return open_dataset(options.calibration_data, "predicted", None, options.seed)


def _classifier(model: Any, options: ExportOptions) -> ClassifierGraph:
    size = options.preprocessing.input_size
    preset = PRESETS.get(options.preprocessing.preset or "")
    if size is None and preset is not None and preset.size is not None:
        size = (preset.size, preset.size)
    return load_classifier(model, replace(options.classifier, input_size=size))


def _class_names(dataset: Dataset, given: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    names = given or dataset.classes or tuple(f"class_{i}" for i in range(count))
    if len(names) != count:
        what = f"{len(names)} class names were given" if given else f"{dataset.name} has {len(names)} class folders"
        raise DatasetError(
            f"{what}, but the classifier has {count} outputs; expected one name an output. Give all names in the "
            "classifier's order with --classes FILE; folders may then cover a part of them"
        )
    unprintable = next((name for name in names if not is_plain_name(name)), None)
    if unprintable is not None:
        raise DatasetError(
            f"the class name {unprintable!r} has control characters, or is empty or longer than {MAX_TEXT} characters"
        )
    return names


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


def _probe_frames(folder: Path | None, preprocessing: Preprocessing) -> list[tuple[str, InputFrame]]:
    if folder is None:
        return synthetic_frames(preprocessing)
    try:
        paths = find_images(folder)[:MAX_PROBES]
        return [(path.name, preprocess_frame(load_image(path), preprocessing)) for path in paths]
    except UnreadableImageError as error:
        raise DatasetError(f"a probe image in {folder} cannot be read: {error}") from error


def _classifier_logits(classifier: ClassifierGraph, preprocessing: Preprocessing, frames: Frames) -> Logits:
    """Run the bare classifier on images that NumPy normalised: independent of the artifact's own nodes."""
    mean, std = np.array(preprocessing.mean, np.float32), np.array(preprocessing.std, np.float32)
    images = (frames.astype(np.float32) - mean) / std
    if classifier.bgr:
        images = images[..., ::-1]
    if classifier.layout == "NCHW":
        images = images.transpose(0, 3, 1, 2)
    images = np.ascontiguousarray(images).astype(helper.tensor_dtype_to_np_dtype(classifier.input_type))
    model = open_ort(classifier.model.SerializeToString())
    rows = [
        model.run({classifier.input_name: image[None]}, [classifier.logits_tensor])[classifier.logits_tensor]
        for image in images
    ]
    return np.concatenate(rows).reshape(len(frames), -1).astype(np.float32)
