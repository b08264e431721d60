"""Batch norms disappear into the convolutions before them, before a classifier changes its precision.

Left as a node, a batch norm would stay float32, between Casts or quantised tensors that TensorRT cannot fuse away.
"""

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from grood_edge.export.layers import replace_nodes

__all__ = ["fold_batch_norms"]


def fold_batch_norms(model: ModelProto) -> ModelProto:
    """Put each BatchNormalization into the convolution before it, where nothing else reads that; changes the model.

    With k = scale / sqrt(variance + epsilon): weights k w and bias k (b - mean) + shift, in float64. The convolution
    keeps its name, and makes what the batch norm made. A norm that would give values that are not finite stays.
    """
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    read = [name for node in model.graph.node for name in node.input] + [value.name for value in model.graph.output]
    producers = {name: node for node in model.graph.node for name in node.output}
    nodes, made = [], []
    for node in model.graph.node:
        convolution = producers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        alone = convolution is not None and convolution.op_type == "Conv" and read.count(node.input[0]) == 1
        folded = None
        if alone and convolution is not None and weights.keys() >= {*convolution.input[1:], *node.input[1:]}:
            folded = _folded(convolution, node, weights)
        if convolution is None or folded is None:
            nodes.append(node)
            continue
        names = f"{node.output[0]}_folded_weight", f"{node.output[0]}_folded_bias"
        del convolution.input[1:]
        convolution.input.extend(names)
        convolution.output[0] = node.output[0]
        made += [numpy_helper.from_array(array, name) for array, name in zip(folded, names, strict=True)]
    replace_nodes(model, nodes)
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in (*model.graph.initializer, *made) if tensor.name in used]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(kept)
    return model


def _folded(
    convolution: NodeProto, norm: NodeProto, weights: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return weights and bias, float32, of the convolution with the norm in it; None where they are not finite."""
    scale, shift, mean, variance = (weights[name].astype(np.float64) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    kernel = weights[convolution.input[1]].astype(np.float64)
    bias = weights[convolution.input[2]].astype(np.float64) if len(convolution.input) > 2 else 0.0
    with np.errstate(all="ignore"):  # a variance below zero gives NaN
        factor = scale / np.sqrt(variance + epsilon)
        weight = (kernel * factor.reshape(-1, *(1 for _ in kernel.shape[1:]))).astype(np.float32)
        shifted = np.asarray(shift + (bias - mean) * factor, np.float32)
    return (weight, shifted) if np.isfinite(weight).all() and np.isfinite(shifted).all() else None
