"""Preprocessing + classifier + head = one ONNX graph, with the inputs and outputs that `docs/format.md` fixes."""

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, compose, helper, numpy_helper

from grood_edge import __version__
from grood_edge import stored_head as stored
from grood_edge.arrays import Frames
from grood_edge.conformal import DecisionRule
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.head import DECISION_OUTPUTS, head_constants, head_nodes
from grood_edge.export.normal_form import IR_VERSION
from grood_edge.onnx_proto import OPSET
from grood_edge.preprocessing import Preprocessing, normalised_frames
from grood_edge.scoring import Head

__all__ = ["attach_head", "base_model", "network_input"]

_CLASSIFIER = "classifier/"


def base_model(classifier: ClassifierGraph, preprocessing: Preprocessing) -> ModelProto:
    """Return the graph without the head: `image` uint8 `[N, h, w, c]` to `features` `[N, d]` and `logits` `[N, k]`.

    `image` is the classifier's input as `preprocess_frame` makes it, of a camera as well: see `camera.attach_camera`.
    """
    inner = compose.add_prefix(classifier.model, _CLASSIFIER)
    batch: int | str = "N" if classifier.dynamic_batch else 1
    nodes, constants, prepared = _preprocessing_nodes(classifier, preprocessing)
    for node in inner.graph.node:
        node.input[:] = [prepared if name == _CLASSIFIER + classifier.input_name else name for name in node.input]
    nodes += inner.graph.node
    nodes += _output_nodes(classifier)
    image = [batch, preprocessing.height, preprocessing.width, preprocessing.channels]
    return _model(
        nodes,
        [*constants, *inner.graph.initializer],
        [helper.make_tensor_value_info("image", TensorProto.UINT8, image)],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classifier.class_count]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, classifier.dimension]),
        ],
    )


def network_input(classifier: ClassifierGraph, preprocessing: Preprocessing, frames: Frames) -> np.ndarray:
    """Return frames uint8 `[n, h, w, c]` as the classifier takes them: normalised, in its own layout and type.

    In NumPy, so that the graph's own preprocessing can be held against it.
    """
    images = normalised_frames(frames, preprocessing, classifier.layout, classifier.bgr)
    return images.astype(helper.tensor_dtype_to_np_dtype(classifier.input_type))


def attach_head(base: ModelProto, head: Head, space: str, rule: DecisionRule) -> ModelProto:
    """Return the whole graph: the base model with the head, which reads the output `space`, and its statistics."""
    tensors = stored.head_tensors(head) | stored.calibration_tensors(rule)
    bank_dtype = head.bank_dtype if len(head.bank) else None
    batch_dim = base.graph.output[0].type.tensor_type.shape.dim[0]
    batch: int | str = batch_dim.dim_param or batch_dim.dim_value
    return _model(
        [*base.graph.node, *head_nodes(len(head.ood_heads), bank_dtype, space)],
        [
            *base.graph.initializer,
            *head_constants(),
            *(numpy_helper.from_array(value, name) for name, value in tensors.items()),
        ],
        list(base.graph.input),
        [
            *base.graph.output,
            *(helper.make_tensor_value_info(name, kind, [batch]) for name, kind in DECISION_OUTPUTS.items()),
        ],
    )


def _model(
    nodes: list[NodeProto],
    initializers: list[TensorProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
) -> ModelProto:
    graph = helper.make_graph(nodes, "grood_edge", inputs, outputs, initializers)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="grood-edge",
        producer_version=__version__,
    )
    checker.check_model(model)
    return model


def _preprocessing_nodes(
    classifier: ClassifierGraph, preprocessing: Preprocessing
) -> tuple[list[NodeProto], list[TensorProto], str]:
    """Cast first (TensorRT takes uint8 nowhere else), then transpose, normalise, reorder channels, cast.

    Normalising after the transposition gives the same values: onnxruntime broadcasts one value a plane at once, and
    three values a pixel one pixel at a time (1.1 ms of EfficientNet-Lite0's 10).
    """
    nodes: list[NodeProto] = []
    constants: list[TensorProto] = []
    tensor = "image"

    def add(operator: str, extra: list[tuple[str, np.ndarray]], **attributes: Any) -> None:
        nonlocal tensor
        output = f"{stored.PREPROCESS}{operator.lower()}_{len(nodes)}"
        names = [stored.PREPROCESS + name for name, _ in extra]
        constants.extend(numpy_helper.from_array(a, n) for n, (_, a) in zip(names, extra, strict=True))
        nodes.append(helper.make_node(operator, [tensor, *names], [output], name=output, **attributes))
        tensor = output

    channels_first = classifier.layout == "NCHW"
    shape = (-1, 1, 1) if channels_first else (-1,)
    mean, std = (np.array(values, np.float32).reshape(shape) for values in (preprocessing.mean, preprocessing.std))
    add("Cast", [], to=TensorProto.FLOAT)
    if channels_first:
        add("Transpose", [], perm=[0, 3, 1, 2])
    if mean.any():
        add("Sub", [("mean", mean)])
    if (std != 1).any():
        add("Div", [("std", std)])
    if classifier.bgr:
        add("Gather", [("bgr", np.array([2, 1, 0], np.int64))], axis=1 if channels_first else 3)
    if classifier.input_type != TensorProto.FLOAT:
        add("Cast", [], to=classifier.input_type)
    return nodes, constants, tensor


def _output_nodes(classifier: ClassifierGraph) -> list[NodeProto]:
    """From the classifier's own tensors to float32 `logits` `[N, k]` and `features` `[N, d]`."""
    nodes = []

    def chain(tensor: str, steps: list[tuple[str, dict[str, Any]]], output: str) -> None:
        for index, (operator, attributes) in enumerate(steps):
            target = output if index == len(steps) - 1 else f"output/{output}_{index}"
            nodes.append(helper.make_node(operator, [tensor], [target], name=f"output/{output}_{index}", **attributes))
            tensor = target

    to_float: tuple[str, dict[str, Any]] = ("Cast", {"to": TensorProto.FLOAT})
    flatten: tuple[str, dict[str, Any]] = ("Flatten", {"axis": 1})
    # A Cast to the type that a tensor already has is an identity, so float32 needs no case of its own.
    chain(_CLASSIFIER + classifier.logits_tensor, [to_float, flatten], "logits")
    features = [to_float]
    if classifier.pooling == "channels-last":
        features.append(("Transpose", {"perm": [0, 3, 1, 2]}))
    if classifier.pooling != "none":
        features.append(("GlobalAveragePool", {}))
    chain(_CLASSIFIER + classifier.features_tensor, [*features, flatten], "features")
    return nodes
