"""benchmarks/gpu.sh: what it says without a GPU, and that its checks pass and fail where they should, on fakes."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.errors import GroodEdgeError
from grood_edge.outputs import Outputs
from grood_edge.runtime.cuda import CudaStream, device_count, load_cudart, open_device
from grood_edge.runtime.trt import TrtBackend
from tests.runtime.fake_cuda import FakeCudart
from tests.runtime.fake_trt import FakeTrt

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu_checks")
    for name, value in {"CYCLES": 3, "LAUNCHES": 3, "TIMED_RUNS": 1}.items():
        monkeypatch.setattr(module, name, value)
    yield module
    sys.modules.pop("gpu_checks")


def failures(rows: list[Any]) -> dict[str, str]:
    return {row.name.split(": ")[1]: row.detail for row in rows if row.outcome == "fail"}


def without_gpu() -> bool:
    try:
        return device_count(load_cudart())[0] == 0
    except GroodEdgeError:
        return True


@pytest.mark.skipif(not without_gpu(), reason="there is a GPU: run benchmarks/gpu.sh itself")
def test_without_a_gpu_it_says_so_and_checks_the_rest(artifact_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--json", str(target), str(artifact_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    document = json.loads(target.read_text())
    assert document["result"] == "no GPU"
    assert document["environment"]["gpu"] is None
    outcomes = {check["name"]: check["outcome"] for check in document["checks"]}
    assert outcomes["cuda"] == "skipped"
    assert outcomes["onnxruntime-cpu digits: probes"] == "pass"
    assert "fail" not in outcomes.values()
    assert "no GPU" in done.stdout
    assert all(name in done.stdout for name in outcomes)


def test_a_file_that_is_no_artifact_fails(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), str(tmp_path / "bad.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout[done.stdout.index("\n{") :])["result"] == "failed"


@pytest.mark.parametrize("integrated", [False, True])
def test_the_device_checks_pass_on_a_device_that_works(checks: ModuleType, integrated: bool) -> None:
    fake = FakeCudart(integrated)
    rows = checks.device_checks(open_device(fake))
    assert failures(rows) == {}
    assert [row.outcome for row in rows].count("pass") >= 8
    assert fake.alive() == []


def test_the_device_checks_notice_a_leak_and_lost_copies(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCudart, "cudaFree", lambda fake, pointer: (fake.cudaError_t.cudaSuccess,))
    assert "bytes are lost" in failures(checks.device_checks(open_device(FakeCudart())))["lifetimes"]
    monkeypatch.setattr(CudaStream, "download", lambda *_: None)
    found = failures(checks.device_checks(open_device(FakeCudart())))
    assert {"copies", "order on a stream", "graph capture"} <= set(found)


def test_the_backend_checks_pass_on_an_engine_that_works(checks: ModuleType, artifact_path: Path) -> None:
    cuda = FakeCudart()
    trt, artifact = FakeTrt(cuda), read_artifact(artifact_path)

    def opening() -> TrtBackend:
        return TrtBackend(trt.api(), artifact.model, artifact.contract, open_device(cuda), trt.logger)

    rows = checks.backend_checks("fake", artifact, opening)
    assert failures(rows) == {}
    assert {row.outcome for row in rows} == {"pass"}
    assert cuda.alive() == []


class Wrong:
    """A backend whose answers depend on where a frame stands in a batch."""

    def __init__(self, backend: TrtBackend) -> None:
        self.provider, self._backend = backend.provider, backend

    def run(self, frames: np.ndarray) -> Outputs:
        outputs = self._backend.run(frames)
        outputs.is_ood[1:] ^= True
        return outputs

    def close(self) -> None:
        self._backend.close()


def test_the_backend_checks_notice_wrong_batches(checks: ModuleType, artifact_path: Path) -> None:
    cuda = FakeCudart()
    trt, artifact = FakeTrt(cuda), read_artifact(artifact_path)

    def opening() -> Wrong:
        return Wrong(TrtBackend(trt.api(), artifact.model, artifact.contract, open_device(cuda), trt.logger))

    found = failures(checks.backend_checks("fake", artifact, opening))
    assert "is_ood of row 1 changed" in found["batches"]
    assert "probes differ" in found["probes"]
