"""The head in the file against the onnx package and onnxruntime: read, replaced, cut out, and fed with NaN and Inf."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, checker, helper, numpy_helper

from grood_edge import wire
from grood_edge.artifact import read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.errors import ArtifactError
from grood_edge.graph_check import refuse_external_data
from grood_edge.images import find_images, load_image
from grood_edge.ort import OrtModel, open_ort
from grood_edge.outputs import Outputs
from grood_edge.runtime import open_session
from grood_edge.scoring import INVALID_SCORE, Head, OodHead, gradients, ood_scores
from grood_edge.stored_head import (
    GROUP,
    calibration_tensors,
    head_from_model,
    head_model,
    head_tensors,
    model_with_tensors,
)

DECISIONS = ["class_id", "ood_score", "p_value", "is_ood", "valid"]


@pytest.fixture(scope="module")
def stored(artifact_path: Path) -> bytes:
    return artifact_path.read_bytes()


@pytest.fixture(scope="module")
def head_alone(stored: bytes) -> OrtModel:
    return open_ort(head_model(stored))


@pytest.fixture(scope="module")
def outputs(artifact_path: Path, digits: DemoImages) -> Outputs:
    with open_session(artifact_path) as session:
        return session.infer([load_image(path) for path in find_images(digits.test)[::10]])


def initializers(model: bytes) -> dict[str, np.ndarray]:
    graph = onnx.load_model_from_string(model).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def new_head(stored: bytes) -> Head:
    """Return another head of the same shape."""
    rng, old = np.random.default_rng(0), head_from_model(stored)
    prototypes = rng.standard_normal(old.prototypes.shape) * 5
    g = gradients(rng.standard_normal(old.only().bank.shape) * 5, prototypes, prototypes.mean(axis=0))
    return Head(prototypes, (OodHead(prototypes.mean(axis=0), g.u, g.log_s),))


def test_stored_values_are_those_that_onnx_reads(stored: bytes) -> None:
    tensors, head = initializers(stored), head_from_model(stored)
    center = tensors["grood/center"].astype(np.float64)
    np.testing.assert_array_equal(head.prototypes, tensors["grood/prototypes_t"].T.astype(np.float64) + center)
    np.testing.assert_array_equal(head.only().prototype, tensors["grood/ood_prototype.0"].astype(np.float64) + center)
    np.testing.assert_array_equal(head.only().bank, tensors["grood/bank_t.0"].T)
    np.testing.assert_array_equal(head.only().bank_log_s, tensors["grood/bank_log_s.0"])
    np.testing.assert_allclose(np.linalg.norm(head.only().bank, axis=1), 1, atol=1e-6)


def test_the_head_is_float32_throughout(stored: bytes) -> None:
    kinds = {name: array.dtype for name, array in initializers(stored).items() if name.startswith(GROUP)}
    assert len(kinds) > 10
    others = {name: kind for name, kind in kinds.items() if kind != np.float32}
    assert others == {"grood/axis": np.int64, "grood/rank": np.int32}


def test_round_trip_through_the_file(stored: bytes) -> None:
    head = new_head(stored)
    read = head_from_model(model_with_tensors(stored, head_tensors(head)))
    np.testing.assert_allclose(read.prototypes, head.prototypes, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(read.only().prototype, head.only().prototype, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(read.only().bank, head.only().bank, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(read.only().bank_log_s, head.only().bank_log_s, rtol=1e-6)


def test_replaced_initializers_equal_what_onnx_writes(stored: bytes) -> None:
    tensors = head_tensors(new_head(stored)) | calibration_tensors(np.linspace(-3, 0, 77, dtype=np.float32), 5)
    ours = onnx.load_model_from_string(model_with_tensors(stored, tensors))
    theirs = onnx.load_model_from_string(stored)
    for tensor in theirs.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    assert ours == theirs
    assert len(tensors) == 9
    checker.check_model(ours)


def test_replacing_with_the_same_values_gives_the_same_bytes(stored: bytes) -> None:
    tensors = {name: value for name, value in initializers(stored).items() if value.dtype in (np.float32, np.int32)}
    same = {name: value for name, value in tensors.items() if name.startswith(GROUP)}
    assert model_with_tensors(stored, same) == stored


def test_replacing_what_is_not_there(stored: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"no initializers \['grood/other'\]"):
        model_with_tensors(stored, {"grood/other": np.zeros(1, np.float32)})


def test_head_alone_decides_like_the_whole_graph(head_alone: OrtModel, outputs: Outputs) -> None:
    alone = head_alone.run({"features": outputs.features, "logits": outputs.logits})
    assert set(alone) == set(DECISIONS)
    for name in DECISIONS:
        np.testing.assert_array_equal(alone[name], getattr(outputs, name))


def test_head_alone_has_no_classifier(stored: bytes, head_alone: OrtModel) -> None:
    cut = onnx.load_model_from_string(head_model(stored))
    checker.check_model(cut)
    assert head_alone.inputs == {"features": ("N", 64), "logits": ("N", 7)}
    assert all(node.name.startswith(GROUP) for node in cut.graph.node)
    assert all(tensor.name.startswith(GROUP) for tensor in cut.graph.initializer)


def test_refitted_head_scores_like_its_definition(stored: bytes) -> None:
    refitted = model_with_tensors(stored, head_tensors(new_head(stored)))
    features = (np.random.default_rng(1).standard_normal((50, 64)) * 5).astype(np.float32)
    feeds = {"features": features, "logits": np.zeros((50, 7), np.float32)}
    scores = open_ort(head_model(refitted)).run(feeds)["ood_score"]
    expected = ood_scores(features.astype(np.float64), head_from_model(refitted))
    np.testing.assert_allclose(scores, expected, atol=2e-4)


BAD_VALUES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("where", ["features", "logits", "both"])
@pytest.mark.parametrize("bad", list(BAD_VALUES))
def test_non_finite_input_is_invalid_and_ood(
    head_alone: OrtModel, outputs: Outputs, bad: str, where: str, batch: int
) -> None:
    good = {name: getattr(outputs, name)[:batch].copy() for name in ("features", "logits")}
    expected = head_alone.run(good)
    assert expected["valid"].all()
    for row in range(batch):
        feeds = {name: array.copy() for name, array in good.items()}
        for name in feeds if where == "both" else [where]:
            feeds[name][row, -1] = BAD_VALUES[bad]
        found = head_alone.run(feeds)
        assert not found["valid"][row]
        assert found["is_ood"][row]
        assert found["ood_score"][row] == np.float32(INVALID_SCORE)
        assert found["p_value"][row] == 0
        others = np.arange(batch) != row
        for name in DECISIONS:  # a bad frame does not touch its neighbours
            np.testing.assert_array_equal(found[name][others], expected[name][others])


def test_all_features_bad_and_overflowing_norm(head_alone: OrtModel) -> None:
    rows = np.stack([np.full(64, v, np.float32) for v in (np.nan, np.inf, -np.inf, 1e20, 3e38)])
    found = head_alone.run({"features": rows, "logits": np.zeros((5, 7), np.float32)})
    assert not found["valid"].any()
    assert found["is_ood"].all()
    assert (found["p_value"] == 0).all()


def test_p_value_and_decision_count_like_numpy(head_alone: OrtModel, artifact_path: Path, outputs: Outputs) -> None:
    calibration = read_artifact(artifact_path).contract.calibration
    scores, n = calibration.sorted_scores(), calibration.n
    counts = np.array([(scores >= score).sum() for score in outputs.ood_score])
    np.testing.assert_array_equal(outputs.p_value, ((counts + 1) / np.float32(n + 1)).astype(np.float32))
    np.testing.assert_array_equal(outputs.is_ood, counts <= calibration.k - 1)


def test_threshold_itself_is_not_an_alarm_and_the_next_float_is(stored: bytes, outputs: Outputs) -> None:
    """Alarm above the k-th largest of n: put real scores in as calibration scores, and read the decisions back."""
    scores = np.sort(outputs.ood_score)
    k = 4
    model = model_with_tensors(stored, calibration_tensors(scores, k))
    found = open_ort(head_model(model)).run({"features": outputs.features, "logits": outputs.logits})
    assert len(np.unique(scores)) == len(scores)
    np.testing.assert_array_equal(found["is_ood"], outputs.ood_score > scores[-k])
    assert found["is_ood"].sum() == k - 1
    np.testing.assert_allclose(found["p_value"].min() * (len(scores) + 1), 2, rtol=1e-6)


def test_missing_initializer_is_named(stored: bytes) -> None:
    for name in ("grood/center", "grood/prototypes_t", "grood/ood_prototype.0", "grood/bank_t.0", "grood/bank_log_s.0"):
        model = onnx.load_model_from_string(stored)
        model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == name))
        with pytest.raises(ArtifactError, match=f"{name}.*missing"):
            head_from_model(model.SerializeToString())


def test_a_classifier_is_not_an_artifact() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    plain = helper.make_model(graph).SerializeToString()
    with pytest.raises(ArtifactError, match="no outputs 'features' and 'logits'"):
        head_model(plain)
    with pytest.raises(ArtifactError, match="missing"):
        head_from_model(plain)
    for read in (head_model, head_from_model, refuse_external_data):
        with pytest.raises(ArtifactError, match="0 ONNX graphs"):
            read(b"")


def test_two_graphs_are_refused(stored: bytes) -> None:
    """Protobuf merges them when the model runs, so that a second one could hold what the first one hides."""
    second = wire.encode_field(7, wire.encode_field(2, b"more"))
    for read in (head_model, head_from_model, refuse_external_data):
        with pytest.raises(ArtifactError, match=r"2 ONNX graphs|twice"):
            read(stored + second)


@pytest.mark.parametrize("dims", [[3], [-1], [2**62, 2**62], [64, 64]])
def test_tensor_whose_data_does_not_fit_its_shape(stored: bytes, dims: list[int]) -> None:
    model = onnx.load_model_from_string(stored)
    tensor = next(t for t in model.graph.initializer if t.name == "grood/center")
    tensor.dims[:] = dims
    with pytest.raises(ArtifactError, match="fit its shape"):
        head_from_model(model.SerializeToString())


def external() -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "weights")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def models_with_external_data() -> Iterator[tuple[str, onnx.ModelProto]]:
    def empty(*nodes: onnx.NodeProto) -> onnx.ModelProto:
        return helper.make_model(helper.make_graph(list(nodes), "g", [], []))

    model = empty()
    model.graph.initializer.append(external())
    yield "initializer", model
    yield "attribute", empty(helper.make_node("Constant", [], ["c"], value=external()))
    yield "attribute list", empty(helper.make_node("Custom", [], ["c"], values=[external()]))
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=external())], "inner", [], [])
    yield "subgraph", empty(helper.make_node("If", ["x"], ["y"], then_branch=inner))
    yield "subgraph list", empty(helper.make_node("Custom", ["x"], ["y"], branches=[inner]))
    sparse = onnx.SparseTensorProto(values=external(), dims=[4])
    model = empty()
    model.graph.sparse_initializer.append(sparse)
    yield "sparse initializer", model
    yield "sparse attribute", empty(helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    model = empty()
    constant = helper.make_node("Constant", [], ["c"], value=external())
    model.functions.append(helper.make_function("d", "F", [], ["c"], [constant], []))
    yield "function", model
    model = empty()
    function = helper.make_function("d", "F", [], ["c"], [], [])
    function.attribute_proto.append(helper.make_attribute("w", external()))
    model.functions.append(function)
    yield "function's default attribute", model


EXTERNAL = dict(models_with_external_data())


@pytest.mark.parametrize("where", list(EXTERNAL))
def test_data_outside_the_file_is_found_wherever_it_is(where: str) -> None:
    model = EXTERNAL[where]
    with pytest.raises(ArtifactError, match="'weights' keeps its data in another file"):
        refuse_external_data(model.SerializeToString())


def test_deeply_nested_graphs_are_refused() -> None:
    graph = helper.make_graph([], "g", [], [])
    for _ in range(30):
        graph = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=graph)], "g", [], [])
    with pytest.raises(ArtifactError, match="more than 16 deep"):
        refuse_external_data(helper.make_model(graph).SerializeToString())
