"""Batch norms in convolutions: the same function without the nodes."""

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from grood_edge.export.folding import fold_batch_norms
from grood_edge.export.layers import prepared
from grood_edge.ort import open_ort

X = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
PARAMETERS = ["scale", "shift", "mean", "variance"]


def model(bias: bool = True, extra: tuple[str, ...] = (), variance: float = 1.0) -> ModelProto:
    """Convolution, batch norm, ReLU; `extra`: tensors that are outputs, too."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((5, 3, 3, 3)), "b": rng.standard_normal(5)}
    arrays |= {name: rng.uniform(0.5, 2, 5) for name in PARAMETERS}
    arrays["variance"] *= variance
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"][: 2 + bias], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", *PARAMETERS], ["n"], name="norm", epsilon=0.01),
        helper.make_node("Relu", ["n"], ["y"], name="relu"),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 5, 8, 8]) for name in ("y", *extra)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])]
    tensors = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def kinds(found: ModelProto) -> list[str]:
    return [node.op_type for node in found.graph.node]


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_function(bias: bool) -> None:
    original = model(bias)
    folded = fold_batch_norms(prepared(original))
    checker.check_model(folded, full_check=True)
    assert kinds(folded) == ["Conv", "Relu"]
    assert folded.graph.node[0].name == "conv"
    assert {tensor.name for tensor in folded.graph.initializer} == {"n_folded_weight", "n_folded_bias"}
    expected, found = (open_ort(m.SerializeToString()).run({"x": X})["y"] for m in (original, folded))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.max() > 1


def test_a_convolution_that_others_read_keeps_its_norm() -> None:
    assert kinds(fold_batch_norms(prepared(model(extra=("c",))))) == ["Conv", "BatchNormalization", "Relu"]


def test_a_norm_that_would_give_nan_stays() -> None:
    assert "BatchNormalization" in kinds(fold_batch_norms(prepared(model(variance=-1.0))))


def test_a_graph_without_norms_stays() -> None:
    once = fold_batch_norms(prepared(model()))
    assert fold_batch_norms(prepared(once)).graph.node == once.graph.node
