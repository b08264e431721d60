"""The head in the file against the onnx package and onnxruntime: read, replaced, cut out, and fed with NaN and Inf."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, checker, helper, numpy_helper

from grood_edge import wire
from grood_edge.artifact import read_artifact
from grood_edge.conformal import DecisionRule
from grood_edge.demo.images import DemoImages
from grood_edge.errors import ArtifactError
from grood_edge.graph_check import refuse_external_data
from grood_edge.images import find_images, load_image
from grood_edge.ort import OrtModel, open_ort
from grood_edge.outputs import Outputs
from grood_edge.runtime import open_session
from grood_edge.scoring import INVALID_SCORE, Head, OodHead, ScoreMap, SeenBank, nearest_rows, ood_scores
from grood_edge.stored_head import (
    GROUP,
    calibration_tensors,
    head_from_model,
    head_model,
    head_tensors,
    model_with_tensors,
    ood_names,
    quantised,
    rounded_rows,
)

NEW_SCALE = 0.375
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
    """Return another head of the same shape: other rows, scale and OOD prototypes, other maps with as many knots."""
    rng, old = np.random.default_rng(0), head_from_model(stored)
    prototypes = rng.standard_normal(old.prototypes.shape) * 5
    around = prototypes[np.arange(len(old.bank)) % 7] + rng.standard_normal(old.bank.shape)
    bank = rounded_rows(around, prototypes, old.bank_dtype)
    ood_heads = []
    for index, ood_head in enumerate(old.ood_heads):
        prototype = prototypes.mean(axis=0) + index * rng.standard_normal(bank.shape[1])
        alone = Head(prototypes, np.zeros((0, bank.shape[1])), (OodHead(prototype, np.zeros(0)),), scale=NEW_SCALE)
        knots = ood_head.score_map.knots.size
        score_map = ScoreMap(0.25, 0.5, np.linspace(-20, 0, knots), np.full(knots, 0.5 / knots))
        ood_heads.append(OodHead(prototype, nearest_rows(bank, alone)[0].log_s, score_map))
    return Head(prototypes, bank, tuple(ood_heads), old.bank_dtype, NEW_SCALE)


def one_group(scores: np.ndarray, rank: int, classes: int = 7) -> DecisionRule:
    return DecisionRule((np.sort(scores).astype(np.float32),), (rank,), np.zeros(classes, np.int32))


def test_stored_values_are_those_that_onnx_reads(stored: bytes) -> None:
    tensors, head = initializers(stored), head_from_model(stored)
    center = tensors["grood/center"].astype(np.float64)
    np.testing.assert_array_equal(head.prototypes, tensors["grood/prototypes_t"].T.astype(np.float64) + center)
    rows = tensors["grood/bank"].astype(np.float32) * tensors["grood/bank_scale"][:, None]
    np.testing.assert_array_equal(head.bank, rows.astype(np.float64) + center)
    assert (len(head.ood_heads), head.bank_dtype) == (3, "int8")
    assert head.scale == tensors["grood/scale"] == np.float32(read_artifact(stored).contract.scale.value)
    for index, ood_head in enumerate(head.ood_heads):
        stored_prototype = tensors[f"grood/ood_prototype.{index}"].astype(np.float64)
        np.testing.assert_array_equal(ood_head.prototype, stored_prototype + center)
        np.testing.assert_array_equal(ood_head.bank_log_s, tensors[f"grood/bank_log_s.{index}"])
        np.testing.assert_array_equal(ood_head.score_map.knots, tensors[f"grood/map_knots.{index}"])
        np.testing.assert_array_equal(ood_head.score_map.weights, tensors[f"grood/map_weights.{index}"])
        assert ood_head.score_map.bias == tensors[f"grood/map_bias.{index}"]
        assert ood_head.score_map.slope == tensors[f"grood/map_slope.{index}"]


def test_what_is_stored_beside_the_rows_follows_from_them(stored: bytes) -> None:
    """Lengths, offsets and the least distance are there for the graph; a reader of the head computes them itself."""
    tensors, head = initializers(stored), head_from_model(stored)
    center = tensors["grood/center"].astype(np.float64)
    for index, ood_head in enumerate(head.ood_heads):
        seen, names = SeenBank.of(head.bank - center, ood_head.prototype - center), ood_names(index)
        np.testing.assert_allclose(1 / tensors[names.bank_inverse_length], seen.lengths, rtol=1e-6)
        np.testing.assert_allclose(tensors[names.bank_offset], seen.offset, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(tensors[names.least_distance], seen.least, rtol=1e-6)


def test_dtypes_of_the_head(stored: bytes) -> None:
    """Float32, but for the rows of the bank, and integers that count or index."""
    kinds = {name: array.dtype for name, array in initializers(stored).items() if name.startswith(GROUP)}
    others = {name: kind for name, kind in kinds.items() if kind != np.float32}
    counting = dict.fromkeys(("grood/calibration_groups", "grood/group_of_class", "grood/rank"), np.int32)
    axes = dict.fromkeys(("grood/first_axis", "grood/axis", "grood/last_axis"), np.int64)
    assert others == {**axes, "grood/bank": np.int8, **counting}
    assert len(kinds) > 40


def test_round_trip_through_the_file(stored: bytes) -> None:
    head = new_head(stored)
    read = head_from_model(model_with_tensors(stored, head_tensors(head)))
    np.testing.assert_allclose(read.prototypes, head.prototypes, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(read.bank, head.bank, rtol=1e-6, atol=1e-6)
    for found, expected in zip(read.ood_heads, head.ood_heads, strict=True):
        np.testing.assert_allclose(found.prototype, expected.prototype, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.bank_log_s, expected.bank_log_s, rtol=1e-6)
        np.testing.assert_allclose(found.score_map.knots, expected.score_map.knots, rtol=1e-6)
        np.testing.assert_allclose(found.score_map.weights, expected.score_map.weights, rtol=1e-6)
        assert (found.score_map.bias, found.score_map.slope) == (0.25, 0.5)
    assert not np.allclose(read.prototypes, head_from_model(stored).prototypes)
    assert read.scale == NEW_SCALE != head_from_model(stored).scale


class TestQuantised:
    def test_every_row_has_its_own_scale(self) -> None:
        rows = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
        rows *= np.float32(10.0) ** np.arange(-20, 20, dtype=np.float32)[:, None]
        stored_rows, scale = quantised(rows)
        assert (stored_rows.dtype.name, scale.dtype.name, scale.shape) == ("int8", "float32", (40,))
        assert np.abs(stored_rows).max(axis=1).tolist() == [127] * 40  # symmetric: -128 is not used
        error = np.abs(stored_rows * scale[:, None].astype(np.float64) - rows)
        assert (error <= 0.5001 * scale[:, None]).all()

    def test_a_row_of_zeros(self) -> None:
        stored_rows, scale = quantised(np.zeros((2, 8), np.float32))
        assert not stored_rows.any()
        assert (scale > 0).all()  # and no division by zero

    def test_rounding_is_what_the_file_does(self, stored: bytes) -> None:
        """Fitting must see the rows as the device will see them; a second rounding changes nothing."""
        head = head_from_model(stored)
        rng = np.random.default_rng(0)
        rows = rng.standard_normal(head.bank.shape) * 5 + head.prototypes.mean(axis=0)
        rounded = rounded_rows(rows, head.prototypes, "int8")
        read = head_from_model(model_with_tensors(stored, head_tensors(dataclasses.replace(head, bank=rows))))
        np.testing.assert_allclose(read.bank, rounded, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(rounded_rows(rounded, head.prototypes, "int8"), rounded, rtol=1e-5, atol=1e-5)
        assert np.abs(rounded - rows).max() > 1e-3
        np.testing.assert_array_equal(rounded_rows(rows, head.prototypes, "float32"), rows)


def test_replaced_initializers_equal_what_onnx_writes(stored: bytes) -> None:
    tensors = head_tensors(new_head(stored)) | calibration_tensors(one_group(np.linspace(-3, 0, 77), 5))
    ours = onnx.load_model_from_string(model_with_tensors(stored, tensors))
    theirs = onnx.load_model_from_string(stored)
    for tensor in theirs.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    assert ours == theirs
    assert len(tensors) == 6 + 3 * 9 + 5
    checker.check_model(ours)


def test_replacing_with_the_same_values_gives_the_same_bytes(stored: bytes) -> None:
    tensors = {
        name: value for name, value in initializers(stored).items() if value.dtype in (np.float32, np.int32, np.int8)
    }
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
    head = new_head(stored)
    refitted = model_with_tensors(stored, head_tensors(head))
    noise = np.random.default_rng(1).standard_normal((50, 64))
    features = (head.prototypes[np.arange(50) % 7] + np.linspace(0.2, 5, 50)[:, None] * noise).astype(np.float32)
    feeds = {"features": features, "logits": np.zeros((50, 7), np.float32)}
    scores = open_ort(head_model(refitted)).run(feeds)["ood_score"]
    expected = ood_scores(features.astype(np.float64), head_from_model(refitted))
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    assert np.ptp(expected) > 1


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
    model = model_with_tensors(stored, calibration_tensors(one_group(scores, k)))
    found = open_ort(head_model(model)).run({"features": outputs.features, "logits": outputs.logits})
    assert len(np.unique(scores)) == len(scores)
    np.testing.assert_array_equal(found["is_ood"], outputs.ood_score > scores[-k])
    assert found["is_ood"].sum() == k - 1
    np.testing.assert_allclose(found["p_value"].min() * (len(scores) + 1), 2, rtol=1e-6)


def test_each_class_counts_in_its_own_group(stored: bytes, outputs: Outputs) -> None:
    """Per-class p-values: one group a class, of different sizes, with other ranks; against the rule in NumPy."""
    by_class = [np.sort(outputs.ood_score[outputs.class_id == c]) for c in range(7)]
    assert len({group.size for group in by_class}) > 1
    rule = DecisionRule(tuple(by_class), tuple(range(1, 8)), np.arange(7, dtype=np.int32))
    feeds = {"features": outputs.features, "logits": outputs.logits}
    found = open_ort(head_model(model_with_tensors(stored, calibration_tensors(rule)))).run(feeds)
    counts = rule.counts(outputs.ood_score, outputs.class_id)
    sizes = np.array([group.size for group in by_class])[outputs.class_id]
    np.testing.assert_array_equal(found["p_value"], (counts + 1).astype(np.float32) / (sizes + 1).astype(np.float32))
    np.testing.assert_array_equal(found["is_ood"], rule.is_alarm(outputs.ood_score, outputs.class_id))
    for c, group in enumerate(by_class):  # above the k-th largest of the class: k - 1 of its own scores
        assert found["is_ood"][outputs.class_id == c].sum() == min(c, group.size)


def test_a_group_may_hold_several_classes(stored: bytes, outputs: Outputs) -> None:
    """The file says which group decides for which class; nothing in the graph takes one for the other."""
    scores = np.sort(outputs.ood_score)
    low, high = scores[: len(scores) // 2], scores[len(scores) // 2 :]
    rule = DecisionRule((low, high), (1, high.size), np.array([0, 1, 0, 1, 0, 1, 0], np.int32))
    feeds = {"features": outputs.features, "logits": outputs.logits}
    found = open_ort(head_model(model_with_tensors(stored, calibration_tensors(rule)))).run(feeds)
    even = outputs.class_id % 2 == 0
    threshold = np.where(even, low[-1], high[0])
    np.testing.assert_array_equal(found["is_ood"], outputs.ood_score > threshold)
    np.testing.assert_array_equal(found["is_ood"], rule.is_alarm(outputs.ood_score, outputs.class_id))


def test_missing_initializer_is_named(stored: bytes) -> None:
    names = (
        "center", "prototypes_t", "scale", "bank_scale", "bank_log_s.0", "bank_log_s.2", "map_bias.1", "map_weights.2",
    )  # fmt: skip
    for name in ("grood/" + name for name in names):
        model = onnx.load_model_from_string(stored)
        model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == name))
        with pytest.raises(ArtifactError, match=f"{name}.*missing"):
            head_from_model(model.SerializeToString())


@pytest.mark.parametrize("name", ["prototypes_t", "center", "scale", "bank_scale", "bank", "map_slope.1"])
@pytest.mark.parametrize("shape", [(3, 2), (), (7,), (2, 3, 4, 5)])
def test_initializers_that_do_not_fit_together(stored: bytes, name: str, shape: tuple[int, ...]) -> None:
    wrong = model_with_tensors(stored, {f"grood/{name}": np.ones(shape, np.float32)})
    if shape == () and name in ("scale", "map_slope.1", "center"):  # it is one number, or is added to each
        head_from_model(wrong)
        return
    with pytest.raises(ArtifactError, match="contradict each other"):
        head_from_model(wrong)


def test_a_bank_without_rows_and_without_tensors(stored: bytes) -> None:
    """No bank in the file means the score log s; the rows' own tensors are then not asked for."""
    model = onnx.load_model_from_string(stored)
    kept = [t for t in model.graph.initializer if "/bank" not in t.name and "/least_distance" not in t.name]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(kept)
    head = head_from_model(model.SerializeToString())
    assert head.bank.shape == (0, 64)
    assert all(ood_head.bank_log_s.size == 0 for ood_head in head.ood_heads)


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
