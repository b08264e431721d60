"""The loader of TensorRT's modules: what it reads from them, what it refuses, and the one logger of a process."""

import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grood_edge.errors import BackendError, MissingExtraError
from grood_edge.runtime.trt_api import FAMILIES, TrtApi, load_api, process_logger, without_noise


class Severity:
    """As pybind11's enum: smaller is worse."""

    ERROR, WARNING, INFO = 1, 2, 3


def fake_module(**names: Any) -> Any:
    class Logger:
        ERROR, WARNING, INFO = 1, 2, 3

    return SimpleNamespace(ILogger=Logger, **names)


def api_of(**names: Any) -> TrtApi:
    return TrtApi(fake_module(**names), "tensorrt", "10.3.0")


class TestCapabilities:
    def test_of_tensorrt_rtx(self) -> None:
        pytest.importorskip("tensorrt_rtx")
        api = load_api("tensorrt-rtx")
        found = api.capabilities
        assert (found.strict_nans, found.compute_capabilities, found.engine_validity) == (True, True, True)
        assert found.weak_flags == ()
        assert api.has("IBuilderConfig.create_timing_cache")
        assert not found.timing_cache, "its timing cache does nothing"

    def test_follow_from_attributes_not_from_the_version(self) -> None:
        flags = SimpleNamespace(TF32=0, FP16=1, INT8=2)
        config = SimpleNamespace(create_timing_cache=None, progress_monitor=None)
        old = api_of(BuilderFlag=flags, IBuilderConfig=config)
        assert old.capabilities.weak_flags == ("FP16", "INT8")
        assert old.capabilities.timing_cache
        assert not old.capabilities.progress_monitor  # half of what it takes
        assert not old.capabilities.strict_nans
        assert TrtApi(old.module, "tensorrt", "99.0").capabilities == old.capabilities


class TestLoading:
    def test_a_missing_tensorrt_rtx_names_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(MissingExtraError, match=r"grood-edge\[rtx\]"):
            load_api("tensorrt-rtx")

    def test_a_missing_tensorrt_says_where_it_comes_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(BackendError, match=r"JetPack .*python3-libnvinfer"):
            load_api("tensorrt")

    @pytest.mark.parametrize("version", ["8.6.1", "9.3.0"])
    def test_versions_before_10_are_refused(self, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        module = ModuleType("tensorrt")
        module.__version__ = version  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        with pytest.raises(BackendError, match=f"TensorRT {version} is installed; expected 10 or newer"):
            load_api("tensorrt")

    def test_a_newer_version_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = ModuleType("tensorrt")
        module.__version__ = "12.1.0.5"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        assert load_api("tensorrt") == TrtApi(module, "tensorrt", "12.1.0.5")

    def test_families_are_the_backends_names(self) -> None:
        assert FAMILIES == ("tensorrt", "tensorrt-rtx")


class TestLogger:
    def test_is_one_for_the_process_and_one_a_module(self) -> None:
        first, second = api_of(), api_of()
        assert process_logger(first) is process_logger(TrtApi(first.module, "tensorrt", "11.0"))
        assert process_logger(first) is not process_logger(second)

    def test_collects_warnings_and_errors_without_noise(self) -> None:
        logger = process_logger(api_of())
        logger.log(Severity.INFO, "I am busy")
        logger.log(Severity.WARNING, "mind the gap")
        before = logger.count
        logger.log(Severity.ERROR, "cannot build\nIn catchCudaError at x.cpp:3: cudaError 35\n")
        logger.log(Severity.ERROR, "In ScopedCudaStream: cudaError 35")
        assert logger.messages == ["mind the gap", "cannot build"]
        assert logger.since(before) == ["cannot build"]
        assert logger.since(logger.count) == []

    def test_keeps_a_bounded_number(self) -> None:
        logger = process_logger(api_of())
        for number in range(5000):
            logger.log(Severity.ERROR, f"message {number}")
        assert len(logger.messages) == 1000
        assert logger.since(4998) == ["message 4998", "message 4999"]
        assert len(logger.since(0)) == 1000

    def test_takes_messages_from_many_threads(self) -> None:
        logger = process_logger(api_of())
        threads = [
            threading.Thread(target=lambda: [logger.log(Severity.ERROR, "x") for _ in range(100)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert logger.count == len(logger.messages) == 800

    def test_noise_alone_is_nothing(self) -> None:
        assert without_noise("  catchCudaError(): cudaError 35\n\n") == ""
        assert without_noise("first\n  second ") == "first\nsecond"
