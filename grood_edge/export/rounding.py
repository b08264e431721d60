"""A float16 graph on the CPU, really rounded.

onnxruntime's CPU provider has few float16 kernels: it computes a float16 graph in float32 between casts of its own, and
removes pairs of them. So nothing overflows there, and nothing is rounded that a GPU rounds. Here every float16 tensor
becomes float32 and is rounded to half where it is made: too large values become infinite, small ones subnormal.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, load_model, numpy_helper, shape_inference

from grood_edge.export.layers import replace_nodes

__all__ = ["rounded", "surviving_roundings"]

_MARK = "rounding/"


def rounded(model: ModelProto) -> ModelProto:
    """Return a float32 graph in which every float16 tensor of `model` is rounded to half; names stay.

    float16 inputs and outputs become float32, too. An input must hold values that are halves.
    """
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    half = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    result = ModelProto()
    result.CopyFrom(model)
    result.graph.ClearField("value_info")
    replace_nodes(result.graph, [made for node in result.graph.node for made in _rounded_node(node, half)])
    for tensor in result.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*result.graph.input, *result.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return result


def surviving_roundings(model: ModelProto) -> int:
    """Count the roundings that are left after onnxruntime's optimisation of a `rounded` graph."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options: Any = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        nodes = load_model(path).graph.node
    halves = {node.output[0] for node in nodes if _cast_to(node) == TensorProto.FLOAT16}
    return sum(_cast_to(node) == TensorProto.FLOAT and node.input[0] in halves for node in nodes)


def _cast_to(node: NodeProto) -> int | None:
    return next((a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to"), None)


def _rounded_node(node: NodeProto, half: set[str]) -> list[NodeProto]:
    if _cast_to(node) == TensorProto.FLOAT16:
        next(a for a in node.attribute if a.name == "to").i = TensorProto.FLOAT
    made = [node]
    for index, name in enumerate(node.output):
        if name in half:
            node.output[index] = f"{_MARK}{name}/raw"
            low = f"{_MARK}{name}/half"
            made.append(helper.make_node("Cast", [node.output[index]], [low], name=low, to=TensorProto.FLOAT16))
            made.append(helper.make_node("Cast", [low], [name], name=f"{_MARK}{name}", to=TensorProto.FLOAT))
    return made
