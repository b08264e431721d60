"""Ranges of a classifier's activations on fit images, by onnxruntime's calibraters; the best method is measured."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, save_model

from grood_edge.errors import ClassifierError

__all__ = ["METHODS", "RangeMethod", "RangeTrial", "Ranges", "measure_ranges"]

RangeMethod = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "entropy")
MIN_IMAGES = 8
PERCENTILE = 99.999
ENTROPY_IMAGES = 32  # the search for a threshold takes as long as the rest of an export with many images
_BATCH = 8


@dataclass(frozen=True)
class Ranges:
    """The largest absolute value of each tensor that is to be kept: what a symmetric int8 scale is made of."""

    method: RangeMethod
    largest: dict[str, float]


@dataclass(frozen=True)
class RangeTrial:
    """A method, and the relative error that it leaves at the features."""

    method: RangeMethod
    feature_error: float


def measure_ranges(model: ModelProto, images: np.ndarray, tensors: tuple[str, ...], method: RangeMethod) -> Ranges:
    """Run the model over images and return the ranges of some of its tensors.

    Args:
        model: with one input.
        images: float32 `[n, ...]`, what the input takes; run in small batches, of which histograms alone are kept.
        tensors: float32 tensors of the model, its input included.
        method: `entropy` sees the first 32 images only.

    Raises:
        ClassifierError: too few images, or a tensor that is not finite.
    """
    if len(images) < MIN_IMAGES:
        raise ClassifierError(
            f"{len(images)} fit images are too few for the ranges of int8 activations; give at least {MIN_IMAGES} with "
            "--data, or use --precision fp16"
        )
    if method == "entropy":
        images = images[:ENTROPY_IMAGES]
    step = 1 if model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1 else _BATCH
    with tempfile.TemporaryDirectory() as folder, _quiet():
        calibrater = _calibrater(model, Path(folder), tensors, method)
        name = model.graph.input[0].name
        for start in range(0, len(images), step):  # between calls the library keeps histograms instead of activations
            calibrater.collect_data(_Reader(name, images[start : start + step]))
        found = calibrater.compute_data()
        del calibrater  # it holds a file in the folder open
    largest = {tensor: float(np.max(np.abs(found[tensor].range_value))) for tensor in tensors if tensor in found.data}
    wrong = next((tensor for tensor in tensors if not np.isfinite(largest.get(tensor, np.nan))), None)
    if wrong is not None:
        raise ClassifierError(
            f"the classifier's tensor {wrong!r} has no finite range on fit images; keep it in float32 with "
            "--keep-float, or use --precision fp32"
        )
    return Ranges(method, largest)


class _Reader:
    """One batch, as the library asks for it."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        self._feeds = iter([{name: images}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _calibrater(model: ModelProto, folder: Path, tensors: tuple[str, ...], method: RangeMethod) -> Any:
    from onnxruntime.quantization import calibrate

    path, augmented = folder / "model.onnx", folder / "augmented.onnx"
    save_model(model, path)
    kinds: dict[RangeMethod, tuple[Any, dict[str, Any]]] = {
        "minmax": (calibrate.MinMaxCalibrater, {}),
        "entropy": (calibrate.EntropyCalibrater, {}),
        "percentile": (calibrate.PercentileCalibrater, {"percentile": PERCENTILE}),
    }
    kind, options = kinds[method]
    calibrater = kind(str(path), augmented_model_path=str(augmented), symmetric=True, **options)
    wanted = set(tensors)
    calibrater.select_tensors_to_calibrate = lambda _: (wanted, {v.name: v for v in model.graph.value_info})
    calibrater.augment_graph()
    calibrater.create_inference_session()
    return calibrater


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library prints and logs what is of no use to the user of an export."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NaN, which `measure_ranges` refuses
            yield
    finally:
        logger.setLevel(before)
