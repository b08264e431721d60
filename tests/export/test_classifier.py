"""One normal form for every source: the same network as nn.Module, .pt2 and .onnx is the same classifier graph."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper, shape_inference
from torch import nn

from grood_edge.errors import ClassifierError
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, graph_from_onnx, load_classifier
from grood_edge.export.normal_form import IR_VERSION
from grood_edge.onnx_proto import OPSET
from grood_edge.ort import open_ort
from tests.export.networks import (
    CLASSES,
    CONV_NODES,
    GEMM,
    ONNX_CASES,
    OPTIONS,
    SIZE,
    TORCH_CASES,
    Expectation,
    legacy_onnx,
    onnx_classifier,
    onnx_tensor,
    random_batch,
    saved_pt2,
    torch_network,
    traced_graph,
)


def run_graph(graph: ClassifierGraph, images: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Run a classifier graph: logits `[n, classes]`, and features `[n, d]` pooled as the graph says."""
    model = open_ort(graph.model.SerializeToString())
    runs = [model.run({graph.input_name: images[i : i + batch]}) for i in range(0, len(images), batch)]
    logits = np.concatenate([run[graph.logits_tensor] for run in runs])
    features = np.concatenate([run[graph.features_tensor] for run in runs])
    axes = {"none": (), "channels-first": (2, 3), "channels-last": (1, 2)}[graph.pooling]
    return logits.reshape(len(images), -1), features.mean(axis=axes) if axes else features


def module_outputs(network: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        outputs: np.ndarray = network(torch.from_numpy(images)).numpy()
    return outputs


def last_layer_inputs(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """What enters the last linear or 1x1 convolution layer, pooled."""
    layers = [part for part in network.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    seen: list[torch.Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module_outputs(network, images)
    handle.remove()
    pooled = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]
    inputs: np.ndarray = pooled.numpy()
    return inputs


def assert_expected(graph: ClassifierGraph, expected: Expectation) -> None:
    inferred = shape_inference.infer_shapes(graph.model)
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*inferred.graph.value_info, *inferred.graph.output)}
    assert len(shapes[graph.features_tensor]) == expected.rank
    assert (graph.pooling, graph.dimension) == (expected.pooling, expected.dimension)
    assert (graph.layout, graph.channels, graph.class_count) == (expected.layout, expected.channels, expected.classes)
    assert graph.dynamic_batch
    assert [o.version for o in graph.model.opset_import if o.domain == ""] == [OPSET]
    assert graph.model.ir_version == IR_VERSION


@pytest.mark.parametrize("name", TORCH_CASES)
def test_module_gives_its_own_logits_and_features(name: str) -> None:
    expected = TORCH_CASES[name].expected
    network, graph = torch_network(name), traced_graph(name)
    images = random_batch(expected.channels)
    assert_expected(graph, expected)
    outputs = module_outputs(network, images)
    for batch in (1, 2, 3):
        logits, features = run_graph(graph, images, batch)
        if expected.ends_in_softmax:
            probabilities = np.exp(outputs) if name == "log-softmax" else outputs
            assert np.abs(logits.sum(axis=1) - 1).min() > 1e-2  # not the probabilities themselves
            logits = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(logits, probabilities, atol=1e-5)
        else:
            np.testing.assert_allclose(logits, outputs, atol=1e-4)
        assert features.shape == (len(images), expected.dimension)
        if name == "cosine":
            np.testing.assert_allclose(np.linalg.norm(features, axis=1), 16, rtol=1e-5)
        else:
            np.testing.assert_allclose(features, last_layer_inputs(network, images), atol=1e-4)


@pytest.mark.parametrize("name", ["squeezenet", "vit"])
def test_module_pt2_and_onnx_are_the_same_classifier(name: str, tmp_path: Path) -> None:
    network, images = torch_network(name), random_batch(3)
    reference, reference_features = run_graph(traced_graph(name), images, 2)
    pt2 = load_classifier(saved_pt2(network, tmp_path / "network.pt2", images), OPTIONS)
    onnx = load_classifier(str(legacy_onnx(network, tmp_path / "network.onnx", images, open_batch=True)), OPTIONS)
    assert (traced_graph(name).source, pt2.source, onnx.source) == ("module", "pt2", "onnx")
    for graph in (pt2, onnx):
        assert (graph.dimension, graph.pooling, graph.class_count) == (
            TORCH_CASES[name].expected.dimension,
            TORCH_CASES[name].expected.pooling,
            CLASSES,
        )
        logits, features = run_graph(graph, images, 2 if graph.dynamic_batch else 1)
        np.testing.assert_allclose(logits, reference, atol=1e-4)
        np.testing.assert_allclose(features, reference_features, atol=1e-4)


@pytest.mark.parametrize("name", ONNX_CASES)
def test_onnx_written_by_hand(name: str) -> None:
    expected = ONNX_CASES[name].expected
    original = ONNX_CASES[name].build()
    graph = graph_from_onnx(original, "onnx", OPTIONS)
    assert_expected(graph, expected)
    dtype = helper.tensor_dtype_to_np_dtype(graph.input_type)
    assert dtype == (np.float16 if name == "fp16" else np.float32)
    images = random_batch(3).astype(dtype)
    if expected.layout == "NHWC":
        images = images.transpose(0, 2, 3, 1)
    reference = open_ort(original.SerializeToString()).run({"image": images})["logits"].reshape(len(images), -1)
    tolerance = 2e-3 if name == "fp16" else 1e-5
    for batch in (1, 2, 3):
        logits, features = run_graph(graph, images, batch)
        np.testing.assert_allclose(logits, reference, atol=tolerance)
        head = {t.name: numpy_helper.to_array(t) for t in original.graph.initializer}
        weights, bias = head.get("w2", np.squeeze(head.get("w1x1", np.zeros(0))).T), head.get("b2", np.zeros(CLASSES))
        np.testing.assert_allclose(features @ weights + bias, reference, atol=tolerance)  # linear in the features


@pytest.mark.parametrize("name", ["conv-bn-gap", "lenet", "squeezenet", "mlp"])
def test_fixed_batch_is_freed(name: str, tmp_path: Path) -> None:
    network, images = torch_network(name), random_batch(3)
    path = legacy_onnx(network, tmp_path / "fixed.onnx", images)
    assert open_ort(path.read_bytes()).inputs["image"][0] == 1  # as torch.onnx.export writes it by default
    graph = load_classifier(path, OPTIONS)
    assert graph.dynamic_batch
    for batch in (1, 2, 3, 6):
        np.testing.assert_allclose(run_graph(graph, images, batch)[0], module_outputs(network, images), atol=1e-4)


def test_batch_of_four_is_freed() -> None:
    flatten = helper.make_node("Reshape", ["pooled", "shape"], ["flat"])
    shape = numpy_helper.from_array(np.array([4, -1], np.int64), "shape")
    graph = graph_from_onnx(onnx_classifier([*CONV_NODES[:3], flatten, GEMM], [shape], batch=4), "onnx", OPTIONS)
    assert graph.dynamic_batch
    assert run_graph(graph, random_batch(3), 3)[0].shape == (6, CLASSES)


def _squeezed() -> ModelProto:
    """Squeezes the batch away and flattens to `[1, -1]`: opening the batch gives other shapes at batch 1 already."""
    return onnx_classifier(
        [
            helper.make_node("Squeeze", ["image", "first"], ["single"]),
            helper.make_node("Reshape", ["single", "shape"], ["flat"]),
            GEMM,
        ],
        [
            numpy_helper.from_array(np.array([0], np.int64), "first"),
            numpy_helper.from_array(np.array([1, -1], np.int64), "shape"),
            onnx_tensor("w2", 3 * SIZE * SIZE, CLASSES),
        ],
        batch=1,
    )


def _centred_over_batch() -> ModelProto:
    """Adds the mean over the batch: every batch size runs, and each gives other logits."""
    return onnx_classifier(
        [
            *CONV_NODES,
            helper.make_node("ReduceMean", ["flat"], ["centre"], axes=[0], keepdims=1),
            helper.make_node("Add", ["flat", "centre"], ["mixed"]),
            helper.make_node("Gemm", ["mixed", "w2", "b2"], ["logits"]),
        ],
        batch=1,
    )


@pytest.mark.parametrize("build", [_squeezed, _centred_over_batch])
def test_network_that_cannot_be_freed_keeps_batch_1(build: object) -> None:
    assert callable(build)
    original = build()
    graph = graph_from_onnx(original, "onnx", OPTIONS)
    assert not graph.dynamic_batch
    images = random_batch(3)
    reference = open_ort(original.SerializeToString())
    expected = np.concatenate([reference.run({"image": image[None]})["logits"] for image in images])
    np.testing.assert_allclose(run_graph(graph, images, 1)[0], expected, atol=1e-5)


def test_vision_transformer_of_the_old_exporter_keeps_batch_1(tmp_path: Path) -> None:
    images = random_batch(3)
    graph = load_classifier(legacy_onnx(torch_network("vit"), tmp_path / "vit.onnx", images), OPTIONS)
    assert not graph.dynamic_batch  # attention's reshapes carry the batch inside a product
    np.testing.assert_allclose(run_graph(graph, images, 1)[0], module_outputs(torch_network("vit"), images), atol=1e-4)


def test_batch_of_four_that_cannot_be_freed_is_refused() -> None:
    original = _centred_over_batch()
    original.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    with pytest.raises(ClassifierError, match=r"fixed batch of 4.*export it again with a dynamic batch"):
        graph_from_onnx(original, "onnx", OPTIONS)


def test_weights_with_nan_are_refused() -> None:
    bias = numpy_helper.from_array(np.array([0, 0, np.nan, 0, 0], np.float32), "b2")
    with pytest.raises(ClassifierError, match="NaN or Inf for random images; check its weights"):
        graph_from_onnx(onnx_classifier([*CONV_NODES, GEMM], [bias]), "onnx", OPTIONS)


def _with_input(*shape: int | str, kind: int = 1) -> ModelProto:
    model = onnx_classifier([*CONV_NODES, GEMM])
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", kind, list(shape)))
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (_with_input("N", 3, 16), OPTIONS, r"shape \['N', 3, 16\]; expected four dimensions"),
        (_with_input("N", 3, 16_385, 16), OPTIONS, "have 16,385 x 16 pixels; at most 16,384 a side"),
        (_with_input("N", 3, 16_384, 1_025), OPTIONS, "16,777,216 in all are supported"),
        (_with_input("N", 3, -1, -1), ClassifierOptions(input_size=(10_000, 10_000)), "have 10,000 x 10,000 pixels"),
        (_with_input("N", 4, 16, 16), OPTIONS, r"Say so with --classifier-layout NCHW or NHWC"),
        (_with_input("N", "C", 16, 16), OPTIONS, r"export the channel count as a number"),
        (_with_input("N", 3, 16, 3), OPTIONS, r"whether channels come first or last"),
        (_with_input("N", 4, 16, 16), ClassifierOptions(layout="NCHW"), r"as NCHW that is 4 channels"),
        (_with_input("N", 3, 16, 16, kind=2), OPTIONS, r"type UINT8; expected FLOAT, FLOAT16 or DOUBLE"),
        (_with_input("N", 1, 16, 16), ClassifierOptions(bgr=True), r"--classifier-bgr needs 3 channels"),
    ],
)
def test_input_that_cannot_be_read(model: ModelProto, options: ClassifierOptions, message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        graph_from_onnx(model, "onnx", options)


def test_ambiguous_layout_can_be_said() -> None:
    graph = graph_from_onnx(_with_input("N", 3, 16, 3), "onnx", ClassifierOptions(layout="NCHW"))
    assert (graph.layout, graph.channels, graph.height, graph.width) == ("NCHW", 3, 16, 3)


def test_two_inputs_are_refused() -> None:
    model = onnx_classifier([*CONV_NODES, GEMM])
    model.graph.input.append(helper.make_tensor_value_info("threshold", 1, [1]))
    with pytest.raises(ClassifierError, match=r"2 inputs \(image, threshold\); expected exactly one"):
        graph_from_onnx(model, "onnx", OPTIONS)


def test_initializers_among_the_inputs_are_no_inputs() -> None:
    model = onnx_classifier([*CONV_NODES, GEMM], opset=9)
    for tensor in model.graph.initializer:  # as IR version 3 demanded
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    graph = graph_from_onnx(model, "onnx", OPTIONS)
    assert (graph.input_name, graph.dimension, graph.dynamic_batch) == ("image", 6, True)
    assert [value.name for value in graph.model.graph.input] == ["image"]


def test_sides_of_minus_one_are_open() -> None:
    """So do some exporters write them, and onnxruntime reads them."""
    graph = graph_from_onnx(_with_input(-1, 3, -1, -1), "onnx", ClassifierOptions(input_size=(SIZE, SIZE)))
    assert (graph.channels, graph.height, graph.width, graph.dynamic_batch) == (3, None, None, True)


def test_named_features_replace_the_found_ones() -> None:
    model = onnx_classifier([*CONV_NODES, GEMM])
    images = random_batch(3)
    graph = graph_from_onnx(model, "onnx", ClassifierOptions(features="conv", input_size=(SIZE, SIZE)))
    assert (graph.features_tensor, graph.pooling, graph.dimension) == ("conv", "channels-first", 6)
    assert (run_graph(graph, images, 2)[1] < 0).any()  # before the ReLU


def test_open_size_is_taken_from_the_options() -> None:
    graph = graph_from_onnx(_with_input("N", 3, "h", "w"), "onnx", ClassifierOptions(input_size=(20, 12)))
    assert (graph.height, graph.width) == (None, None)


def test_onnx_needs_no_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "classifier.onnx"
    path.write_bytes(onnx_classifier([*CONV_NODES, GEMM]).SerializeToString())
    monkeypatch.setitem(sys.modules, "grood_edge.export.torch_classifier", None)  # importing it fails
    assert load_classifier(path, OPTIONS).class_count == CLASSES
    with pytest.raises(ImportError):
        load_classifier("network.pt2", OPTIONS)
