"""Where the features are: on graphs from the wild, and what a user reads when it is not clear."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from grood_edge.errors import ClassifierError
from grood_edge.export.feature_point import FeaturePoint, find_feature_point, pruned
from grood_edge.export.normal_form import load_onnx, normal_form
from grood_edge.ort import open_ort
from tests.export.networks import CONV_NODES, GEMM, onnx_classifier, onnx_tensor, random_batch

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def prepared(model: ModelProto) -> ModelProto:
    return shape_inference.infer_shapes(normal_form(model), data_prop=True)


def find(nodes: list[NodeProto], features: str | None = None, outputs: tuple[str, ...] = ("logits",)) -> FeaturePoint:
    return find_feature_point(prepared(onnx_classifier(nodes, outputs=outputs)), features)


@pytest.mark.parametrize(
    ("name", "dimension", "pooling", "last"),
    [
        ("bvlc_alexnet", 4096, "none", "Gemm"),
        ("densenet121", 1024, "channels-first", "Conv"),
        ("inception_v1", 1024, "none", "Gemm"),
        ("inception_v2", 1024, "none", "Gemm"),
        ("resnet50", 2048, "none", "Gemm"),
        ("shufflenet", 544, "none", "Gemm"),
        ("squeezenet", 512, "channels-first", "Conv"),
        ("vgg19", 4096, "none", "Gemm"),
        ("zfnet512", 1024, "none", "Gemm"),
    ],
)
def test_graphs_of_the_onnx_package(name: str, dimension: int, pooling: str, last: str) -> None:
    model = prepared(load_onnx(LIGHT / f"light_{name}.onnx"))  # opset 9, input lists and axes as they were then
    point = find_feature_point(model, None)
    assert (point.class_count, point.dimension, point.pooling) == (1000, dimension, pooling)
    ends = [node.op_type for node in pruned(model, [point.logits]).graph.node if node.op_type in ("Gemm", "Conv")]
    before = [node.op_type for node in pruned(model, [point.features]).graph.node if node.op_type in ("Gemm", "Conv")]
    assert ends == [*before, last]  # exactly one layer with weights lies between features and logits
    assert all(node.op_type != "Softmax" for node in pruned(model, [point.logits]).graph.node)


def test_dropout_and_identity_before_the_last_layer_are_stepped_over() -> None:
    nodes = [
        *CONV_NODES,
        helper.make_node("Dropout", ["flat"], ["dropped"]),
        helper.make_node("Identity", ["dropped"], ["same"]),
        helper.make_node("Gemm", ["same", "w2", "b2"], ["logits"]),
    ]
    assert find(nodes).features == "flat"


@pytest.mark.parametrize(("operator", "opset"), [("Softmax", 11), ("LogSoftmax", 11), ("Softmax", 13), ("Softmax", 19)])
def test_logits_lie_before_a_final_softmax(operator: str, opset: int) -> None:
    gemm = helper.make_node("Gemm", ["flat", "w2", "b2"], ["scores"])
    final = helper.make_node(operator, ["scores"], ["logits"], axis=1)
    model = onnx_classifier([*CONV_NODES, gemm, final], opset=opset)
    form = prepared(model)
    point = find_feature_point(form, None)
    assert (point.features, point.dimension, point.class_count) == ("flat", 6, 5)
    images = random_batch(3)
    logits = open_ort(pruned(form, [point.logits]).SerializeToString()).run({"image": images})[point.logits]
    plain = onnx_classifier([*CONV_NODES, GEMM], opset=17)
    assert abs(logits - open_ort(plain.SerializeToString()).run({"image": images})["logits"]).max() < 1e-5


def test_softmax_of_attention_is_no_ending() -> None:
    nodes = [
        *CONV_NODES,
        helper.make_node("Softmax", ["flat"], ["weights"], axis=1),
        helper.make_node("Mul", ["flat", "weights"], ["attended"]),
        helper.make_node("Gemm", ["attended", "w2", "b2"], ["logits"]),
    ]
    point = find(nodes)
    assert (point.logits, point.features) == ("logits", "attended")


def test_sigmoid_ending_is_refused() -> None:
    gemm = helper.make_node("Gemm", ["flat", "w2", "b2"], ["scores"])
    with pytest.raises(ClassifierError, match=r"ends in a Sigmoid.*expected logits or a Softmax"):
        find([*CONV_NODES, gemm, helper.make_node("Sigmoid", ["scores"], ["logits"])])


def test_two_outputs_are_refused_with_names_and_shapes() -> None:
    with pytest.raises(ClassifierError, match=r"2 outputs \(logits \[None, 5\], flat \[None, 6\]\); expected one"):
        find([*CONV_NODES, GEMM], outputs=("logits", "flat"))


def test_unknown_features_list_the_candidates_with_shapes() -> None:
    with pytest.raises(ClassifierError, match=r"no tensor 'penultimate'; candidates: .*relu \[None, 6, 16, 16\].*flat"):
        find([*CONV_NODES, GEMM], features="penultimate")


@pytest.mark.parametrize("name", ["image", "w2"])
def test_neither_input_nor_weights_can_be_features(name: str) -> None:
    with pytest.raises(ClassifierError, match=f"no tensor '{name}'; candidates: "):
        find([*CONV_NODES, GEMM], features=name)


def test_features_of_another_rank_are_refused() -> None:
    rank_3 = helper.make_node("Unsqueeze", ["flat", "two"], ["deep"])
    model = onnx_classifier([*CONV_NODES, rank_3, GEMM], [helper.make_tensor("two", 7, [1], [2])], outputs=("logits",))
    with pytest.raises(ClassifierError, match=r"'deep' has shape \[None, 6, 1\]; expected \[N, d\] or \[N, d, h, w\]"):
        find_feature_point(prepared(model), "deep")


def _sum_of_two_heads() -> list[NodeProto]:
    return [
        *CONV_NODES,
        helper.make_node("Gemm", ["flat", "w2", "b2"], ["first"]),
        helper.make_node("Gemm", ["flat", "w2"], ["second"]),
        helper.make_node("Add", ["first", "second"], ["logits"], name="ensemble"),
    ]


def test_ambiguous_ending_lists_the_candidates_and_the_option() -> None:
    with pytest.raises(ClassifierError) as caught:
        find(_sum_of_two_heads())
    message = str(caught.value)
    assert "the logits come from Add 'ensemble', not from one linear layer" in message
    assert "--features TENSOR" in message
    assert "flat [None, 6]" in message
    assert "first [None, 5]" in message
    assert find(_sum_of_two_heads(), features="flat").dimension == 6


def test_wide_last_convolution_is_no_linear_layer() -> None:
    wide = helper.make_node("Conv", ["relu", "w3x3"], ["map"], pads=[1, 1, 1, 1])
    pool = helper.make_node("GlobalAveragePool", ["map"], ["logits"])
    model = onnx_classifier([*CONV_NODES[:2], wide, pool], [onnx_tensor("w3x3", 5, 6, 3, 3)])
    with pytest.raises(ClassifierError, match=r"before the last Conv has shape \[None, 6, 16, 16\].*--features TENSOR"):
        find_feature_point(prepared(model), None)


def test_no_linear_layer_at_all() -> None:
    with pytest.raises(ClassifierError, match="no linear layer before its output"):
        find(
            [
                helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
                helper.make_node("Flatten", ["pooled"], ["logits"]),
            ]
        )


def test_one_class_is_refused() -> None:
    model = onnx_classifier([*CONV_NODES, GEMM], [onnx_tensor("w2", 6, 1), onnx_tensor("b2", 1)])
    with pytest.raises(ClassifierError, match="1 output class; a score needs at least two"):
        find_feature_point(prepared(model), None)


def test_segmentation_output_is_refused() -> None:
    conv = helper.make_node("Conv", ["relu", "w1x1"], ["logits"])
    model = onnx_classifier([*CONV_NODES[:2], conv], [onnx_tensor("w1x1", 5, 6, 1, 1)])
    with pytest.raises(ClassifierError, match=r"shape \[None, 5, 16, 16\]; expected logits \[N, classes\]"):
        find_feature_point(prepared(model), None)


def test_pruning_drops_what_nobody_needs() -> None:
    dead = helper.make_node("Gemm", ["flat", "dead"], ["auxiliary"])
    model = prepared(onnx_classifier([*CONV_NODES, dead, GEMM], [onnx_tensor("dead", 6, 9)]))
    result = pruned(model, ["logits", "flat"])
    assert "auxiliary" not in {name for node in result.graph.node for name in node.output}
    assert {tensor.name for tensor in result.graph.initializer} == {"w", "w2", "b2"}
    assert [output.name for output in result.graph.output] == ["logits", "flat"]
    assert open_ort(result.SerializeToString()).run({"image": random_batch(3)})["flat"].shape == (6, 6)


def test_pruning_keeps_what_a_branch_takes_from_outside() -> None:
    def branch(name: str) -> GraphProto:
        gemm = helper.make_node("Gemm", ["flat", "w2", "b2"], [name])
        return helper.make_graph([gemm], name, [], [helper.make_empty_tensor_value_info(name)])

    choose = helper.make_node("If", ["condition"], ["logits"], then_branch=branch("yes"), else_branch=branch("no"))
    weights = [helper.make_tensor("condition", 9, [], [True]), onnx_tensor("w2", 6, 5), onnx_tensor("b2", 5)]
    result = pruned(prepared(onnx_classifier([*CONV_NODES, choose], weights)), ["logits"])
    assert open_ort(result.SerializeToString()).run({"image": random_batch(3)})["logits"].shape == (6, 5)


@pytest.mark.parametrize(("tensor", "pooling"), [("nhwc", "channels-last"), ("nchw", "channels-first")])
def test_named_spatial_features_are_pooled_over_the_right_axes(tensor: str, pooling: str) -> None:
    """Conv -> `nchw` -> Transpose -> `nhwc` -> ReduceMean -> MatMul, as converters from TensorFlow write it."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "w": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "v": rng.standard_normal((16, 5)).astype(np.float32),
        "axes": np.array([1, 2], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["nchw"], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["nchw"], ["nhwc"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMean", ["nhwc", "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    point = find_feature_point(shape_inference.infer_shapes(model), tensor)
    assert (point.dimension, point.pooling) == (16, pooling)
    assert find_feature_point(shape_inference.infer_shapes(model), None).features == "pooled"
