"""The fp16 rewrite: strongly typed, delicate operators in float32, half the size, and layers that can be kept."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, shape_inference

from grood_edge.errors import ClassifierError
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, graph_from_onnx
from grood_edge.export.features import FeaturePass
from grood_edge.export.graph import base_model, network_input
from grood_edge.export.half import half_layer_errors, half_precision
from grood_edge.export.layers import error_at_features, features_of
from grood_edge.export.rounding import rounded
from grood_edge.ort import open_ort
from grood_edge.preprocessing import Preprocessing
from tests.export.networks import traced_graph

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def types_of(model: ModelProto) -> dict[str, int]:
    graph = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return found | {t.name: t.data_type for t in graph.initializer}


def require_strongly_typed(model: ModelProto) -> None:
    """No operator but Cast sees two float types; Resize takes its scales as float32 by definition."""
    types = types_of(model)
    for node in model.graph.node:
        kinds = {types[name] for name in (*node.input, *node.output) if name} & {HALF, FLOAT}
        assert len(kinds) <= 1 or node.op_type in ("Cast", "Resize"), (node.name, node.op_type)


@pytest.fixture(scope="module")
def digit_half(digit_graph: ClassifierGraph) -> ClassifierGraph:
    return half_precision(digit_graph)


@pytest.fixture(scope="module")
def digit_images(
    digit_graph: ClassifierGraph, digit_pass: FeaturePass, digit_preprocessing: Preprocessing
) -> np.ndarray:
    return network_input(digit_graph, digit_preprocessing, digit_pass.frames[:24])


def test_backbone_is_half_and_the_last_layer_float(digit_half: ClassifierGraph) -> None:
    types = types_of(digit_half.model)
    require_strongly_typed(digit_half.model)
    assert digit_half.input_type == HALF
    assert types[digit_half.input_name] == HALF
    assert types[digit_half.logits_tensor] == FLOAT
    convolutions = [node for node in digit_half.model.graph.node if node.op_type == "Conv"]
    assert {types[node.output[0]] for node in convolutions} == {HALF}
    last = [node for node in digit_half.model.graph.node if node.op_type == "Gemm"][-1]
    assert types[last.input[0]] == types[last.input[1]] == FLOAT
    assert types[last.output[0]] == FLOAT


def test_half_the_size(digit_graph: ClassifierGraph, digit_half: ClassifierGraph) -> None:
    sizes = [len(graph.model.SerializeToString()) for graph in (digit_graph, digit_half)]
    assert sizes[1] < 0.55 * sizes[0]  # node names weigh something in so small a network


def test_features_barely_change(
    digit_graph: ClassifierGraph,
    digit_half: ClassifierGraph,
    digit_pass: FeaturePass,
    digit_preprocessing: Preprocessing,
) -> None:
    models = [base_model(digit_graph, digit_preprocessing), rounded(base_model(digit_half, digit_preprocessing))]
    whole, low = (
        open_ort(model.SerializeToString()).run({"image": digit_pass.frames[:64]}, ["features", "logits"])
        for model in models
    )
    assert low["features"].dtype == np.float32
    error = np.linalg.norm(low["features"] - whole["features"], axis=1) / np.linalg.norm(whole["features"], axis=1)
    assert 1e-5 < error.mean() < 5e-3  # rounded, and to eleven bits
    assert (low["logits"].argmax(1) == whole["logits"].argmax(1)).all()


def test_no_cast_stands_twice(digit_half: ClassifierGraph) -> None:
    casts = [(n.input[0], n.attribute[0].i) for n in digit_half.model.graph.node if n.op_type == "Cast"]
    assert len(casts) == len(set(casts))


@pytest.mark.parametrize("name", ["vit", "squeezenet", "conv-bn-gap", "lenet", "cosine"])
def test_other_networks(name: str) -> None:
    graph = traced_graph(name)
    half = half_precision(graph)
    require_strongly_typed(half.model)
    delicate = {"LayerNormalization", "Softmax", "BatchNormalization", "ReduceMean", "Exp", "Pow", "Sqrt"}
    types = types_of(half.model)
    for node in half.model.graph.node:
        if node.op_type in delicate and node.op_type != "ReduceMean":
            assert types[node.output[0]] == FLOAT, node.name


def test_a_kept_layer_is_float_with_its_own_weights(digit_graph: ClassifierGraph) -> None:
    name = next(node.name for node in half_precision(digit_graph).model.graph.node if node.op_type == "Conv")
    kept = half_precision(digit_graph, frozenset({name})).model
    require_strongly_typed(kept)
    node = next(node for node in kept.graph.node if node.name == name)
    types = types_of(kept)
    assert types[node.output[0]] == types[node.input[1]] == FLOAT
    assert node.input[1] in {t.name for t in digit_graph.model.graph.initializer}


def scaled(graph: ClassifierGraph, factor: float) -> ClassifierGraph:
    """Return the same function with the first convolution's output larger: the second one's weights are smaller."""
    model = ModelProto()
    model.CopyFrom(graph.model)
    first, second = (node for node in list(model.graph.node)[:4] if node.op_type == "Conv")
    factors = dict.fromkeys(first.input[1:], factor) | {second.input[1]: 1 / factor}
    for tensor in model.graph.initializer:
        if tensor.name in factors:
            values = numpy_helper.to_array(tensor) * np.float32(factors[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return replace(graph, model=model)


def test_weights_beyond_half_force_float(digit_graph: ClassifierGraph) -> None:
    half = half_precision(scaled(digit_graph, 1e6))
    require_strongly_typed(half.model)
    types = types_of(half.model)
    first = next(node for node in half.model.graph.node if node.op_type == "Conv")
    assert types[first.output[0]] == FLOAT


@pytest.mark.parametrize("factor", [4e4, 1e6])
def test_layer_errors_name_an_overflow(digit_graph: ClassifierGraph, digit_images: np.ndarray, factor: float) -> None:
    """Until it overflows nowhere, nodes are given back; the network then answers as in float32."""
    spoilt, kept = scaled(digit_graph, factor), frozenset[str]()
    for _ in range(8):
        worst = {e.node for e in half_layer_errors(spoilt, digit_images[:4], kept) if e.error == float("inf")}
        if not worst:
            break
        assert not worst & kept
        kept |= worst
    assert kept
    assert not worst
    half = half_precision(spoilt, kept)
    found = features_of(rounded(half.model), half, digit_images.astype(np.float16).astype(np.float32))
    assert error_at_features(found, features_of(spoilt.model, spoilt, digit_images)) < 0.02


def test_layer_errors_are_small_and_sorted(digit_graph: ClassifierGraph, digit_images: np.ndarray) -> None:
    errors = half_layer_errors(digit_graph, digit_images[:8], frozenset())
    layers = [node.op_type for node in digit_graph.model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(errors) == len(layers) - 1  # all but the last
    assert [e.error for e in errors] == sorted((e.error for e in errors), reverse=True)
    assert 0 < errors[-1].error <= errors[0].error < 0.02


def test_refused(digit_half: ClassifierGraph, digit_graph: ClassifierGraph) -> None:
    with pytest.raises(ClassifierError, match="input is FLOAT16; fp16 is made of a float32 classifier"):
        half_precision(digit_half)
    everything = frozenset(node.name for node in half_precision(digit_graph).model.graph.node)
    with pytest.raises(ClassifierError, match="no convolution or product"):
        half_precision(digit_graph, everything)


def test_control_flow_is_refused() -> None:
    """An If in front of the network."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])], "b", [], [helper.make_tensor_value_info("b", FLOAT, None)]
    )
    nodes = [
        helper.make_node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch),
        helper.make_node("GlobalAveragePool", ["i"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.ones((3, 2), np.float32), "w"), numpy_helper.from_array(np.array(True), "yes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    classifier = graph_from_onnx(model, "onnx", ClassifierOptions(features="f"))
    with pytest.raises(ClassifierError, match="has a subgraph"):
        half_precision(classifier)


def test_constants_in_every_form() -> None:
    """`value_float` and its like are constants, too."""
    nodes = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Constant", [], ["axes"], value_ints=[2, 3]),
        helper.make_node("Conv", ["x", "k"], ["c"]),
        helper.make_node("Mul", ["c", "two"], ["m"]),
        helper.make_node("ReduceMean", ["m", "axes"], ["f"], keepdims=0),
        helper.make_node("Gemm", ["f", "w"], ["logits"]),
    ]
    rng = np.random.default_rng(0)
    arrays = {"k": rng.standard_normal((6, 3, 3, 3)), "w": rng.standard_normal((6, 2))}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["N", 2])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    half = half_precision(graph_from_onnx(model, "onnx", ClassifierOptions()))
    require_strongly_typed(half.model)
    assert "Constant" not in {node.op_type for node in half.model.graph.node}
