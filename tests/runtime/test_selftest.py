"""The packaged artifact, and what is built, verified and timed with it on this machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.errors import ArtifactError
from grood_edge.outputs import Outputs
from grood_edge.probes import replay_probes
from grood_edge.runtime import selftest as selftest_module
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.selftest import BACKENDS, MODEL, SelfTest, selftest


def test_the_packaged_artifact_is_current_and_small() -> None:
    """`python -m tests.selftest_model` makes it anew."""
    artifact = read_artifact(MODEL)
    assert MODEL.stat().st_size < 200_000
    assert replay_probes(artifact.contract, OnnxRuntimeBackend(artifact).run, "cpu").passed
    assert len(artifact.contract.ood_prototypes) == 3


def test_the_packaged_artifact_made_anew_answers_the_same(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.selftest_model import make

    make(tmp_path / "again.onnx")
    old, new = read_artifact(MODEL), read_artifact(tmp_path / "again.onnx")
    assert old.contract.classes == new.contract.classes
    assert old.contract.preprocessing == new.contract.preprocessing
    frames = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 1), dtype=np.uint8)
    expected, found = (OnnxRuntimeBackend(artifact).run(frames) for artifact in (old, new))
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.ood_score, expected.ood_score, rtol=1e-3, atol=1e-3)


def test_every_backend_has_a_line(user_home: Path) -> None:
    found = {result.backend: result for result in selftest()}
    assert tuple(found) == BACKENDS
    cpu = found["onnxruntime-cpu"]
    assert cpu.status == "passed"
    assert cpu.largest_error is not None
    assert cpu.tolerance is not None
    assert cpu.largest_error <= cpu.tolerance
    assert len(cpu.milliseconds) == 2
    assert all(value > 0 for value in cpu.milliseconds)
    assert cpu.ratio is not None
    assert all(result.status != "FAILED" for result in found.values())


def test_tensorrt_rtx_is_built_without_a_gpu(user_home: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (result,) = selftest(backends=("tensorrt-rtx",))
    assert result.status in ("built, not run", "passed")
    assert result.build_seconds is not None


def test_a_wrong_backend_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run = OnnxRuntimeBackend.run

    def wrong(self: OnnxRuntimeBackend, frames: np.ndarray) -> Outputs:
        outputs = run(self, frames)
        if len(frames) == 3:
            outputs.ood_score[:] += 1
        return outputs

    monkeypatch.setattr(OnnxRuntimeBackend, "run", wrong)
    (result,) = selftest(backends=("onnxruntime-cpu",))
    assert result.status == "FAILED"
    assert "in batches of 3" in result.reason


def test_a_backend_that_breaks_leaves_the_others_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = selftest_module._tested

    def broken(name: str, *arguments: Any) -> SelfTest:
        if name == "tensorrt":
            raise RuntimeError("bindings of another version")
        return plain(name, *arguments)

    monkeypatch.setattr(selftest_module, "_tested", broken)
    first, second = selftest(backends=("tensorrt", "onnxruntime-cpu"))
    assert (first.status, first.reason) == ("FAILED", "RuntimeError: bindings of another version")
    assert second.status == "passed"


def test_another_model(artifact_path: Path, tmp_path: Path) -> None:
    (result,) = selftest(artifact_path, ("onnxruntime-cpu",))
    assert result.status == "passed"
    with pytest.raises(ArtifactError, match="cannot read"):
        selftest(tmp_path / "none.onnx", ("onnxruntime-cpu",))


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grood_edge", "selftest", *words], capture_output=True, text=True, check=False
    )


def test_the_command() -> None:
    done = command("--json", "--backend", "onnxruntime-cpu")
    document = json.loads(done.stdout)
    assert (done.returncode, document["passed"], document["model"]) == (0, True, "selftest.onnx")
    assert document["backends"][0]["status"] == "passed"
    wrong = command("--backend", "abacus")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "expected one of onnxruntime-cpu" in wrong.stderr


def test_a_backend_that_is_asked_for_and_not_here_fails() -> None:
    done = command("--backend", "onnxruntime-cuda")
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    assert done.returncode == 1
    assert "FAIL: onnxruntime-cuda" in done.stdout
