"""The int8 rewrite: which tensors are quantised and how, what onnxruntime computes of it, and which layers are kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from grood_edge.errors import ClassifierError
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, load_classifier
from grood_edge.export.features import FeaturePass
from grood_edge.export.graph import network_input
from grood_edge.export.half import half_precision
from grood_edge.export.layers import error_at_features, features_of, layers_named, logits_layer
from grood_edge.export.preflight import preflight
from grood_edge.export.quantize import (
    LEVELS,
    WEIGHT_LEVELS,
    choose_ranges,
    default_float_layers,
    layer_errors,
    quantized,
)
from grood_edge.export.ranges import Ranges
from grood_edge.preprocessing import Preprocessing
from tests.export.backbones import fitted_network
from tests.export.conftest import Batches
from tests.export.networks import legacy_onnx, random_batch, traced_graph

NONE: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def images(digit_graph: ClassifierGraph, digit_pass: FeaturePass, digit_preprocessing: Preprocessing) -> np.ndarray:
    return network_input(digit_graph, digit_preprocessing, digit_pass.frames[:64])


@pytest.fixture(scope="module")
def ranges(digit_graph: ClassifierGraph, images: np.ndarray) -> Ranges:
    return choose_ranges(digit_graph, images, NONE)[0]


@pytest.fixture(scope="module")
def low(digit_graph: ClassifierGraph, ranges: Ranges) -> ClassifierGraph:
    return quantized(digit_graph, ranges, NONE)


def arrays(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def makers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def test_every_pair_is_symmetric_int8(low: ClassifierGraph) -> None:
    values = arrays(low.model)
    pairs = [n for n in low.model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 4
    for node in pairs:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
        assert (values[node.input[1]] > 0).all()


def test_weights_are_stored_as_int8_one_scale_a_channel(digit_graph: ClassifierGraph, low: ClassifierGraph) -> None:
    values, made, before = arrays(low.model), makers(low.model), arrays(digit_graph.model)
    quantised = [n for n in low.model.graph.node if n.op_type in ("Conv", "Gemm") and n.input[1] in made]
    assert quantised
    for node in quantised:
        stored, scale, _ = (values[name] for name in made[node.input[1]].input)
        original = before[node.input[1].split("_axis")[0]]
        assert stored.dtype == np.int8
        assert np.abs(stored).max() == WEIGHT_LEVELS
        shape = [-1] + [1] * (original.ndim - 1)  # Conv, and Gemm with transB
        assert np.abs(stored * scale.reshape(shape) - original).max() <= scale.max() * 0.501
        assert node.input[1].split("_axis")[0] not in values  # no float copy is left
        assert all(values[name].dtype == np.float32 for name in node.input[2:])  # the bias


def test_first_and_last_layer_stay_float(digit_graph: ClassifierGraph, low: ClassifierGraph) -> None:
    made = makers(low.model)
    first = next(node for node in low.model.graph.node if node.op_type == "Conv")
    (*_, last) = logits_layer(low.model, low)
    for node in (first, last):
        assert made.get(node.input[1], node).op_type != "DequantizeLinear"


def test_features_stay_near(digit_graph: ClassifierGraph, low: ClassifierGraph, images: np.ndarray) -> None:
    reference = features_of(digit_graph.model, digit_graph, images)
    error = error_at_features(features_of(low.model, low, images), reference)
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("level", [0, 1, 2, 99])
def test_onnxruntime_computes_the_same_at_every_level(low: ClassifierGraph, images: np.ndarray, level: int) -> None:
    """8-bit weights would saturate in its kernels on x86 without VNNI, from level 2 on."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(low.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = onnxruntime.InferenceSession(low.model.SerializeToString(), plain, providers=["CPUExecutionProvider"])
    found, expected = (s.run([low.features_tensor], {low.input_name: images})[0] for s in (session, exact))
    assert error_at_features(found.astype(np.float64), expected.astype(np.float64)) < 0.02


def test_weights_cannot_saturate_16_bits() -> None:
    """Two products of an uint8 and a weight, added into int16, as x86 without VNNI does."""
    assert 2 * 255 * WEIGHT_LEVELS <= np.iinfo(np.int16).max < 2 * 255 * LEVELS


def test_a_kept_layer_is_untouched(digit_graph: ClassifierGraph, ranges: Ranges) -> None:
    name = [node.name for node in digit_graph.model.graph.node if node.op_type == "Conv"][1]
    kept = quantized(digit_graph, ranges, frozenset({name})).model
    node = next(node for node in kept.graph.node if node.name == name)
    before = next(node for node in digit_graph.model.graph.node if node.name == name)
    assert list(node.input) == list(before.input)
    assert (arrays(kept)[node.input[1]] == arrays(digit_graph.model)[node.input[1]]).all()


def test_layer_errors(digit_graph: ClassifierGraph, ranges: Ranges, images: np.ndarray) -> None:
    errors = layer_errors(digit_graph, ranges, images[:8], NONE)
    assert [e.error for e in errors] == sorted((e.error for e in errors), reverse=True)
    assert all(0 < e.error < 0.1 for e in errors)
    fewer = layer_errors(digit_graph, ranges, images[:8], frozenset({errors[0].node}))
    assert fewer == errors[1:]


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_other_networks(name: str, train_batches: Batches, tmp_path: Path) -> None:
    """Batch norms are folded; depthwise convolutions start in float; TensorRT refuses nothing; features stay near."""
    (frames, labels), *_ = train_batches
    data = np.ascontiguousarray(frames[:48].transpose(0, 3, 1, 2).astype(np.float32) / 255)
    network = fitted_network(name, frames, labels)
    graph = load_classifier(legacy_onnx(network, tmp_path / "n.onnx", data[:1], open_batch=True), ClassifierOptions())
    kept = default_float_layers(graph)
    assert len(kept) == (2 if name == "mobilenet" else 0)
    found, trials = choose_ranges(graph, data, kept)
    assert {trial.method for trial in trials} == {"minmax", "percentile", "entropy"}
    assert found.method == min(trials, key=lambda trial: trial.feature_error).method
    low = quantized(graph, found, kept)
    kinds = [node.op_type for node in low.model.graph.node]
    assert "QuantizeLinear" in kinds
    assert "BatchNormalization" not in kinds
    assert [f.sentence for f in preflight(low.model) if f.kind == "refused"] == []
    reference = features_of(graph.model, graph, data[:16])
    assert error_at_features(features_of(low.model, low, data[:16]), reference) < 0.2


@pytest.mark.parametrize("name", ["squeezenet", "conv-bn-gap"])
def test_networks_with_nothing_between_first_and_last_layer(name: str) -> None:
    with pytest.raises(ClassifierError, match="the first and the last layer never are"):
        choose_ranges(traced_graph(name), random_batch(3, 48), NONE)


def test_residual_branches_are_quantised_before_the_sum() -> None:
    graph = traced_graph("vit")
    low = quantized(graph, choose_ranges(graph, random_batch(3, 16), NONE)[0], NONE)
    made = makers(low.model)
    sums = [n for n in low.model.graph.node if n.op_type == "Add" and all(name in made for name in n.input)]
    both = [n for n in sums if all(made[name].op_type == "DequantizeLinear" for name in n.input)]
    assert both


def test_names_of_tensors_and_nodes(digit_graph: ClassifierGraph) -> None:
    node = next(node for node in digit_graph.model.graph.node if node.op_type == "Conv")
    assert layers_named(digit_graph, frozenset({node.output[0]})) == {node.name}
    assert layers_named(digit_graph, frozenset({node.name})) == {node.name}
    with pytest.raises(ClassifierError, match=r"--keep-float 'conv_99' is no node or tensor.*Conv"):
        layers_named(digit_graph, frozenset({"conv_99"}))


def test_refused(digit_graph: ClassifierGraph, ranges: Ranges, images: np.ndarray) -> None:
    half: Any = half_precision(digit_graph)
    with pytest.raises(ClassifierError, match="FLOAT16; int8 is made of a float32 classifier"):
        quantized(half, ranges, NONE)
    everything = frozenset(node.name for node in digit_graph.model.graph.node)
    with pytest.raises(ClassifierError, match="no convolution or product"):
        quantized(digit_graph, ranges, everything)
    with pytest.raises(ClassifierError, match="too few for the ranges"):
        choose_ranges(digit_graph, images[:8], NONE)
    broken = ModelProto()
    broken.CopyFrom(digit_graph.model)
    for tensor in broken.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 4:
            values = np.full(tuple(tensor.dims), np.inf, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(ClassifierError, match="no finite range"):
        choose_ranges(replace(digit_graph, model=broken), images, NONE)
