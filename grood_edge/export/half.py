"""fp16: a mixed, strongly typed classifier graph. The backbone computes in float16, what is delicate in float32.

After the pooling in front of the features everything is float32: the last layer, and with it the logits. Norms,
softmax, exponentials and sums of squares stay float32 inside the backbone too. Every change of type is a Cast; no
operator ever sees two float types.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper, shape_inference

from grood_edge.errors import ClassifierError
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.feature_point import pruned
from grood_edge.export.folding import simplified
from grood_edge.export.layers import (
    WEIGHTED,
    LayerError,
    cast_node,
    checked,
    error_at_features,
    features_of,
    fits_half,
    is_stored_half,
    logits_layer,
    prepared,
    ranked,
    replace_initializers,
    replace_nodes,
    tensor_types,
)
from grood_edge.export.rounding import rounded
from grood_edge.ort import open_ort

__all__ = ["half_layer_errors", "half_precision"]

# A sum of squares leaves float16 at 65,504, an exponential at 11; a mean over a long axis loses its last digits.
_FLOAT_ONLY = {
    "BatchNormalization", "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log",
    "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", "Pow", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSum", "ReduceSumSquare", "Softmax", "Softplus", "Sqrt", "Reciprocal", "CumSum",
    "ConstantOfShape", "Range", "LRN", "EyeLike", "GridSample",
}  # fmt: skip
_AFTER_POOLING = {"Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_ALWAYS_FLOAT_INPUTS = {"Resize": (1, 2)}  # roi and scales are float32 by definition


def half_precision(classifier: ClassifierGraph, keep_float: frozenset[str] = frozenset()) -> ClassifierGraph:
    """Return the classifier in mixed precision, with a float16 input and float32 logits.

    Args:
        classifier: its input is float32.
        keep_float: names of nodes that stay float32, with weights stored in float32.

    Raises:
        ClassifierError: subgraphs, another input type, or nothing left to compute in float16.
    """
    model = simplified(classifier, "fp16")
    types, ranks = tensor_types(model), _ranks(model)
    tail = _tail(model, classifier)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    floating = {
        node.name
        for node in model.graph.node
        if node.name in tail | keep_float or _is_delicate(node, types, weights, ranks)
    }
    if all(node.name in floating for node in model.graph.node if node.op_type in WEIGHTED):
        raise ClassifierError("no convolution or product of the classifier can be float16; use --precision fp32")
    typed = _Typed(types, weights, floating, keep_float)
    nodes = [made for node in model.graph.node for made in typed.rewritten(node)]
    replace_nodes(model.graph, nodes)
    replace_initializers(model.graph, typed.stored.values())
    model.graph.ClearField("value_info")
    for value in (*model.graph.input, *model.graph.output):
        if value.name in typed.half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return replace(classifier, model=checked(model, "fp16"), input_type=TensorProto.FLOAT16)


def half_layer_errors(classifier: ClassifierGraph, images: np.ndarray, kept: frozenset[str]) -> list[LayerError]:
    """Return, for each layer that computes in float16, the error at the features when it alone is rounded.

    Largest first; nodes whose output leaves float16 come before all others, with an infinite error.

    Args:
        classifier: the float32 graph.
        images: its input, float32 `[n, ...]`.
        kept: nodes that are float32 already.
    """
    mixed = half_precision(classifier, kept)
    reference = features_of(classifier.model, classifier, images)
    everything = frozenset(node.name for node in prepared(classifier.model).graph.node)
    inputs = images.astype(np.float16).astype(np.float32)
    inferred = shape_inference.infer_shapes(mixed.model, data_prop=True)
    types = tensor_types(inferred)
    half = [node for node in inferred.graph.node if types.get(node.output[0]) == TensorProto.FLOAT16]
    overflowing = _overflowing(inferred, half, inputs)
    known = {node.name for node in overflowing}

    def error(node: NodeProto) -> float:
        alone = half_precision(classifier, everything - {node.name})
        return error_at_features(features_of(rounded(alone.model), alone, inputs), reference)

    layers = [node for node in half if node.op_type in WEIGHTED and node.name not in known]
    return ranked(overflowing, lambda _: float("inf")) + ranked(layers, error)


def _ranks(model: ModelProto) -> dict[str, int]:
    graph = model.graph
    return {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.input, *graph.output)}


def _tail(model: ModelProto, classifier: ClassifierGraph) -> set[str]:
    """Return the nodes behind the pooling: those that make features of what is pooled, and all that follow."""
    producers = {name: node for node in model.graph.node for name in node.output}
    tail: set[str] = set()
    node = producers.get(classifier.features_tensor)
    while node is not None and node.op_type in _AFTER_POOLING:
        tail.add(node.name)
        node = producers.get(node.input[0])
    tail.update(node.name for node in logits_layer(model, classifier))  # where logits do not come from the features
    after = {classifier.features_tensor}
    for node in model.graph.node:
        if after.intersection(node.input):
            after.update(node.output)
            tail.add(node.name)
    return tail


def _is_delicate(
    node: NodeProto, types: dict[str, int], weights: dict[str, TensorProto], ranks: dict[str, int]
) -> bool:
    """Tell whether a node must compute in float32: by its operator, or by a constant that float16 does not hold."""
    if node.op_type in _FLOAT_ONLY:
        return True
    if node.op_type == "ReduceMean" and ranks.get(node.input[0], 0) != 4:
        return True  # of a norm that was written out; over height and width it is a pooling
    constants = [weights[name] for name in _halved_inputs(node) if name in weights and types[name] == TensorProto.FLOAT]
    return any(not fits_half(numpy_helper.to_array(tensor)) for tensor in constants)


def _halved_inputs(node: NodeProto) -> Iterator[str]:
    fixed = _ALWAYS_FLOAT_INPUTS.get(node.op_type, ())
    return (name for index, name in enumerate(node.input) if name and index not in fixed)


class _Typed:
    """Rewrites nodes in order; remembers which tensors are float16, and casts each once in either direction."""

    def __init__(
        self, types: dict[str, int], weights: dict[str, TensorProto], floating: set[str], keep: frozenset[str]
    ) -> None:
        self._types, self._weights, self._floating, self._keep = types, weights, floating, keep
        self.stored: dict[str, TensorProto] = {}  # initializers of the rewritten nodes
        self._cast: set[str] = set()
        # float16, until a float32 node makes them
        self.half = {name for name, kind in types.items() if kind == TensorProto.FLOAT and name not in weights}

    def rewritten(self, node: NodeProto) -> list[NodeProto]:
        """Return the node with its inputs in its own type, after the Casts that are new."""
        casts: list[NodeProto] = []
        result = NodeProto.FromString(node.SerializeToString())
        floating = node.name in self._floating
        fixed = _ALWAYS_FLOAT_INPUTS.get(node.op_type, ())
        for index, name in enumerate(node.input):
            if not name or self._types.get(name) != TensorProto.FLOAT:
                if name in self._weights:
                    self.stored[name] = self._weights[name]
                continue
            wanted = TensorProto.FLOAT if floating or index in fixed else TensorProto.FLOAT16
            result.input[index] = self._typed_input(name, wanted, node, casts)
        if floating:
            self.half.difference_update(node.output)
        elif node.op_type == "Cast":
            for attribute in result.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.FLOAT16
        return [*casts, result]

    def _typed_input(self, name: str, wanted: int, node: NodeProto, casts: list[NodeProto]) -> str:
        if name in self._weights:
            return self._constant(name, wanted, node, casts)
        if (name in self.half) == (wanted == TensorProto.FLOAT16):
            return name
        return self._cast_to(name, wanted, casts)

    def _constant(self, name: str, wanted: int, node: NodeProto, casts: list[NodeProto]) -> str:
        values = numpy_helper.to_array(self._weights[name])
        if wanted == TensorProto.FLOAT and (node.name in self._keep or not is_stored_half(node, values)):
            self.stored[name] = self._weights[name]
            return name
        stored = f"{name}_fp16"
        self.stored[stored] = numpy_helper.from_array(values.astype(np.float16), stored)
        return stored if wanted == TensorProto.FLOAT16 else self._cast_to(stored, wanted, casts)

    def _cast_to(self, name: str, wanted: int, casts: list[NodeProto]) -> str:
        cast = cast_node(name, wanted)
        if cast.name not in self._cast:
            self._cast.add(cast.name)
            casts.append(cast)
        return cast.name


def _overflowing(inferred: ModelProto, half: list[NodeProto], inputs: np.ndarray) -> list[NodeProto]:
    """Return the float16 nodes whose output leaves float16 although their inputs are finite.

    inferred: the mixed graph with its types. inputs: halves, float32 `[n, ...]`.
    """
    image = inferred.graph.input[0].name
    computed = {name for node in inferred.graph.node for name in node.output}
    wanted = list(dict.fromkeys(n for node in half for n in (*node.input, *node.output) if n in computed))
    opened = open_ort(rounded(pruned(inferred, wanted)).SerializeToString())
    infinite: set[str] = set()
    for row in inputs:
        found = opened.run({image: row[None]}, wanted)
        infinite.update(name for name, values in found.items() if not np.isfinite(values).all())
    first = [node for node in half if node.output[0] in infinite and not infinite.intersection(node.input)]
    casts = {node.output[0] for node in first if node.op_type == "Cast" and node.input[0] in computed}
    # What a Cast in front of float16 nodes cannot hold, those nodes have to take in float32.
    readers = [node for node in inferred.graph.node if casts.intersection(node.input)]
    return readers + [node for node in first if node.output[0] not in casts]
