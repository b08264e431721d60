"""onnxruntime, opened strictly, and its exceptions turned into ours."""

import sys
from copy import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, load, parser

from grood_edge.errors import BackendError, MissingExtraError
from grood_edge.ort import PROVIDERS, OrtModel, _session_options, open_ort, tensorrt_options

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


def test_the_models_bytes_are_let_go() -> None:
    data = model()
    before = sys.getrefcount(data)
    session = open_ort(data)
    assert sys.getrefcount(data) == before
    assert session.outputs == ["y"]


INT8_ROWS = "r = DequantizeLinear<axis=0>(b, s) y = Gemm<transB=1>({}, r)"
QUANTISED = "q = QuantizeLinear(x, one, zero) d = DequantizeLinear(q, one, zero) " + INT8_ROWS.format("d")


@pytest.mark.parametrize(("nodes", "left"), [(INT8_ROWS.format("x"), 0), (QUANTISED, 2)], ids=["float", "int8"])
def test_int8_constants_are_dequantised_on_loading_where_nothing_computes_in_int8(
    nodes: str, left: int, tmp_path: Path
) -> None:
    """A network that does keeps its pairs: onnxruntime makes int8 products of them."""
    constants = "int8[3,2] b = {1, 2, 3, 4, 5, 6}, float[3] s = {1, 2, 4}, float one = {1}, int8 zero = {0}"
    made = parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 19]> g (float[N,2] x) => (float[N,3] y) <{constants}> {{ {nodes} }}'
    ).SerializeToString()
    options = _session_options("cpu", 1, made)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(made, options)
    operators = [node.op_type for node in load(tmp_path / "optimised.onnx").graph.node]
    assert operators.count("DequantizeLinear") == left
    found = open_ort(made).run({"x": np.array([[1, 3]], np.float32)})["y"]
    np.testing.assert_array_equal(found, [[7, 30, 92]])


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


def test_names_without_end_do_not_fill_the_message() -> None:
    with pytest.raises(BackendError, match="cannot open the model on cpu") as error:
        open_ort(model("U" * 100_000))
    assert len(str(error.value)) < 1000


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
    with pytest.raises(MissingExtraError, match=r"pip install 'grood-edge\[cpu\]'") as error:
        open_ort(model())
    assert str(copy(error.value)) == str(error.value)  # as between processes


@pytest.mark.skipif("TensorrtExecutionProvider" in onnxruntime.get_available_providers(), reason="TensorRT is here")
def test_tensorrt_is_refused_and_never_replaced() -> None:
    with pytest.raises(BackendError, match=r"provider 'tensorrt-ep' was asked for.*has no TensorrtExecutionProvider"):
        open_ort(model(), "tensorrt-ep")


def test_tensorrt_engines_are_kept_apart_by_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folder and prefix come from the digest: onnxruntime's own names do not tell two weights apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = tensorrt_options(model("Relu")), tensorrt_options(model("Sigmoid"))
    for name in ("trt_engine_cache_path", "trt_engine_cache_prefix", "trt_timing_cache_path"):
        assert first[name] != second[name]
    assert first == tensorrt_options(model("Relu"))
    folder = Path(first["trt_engine_cache_path"])
    assert folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [first[f"trt_profile_{part}_shapes"] for part in ("min", "opt", "max")] == ["x:1x2", "x:1x2", "x:8x2"]


def test_variables_that_change_engines_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ORT_TENSORRT_FP16_ENABLE", "1")
    tensorrt_options(model())
    assert "ORT_TENSORRT_FP16_ENABLE" in caplog.text


def test_a_provider_that_did_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime says that it has CUDA, and then runs on the CPU: its libraries are missing."""
    plain = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda m, o, providers, **_: plain(m, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(BackendError, match="'cuda' was asked for, but onnxruntime fell back to CPUExecutionProvider"):
        open_ort(model(), "cuda")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt-ep"])
def test_a_provider_that_cannot_start_is_not_replaced_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], provider: str
) -> None:
    """As the GPU package does without CUDA: its Python part would print to stdout and try again on the CPU."""
    tried: list[object] = []

    class WithoutLibraries(onnxruntime.InferenceSession):  # type: ignore[misc]
        def _create_inference_session(self, providers: object, *arguments: object) -> None:
            tried.append(providers)
            raise RuntimeError("Please install the libraries.")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    data = model()
    tensorrt_options(data)  # looks into the model with a session of its own
    monkeypatch.setattr("grood_edge.ort._profile", lambda _: {})
    monkeypatch.setattr(onnxruntime, "InferenceSession", WithoutLibraries)
    with pytest.raises(BackendError, match=r"Please install the libraries\. Where its libraries .*install.*doctor"):
        open_ort(data, provider)
    assert len(tried) == 1
    assert capsys.readouterr().out == ""


def test_a_run_is_not_repeated_on_another_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Watched(onnxruntime.InferenceSession):  # type: ignore[misc]
        def disable_fallback(self) -> None:
            calls.append("disabled")
            super().disable_fallback()

    monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
    open_ort(model())
    assert calls == ["disabled"]


def test_bound_inputs_and_outputs_give_the_same_for_changing_batches(artifact_path: Path) -> None:
    """What GPU providers run with, here on the CPU."""
    session = onnxruntime.InferenceSession(artifact_path.read_bytes(), providers=["CPUExecutionProvider"])
    bound, plain = OrtModel(session, bound=True), OrtModel(session)
    rng = np.random.default_rng(0)
    for size in (1, 8, 3, 8, 1):
        frames = rng.integers(0, 256, (size, 32, 32, 1), dtype=np.uint8)
        first, second = bound.run({"image": frames}), plain.run({"image": frames})
        assert list(first) == list(second)
        for name, values in second.items():
            np.testing.assert_array_equal(first[name], values)
    with pytest.raises(BackendError, match="onnxruntime failed"):
        bound.run({"image": frames[:, :16]})
