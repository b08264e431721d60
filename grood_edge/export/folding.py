"""A float32 classifier graph, simplified before it changes its precision: batch norms disappear into convolutions.

Left as a node, a batch norm would stay float32, between Casts or quantised tensors that TensorRT cannot fuse away.
"""

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from grood_edge.errors import ClassifierError
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.layers import prepared, replace_initializers, replace_nodes

__all__ = ["fold_batch_norms", "simplified"]


def simplified(classifier: ClassifierGraph, precision: str) -> ModelProto:
    """Return a copy of the graph to write in `precision`: prepared (`layers.prepared`), batch norms folded.

    Raises:
        ClassifierError: its input is not float32, or it has subgraphs.
    """
    if classifier.input_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(classifier.input_type)
        raise ClassifierError(
            f"the classifier's input is {kind}; {precision} is made of a float32 classifier: export that one"
        )
    return fold_batch_norms(prepared(classifier.model))


def fold_batch_norms(model: ModelProto) -> ModelProto:
    """Put each BatchNormalization into the convolution before it, where nothing else reads that; changes the model.

    With k = scale / sqrt(variance + epsilon): weights k w and bias k (b - mean) + shift, in float64. The convolution
    keeps its name, and makes what the batch norm made. A norm that would give values that are not finite stays.
    """
    graph = model.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    read = [name for node in graph.node for name in node.input] + [value.name for value in graph.output]
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    nodes, made = [], []
    for node in graph.node:
        alone = node.op_type == "BatchNormalization" and read.count(node.input[0]) == 1
        convolution = convolutions.get(node.input[0]) if alone else None
        folded = None if convolution is None else _folded(convolution, node, weights)
        if convolution is None or folded is None:
            nodes.append(node)
            continue
        names = f"{node.output[0]}_folded_weight", f"{node.output[0]}_folded_bias"
        del convolution.input[1:]
        convolution.input.extend(names)
        convolution.output[0] = node.output[0]
        made += [numpy_helper.from_array(array, name) for array, name in zip(folded, names, strict=True)]
    replace_nodes(graph, nodes)
    replace_initializers(graph, [*graph.initializer, *made])
    return model


def _folded(
    convolution: NodeProto, norm: NodeProto, weights: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return weights and bias, float32, of the convolution with the norm in it; None where they cannot be had."""
    if not weights.keys() >= {*convolution.input[1:], *norm.input[1:]}:
        return None
    scale, shift, mean, variance = (weights[name].astype(np.float64) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    kernel = weights[convolution.input[1]].astype(np.float64)
    bias = weights[convolution.input[2]].astype(np.float64) if len(convolution.input) > 2 else 0.0
    with np.errstate(all="ignore"):  # a variance below zero gives NaN
        factor = scale / np.sqrt(variance + epsilon)
        weight = (kernel * factor.reshape(-1, *(1 for _ in kernel.shape[1:]))).astype(np.float32)
        shifted = np.asarray(shift + (bias - mean) * factor, np.float32)
    return (weight, shifted) if np.isfinite(weight).all() and np.isfinite(shifted).all() else None
