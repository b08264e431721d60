"""The classifier's last linear layer, read out of an artifact: some baselines change it, or need its null space."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from grood_edge.arrays import Features, Logits
from grood_edge.artifact import Artifact
from grood_edge.errors import BackendError, MissingExtraError
from grood_edge.ort import OrtModel, open_ort

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["LinearLayer", "NoLinearLayer", "read_linear_layer"]

TOLERANCE = 1e-4  # of the logits' scale
ROWS = 256  # unit vectors that run at a time


class NoLinearLayer(Exception):  # noqa: N818 -- not an error: the network is what it is
    """The logits are not W h + b of the features; `str()` says why."""


@dataclass(frozen=True)
class LinearLayer:
    """logits = features W^T + bias; `weight` float32 `[k, d]`, `bias` float32 `[k]`."""

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: Features) -> Logits:
        """Return float32 `[n, k]`."""
        result: Logits = features @ self.weight.T + self.bias
        return result


def read_linear_layer(artifact: Artifact, features: Features, logits: Logits) -> LinearLayer:
    """Cut the part from features to logits out of the graph, and read W and b off its answers to unit vectors.

    Whatever operators that part has (Gemm, MatMul and Add, a 1x1 Conv, quantised weights), b is its answer to zero and
    column i of W its answer to the i-th unit vector, less b. `features` `[n, d]` and `logits` `[n, k]` of real images
    prove that it is linear.

    Raises:
        NoLinearLayer: the part has other inputs, or is not linear on the given images.
        MissingExtraError: onnx is not installed.
        ArtifactError: onnx cannot read the model.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnx", "export", "Reading the last layer for --baselines") from error
    from grood_edge.export.normal_form import model_of

    if not len(features):
        raise NoLinearLayer("no image gave finite features to check it with")
    classifier = artifact.contract.classifier
    model = _last_part(model_of(artifact), f"classifier/{classifier.features_tensor}")
    layer = _probed(model, features.shape[1], classifier.features_pooled, classifier.batch == "1")
    error_of_logits = float(np.abs(layer.logits(features) - logits).max())
    scale = float(np.abs(logits).max())
    if not error_of_logits <= TOLERANCE * max(scale, 1e-6):
        raise NoLinearLayer(f"the logits differ from W h + b by {error_of_logits:.1e} at a scale of {scale:.1f}")
    return layer


def _last_part(model: "ModelProto", features: str) -> "ModelProto":
    from onnx import TensorProto, helper

    from grood_edge.export.feature_point import pruned

    part = pruned(_without_producer(model, features), ["logits"])
    if any("image" in node.input for node in part.graph.node) or not part.graph.node:
        raise NoLinearLayer("the logits do not come from the features alone")
    part.graph.ClearField("input")
    part.graph.input.append(helper.make_tensor_value_info(features, TensorProto.FLOAT, None))
    return part


def _without_producer(model: "ModelProto", tensor: str) -> "ModelProto":
    from onnx import ModelProto

    result = ModelProto()
    result.CopyFrom(model)
    result.graph.ClearField("node")
    result.graph.node.extend(node for node in model.graph.node if tensor not in node.output)
    return result


def _probed(model: "ModelProto", dimension: int, pooled: bool, single: bool) -> LinearLayer:
    try:
        part = open_ort(model.SerializeToString())
        zero = _answers(part, np.zeros((1, dimension), np.float32), pooled)
        step = 1 if single else ROWS
        columns = [_answers(part, rows, pooled) - zero for rows in _unit_rows(dimension, step)]
    except BackendError as error:
        raise NoLinearLayer(f"the last layer cannot be run alone ({error})") from error
    return LinearLayer(np.ascontiguousarray(np.concatenate(columns).T), zero[0])


def _unit_rows(dimension: int, step: int) -> list[np.ndarray]:
    return [np.eye(min(step, dimension - i), dimension, i, dtype=np.float32) for i in range(0, dimension, step)]


def _answers(part: OrtModel, rows: np.ndarray, pooled: bool) -> np.ndarray:
    """Run rows `[n, d]`; before a pooling they are maps of one pixel, channels first, else channels last."""
    shapes = [(*rows.shape, 1, 1), (len(rows), 1, 1, rows.shape[1])] if pooled else [rows.shape]
    name = next(iter(part.inputs))
    for index, shape in enumerate(shapes):
        try:
            return part.run({name: rows.reshape(shape)}, ["logits"])["logits"]
        except BackendError:
            if index == len(shapes) - 1:
                raise
    raise AssertionError("unreachable: there is always a last shape")
