"""From anything that the user has to a classifier graph: ONNX, opset 19, with its features and logits found.

An nn.Module or a .pt2 becomes ONNX first (`torch_classifier`), so that an existing .onnx is no special case:
from there on there is one way, and it is torch-free.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, shape_inference

from grood_edge.errors import BackendError, ClassifierError
from grood_edge.export.feature_point import Pooling, find_feature_point, pruned
from grood_edge.export.normal_form import free_batch, load_onnx, normal_form
from grood_edge.export.preflight_finding import type_name
from grood_edge.onnx_proto import OPSET
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import MAX_SIDE

__all__ = ["ClassifierGraph", "ClassifierOptions", "load_classifier"]

Layout = Literal["NCHW", "NHWC"]

MAX_INPUT_PIXELS = 1 << 24  # of a classifier; the checks alone run six random images of it
OUTPUT_TOLERANCE = 1e-5  # relative to the largest output: float32 with another order of summation
HALF_OUTPUT_TOLERANCE = 5e-3  # the same for float16: 11 bits of mantissa
_FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class ClassifierOptions:
    """What the user says about the classifier; None means "find out".

    features: name of the features tensor in the ONNX graph. input_size: (height, width) to trace an nn.Module with.
    """

    features: str | None = None
    layout: Layout | None = None
    bgr: bool = False
    weights: Path | None = None
    input_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class ClassifierGraph:
    """A classifier in normal form, with everything the artifact needs to know about it.

    `height` and `width` are None where the graph leaves them open. `pooling` says how `features_tensor` becomes
    `[N, dimension]`.
    """

    model: ModelProto
    source: Literal["module", "pt2", "onnx"]
    input_name: str
    input_type: int
    layout: Layout
    bgr: bool
    channels: int
    height: int | None
    width: int | None
    dynamic_batch: bool
    logits_tensor: str
    class_count: int
    features_tensor: str
    pooling: Pooling
    dimension: int


def load_classifier(model: Any, options: ClassifierOptions) -> ClassifierGraph:
    """Load a classifier: an nn.Module, or the text that names one.

    The text is a path to `.onnx` or `.pt2`, `package.module:factory` (runs the user's code), or
    `torchvision:NAME` / `timm:NAME` with `options.weights`.

    Raises:
        ClassifierError: it cannot be loaded, or its features and logits cannot be found.
        MissingExtraError: torch, torchvision or timm is needed and missing.
    """
    text = str(model) if isinstance(model, str | Path) else None
    if text is not None and text.lower().endswith(".onnx"):
        return graph_from_onnx(load_onnx(Path(text)), "onnx", options)
    from grood_edge.export.torch_classifier import onnx_from_torch  # torch is slow to import and optional

    exported, source = onnx_from_torch(model, options.weights, options.input_size)
    return graph_from_onnx(exported, source, options)


def graph_from_onnx(
    original: ModelProto, source: Literal["module", "pt2", "onnx"], options: ClassifierOptions
) -> ClassifierGraph:
    """Bring an ONNX classifier into normal form and find its input, logits and features.

    Raises:
        ClassifierError: says which node or tensor is in the way, and which option may help.
    """
    model = normal_form(original)
    image = _only_image_input(model)
    layout, channels, height, width = _read_layout(image, options.layout)
    if options.bgr and channels != 3:
        raise ClassifierError(f"--classifier-bgr needs 3 channels, but the classifier's input has {channels}")
    size = options.input_size or (224, 224)
    shape = (channels, height or size[0], width or size[1])
    if max(shape) > MAX_SIDE or shape[1] * shape[2] > MAX_INPUT_PIXELS:
        raise ClassifierError(
            f"the classifier's images have {shape[1]:,} x {shape[2]:,} pixels; at most {MAX_SIDE:,} a side and "
            f"{MAX_INPUT_PIXELS:,} in all are supported"
        )
    images = random_images(shape if layout == "NCHW" else (*shape[1:], shape[0]), image.type.tensor_type.elem_type)
    freed = free_batch(model)
    dynamic_batch = _same_outputs(original, freed, model, images)
    model = shape_inference.infer_shapes(freed if dynamic_batch else model, data_prop=True)
    point = find_feature_point(model, options.features)
    return ClassifierGraph(
        model=pruned(model, [point.logits, point.features]),
        source=source,
        input_name=image.name,
        input_type=image.type.tensor_type.elem_type,
        layout=layout,
        bgr=options.bgr,
        channels=channels,
        height=height,
        width=width,
        dynamic_batch=dynamic_batch,
        logits_tensor=point.logits,
        class_count=point.class_count,
        features_tensor=point.features,
        pooling=point.pooling,
        dimension=point.dimension,
    )


def random_images(shape: tuple[int, ...], onnx_type: int, count: int = 6) -> np.ndarray:
    """Return seeded normal noise `[count, *shape]` in an ONNX dtype, to compare two graphs with."""
    rng, images = np.random.default_rng(0), np.empty((count, *shape), helper.tensor_dtype_to_np_dtype(onnx_type))
    for image in images:  # in float64 one at a time
        image[...] = rng.standard_normal(shape)
    return images


def _same_outputs(original: ModelProto, freed: ModelProto, kept: ModelProto, images: np.ndarray) -> bool:
    """Compare the converted classifier with the original; False when only `kept`, with batches of 1, gives the same.

    Raises:
        ClassifierError: not even that gives the original's outputs.
    """
    reference = open_ort(original.SerializeToString())
    (shape,) = reference.inputs.values()
    step = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else 1
    images = np.resize(images, (-(-len(images) // step) * step, *images.shape[1:]))
    expected = _outputs(reference, images, step)
    if not np.isfinite(expected).all():
        raise ClassifierError("the classifier's outputs are NaN or Inf for random images; check its weights")
    tolerance = HALF_OUTPUT_TOLERANCE if images.dtype == np.float16 else OUTPUT_TOLERANCE
    limit = tolerance * max(1.0, float(np.abs(expected).max()))
    errors = _largest_errors(freed, images, expected, (1, 2, 3))
    if max(errors) <= limit:
        return True
    if step > 1:
        raise ClassifierError(
            f"the classifier has a fixed batch of {step}, and with an open batch its outputs differ by "
            f"{max(errors):.1e} (at most {limit:.1e} was expected); export it again with a dynamic batch, or batch 1"
        )
    (error,) = _largest_errors(kept, images, expected, (1,))
    if error <= limit:
        return False
    raise ClassifierError(
        f"after conversion to the artifact's opset the classifier's outputs differ by {error:.1e} from the original's "
        f"(at most {limit:.1e} was expected); export it again with opset {OPSET}"
    )


def _largest_errors(
    model: ModelProto, images: np.ndarray, expected: np.ndarray, batches: tuple[int, ...]
) -> list[float]:
    """Return the largest error of the outputs for each batch size; infinite where the model does not run."""
    try:
        opened = open_ort(model.SerializeToString())
        return [float(np.abs(_outputs(opened, images, batch) - expected).max()) for batch in batches]
    except (BackendError, ValueError):
        return [float("inf")]


def _outputs(model: OrtModel, images: np.ndarray, batch: int) -> np.ndarray:
    (name,) = model.inputs
    rows = [model.run({name: images[i : i + batch]})[model.outputs[0]] for i in range(0, len(images), batch)]
    if rows[0].ndim < 2:
        shape = list(rows[0].shape)
        raise ClassifierError(
            f"the classifier's output has shape {shape} for {batch} images; expected logits [N, classes]"
        )
    return np.concatenate(rows).astype(np.float64)


def _only_image_input(model: ModelProto) -> ValueInfoProto:
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ClassifierError(f"the classifier has {len(inputs)} inputs ({names}); expected exactly one image input")
    if inputs[0].type.tensor_type.elem_type not in _FLOAT_TYPES:
        kind = type_name(inputs[0].type.tensor_type.elem_type).upper()
        raise ClassifierError(
            f"the classifier's input {inputs[0].name!r} has type {kind}; expected FLOAT, FLOAT16 or DOUBLE. "
            "Export the classifier without the part that converts pixels"
        )
    image: ValueInfoProto = inputs[0]
    return image


def _read_layout(image: ValueInfoProto, asked: Layout | None) -> tuple[Layout, int, int | None, int | None]:
    """Read layout, channels, height and width from the input's shape."""
    dims = [d.dim_value if d.dim_value > 0 else None for d in image.type.tensor_type.shape.dim]  # some write -1
    shown = [d.dim_value or d.dim_param or "?" for d in image.type.tensor_type.shape.dim]
    if len(dims) != 4:
        raise ClassifierError(f"the classifier's input {image.name!r} has shape {shown}; expected four dimensions")
    first, last = dims[1] in (1, 3), dims[3] in (1, 3)
    if asked is None and first == last:
        raise ClassifierError(
            f"the classifier's input {image.name!r} has shape {shown}: whether channels come first or last cannot be "
            "read from it. Say so with --classifier-layout NCHW or NHWC, and export the channel count as a number"
        )
    layout: Layout = asked or ("NCHW" if first else "NHWC")
    channels = dims[1] if layout == "NCHW" else dims[3]
    if channels not in (1, 3):
        raise ClassifierError(
            f"the classifier's input {image.name!r} has shape {shown}; as {layout} that is {channels} "
            "channels, and 1 or 3 are supported"
        )
    height, width = (dims[2], dims[3]) if layout == "NCHW" else (dims[1], dims[2])
    return layout, channels, height, width
