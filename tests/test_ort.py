"""onnxruntime, opened strictly, and its exceptions turned into ours."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from grood_edge.errors import BackendError, MissingExtraError
from grood_edge.ort import PROVIDERS, open_ort

WITHOUT_CUDA = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()


def model(operator: str = "Relu", domain: str = "") -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], domain=domain)], "g", [x], [y])
    opsets = [helper.make_opsetid("", 19), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def test_inputs_outputs_and_values() -> None:
    session = open_ort(model())
    assert session.inputs == {"x": ("N", 2)}
    assert session.outputs == ["y"]
    values = np.array([[-1, 2], [3, -4]], np.float32)
    np.testing.assert_array_equal(session.run({"x": values})["y"], [[0, 2], [3, 0]])
    assert list(session.run({"x": values}, ["y"])) == ["y"]


def test_threads(artifact_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), dtype=np.uint8)
    one, default = (open_ort(artifact_path.read_bytes(), threads=n).run({"image": frames}) for n in (1, None))
    np.testing.assert_allclose(one["logits"], default["logits"], rtol=1e-5, atol=1e-5)


def test_unknown_provider() -> None:
    for name in ("tpu", "CPU", "CPUExecutionProvider", ""):
        with pytest.raises(BackendError, match=f"provider '{name}' is unknown; expected one of cpu, cuda"):
            open_ort(model(), name)


@pytest.mark.skipif(not WITHOUT_CUDA, reason="this onnxruntime has CUDA")
def test_cuda_is_refused_and_never_replaced_by_the_cpu() -> None:
    with pytest.raises(BackendError) as error:
        open_ort(model(), "cuda")
    text = str(error.value)
    assert "provider 'cuda' was asked for" in text
    assert f"onnxruntime {onnxruntime.__version__} has no CUDAExecutionProvider" in text
    assert "grood-edge[gpu]" in text
    assert "--provider cpu" in text


def test_every_provider_is_one_that_onnxruntime_knows() -> None:
    assert set(PROVIDERS.values()) <= set(onnxruntime.get_all_providers())


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x08\x09", b"\0" * 100, b"PK\x03\x04"])
def test_garbage_model(data: bytes) -> None:
    with pytest.raises(BackendError, match="onnxruntime cannot open the model on cpu"):
        open_ort(data)


def test_truncated_model(artifact_path: Path) -> None:
    data = artifact_path.read_bytes()
    with pytest.raises(BackendError, match="cannot open the model"):
        open_ort(data[: len(data) // 2])


def test_unknown_operator_is_named() -> None:
    with pytest.raises(BackendError, match=r"cannot open the model on cpu.*Unheard"):
        open_ort(model("Unheard"))
    with pytest.raises(BackendError, match=r"cannot open the model on cpu.*my\.domain"):
        open_ort(model("Relu", "my.domain"))


def test_wrong_feeds() -> None:
    session = open_ort(model())
    good = np.zeros((1, 2), np.float32)
    for feeds in ({}, {"z": good}, {"x": good.astype(np.float64)}, {"x": np.zeros((1, 3), np.float32)}):
        with pytest.raises(BackendError, match="onnxruntime failed: ") as error:
            session.run(feeds)
        assert "\n" not in str(error.value)
    with pytest.raises(BackendError, match="onnxruntime failed"):
        session.run({"x": good}, ["none"])
    np.testing.assert_array_equal(session.run({"x": good})["y"], good)  # and it still works


def test_missing_onnxruntime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'grood-edge\[cpu\]'"):
        open_ort(model())
