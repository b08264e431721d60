"""Find `logits` and `features` on a classifier's ONNX graph, and cut away what they do not need.

`logits` is the tensor before a final Softmax. `features` is the input of the last Gemm or MatMul (or 1x1 Conv
before a pooling) that produces the logits, found by walking back from the output.
"""

from dataclasses import dataclass
from typing import Literal

from onnx import GraphProto, ModelProto, NodeProto, helper

from grood_edge.errors import ClassifierError

__all__ = ["FeaturePoint", "Pooling", "captured_tensors", "find_feature_point", "pruned"]

Pooling = Literal["none", "channels-first", "channels-last"]

_SHAPE_ONLY = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout"}
_AFTER_WEIGHTS = {
    "BatchNormalization",
    "DequantizeLinear",
    "QuantizeLinear",
    "GlobalAveragePool",
    "AveragePool",
    "ReduceMean",
    "Relu",
    "Transpose",
}
_WITH_CONSTANT = {"Add", "Sub", "Mul", "Div"}
_WEIGHTED = {"Gemm", "MatMul", "Conv"}
_SPATIAL = {"Conv", "GlobalAveragePool", "AveragePool", "MaxPool", "BatchNormalization"}
_ELEMENTWISE = {"Relu", "Identity", "Clip", "Sigmoid", "HardSwish", "HardSigmoid", "Mul", "Add", "Dropout"}
_SOFTMAX = {"Softmax", "LogSoftmax"}
_WANT_OPTION = "Choose the features with --features TENSOR"


@dataclass(frozen=True)
class FeaturePoint:
    """Names and sizes of the two tensors."""

    logits: str
    class_count: int
    features: str
    pooling: Pooling
    dimension: int


def find_feature_point(model: ModelProto, features: str | None) -> FeaturePoint:
    """Find the logits, and the features unless the user names them.

    `model` has inferred shapes.

    Raises:
        ClassifierError: two outputs, a Sigmoid ending, an unknown tensor, or an ambiguous ending; lists candidates.
    """
    graph = _Graph(model.graph)
    if len(model.graph.output) != 1:
        names = ", ".join(f"{o.name} {graph.shape(o.name)}" for o in model.graph.output)
        raise ClassifierError(
            f"the classifier has {len(model.graph.output)} outputs ({names}); expected one, the logits. "
            "Export it again with that output alone"
        )
    logits = _logits(graph, model.graph.output[0].name)
    class_count = _class_count(graph, logits)
    if features is not None:
        pooling, dimension = _named_features(graph, features)
        return FeaturePoint(logits, class_count, features, pooling, dimension)
    name, node = _weighted_input(graph, logits)
    pooling, dimension = _pooling_before(graph, name, node)
    return FeaturePoint(logits, class_count, name, pooling, dimension)


def pruned(model: ModelProto, outputs: list[str]) -> ModelProto:
    """Return the model with only the nodes and initializers that these tensors need, in the given order."""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    needed: set[str] = set()
    pending = list(outputs)
    while pending:
        name = pending.pop()
        if name and name not in needed:
            needed.add(name)
            if name in producers:
                pending += [*producers[name].input, *captured_tensors(producers[name])]
    result = ModelProto()
    result.CopyFrom(model)
    result.graph.ClearField("node")
    result.graph.node.extend(node for node in graph.node if needed.intersection(node.output))
    result.graph.ClearField("initializer")
    result.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed)
    result.graph.ClearField("value_info")
    result.graph.ClearField("output")
    known = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
    result.graph.output.extend(known.get(name, helper.make_empty_tensor_value_info(name)) for name in outputs)
    return result


class _Graph:
    """Lookups over one graph: who produces a tensor, what shape it has, whether it depends on the image."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes = graph.node
        self.producers = {name: node for node in graph.node for name in node.output}
        self._constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        self._values = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
        self._from_image = {value.name for value in graph.input} - set(self._constants)
        for node in graph.node:
            if self._from_image.intersection([*node.input, *captured_tensors(node)]):
                self._from_image.update(node.output)

    def shape(self, name: str) -> list[int | None]:
        """Return the known dimensions, None for open ones; [] when nothing is known."""
        if name in self._constants:
            return list(self._constants[name])
        if name not in self._values:
            return []
        return [d.dim_value or None for d in self._values[name].type.tensor_type.shape.dim]

    def depends_on_image(self, name: str) -> bool:
        return name in self._from_image

    def image_inputs(self, node: NodeProto) -> list[str]:
        return [name for name in node.input if name in self._from_image]

    def candidates(self) -> str:
        """List the last tensors that could be features, with shapes."""
        rows = [
            f"{name} {self.shape(name)}"
            for node in self.nodes
            for name in node.output
            if name in self._from_image and self._could_be_features(self.shape(name))
        ]
        return "; ".join(rows[-8:]) or "none"

    def _could_be_features(self, shape: list[int | None]) -> bool:
        return len(shape) in (2, 4) and shape[1] is not None and shape[1] > 1


def _logits(graph: _Graph, output: str) -> str:
    """Return the tensor before a final Softmax, or the output itself when there is none."""
    name = output
    while (node := graph.producers.get(name)) is not None:
        if node.op_type in _SOFTMAX:
            return str(node.input[0])
        if node.op_type == "Sigmoid":
            raise ClassifierError(
                "the classifier ends in a Sigmoid (one score a label); expected logits or a Softmax over classes"
            )
        if node.op_type not in _SHAPE_ONLY:
            return output
        name = node.input[0]
    return output


def _class_count(graph: _Graph, logits: str) -> int:
    shape = graph.shape(logits)
    spatial = shape[2:] if len(shape) == 4 else []
    if len(shape) not in (2, 4) or shape[1] is None or any(size != 1 for size in spatial):
        raise ClassifierError(f"the classifier's output {logits!r} has shape {shape}; expected logits [N, classes]")
    if shape[1] < 2:
        raise ClassifierError(f"the classifier has {shape[1]} output class; a score needs at least two")
    return shape[1]


def _weighted_input(graph: _Graph, logits: str) -> tuple[str, NodeProto]:
    """Walk back from the logits to the last node with weights; return the tensor that enters it, and the node."""
    name = logits
    while (node := graph.producers.get(name)) is not None:
        inputs = graph.image_inputs(node)
        if node.op_type in _WEIGHTED and len(inputs) == 1:
            return _before_shape_changes(graph, inputs[0]), node
        passes = node.op_type in _SHAPE_ONLY | _AFTER_WEIGHTS | _WITH_CONSTANT
        if not passes or len(inputs) != 1:
            raise ClassifierError(
                f"the features cannot be found: the logits come from {node.op_type} {node.name!r}, not from one linear "
                f"layer. {_WANT_OPTION}; candidates: {graph.candidates()}"
            )
        name = inputs[0]
    raise ClassifierError(f"the classifier has no linear layer before its output. {_WANT_OPTION}: {graph.candidates()}")


def _before_shape_changes(graph: _Graph, name: str) -> str:
    """Step over operators that do not change values, as long as the tensor keeps rank 2."""
    while (node := graph.producers.get(name)) is not None and node.op_type in ("Identity", "Dropout"):
        name = node.input[0]
    return name


def _pooling_before(graph: _Graph, name: str, node: NodeProto) -> tuple[Pooling, int]:
    shape = graph.shape(name)
    if len(shape) == 2 and shape[1] is not None:
        return "none", shape[1]
    if len(shape) == 4 and node.op_type == "Conv" and shape[1] is not None and _is_pointwise(graph, node):
        return "channels-first", shape[1]
    if len(shape) == 4 and node.op_type == "MatMul" and shape[3] is not None:
        return "channels-last", shape[3]
    raise ClassifierError(
        f"the tensor {name!r} before the last {node.op_type} has shape {shape}; expected [N, d], or [N, d, h, w] "
        f"before a 1x1 Conv. {_WANT_OPTION}; candidates: {graph.candidates()}"
    )


def _is_pointwise(graph: _Graph, conv: NodeProto) -> bool:
    return graph.shape(conv.input[1])[2:] == [1, 1]


def _named_features(graph: _Graph, name: str) -> tuple[Pooling, int]:
    shape = graph.shape(name)
    if not shape or name not in graph.producers or not graph.depends_on_image(name):
        raise ClassifierError(f"the classifier has no tensor {name!r}; candidates: {graph.candidates()}")
    if len(shape) not in (2, 4) or shape[1] is None:
        raise ClassifierError(
            f"the tensor {name!r} has shape {shape}; expected [N, d] or [N, d, h, w]; candidates: {graph.candidates()}"
        )
    if len(shape) == 2:
        return "none", shape[1]
    pooling = _spatial_layout(graph, name)
    dimension = shape[1] if pooling == "channels-first" else shape[3]
    if dimension is None:
        raise ClassifierError(f"the tensor {name!r} has shape {shape}; its number of channels must be fixed")
    return pooling, dimension


def _spatial_layout(graph: _Graph, name: str) -> Pooling:
    """Tell where a rank-4 tensor keeps its channels: ONNX's spatial operators have them first, Transpose moves them."""
    pending, seen = [name], {name}
    while pending:
        tensor = pending.pop(0)
        for node in graph.nodes:
            if tensor in node.output and node.op_type in _SPATIAL:
                return "channels-first"
            if tensor in node.input and node.op_type in _SPATIAL:
                return "channels-first"
            if node.op_type == "Transpose" and (tensor in node.input or tensor in node.output):
                order = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
                if order in ([0, 3, 1, 2], [0, 2, 3, 1]):
                    return "channels-last" if (order[1] == 3) == (tensor in node.input) else "channels-first"
            if node.op_type in _ELEMENTWISE and (tensor in node.input or tensor in node.output):
                pending += [other for other in (*node.input, *node.output) if other not in seen]
                seen.update((*node.input, *node.output))
    raise ClassifierError(
        f"whether the channels of {name!r} come first or last cannot be read from the graph; choose a tensor next to a "
        f"convolution or pooling, or after the pooling; candidates: {graph.candidates()}"
    )


def captured_tensors(node: NodeProto) -> list[str]:
    """Return the tensors that a node's sub-graphs take from outside."""
    names: list[str] = []
    for attribute in node.attribute:
        for sub in (attribute.g, *attribute.graphs):
            for inner in sub.node:
                names += [*inner.input, *captured_tensors(inner)]
    return names
