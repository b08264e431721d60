"""int8: explicit QuantizeLinear and DequantizeLinear around the classifier's products, as TensorRT wants them.

Symmetric, zero point 0; activations one scale a tensor, weights one a channel and stored as int8; biases float32. The
first convolution, the layer that makes the logits and all that follows the features stay float32.
"""

from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from grood_edge.errors import ClassifierError
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.folding import simplified
from grood_edge.export.layers import (
    LayerError,
    cast_node,
    checked,
    error_at_features,
    features_of,
    is_stored_half,
    logits_layer,
    prepared,
    ranked,
    replace_initializers,
    replace_nodes,
)
from grood_edge.export.ranges import METHODS, Ranges, RangeTrial, measure_ranges

__all__ = ["choose_ranges", "default_float_layers", "layer_errors", "quantized"]

LEVELS = 127  # of activations, -127..127: a symmetric int8 scale uses no -128
# Of weights, -64..64: 7 bits. onnxruntime on x86 without VNNI adds products of uint8 and int8 in pairs into 16 bits,
# and with 8-bit weights saturates without a word: features of EfficientNet-Lite0 were off by 106 % instead of 11 %.
WEIGHT_LEVELS = 64
HELD_OUT = 4  # every fourth image judges the methods of finding ranges instead of taking part
_PRODUCTS = ("Conv", "Gemm", "MatMul")


def quantized(classifier: ClassifierGraph, ranges: Ranges, keep_float: frozenset[str]) -> ClassifierGraph:
    """Return the classifier with explicit int8 quantisation.

    Args:
        classifier: its input is float32.
        ranges: of the activations (`choose_ranges`).
        keep_float: nodes that stay float32.

    Raises:
        ClassifierError: subgraphs, another input type, or nothing to quantise.
    """
    model = simplified(classifier, "int8")
    layers = _layers(model, classifier)
    lowered = [node.name for node in layers.products + layers.sums if node.name not in keep_float]
    _require_products([node for node in layers.products if node.name in lowered])
    writer = _Writer(model, ranges, keep_float)
    nodes = [made for node in model.graph.node for made in writer.rewritten(node, node.name in lowered)]
    replace_nodes(model.graph, nodes)
    replace_initializers(model.graph, [*model.graph.initializer, *writer.made])
    model.graph.ClearField("value_info")
    return replace(classifier, model=checked(model, "int8"))


def default_float_layers(classifier: ClassifierGraph) -> frozenset[str]:
    """Return the depthwise convolutions: they have few weights, and int8 harms them most (docs/precision.md)."""
    model = prepared(classifier.model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = set()
    for node in model.graph.node:
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type == "Conv" and group > 1 and node.input[1] in weights and weights[node.input[1]].dims[1] == 1:
            found.add(node.name)
    return frozenset(found)


def choose_ranges(
    classifier: ClassifierGraph, images: np.ndarray, keep_float: frozenset[str]
) -> tuple[Ranges, tuple[RangeTrial, ...]]:
    """Measure ranges in three ways, and choose by the error at the features of images that had no part in them.

    Args:
        classifier: the float32 graph.
        images: its input, float32 `[n, ...]`, of fit images.
        keep_float: nodes that stay float32.

    Raises:
        ClassifierError: too few images, another input type, or activations that are not finite.
    """
    model = simplified(classifier, "int8")
    _require_products(_layers(model, classifier).products)
    tensors = _activations(model, classifier)
    judging = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    reference = features_of(classifier.model, classifier, images[judging])

    found = [measure_ranges(model, images[~judging], tensors, method) for method in METHODS]
    trials = []
    for ranges in found:
        graph = quantized(classifier, ranges, keep_float)
        error = error_at_features(features_of(graph.model, graph, images[judging]), reference)
        trials.append(RangeTrial(ranges.method, round(error, 6)))
    best = min(range(len(trials)), key=lambda index: trials[index].feature_error)
    return found[best], tuple(trials)


def layer_errors(
    classifier: ClassifierGraph, ranges: Ranges, images: np.ndarray, keep_float: frozenset[str]
) -> list[LayerError]:
    """Return the error at the features when one product alone is quantised, of each that would be; largest first.

    Args:
        classifier: the float32 graph.
        ranges: of the activations.
        images: its input, float32 `[n, ...]`.
        keep_float: nodes that stay float32.
    """
    reference = features_of(classifier.model, classifier, images)
    layers = _layers(simplified(classifier, "int8"), classifier)
    everything = frozenset(node.name for node in layers.products + layers.sums)

    def error(node: NodeProto) -> float:
        alone = quantized(classifier, ranges, everything - {node.name})
        return error_at_features(features_of(alone.model, alone, images), reference)

    return ranked([node for node in layers.products if node.name not in keep_float], error)


@dataclass(frozen=True)
class _Layers:
    """Nodes that may be quantised: products with constant weights, and sums of two activations (residual branches)."""

    products: list[NodeProto]
    sums: list[NodeProto]


def _layers(model: ModelProto, classifier: ClassifierGraph) -> _Layers:
    weights = {tensor.name for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    after, products, sums = {classifier.features_tensor}, [], []
    last = {node.name for node in logits_layer(model, classifier)}
    convolved: set[str] = set()  # what a convolution or product has had a part in
    for node in model.graph.node:
        if convolved.intersection(node.input) or (node.op_type in _PRODUCTS and node.input[1] in weights):
            convolved.update(node.output)
        if after.intersection(node.input):
            after.update(node.output)
        elif node.op_type in _PRODUCTS and node.input[1] in weights and node.input[0] not in weights:
            products.append(node)
        elif node.op_type == "Add" and all(name in convolved and name in producers for name in node.input):
            sums.append(node)
    products = [node for node in products if node.name not in last]
    return _Layers(products[1:], sums)


def _require_products(products: list[NodeProto]) -> None:
    if not products:
        raise ClassifierError(
            "no convolution or product of the classifier can be int8 (the first and the last layer never are); use "
            "--precision fp16 or fp32"
        )


def _activations(model: ModelProto, classifier: ClassifierGraph) -> tuple[str, ...]:
    layers = _layers(model, classifier)
    names = [node.input[0] for node in layers.products] + [name for node in layers.sums for name in node.input]
    return tuple(dict.fromkeys(names))


class _Writer:
    """Writes Q/DQ pairs, one a tensor, and int8 weights."""

    def __init__(self, model: ModelProto, ranges: Ranges, keep: frozenset[str]) -> None:
        self.made: list[TensorProto] = []
        self._weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._largest = ranges.largest
        self._keep = keep
        self._done: set[str] = set()

    def rewritten(self, node: NodeProto, lowered: bool) -> list[NodeProto]:
        """Return the node after what its inputs need."""
        before: list[NodeProto] = []
        result = NodeProto.FromString(node.SerializeToString())
        if lowered:
            result.input[0] = self._activation(node.input[0], before)
            second = node.input[1]
            product = node.op_type in _PRODUCTS
            result.input[1] = self._weight(node, before) if product else self._activation(second, before)
        elif len(node.input) > 1 and node.input[1] in self._weights and node.name not in self._keep:
            result.input[1] = self._stored(node, before)
        return [*before, result]

    def _activation(self, name: str, before: list[NodeProto]) -> str:
        scale, zero, low, high = (f"{name}_{part}" for part in ("scale", "zero", "int8", "dequantized"))
        if name not in self._done:
            self._done.add(name)
            step = np.array(max(self._largest[name], 1e-12) / LEVELS, np.float32)
            self._add((scale, step), (zero, np.array(0, np.int8)))
            before.append(helper.make_node("QuantizeLinear", [name, scale, zero], [low], name=low))
            before.append(helper.make_node("DequantizeLinear", [low, scale, zero], [high], name=high))
        return high

    def _weight(self, node: NodeProto, before: list[NodeProto]) -> str:
        name = node.input[1]
        values = self._weights[name].astype(np.float64)
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or transposed else values.ndim - 1
        low, scale, zero, high = (f"{name}_axis{axis}_{part}" for part in ("int8", "scale", "zero", "dequantized"))
        if high not in self._done:
            self._done.add(high)
            others = tuple(i for i in range(values.ndim) if i != axis)
            steps = np.maximum(np.abs(values).max(axis=others), 1e-12).astype(np.float32) / np.float32(WEIGHT_LEVELS)
            shape = [-1 if i == axis else 1 for i in range(values.ndim)]
            levels = np.clip(np.rint(values / steps.reshape(shape)), -WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8)
            self._add((low, levels), (scale, steps), (zero, np.zeros(len(steps), np.int8)))
            before.append(helper.make_node("DequantizeLinear", [low, scale, zero], [high], name=high, axis=axis))
        return high

    def _stored(self, node: NodeProto, before: list[NodeProto]) -> str:
        """Large weights of the layers that always stay float32 are stored as float16."""
        name, values = str(node.input[1]), self._weights[node.input[1]]
        if values.dtype != np.float32 or not is_stored_half(node, values):
            return name
        stored = f"{name}_fp16"
        cast = cast_node(stored, TensorProto.FLOAT)
        if stored not in self._done:
            self._done.add(stored)
            self._add((stored, values.astype(np.float16)))
            before.append(cast)
        return str(cast.output[0])

    def _add(self, *tensors: tuple[str, np.ndarray]) -> None:
        self.made += [numpy_helper.from_array(value, name) for name, value in tensors]
