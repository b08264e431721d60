"""Opset 19, standard operators only, nothing left of the machine it came from; files are untrusted."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper, shape_inference

from grood_edge.artifact import read_artifact
from grood_edge.errors import ArtifactError, ClassifierError
from grood_edge.export.classifier import ClassifierOptions, graph_from_onnx, load_classifier
from grood_edge.export.normal_form import IR_VERSION, free_batch, load_onnx, model_of, normal_form
from grood_edge.export.torch_classifier import onnx_from_torch
from grood_edge.onnx_proto import OPSET
from grood_edge.ort import open_ort
from tests.export.networks import (
    CLASSES,
    CONV_NODES,
    GEMM,
    OPTIONS,
    SIZE,
    onnx_classifier,
    onnx_tensor,
    random_batch,
    torch_network,
    traced_graph,
)
from tests.golden import golden, golden_model


def logits_of(model: ModelProto) -> np.ndarray:
    return open_ort(model.SerializeToString()).run({"image": random_batch(3)})["logits"]


def body(opset: int) -> list[NodeProto]:
    """Operators that changed on the way: BatchNormalization, MaxPool, Dropout, ReduceMean, Clip, Softmax."""
    axes = {"axes": [2, 3], "keepdims": 0}
    return [
        CONV_NODES[0],
        helper.make_node("BatchNormalization", ["conv", "s", "o", "m", "v"], ["bn"], name="bn"),
        helper.make_node("MaxPool", ["bn"], ["max"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("ReduceMean", ["max", "two_three"] if opset >= 18 else ["max"], ["mean"],
                         **({"keepdims": 0} if opset >= 18 else axes)),
        helper.make_node("Dropout", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w2", "b2"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["logits"], axis=1),
    ]  # fmt: skip


def statistics(opset: int) -> list[TensorProto]:
    positive = [numpy_helper.from_array(np.linspace(0.5, 1.5, 6, dtype=np.float32), name) for name in ("s", "v")]
    axes = [numpy_helper.from_array(np.array([2, 3], np.int64), "two_three")] if opset >= 18 else []
    return [*positive, onnx_tensor("o", 6), onnx_tensor("m", 6), *axes]


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 17, 18, 19, 20, 21, 22])
def test_every_opset_comes_to_19_and_gives_the_same(opset: int) -> None:
    original = onnx_classifier(body(opset), statistics(opset), opset=opset)
    form = normal_form(original)
    assert [(o.domain, o.version) for o in form.opset_import] == [("", OPSET)]
    assert form.ir_version == IR_VERSION
    checker.check_model(shape_inference.infer_shapes(form, strict_mode=True), full_check=True)
    np.testing.assert_allclose(logits_of(form), logits_of(original), atol=1e-6)


def test_the_original_is_left_as_it_was() -> None:
    original = onnx_classifier(body(11), statistics(11), opset=11)
    before = original.SerializeToString(deterministic=True)
    free_batch(normal_form(original))
    assert original.SerializeToString(deterministic=True) == before


def test_newer_operator_is_refused_by_name() -> None:
    gelu = helper.make_node("Gelu", ["flat"], ["soft"], name="encoder/gelu_3")
    gemm = helper.make_node("Gemm", ["soft", "w2", "b2"], ["logits"])
    model = onnx_classifier([*CONV_NODES, gelu, gemm], opset=20)
    assert logits_of(model).shape == (6, CLASSES)  # a fine model, for a newer runtime
    with pytest.raises(
        ClassifierError, match=r"opset 20, and its node Gelu 'encoder/gelu_3' does not exist in opset 19"
    ):
        normal_form(model)


@pytest.mark.parametrize(
    ("opset", "message"),
    [(6, "opset 6; at least 7 is needed"), (1, "at least 7"), (99, "opset 99; the installed onnx knows up to")],
)
def test_opset_out_of_reach(opset: int, message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        normal_form(onnx_classifier([*CONV_NODES, GEMM], opset=opset))


def test_custom_domain_is_refused_by_node_names() -> None:
    custom = [
        helper.make_node("FusedGelu", ["flat"], ["a"], name="mlp/act", domain="com.acme"),
        helper.make_node("FusedGelu", ["a"], ["b"], name="mlp/act_1", domain="com.acme"),
        helper.make_node("Gemm", ["b", "w2", "b2"], ["logits"]),
    ]
    model = onnx_classifier([*CONV_NODES, *custom], domains=("com.acme",))
    with pytest.raises(ClassifierError, match=r"2 nodes .*FusedGelu 'mlp/act' \(com.acme\), FusedGelu 'mlp/act_1'"):
        normal_form(model)


def test_custom_domain_in_a_branch_is_found() -> None:
    def branch(name: str, domain: str) -> onnx.GraphProto:
        node = helper.make_node("Gemm", ["flat", "w2", "b2"], [name], name=f"in {name}", domain=domain)
        return helper.make_graph([node], name, [], [helper.make_empty_tensor_value_info(name)])

    choose = helper.make_node(
        "If", ["condition"], ["logits"], then_branch=branch("yes", ""), else_branch=branch("no", "com.acme")
    )
    weights = [helper.make_tensor("condition", 9, [], [True]), onnx_tensor("w2", 6, 5), onnx_tensor("b2", 5)]
    with pytest.raises(ClassifierError, match=r"1 nodes .*Gemm 'in no' \(com.acme\)"):
        normal_form(onnx_classifier([*CONV_NODES, choose], weights, domains=("com.acme",)))


def test_long_name_of_the_standard_domain_is_the_standard_domain() -> None:
    model = onnx_classifier([*CONV_NODES, GEMM], opset=17)
    expected = logits_of(model)
    for node in model.graph.node:
        node.domain = "ai.onnx"
    np.testing.assert_allclose(logits_of(normal_form(model)), expected, atol=1e-6)


def test_local_functions_are_inlined() -> None:
    function = helper.make_function(
        "my.layers",
        "ScaledRelu",
        ["x"],
        ["y"],
        [
            helper.make_node("Constant", [], ["factor"], value=helper.make_tensor("two", 1, [], [2.0])),
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Mul", ["r", "factor"], ["y"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    call = helper.make_node("ScaledRelu", ["conv"], ["relu"], domain="my.layers")
    nodes = [CONV_NODES[0], call, *CONV_NODES[2:], GEMM]
    model = onnx_classifier(nodes, functions=[function], domains=("my.layers",))
    form = normal_form(model)
    assert not form.functions
    assert {node.domain for node in form.graph.node} == {""}
    assert [o.domain for o in form.opset_import] == [""]
    np.testing.assert_allclose(logits_of(form), logits_of(model), atol=1e-6)
    assert graph_from_onnx(model, "onnx", OPTIONS).dimension == 6


@pytest.mark.parametrize(
    ("levels", "weight", "again", "message"),
    [
        (30, 0, False, r"has 1,073,7\d\d,\d+ nodes .* when its local functions are inlined; at most 20,\d+ of"),
        (10, 1 << 20, False, r"has 1,540 nodes of 53\d,\d{3},\d{3} bytes"),
        (70, 0, False, "call one another more than 64 deep"),
        (3, 0, True, "more than 64 deep, or themselves"),
    ],
)
def test_functions_that_double_with_each_level_are_refused(
    levels: int, weight: int, again: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kilobyte of 15 levels took 16 seconds and 300 MB to inline."""
    functions = []
    for level in range(levels):
        inner, domain = (f"F{level - 1}", "my.layers") if level or again else ("Relu", "")
        inner = f"F{levels - 1}" if again and level == 0 else inner
        nodes = [helper.make_node(inner, [a], [b], domain=domain) for a, b in (("x", "m"), ("m", "y"))]
        if level == 0 and weight:
            nodes.append(helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.zeros(weight, "u1"))))
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.layers", 1)]
        functions.append(helper.make_function("my.layers", f"F{level}", ["x"], ["y"], nodes, opsets))
    call = helper.make_node(f"F{levels - 1}", ["conv"], ["relu"], domain="my.layers")
    model = onnx_classifier([CONV_NODES[0], call, *CONV_NODES[2:], GEMM], functions=functions, domains=("my.layers",))
    monkeypatch.setattr("onnx.inliner.inline_local_functions", lambda _: pytest.fail("it was inlined"))
    with pytest.raises(ClassifierError, match=message):
        normal_form(model)


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes"),
    [(17, ["bn", "mean", "variance"], {"training_mode": 1}), (13, ["bn", "a", "b", "c", "d"], {})],
)
def test_batch_norm_in_training_mode_is_refused(opset: int, outputs: list[str], attributes: dict[str, Any]) -> None:
    bn = helper.make_node("BatchNormalization", ["conv", "s", "o", "m", "v"], outputs, name="layer1/bn", **attributes)
    relu = helper.make_node("Relu", ["bn"], ["relu"])
    model = onnx_classifier([CONV_NODES[0], bn, relu, *CONV_NODES[2:], GEMM], statistics(opset), opset=opset)
    with pytest.raises(ClassifierError, match=r"BatchNormalization 'layer1/bn' is a batch norm in training.*eval\(\)"):
        normal_form(model)


def test_attribute_of_another_type_is_refused_before_it_is_converted() -> None:
    """The converter of onnx 1.23 reads the integers of a FLOAT, and the process ends."""
    mean = helper.make_node("ReduceMean", ["relu"], ["flat"], name="mean", axes=[2, 3], keepdims=0)
    mean.attribute[0].type = onnx.AttributeProto.FLOAT
    model = onnx_classifier([*CONV_NODES[:2], mean, GEMM], [], opset=17)
    with pytest.raises(ClassifierError, match=r"ReduceMean 'mean' is not what opset 17 allows: .*axes.*Export"):
        normal_form(model)


def test_a_node_without_a_name_or_with_a_long_one_is_refused_in_few_words() -> None:
    for node in (NodeProto(op_type="Relu", input=["conv"]), helper.make_node("R" * 5000, ["conv"], ["x" * 50_000])):
        with pytest.raises(ClassifierError, match="is not what opset 17 allows") as error:
            normal_form(onnx_classifier([*CONV_NODES, GEMM, node], opset=17))
        assert len(str(error.value)) < 1000


def test_a_flag_whose_data_does_not_fit_is_refused() -> None:
    flag = TensorProto(name="train", data_type=TensorProto.BOOL, dims=[5], raw_data=bytes(10))
    with pytest.raises(ClassifierError, match="tensor 'train' is damaged: cannot reshape"):
        normal_form(onnx_classifier([*CONV_NODES, GEMM], [flag]))


def test_a_network_that_gives_one_number_is_refused(tmp_path: Path) -> None:
    total = helper.make_node("ReduceSum", ["each"], ["logits"], keepdims=0)
    nodes = [*CONV_NODES, helper.make_node("Gemm", ["flat", "w2", "b2"], ["each"]), total]
    onnx.save(onnx_classifier(nodes, opset=OPSET), tmp_path / "net.onnx")
    with pytest.raises(ClassifierError, match=r"output has shape \[\] for 1 images; expected logits"):
        load_classifier(tmp_path / "net.onnx", ClassifierOptions(input_size=(16, 16)))


def test_an_input_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    model = onnx_classifier(body(OPSET), [], opset=OPSET)
    model.graph.input[0].type.tensor_type.elem_type = -(1 << 31)
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ClassifierError, match="has type NUMBER -2147483648; expected FLOAT"):
        load_classifier(tmp_path / "net.onnx", ClassifierOptions(input_size=(16, 16)))


@pytest.mark.parametrize("as_node", [True, False])
def test_dropout_in_training_mode_is_refused(as_node: bool) -> None:
    """onnxruntime leaves it out, other runtimes draw random masks: the classifier would not be one."""
    train = helper.make_tensor("train", 9, [], [True])
    nodes = [helper.make_node("Constant", [], ["train"], value=train)] if as_node else []
    drop = helper.make_node("Dropout", ["flat", "", "train"], ["dropped"], name="drop")
    gemm = helper.make_node("Gemm", ["dropped", "w2", "b2"], ["logits"])
    model = onnx_classifier([*nodes, *CONV_NODES, drop, gemm], [] if as_node else [train])
    with pytest.raises(ClassifierError, match="Dropout 'drop' is a dropout in training mode"):
        normal_form(model)


def test_nothing_of_the_exporters_machine_is_left() -> None:
    network = torch_network("conv-bn-gap")
    raw = onnx_from_torch(network, None, (SIZE, SIZE))[0].SerializeToString()
    form = traced_graph("conv-bn-gap").model.SerializeToString()
    repository = str(Path(__file__).parents[2]).encode()
    traces = [repository, b"networks.py", b"torch/nn", b"stack_trace"]
    assert all(trace in raw for trace in traces)  # this is what the dynamo exporter writes
    assert not any(trace in form for trace in traces)


def test_every_doc_string_is_stripped() -> None:
    secret = "/home/user/project/train.py"
    constant = helper.make_node("Constant", [], ["offset"], value=helper.make_tensor("five", 1, [1], [5.0]))
    nodes = [*CONV_NODES, constant, helper.make_node("Gemm", ["flat", "w2", "b2"], ["scores"])]
    model = onnx_classifier([*nodes, helper.make_node("Add", ["scores", "offset"], ["logits"])])
    model.doc_string = model.producer_name = model.domain = model.graph.doc_string = secret
    graph = model.graph
    for part in (graph.input[0], graph.output[0], graph.initializer[0], *graph.node):
        part.doc_string = secret
    for owner in (model, graph, graph.node[0], graph.initializer[0], graph.input[0]):
        entry = owner.metadata_props.add()
        entry.key, entry.value = "source", secret
    for node in graph.node:
        for attribute in node.attribute:
            attribute.doc_string = secret
            if attribute.HasField("t"):
                attribute.t.doc_string = secret
    graph.value_info.append(helper.make_tensor_value_info("flat", 1, ["N", 6], doc_string=secret))
    assert model.SerializeToString().count(secret.encode()) > 15
    form = normal_form(model)
    assert secret.encode() not in form.SerializeToString()
    np.testing.assert_allclose(logits_of(form), logits_of(model), atol=1e-6)


def test_weights_among_the_inputs_become_constants_again() -> None:
    model = onnx_classifier([*CONV_NODES, GEMM], opset=9)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    assert [value.name for value in normal_form(model).graph.input] == ["image"]


def test_free_batch_opens_the_batch_and_nothing_else() -> None:
    shapes = {"keep": [6, -1], "open": [1, -1], "whole": [1, 1536]}
    tensors = [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in shapes.items()]
    nodes = [CONV_NODES[0], *(helper.make_node("Reshape", ["conv", name], [f"{name} out"]) for name in shapes)]
    freed = free_batch(onnx_classifier(nodes, tensors, batch=1, outputs=tuple(f"{name} out" for name in shapes)))
    found = {t.name: numpy_helper.to_array(t).tolist() for t in freed.graph.initializer if t.name in shapes}
    assert found == {"keep": [6, -1], "open": [0, -1], "whole": [-1, 1536]}
    assert freed.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def _external(folder: Path, location: str, *, write: bool = True) -> Path:
    """Write a classifier that keeps the weights of its linear layer in `location`."""
    model = onnx_classifier([*CONV_NODES, GEMM])
    tensor = next(t for t in model.graph.initializer if t.name == "w2")
    data = numpy_helper.to_array(tensor).tobytes()
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    target = folder / location
    if write:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    path = folder / "classifier.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_beside_the_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _external(tmp_path, "weights/classifier.data")
    monkeypatch.chdir(tmp_path.parent)  # the data is beside the model, not in the working folder
    model = load_onnx(path)
    np.testing.assert_array_equal(logits_of(model), logits_of(onnx_classifier([*CONV_NODES, GEMM])))
    assert load_classifier(path, OPTIONS).dimension == 6


def test_external_data_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    secret = tmp_path / "secret.data"
    for location in ("../secret.data", "weights/../../secret.data", str(secret)):
        path = _external(inside, location)
        assert secret.exists()
        with pytest.raises(ClassifierError, match=r"keeps its data in .*secret.data', outside the model's folder"):
            load_onnx(path)


def test_absolute_path_is_refused_wherever_it_leads(tmp_path: Path) -> None:
    path = _external(tmp_path, str(tmp_path / "weights.data"))
    with pytest.raises(ClassifierError, match=r"keeps its data in .*weights\.data'.* Put the data file beside"):
        load_onnx(path)


def test_symbolic_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    path = _external(inside, "weights.data")
    (inside / "weights.data").rename(tmp_path / "elsewhere.data")
    os.symlink(tmp_path / "elsewhere.data", inside / "weights.data")
    with pytest.raises(ClassifierError, match="outside the model's folder; it was not read"):
        load_onnx(path)


def test_external_data_in_a_local_function_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.data").write_bytes(np.zeros(5, np.float32).tobytes())
    leak = TensorProto(name="leak", data_type=TensorProto.FLOAT, dims=[5], data_location=TensorProto.EXTERNAL)
    leak.external_data.add(key="location", value="../secret.data")
    nodes = [helper.make_node("Constant", [], ["c"], value=leak), helper.make_node("Add", ["x", "c"], ["y"])]
    function = helper.make_function("my.layers", "Leak", ["x"], ["y"], nodes, [helper.make_opsetid("", 17)])
    call = helper.make_node("Leak", ["scores"], ["logits"], domain="my.layers")
    gemm = helper.make_node("Gemm", ["flat", "w2", "b2"], ["scores"])
    model = onnx_classifier([*CONV_NODES, gemm, call], functions=[function], domains=("my.layers",))
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "classifier.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        ClassifierError, match=r"'leak' keeps its data in '../secret\.data', outside the model's folder"
    ):
        load_onnx(path)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match=r"'w2' keeps its data in 'gone.data', which does not exist"):
        load_onnx(_external(tmp_path, "gone.data", write=False))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        (b"", "holds no ONNX graph"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, "not an ONNX file, or it is damaged|holds no ONNX graph"),
        (onnx_classifier([*CONV_NODES, GEMM]).SerializeToString()[:-40], "not an ONNX file, or it is damaged"),
        (onnx_classifier([*CONV_NODES, GEMM]).SerializeToString()[:300], "not an ONNX file, or it is damaged"),
    ],
)
def test_damaged_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClassifierError, match=message):
        load_classifier(path, OPTIONS)


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ClassifierError, match="cannot read"):
        load_onnx(tmp_path / "folder.onnx")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"output/logits_0", b"output/logits_\xff", r"has the name b'output/logits_\\xff', which is not UTF-8"),
        # field 4 of a tensor: floats, four bytes each
        (b"\x42\x0bgrood/scale", b"\x22\x0bgrood/scale", "the package onnx cannot read the artifact"),
    ],
)
def test_an_artifact_that_onnx_cannot_read_is_refused(old: bytes, new: bytes, message: str) -> None:
    model = golden_model()
    artifact = replace(read_artifact(golden()), model=model.replace(old, new))
    assert model != artifact.model
    with pytest.raises(ArtifactError, match=message):
        model_of(artifact)


def test_names_of_a_classifier_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(onnx_classifier([*CONV_NODES]).SerializeToString().replace(b"conv", b"con\xff"))
    with pytest.raises(ClassifierError, match=r"the name b'con\\xff' is not UTF-8"):
        load_onnx(tmp_path / "x.onnx")


@pytest.mark.parametrize("location", ["x" * 5000, "a\0b", "circle"])
def test_external_data_with_a_name_that_no_file_has(location: str, tmp_path: Path) -> None:
    path = _external(tmp_path, "weights.data")
    os.symlink("circle", tmp_path / "circle")
    model = onnx.load(path, load_external_data=False)
    for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
        entry.value = location if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ClassifierError, match="keeps its data in"):
        load_onnx(path)
