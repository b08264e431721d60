"""The preflight against TensorRT-RTX's own parser and builder, and against models made to hurt it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, defs, helper, numpy_helper

from grood_edge.artifact import read_artifact
from grood_edge.export.preflight import MAX_FINDINGS, Finding, preflight
from tests.operators import IMAGES, OPERATOR_GRAPHS, ROWS, SAME, OperatorGraph, model_of, weights

# Graphs of the matrix that become engines and are refused all the same, and why.
STRICTER = {
    "uint8-activation": "the parser takes uint8 for int8 with a warning: values above 127 saturate",
    "microsoft-gelu": "the parser ignores the domain and imports whatever has that name",
}
# Operators with an importer that are refused: what happens when one is used.
IMPORTER_IN_VAIN = {
    "NonZero": "its plugin is not in TensorRT-RTX",
    "NonMaxSuppression": "no implementation when it is built",
    "RoiAlign": "its plugin is not in TensorRT-RTX",
    "CausalConvWithState": "its plugin is not in TensorRT-RTX",
    "LinearAttention": "its plugin is not in TensorRT-RTX",
    "Attention": "only some shapes have an implementation; not in opset 19",
    "TensorScatter": "only one mode and rank; not in opset 19",
}

Build = Callable[[ModelProto], Any]


@pytest.fixture(scope="module")
def build() -> Build:
    pytest.importorskip("tensorrt_rtx")
    from tests.rtx import build_rtx

    return build_rtx


def refused(model: ModelProto, family: str = "tensorrt-rtx") -> list[Finding]:
    return [f for f in preflight(model) if f.kind == "refused" and family in f.families]


def found(model: ModelProto) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(f.operator, f.kind, f.families) for f in preflight(model)]


def graph(signature: str, body: str, **named: Any) -> ModelProto:
    header = {key: named.pop(key) for key in ("opset", "ir", "domains", "functions") if key in named}
    return model_of(signature, body, named, **header)


def row_id(row: Any) -> str:
    return row.name if isinstance(row, OperatorGraph) else str(row)


def test_the_matrix_is_whole() -> None:
    assert len({row.name for row in OPERATOR_GRAPHS}) == 108
    assert STRICTER.keys() <= {row.name for row in OPERATOR_GRAPHS if row.stops is None}


@pytest.mark.parametrize("row", OPERATOR_GRAPHS, ids=row_id)
def test_agrees_with_the_parser(row: OperatorGraph, build: Build) -> None:
    verdict = build(row.model)
    assert (verdict.stage == "built") == (row.stops is None), verdict.message
    if verdict.stage == "parse":
        assert verdict.operator == row.stops
    assert bool(refused(row.model)) == (verdict.stage != "built" or row.name in STRICTER)


@pytest.mark.parametrize("row", OPERATOR_GRAPHS, ids=row_id)
def test_names_the_node_at_which_tensorrt_stops(row: OperatorGraph) -> None:
    """Needs no TensorRT-RTX, so the rules are held to the matrix on every machine."""
    findings = refused(row.model)
    assert bool(findings) == (row.stops is not None or row.name in STRICTER)
    if row.stops is not None:
        assert findings[0].operator == row.stops
    for finding in preflight(row.model):
        assert finding.node
        assert finding.sentence == str(finding)
        assert all(part in finding.sentence for part in (finding.node, finding.found, finding.advice, "TensorRT"))
        assert ("TensorRT-RTX" in finding.sentence) == ("tensorrt-rtx" in finding.families)


NORM = {"s": weights(8), "b": weights(8)}
INNER = "then_branch = t () => (float to) { to = Identity(m) }, else_branch = e () => (float eo) "
BEYOND: dict[str, tuple[str, ModelProto]] = {
    "uint8 inside": ("Cast", graph(SAME, "u = Cast<to=2>(x) y = Cast<to=1>(u)")),
    "uint8 concat": ("Concat", graph("uint8[N,8] x -> uint8[N,16] y", "y = Concat<axis=1>(x, x)")),
    "int8 constant": (
        "Cast",
        graph("float[N,8] x -> float[N,8] y", "f = Cast<to=1>(w) y = MatMul(x, f)", w=weights(8, 8, dtype=np.int8)),
    ),
    "int32 matmul": ("MatMul", graph("int32[8,8] x -> int32[8,8] y", "y = MatMul(x, x)")),
    "int64 times int32": ("Mul", graph("int32[N,8] x -> int32[N,8] y", "y = Mul(x, c)", c=2)),
    "half convolution of float": (
        "Conv",
        graph(f"{IMAGES} -> float[N,8,30,30] y", "y = Conv(x, w)", w=weights(8, 3, 3, 3, dtype=np.float16)),
    ),
    "half layer norm with float scale": (
        "LayerNormalization",
        graph("float16[N,8] x -> float16[N,8] y", "y = LayerNormalization(x, s, b)", **NORM),
    ),
    "bool resize": (
        "Resize",
        graph("bool[1,3,8,8] x -> bool[1,3,4,4] y", 'y = Resize<mode="nearest">(x, , s)', s=[1.0, 1.0, 0.5, 0.5]),
    ),
    "bool product": ("Mul", graph("bool[N,8] x -> bool[N,8] y", "y = Mul(x, x)")),
    "float modulo": ("Mod", graph(SAME, "y = Mod(x, x)")),
    "dilated pool": (
        "MaxPool",
        graph(f"{IMAGES} -> float[N,3,28,28] y", "y = MaxPool<kernel_shape=[3,3], dilations=[2,2]>(x)"),
    ),
    "pool with indices": (
        "MaxPool",
        graph(f"{IMAGES} -> float[N,3,30,30] y, int64[N,3,30,30] i", "y, i = MaxPool<kernel_shape=[3,3]>(x)"),
    ),
    "k above the dimension": (
        "TopK",
        graph("float[N,8] x -> float[N,9] y, int64[N,9] i", "y, i = TopK(x, k)", k=[9]),
    ),
    "negative scale": (
        "QuantizeLinear",
        graph(SAME, "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", s=-1.0, z=np.int8(0)),
    ),
    "axes from outside": ("ReduceSum", graph(f"{ROWS}, int64[1] a -> float[N,1] y", "y = ReduceSum(x, a)")),
    "int16 initializer": ("initializer", graph(SAME, "y = Relu(x)", w=weights(8, dtype=np.int16))),
    "string input": ("input", graph("string[N] x -> string[N] y", "y = Identity(x)")),
    "untyped output": ("output", graph(f"{ROWS} -> y", "y = Relu(x)")),
    "NonZero in a branch": (
        "NonZero",
        graph(
            f"{ROWS} -> float y",
            "m = ReduceMax<keepdims=0>(x) c = Greater(m, z) "
            f"y = If (c) <{INNER} {{ n = NonZero(x) f = Cast<to=1>(n) eo = ReduceMax<keepdims=0>(f) }}>",
            z=0.0,
        ),
    ),
    "mixed operands in a branch": (
        "Mul",
        graph(
            "float x -> float y",
            f"m = Identity(x) c = Greater(x, z) h = Cast<to=10>(x) y = If (c) <{INNER} {{ eo = Mul(h, m) }}>",
            z=0.0,
        ),
    ),
}


@pytest.mark.parametrize(("operator", "model"), BEYOND.values(), ids=BEYOND)
def test_agrees_beyond_the_matrix(operator: str, model: ModelProto, build: Build) -> None:
    assert build(model).stage != "built"
    assert operator in {finding.operator for finding in refused(model)}


ACCEPTED = {
    "integer powers": graph(SAME, "y = Pow(x, c)", c=np.int32(2)),
    "half batch norm with float statistics": graph(
        "float16[N,8,4,4] x -> float16[N,8,4,4] y",
        "y = BatchNormalization(x, s, b, b, v)",
        **NORM,
        v=np.ones(8, np.float32),
    ),
    "resize by scales and axes": graph(
        f"{IMAGES} -> float[N,3,16,16] y", 'y = Resize<mode="linear", axes=[2,3]>(x, , s)', s=[0.5, 0.5], opset=18
    ),
    "resize by sizes and axes of a fixed batch": graph(
        "float[2,3,32,32] x -> float[2,3,16,16] y",
        'y = Resize<mode="linear", axes=[2,3]>(x, , , s)',
        s=[16, 16],
        opset=18,
    ),
    "weights without zero point": graph(
        "float[N,8] x -> float[N,8] y",
        "d = DequantizeLinear<axis=0>(w, s) y = MatMul(x, d)",
        w=weights(8, 8, dtype=np.int8),
        s=np.full(8, 0.1, np.float32),
    ),
    "uint8 constant through Cast": graph(SAME, "f = Cast<to=1>(c) y = Mul(x, f)", c=np.array([3], np.uint8)),
}


@pytest.mark.parametrize("model", ACCEPTED.values(), ids=ACCEPTED)
def test_refuses_no_more_than_the_parser(model: ModelProto, build: Build) -> None:
    assert build(model).stage == "built"
    assert refused(model) == []


def test_knows_the_operators_that_have_an_importer() -> None:
    pytest.importorskip("tensorrt_rtx")
    from tests.rtx import rtx_operators

    names = {schema.name for schema in defs.get_all_schemas_with_history() if schema.domain == ""}
    importable = rtx_operators(sorted(names))
    unknown = set()
    for name in names:
        node = helper.make_node(name, ["x"], ["y"])
        nodes = onnx.helper.make_graph([node], "g", [], [])
        model = helper.make_model(nodes, opset_imports=[helper.make_opsetid("", defs.onnx_opset_version())])
        if any("import this operator" in finding.found for finding in preflight(model)):
            unknown.add(name)
    assert unknown - (names - importable) == IMPORTER_IN_VAIN.keys()
    assert names - importable <= unknown | {name for name in names if not _in_newest(name)}


def _in_newest(name: str) -> bool:
    return bool(defs.has(name, defs.onnx_opset_version(), ""))


def test_opset_and_ir_are_bounded_by_the_oldest_tensorrt() -> None:
    assert found(graph(SAME, "y = Relu(x)", opset=19)) == []
    assert found(graph(SAME, "y = Relu(x)", opset=20)) == [("model", "refused", ("tensorrt",))]
    assert found(graph(SAME, "y = Relu(x)", ir=11)) == [("model", "refused", ("tensorrt",))]


def test_what_jetpack_6_is_not_known_to_take_is_a_warning() -> None:
    rows = {row.name: row.model for row in OPERATOR_GRAPHS}
    assert found(rows["function"]) == [("model", "warning", ("tensorrt",))]
    assert found(rows["int8-per-channel"]) == [("QuantizeLinear", "warning", ("tensorrt",))]


def test_warns_of_open_sizes_and_int64_outputs() -> None:
    both = ("tensorrt", "tensorrt-rtx")
    open_size = graph("float[N,3,H,V] x -> float[N,3,H,V] y", "y = Relu(x)")
    assert found(open_size) == [("input", "warning", both)]
    assert "[2, 3]" in preflight(open_size)[0].found
    (indices,) = preflight(graph(f"{ROWS} -> int64[N,1] y", "y = ArgMax<axis=1>(x)"))
    assert (indices.node, indices.kind) == ("y", "warning")
    assert "int32" in indices.advice


def test_inputs_of_fixed_size_and_weights_among_the_inputs_are_silent() -> None:
    assert found(graph("float[1,3,8,8] x, float[W,V] w -> float[1,3,8,8] y", "y = Add(x, w)", w=weights(8, 8))) == []


def test_the_head_stays_float32(artifact_path: Path) -> None:
    model = onnx.load_from_string(bytes(read_artifact(artifact_path).model))
    assert refused(model) == []
    center = next(tensor for tensor in model.graph.initializer if tensor.name == "grood/center")
    half = numpy_helper.from_array(numpy_helper.to_array(center).astype(np.float16), center.name)
    center.CopyFrom(half)
    sub = next(node for node in model.graph.node if center.name in node.input)
    assert {finding.node for finding in refused(model)} == {sub.name}
    assert any("distances lose their digits" in finding.found for finding in refused(model))


def test_reads_nothing_outside_the_model_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "z").write_bytes(b"\x03")
    model = graph(SAME, "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", s=1.0, z=np.int8(0))
    tensor = model.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="z")
    before = model.SerializeToString()
    assert "no constant" in refused(model)[0].found  # and not: zero point 3
    assert model.SerializeToString() == before


def test_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    infer = onnx.shape_inference.infer_shapes

    def watched(model: ModelProto) -> ModelProto:
        seen.append(model.ByteSize())
        return infer(model)

    monkeypatch.setattr("grood_edge.export.preflight.shape_inference.infer_shapes", watched)
    assert found(graph("float[N,1000] x -> float[N,1000] y", "y = MatMul(x, w)", w=weights(1000, 1000))) == []
    assert seen
    assert seen[0] < 10_000


def _calls_itself() -> ModelProto:
    function = '<domain: "f", opset_import: ["" : 17, "f" : 1]> A (a) => (o) { o = f.A(a) }'
    return graph(SAME, "y = f.A(x)", domains=("f",), functions=function)


def _doubles_sixty_times() -> ModelProto:
    header = '<domain: "f", opset_import: ["" : 17, "f" : 1]>'
    functions = f"{header} F0 (a) => (o) {{ o = Neg(a) }} " + " ".join(
        f"{header} F{i + 1} (a) => (o) {{ b = f.F{i}(a) o = f.F{i}(b) }}" for i in range(60)
    )
    return graph(SAME, "y = f.F60(x)", domains=("f",), functions=functions)


def _nested(depth: int) -> ModelProto:
    inner = helper.make_graph([helper.make_node("NonZero", ["x"], ["o"])], "g", [], [])
    for _ in range(depth):
        inner = helper.make_graph([helper.make_node("If", ["c"], ["o"], then_branch=inner)], "g", [], [])
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 17)])


HOSTILE = {
    "a function that calls itself": _calls_itself(),
    "functions that double sixty times": _doubles_sixty_times(),
    "subgraphs in subgraphs": _nested(20),
}


@pytest.mark.parametrize("model", HOSTILE.values(), ids=HOSTILE)
def test_hostile_models_are_refused_quickly(model: ModelProto) -> None:
    assert refused(model)


def test_findings_are_bounded() -> None:
    nodes = [helper.make_node("NonZero", ["x"], [f"y{i}"]) for i in range(1000)]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.INT64, None) for i in range(1000)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs))
    kinds = [finding.kind for finding in preflight(model)]
    assert kinds == ["refused"] * MAX_FINDINGS + ["warning"] * MAX_FINDINGS


def test_malformed_models_are_judged_and_do_not_crash() -> None:
    assert preflight(ModelProto()) == ()
    model = ModelProto()
    for operator in ("Resize", "TopK", "QuantizeLinear", "DequantizeLinear", "Mod", "Constant", "MaxPool", "Cast", ""):
        for count in (0, 1, 4):
            node = model.graph.node.add(op_type=operator, input=["x"] * count)
            for name in ("axes", "dilations", "antialias", "coordinate_transformation_mode", "value", "k", "fmod"):
                node.attribute.add(name=name, type=AttributeProto.FLOAT, f=float("nan"))
    model.graph.input.add(name="x").type.tensor_type.elem_type = 99
    model.graph.initializer.add(name="x", data_type=TensorProto.INT8, dims=[3, -1], raw_data=b"1")
    model.graph.initializer.add(name="w", data_type=77, dims=[1 << 62, 1 << 62])
    assert all(finding.node and finding.operator and finding.sentence for finding in preflight(model))
    assert "number 77" in str(preflight(model))
