"""Which backend runs: by name without falling back, or `auto`, which says what it passed over.

No GPU is here, so CUDA and the engine's execution are the public fakes; the engine itself is a real one of
TensorRT-RTX, found, built, signed, cached and refused by the real code.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.errors import BackendError, CalibrationError, GroodEdgeError, UsageError, VerificationError
from grood_edge.outputs import Outputs
from grood_edge.runtime import choose, open_session
from grood_edge.runtime import compile as compile_module
from grood_edge.runtime.compile import CompileOptions, compile_artifact
from grood_edge.runtime.cuda import open_device
from grood_edge.runtime.engine_spec import BuildSpec, Device
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.trt import TrtBackend
from grood_edge.runtime.trt_api import TrtApi
from tests.runtime.engines import RTX_3060
from tests.runtime.fake_cuda import FakeCudart
from tests.runtime.fake_trt import FakeTrt
from tests.without_hook import without_hook


@pytest.fixture
def model(artifact_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(artifact_path, tmp_path / "digits.onnx"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, model: Path, rtx: TrtApi, user_home: Path, tmp_path: Path) -> list[FakeTrt]:
    """A machine with a GPU on which TensorRT-RTX runs; returns what was opened."""
    made: list[FakeTrt] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def choose_api(family: str, device: Any) -> TrtApi:
        if family == "tensorrt":
            raise BackendError("tensorrt is not installed")
        return rtx

    def backend(api: Any, plan: bytes, contract: Any, device: Any, logger: Any, on_host: bool) -> TrtBackend:
        assert plan[:4] == b"ptrt" or plan[1:4] == b"trt"
        fake = FakeTrt(FakeCudart(), rtx=True)
        made.append(fake)
        return TrtBackend(
            fake.api(), read_artifact(model).model, contract, open_device(fake.cuda), fake.logger, on_host
        )

    monkeypatch.setattr(choose, "choose_api", choose_api)
    monkeypatch.setattr(choose, "open_device", object)
    monkeypatch.setattr(choose, "present_device", lambda: RTX_3060)
    monkeypatch.setattr(choose, "TrtBackend", backend)
    monkeypatch.setattr(compile_module, "inspected_types", lambda *_: None)  # opening an engine needs the GPU
    return made


FRAME = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)


def test_onnxruntime_is_the_default(model: Path) -> None:
    with open_session(model) as session:
        assert (session.backend.provider, session.fallbacks) == ("cpu", ())


def test_auto_without_a_gpu_takes_the_cpu_and_says_why(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "grood_edge"), open_session(model, backend="auto") as session:
        assert session.backend.provider == "cpu"
        assert [reason.split(" is not used")[0] for reason in session.fallbacks] == list(choose.AUTO_ORDER[:-1])
    assert [record.message for record in caplog.records] == list(session.fallbacks)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_named_backend_never_falls_back(model: Path, backend: Any) -> None:
    with pytest.raises(GroodEdgeError, match=r"no CUDA device|cuda-bindings"):
        open_session(model, backend=backend)


@pytest.mark.parametrize(
    "arguments",
    [
        {"backend": "tensorrt", "provider": "cuda"},
        {"backend": "auto", "provider": "cpu"},
        {"trusted_engine": "a" * 64},
        {"backend": "auto", "trusted_engine": "a" * 64},
    ],
)
def test_contradictions(model: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"leave one of the two out|no engine is loaded"):
        open_session(model, **arguments)


@pytest.mark.parametrize("name", ["cpu", "tensort", ""])
def test_an_unknown_backend_is_not_taken_for_tensorrt(model: Path, name: Any) -> None:
    message = rf"backend '{name}' is unknown; expected one of auto, tensorrt, tensorrt-rtx"
    with without_hook(), pytest.raises(UsageError, match=message):
        open_session(model, backend=name)


def test_auto_passes_over_an_engine_that_answers_garbage(
    model: Path, gpu: list[FakeTrt], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrtBackend.run

    def garbage(self: TrtBackend, frames: np.ndarray) -> Outputs:
        outputs = run(self, frames)
        if len(frames) == 3:
            outputs.class_id[:] = 1 << 30
        return outputs

    monkeypatch.setattr(TrtBackend, "run", garbage)
    with open_session(model, backend="auto") as session:
        assert session.backend.provider == "cpu"
        assert any("class_id is 1073741824" in reason for reason in session.fallbacks)


def test_auto_builds_verifies_and_caches(model: Path, gpu: list[FakeTrt], tmp_path: Path) -> None:
    steps: list[str] = []
    with open_session(model, backend="auto", progress=lambda text, *_: steps.append(text)) as session:
        assert session.backend.provider == "tensorrt-rtx"
        assert len(session.fallbacks) == 1  # tensorrt
        found = session.predict(FRAME)
    with open_session(model) as plain:
        assert plain.predict(FRAME) == found
    assert "verifying the engine" in steps
    folder = tmp_path / "cache" / "grood-edge" / "engines"
    assert folder.stat().st_mode & 0o777 == 0o700
    names = sorted(path.name for path in folder.iterdir())
    assert [name.split(".engine")[1] for name in names] == ["", ".json", ".verified"]
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    steps.clear()
    with open_session(model, backend="auto", progress=lambda text, *_: steps.append(text)):
        assert steps == []  # neither built nor verified again
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_an_engine_beside_the_model_comes_first(
    model: Path, gpu: list[FakeTrt], rtx: TrtApi, user_home: Path, tmp_path: Path
) -> None:
    compile_artifact(model, rtx, RTX_3060)
    with open_session(model, backend="tensorrt-rtx"):
        assert len(gpu) == 1
    assert not list((tmp_path / "cache").rglob("*.engine"))


def test_a_refused_engine_is_an_error_by_name_and_a_reason_with_auto(
    model: Path, gpu: list[FakeTrt], rtx: TrtApi
) -> None:
    path = compile_artifact(model, rtx, RTX_3060).path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BackendError, match=r"was truncated.*Build it again: grood-edge compile"):
        open_session(model, backend="tensorrt-rtx")
    with open_session(model, backend="auto") as session:
        assert session.backend.provider == "cpu"
        assert any("was truncated" in reason for reason in session.fallbacks)


def test_an_engine_that_answers_wrongly_is_not_used(
    model: Path, gpu: list[FakeTrt], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrtBackend.run

    def wrong(self: TrtBackend, frames: np.ndarray) -> Outputs:
        outputs = run(self, frames)
        outputs.ood_score[:] += 1
        return outputs

    monkeypatch.setattr(TrtBackend, "run", wrong)
    with pytest.raises(VerificationError, match="does not reproduce the artifact's probes"):
        open_session(model, backend="tensorrt-rtx")
    assert gpu[0].cuda.alive() == []  # closed again
    with open_session(model, backend="auto") as session:
        assert session.backend.provider == "cpu"
        assert any("does not reproduce" in reason for reason in session.fallbacks)


def test_a_record_of_another_contract_does_not_count(model: Path, gpu: list[FakeTrt], tmp_path: Path) -> None:
    open_session(model, backend="tensorrt-rtx").close()
    (record,) = (tmp_path / "cache").rglob("*.verified")
    other = json.dumps(json.loads(record.read_text()) | {"contract": "0" * 64})
    for content in (other, "[" * 4000):  # nested deeper than Python's JSON reader goes
        steps: list[str] = []
        record.write_text(content)
        open_session(model, backend="tensorrt-rtx", progress=lambda text, *_, s=steps: s.append(text)).close()
        assert "verifying the engine" in steps


def test_a_foreign_engine_needs_its_digest(
    model: Path, gpu: list[FakeTrt], rtx: TrtApi, user_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled = compile_artifact(model, rtx, RTX_3060)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another-user"))
    with pytest.raises(BackendError, match="built by another user or on another machine"):
        open_session(model, backend="tensorrt-rtx")
    with pytest.raises(BackendError, match="names 000000000000"):
        open_session(model, backend="tensorrt-rtx", trusted_engine="0" * 64)
    with open_session(model, backend="tensorrt-rtx", trusted_engine=compiled.sidecar.engine_sha256) as session:
        assert session.backend.provider == "tensorrt-rtx"


def test_a_damaged_cache_is_made_again(model: Path, gpu: list[FakeTrt], tmp_path: Path) -> None:
    """A process killed between the two files leaves an engine without its sidecar."""
    open_session(model, backend="tensorrt-rtx").close()
    (sidecar,) = (tmp_path / "cache").rglob("*.engine.json")
    sidecar.unlink()
    open_session(model, backend="tensorrt-rtx").close()
    assert sidecar.exists()


def test_what_a_session_refuses_is_refused_before_a_build(model: Path, gpu: list[FakeTrt], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError):
        open_session(model, backend="tensorrt-rtx", alpha=1e-6)
    assert gpu == []
    assert not list((tmp_path / "cache").rglob("*.engine"))


def test_a_cache_that_others_can_write_is_refused(model: Path, gpu: list[FakeTrt], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "grood-edge" / "engines"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(BackendError, match=r"can write .*mode 0777.*chmod 700"):
        open_session(model, backend="tensorrt-rtx")


def test_a_backend_of_ones_own(model: Path) -> None:
    backend = OnnxRuntimeBackend(read_artifact(model))
    with open_session(model, backend=backend) as session:
        assert session.backend is backend
    with pytest.raises(UsageError, match="no engine is loaded; leave it out"):
        open_session(model, backend=backend, trusted_engine="a" * 64)


def test_an_engine_of_other_batches_beside_the_model_is_found(
    model: Path, gpu: list[FakeTrt], rtx: TrtApi, user_home: Path, tmp_path: Path
) -> None:
    compile_artifact(model, rtx, RTX_3060, CompileOptions(BuildSpec((1, 2, 4), ("SM86",))))
    open_session(model, backend="tensorrt-rtx").close()
    assert len(gpu) == 1
    assert not list((tmp_path / "cache").rglob("*.engine"))


def test_a_gpu_that_rtx_builds_nothing_for(
    model: Path, gpu: list[FakeTrt], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choose, "present_device", lambda: Device("NVIDIA H100", (9, 0), "12.4"))
    with pytest.raises(BackendError, match=r"builds no engine for NVIDIA H100 \(compute capability 9.0\)"):
        open_session(model, backend="tensorrt-rtx")
    assert not list((tmp_path / "cache").rglob("*.engine"))
