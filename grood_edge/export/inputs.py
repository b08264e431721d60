"""All that the user hands to an export: options, and everything opened and checked before any long work."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from grood_edge.arrays import Frame, InputFrame
from grood_edge.camera_part import simulated_frame
from grood_edge.contract_reader import MAX_TEXT, is_plain_name
from grood_edge.contract_rules import MAX_PROBES
from grood_edge.errors import DatasetError, OutputError, UsageError
from grood_edge.export.calibration import Promise
from grood_edge.export.camera import camera_model
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, load_classifier
from grood_edge.export.dataset import Dataset, LabelSource, open_dataset, restart_of
from grood_edge.export.features import DEFAULT_ROWS, MAX_ROWS, Reading
from grood_edge.export.fit import BankSize, FitOptions, ScaleOption, Space
from grood_edge.export.mixup import FEATURES
from grood_edge.export.ood_prototype import AUTO, source_names
from grood_edge.export.shards import require_listing
from grood_edge.export.spool import check_spool_folder
from grood_edge.images import UnreadableImageError, find_images, load_image
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import (
    PRESETS,
    Preprocessing,
    PreprocessingOptions,
    preprocess_frame,
    resolve_preprocessing,
)
from grood_edge.probes import synthetic_frames
from grood_edge.progress import Progress
from grood_edge.ray_engine import Engine, require_engine
from grood_edge.scoring import BankDtype

__all__ = ["ExportOptions", "Inputs", "fit_options", "open_inputs", "reading_of", "refuse_own_model", "reopened"]

PrecisionOption = Literal["fp32", "fp16", "int8", "auto"]

MIN_ROWS = 2_000  # of --max-bank-source: sets that are small enough to be cross-fitted keep every row


@dataclass(frozen=True)
class ExportOptions:
    """How to export. The defaults suit a classifier with class folders.

    calibration_data: images the network was never trained on; None splits or cross-fits `data`.
    classes: names in the classifier's order; None takes the sorted folder names.
    labels: `folder`, or `predicted` for unlabelled frames. ood_prototype: `auto`, or some of `mean`, `mixup`, `noise`,
    `origin` and `images:DIR`, separated by commas. mixup_layer: `features`, `early` or a tensor. space: the head reads
    the features, or the classifier's logits. scale: of the distances; 1 is the paper's. bank: `auto`, `all`, `none`
    (the score is log s), or a number of k-means rows. bank_dtype: how the rows are stored. keep_paths: names of images
    in the contract, for explanations. alpha: accepted false-alarm rate. delta: the risk that the rate is above alpha
    after all; None is 0.05 where a promise is possible. rule: `marginal` holds alpha on average only. per_class:
    p-values by predicted class.
    unseen: `data` was not trained on.
    precision: of the classifier graph: `fp32` leaves it as it is, `auto` takes the smallest that decides alike.
    keep_float: tensors or nodes that stay float32 in fp16 and int8. max_auroc_drop, max_flips: what a lower precision
    may cost, as shares: AUROC over left-out classes, and other decisions on fit images.
    max_bank_source: feature rows that are kept, spread over the classes, for the bank to be made of. spool: a folder
    for what has been read; an interrupted export goes on from there, and removes it at the end. engine: `ray` spreads
    the passes over `data` and `calibration_data` on a cluster, that of `ray_address` or one on this machine.
    """

    calibration_data: Any = None
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    classes: tuple[str, ...] | None = None
    labels: LabelSource = "folder"
    ood_prototype: str = AUTO
    mixup_layer: str = FEATURES
    space: Space = "features"
    scale: ScaleOption = "auto"
    bank: BankSize = "auto"
    bank_dtype: BankDtype = "int8"
    keep_paths: bool = False
    precision: PrecisionOption = "fp32"
    keep_float: tuple[str, ...] = ()
    max_auroc_drop: float = 0.005
    max_flips: float = 0.03
    max_bank_source: int = DEFAULT_ROWS
    alpha: float = 0.05
    delta: float | None = None
    rule: Literal["guaranteed", "marginal"] = "guaranteed"
    per_class: bool = False
    unseen: bool = False
    probes: Path | None = None
    seed: int = 0
    force: bool = False
    allow_unreadable: bool = False
    spool: Path | None = None
    engine: Engine = "local"
    ray_address: str | None = None


@dataclass(frozen=True)
class Inputs:
    """All that the user handed in, opened and checked before any long work; `camera` is that part of the graph."""

    dataset: Dataset
    calibration_data: Dataset | None
    classifier: ClassifierGraph
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    probe_frames: list[tuple[str, InputFrame]]
    camera: OrtModel | None


def open_inputs(model: Any, data: Any, options: ExportOptions, progress: Progress) -> Inputs:
    """Open the images and load the classifier.

    Raises:
        GroodEdgeError: something cannot be used; every message says what to do.
    """
    sources = source_names(options.ood_prototype)
    if options.mixup_layer != FEATURES and not {"mixup", AUTO}.intersection(sources):
        raise UsageError("--mixup-layer has no use without --ood-prototype mixup or auto")
    _check_precision(data, options)
    require_engine(options.engine, options.ray_address)
    dataset = open_dataset(data, options.labels, options.classes, options.seed)
    if not MIN_ROWS <= options.max_bank_source <= MAX_ROWS:
        expected = f"a number of rows from {MIN_ROWS:,} to {MAX_ROWS:,}"
        raise UsageError(f"--max-bank-source {options.max_bank_source}; expected {expected}")
    if options.bank == "all" and (dataset.count or 0) > options.max_bank_source:
        raise UsageError(
            f"--bank all would need a row for each of {dataset.count:,} images, but --max-bank-source keeps "
            f"{options.max_bank_source:,} (at most {MAX_ROWS:,}); use --bank N or raise --max-bank-source"
        )
    calibration_data = _calibration_dataset(options)
    _check_reading([one for one in (dataset, calibration_data) if one is not None], options)
    progress("loading the classifier", 0, None)
    classifier = _classifier(model, options)
    progress("loading the classifier", 1, 1)
    classes = _class_names(dataset, options.classes, classifier.class_count)
    preprocessing = resolve_preprocessing(
        options.preprocessing, classifier.channels, (classifier.height, classifier.width)
    )
    probe_frames = _probe_frames(options.probes, preprocessing)
    camera = None
    if preprocessing.camera is not None:
        camera = open_ort(camera_model(preprocessing).SerializeToString())
    return Inputs(dataset, calibration_data, classifier, classes, preprocessing, probe_frames, camera)


def reopened(data: Any, options: ExportOptions) -> Dataset:
    """Return the ID images once more, in the same order: a data set of a factory can be read once."""
    return open_dataset(data, options.labels, options.classes, options.seed)


def reading_of(inputs: Inputs, options: ExportOptions, hold_out: bool) -> Reading:
    """Return how passes over the images are read; without the spool, which needs the graph's digest."""
    return Reading(
        preprocessing=inputs.preprocessing,
        class_count=inputs.classifier.class_count,
        hold_out=hold_out,
        seed=options.seed,
        allow_unreadable=options.allow_unreadable,
        space=options.space,
        max_rows=options.max_bank_source,
        camera=inputs.camera,
    )


def refuse_own_model(model: Any, out: Path) -> None:
    """Refuse to overwrite the classifier.

    Raises:
        OutputError: the output is the classifier's own file.
    """
    if isinstance(model, str | Path) and os.path.exists(model) and Path(model).resolve() == out.resolve():
        raise OutputError(f"{out} is the classifier itself; choose another output, so that the classifier is kept")


def fit_options(options: ExportOptions) -> FitOptions:
    """Return the part of the options that the statistics depend on.

    Raises:
        UsageError: values out of range, or a confidence for images that were seen in training.
    """
    marginal = options.rule == "marginal"
    if options.calibration_data is None:
        provenance: Literal["unseen", "seen-in-training"] = "unseen" if options.unseen else "seen-in-training"
        Promise(options.alpha, options.delta, provenance, "split", marginal).usable_delta()
    return FitOptions(
        ood_prototype=options.ood_prototype,
        bank=options.bank,
        bank_dtype=options.bank_dtype,
        space=options.space,
        scale=options.scale,
        keep_paths=options.keep_paths,
        labels=options.labels,
        alpha=options.alpha,
        delta=options.delta,
        marginal=marginal,
        per_class=options.per_class,
        unseen=options.unseen,
        seed=options.seed,
    )


def _check_precision(data: Any, options: ExportOptions) -> None:
    """Refuse what a lower precision cannot be judged with."""
    for name, value in (("max-auroc-drop", options.max_auroc_drop), ("max-flips", options.max_flips)):
        if not 0 <= value <= 1:
            raise UsageError(f"--{name} is {100 * value:g} %; expected 0 to 100 % (0 to 1 in Python)")
    if options.precision == "fp32":
        if options.keep_float:
            raise UsageError("--keep-float has no use without --precision fp16, int8 or auto")
    elif isinstance(data, Iterator):
        raise UsageError(
            f"--precision {options.precision} reads the images twice, and {type(data).__name__} can be read once; give "
            "a list of batches, a folder or an .npz"
        )


def _check_reading(datasets: list[Dataset], options: ExportOptions) -> None:
    """Refuse data sets that cannot be read as asked."""
    for dataset in datasets:
        if options.engine == "ray":
            require_listing(dataset)
        if options.spool is not None:
            restart_of(dataset)
    if options.spool is not None:
        check_spool_folder(options.spool)


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


def _probe_frames(folder: Path | None, preprocessing: Preprocessing) -> list[tuple[str, InputFrame]]:
    if folder is None:
        return synthetic_frames(preprocessing)
    try:
        paths = find_images(folder)[:MAX_PROBES]
        return [(path.name, _graph_frame(load_image(path), preprocessing)) for path in paths]
    except UnreadableImageError as error:
        raise DatasetError(f"a probe image in {folder} cannot be read: {error}") from error


def _graph_frame(frame: Frame, preprocessing: Preprocessing) -> InputFrame:
    if preprocessing.camera is not None:
        return simulated_frame(frame, preprocessing.camera)
    return preprocess_frame(frame, preprocessing)
