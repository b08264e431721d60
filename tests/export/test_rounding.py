"""A float16 graph rounded on the CPU: every rounding survives onnxruntime's optimisation, and 70,000 is infinite."""

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from grood_edge.export.rounding import rounded, surviving_roundings

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
LEVELS = [
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
]


def half_graph() -> ModelProto:
    """x -> half -> Conv -> Relu -> Mul with itself -> float32."""
    weights = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=HALF),
        helper.make_node("Conv", ["a", "w"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Mul", ["r", "r"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=FLOAT),
    ]
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["N", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", FLOAT, ["N", 4, 6, 6])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def run(model: ModelProto, x: np.ndarray, level: onnxruntime.GraphOptimizationLevel = LEVELS[2]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def halves(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def by_hand(x: np.ndarray) -> np.ndarray:
    """The same in NumPy, rounded after every step; the convolution sums in float32, as GPUs do."""
    weights = numpy_helper.to_array(half_graph().graph.initializer[0]).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(halves(x), (3, 3), axis=(2, 3))
    r = np.maximum(halves(np.einsum("nchwij,ocij->nohw", windows, weights)), 0)
    return halves(r * r)


@pytest.mark.parametrize("level", LEVELS)
def test_equals_rounding_every_step(level: onnxruntime.GraphOptimizationLevel) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    found, expected = run(rounded(half_graph()), x, level), by_hand(x)
    assert (found == halves(found)).all()
    assert np.abs(found - expected).max() <= 2.0**-9 * expected.max()  # another order of summation: one unit
    assert (found == expected).mean() > 0.95


def test_every_float16_tensor_is_rounded_after_optimisation() -> None:
    assert surviving_roundings(rounded(half_graph())) == 4  # a, c, r, m


def test_overflow_at_70000_is_infinite_here_and_hidden_by_the_plain_graph() -> None:
    x = np.full((1, 3, 8, 8), 0.0, np.float32)
    base = run(half_graph(), np.ones_like(x)).max()
    x += np.sqrt(70_000 / base)
    plain, judged = run(half_graph(), x), run(rounded(half_graph()), x)
    assert plain.max() == pytest.approx(70_000, rel=0.01)  # larger than any float16
    assert np.isinf(judged).any()


def test_small_values_become_subnormal_or_zero() -> None:
    graph = half_graph()
    x = np.full((1, 3, 8, 8), 2.0**-24, np.float32)
    assert run(rounded(graph), x).max() == 0.0  # its square is far below the smallest half, 2^-24


def test_names_types_and_the_model_itself_stay() -> None:
    model = half_graph()
    before = model.SerializeToString()
    other = rounded(model)
    assert model.SerializeToString() == before
    assert [(v.name, v.type.tensor_type.elem_type) for v in (*other.graph.input, *other.graph.output)] == [
        ("x", FLOAT), ("y", FLOAT),
    ]  # fmt: skip
    assert {t.data_type for t in other.graph.initializer} == {FLOAT}
