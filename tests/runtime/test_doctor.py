"""What the doctor says about this machine, and about machines that are set up badly."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from grood_edge.errors import BackendError
from grood_edge.ort import PROVIDERS
from grood_edge.runtime import doctor, machine
from grood_edge.runtime.choose import AUTO_ORDER
from grood_edge.runtime.doctor import Gpu, diagnose
from grood_edge.runtime.gpu import DeviceInfo


def test_this_machine() -> None:
    found = diagnose()
    assert [way.name for way in found.ways] == list(AUTO_ORDER)
    assert found.ways[-1].works
    assert found.packages["onnxruntime"]
    if not found.gpu.name:
        assert found.auto == "onnxruntime on cpu"
        assert found.gpu.reason
        assert "an NVIDIA GPU" in found.better
        assert all(way.reason and way.advice for way in found.ways[:-1])


def test_json_of_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "grood_edge", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    assert set(document) == {field.name for field in dataclasses.fields(doctor.Diagnosis)}
    assert document["auto"] in AUTO_ORDER
    assert done.stderr == ""


def test_torch_and_onnx_are_not_imported() -> None:
    code = (
        "import sys; from grood_edge.runtime.doctor import diagnose; diagnose();"
        "sys.exit(bool({'torch', 'onnx', 'sklearn'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def with_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 7)) -> None:
    info = DeviceInfo(0, "Orin", capability, (12, 6), integrated=True, memory=8 << 30)
    monkeypatch.setattr(doctor, "load_cudart", lambda: None)
    monkeypatch.setattr(doctor, "device_info", lambda _: info)


def test_a_gpu_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    monkeypatch.setattr(doctor, "require_usable", lambda _: (_ for _ in ()).throw(BackendError("it cannot start")))
    found = diagnose()
    assert found.gpu == Gpu("Orin", "8.7", "12.6", 8 << 30, True, found.gpu.power)
    assert found.ways[0].advice.startswith("on a Jetson: apt install")  # the GPU itself is there
    assert found.auto == "onnxruntime on cpu"
    assert found.better.startswith("for onnxruntime on cuda: pip uninstall onnxruntime")


def test_a_gpu_with_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    with_gpu(monkeypatch)
    assert "no engine for compute capability 8.7" in diagnose().ways[1].reason
    with_gpu(monkeypatch, (8, 6))
    found = diagnose()
    assert found.auto == "tensorrt-rtx"
    assert "strongly_typed" in found.ways[1].capabilities
    assert found.better.startswith("for tensorrt:")


def test_a_probe_that_breaks_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "load_api", lambda _: 1 / 0)
    found = diagnose()
    assert found.ways[0].reason == "ZeroDivisionError: division by zero"
    assert found.ways[-1].works


@pytest.mark.parametrize("error", [RuntimeError("no libcudart"), OSError("no libcudart")])
def test_cuda_bindings_that_break_are_a_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(doctor, "load_cudart", broken)
    found = diagnose()
    assert "no libcudart" in found.gpu.reason
    assert found.ways[-1].works


@pytest.mark.parametrize("metadata", ["", "Metadata-Version: 2.1\nName: torch\n"])
def test_a_package_that_was_half_removed_is_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, metadata: str
) -> None:
    folder = tmp_path / "torch-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert diagnose().packages["torch"].startswith("unreadable")


def test_conflicts_and_variables_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_TENSORRT_FP16_ENABLE", "1")
    monkeypatch.setattr(doctor, "_packages", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    both, variables = diagnose().warnings
    assert "overwrite each other" in both
    assert "ORT_TENSORRT_FP16_ENABLE" in variables


def test_a_jetson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    monkeypatch.setattr(doctor, "_JETPACK", tmp_path / "release")
    monkeypatch.setattr(doctor, "_MODEL", tmp_path / "model")
    tool = tmp_path / "nvpmodel"
    tool.write_text("#!/bin/sh\necho 'NV Power Mode: 15W'\necho 0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = diagnose()
    assert found.device == "NVIDIA Jetson Orin Nano Developer Kit, L4T 36.4.3"
    assert found.gpu.power == "NV Power Mode: 15W, 0"


def test_cuda_of_onnxruntime_is_tried_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson has no nvidia-smi, and onnxruntime needs no cuda-bindings: what `auto` would take must be told."""

    def broken() -> None:
        raise BackendError("cuda-bindings is not installed")

    asked: list[str] = []
    monkeypatch.setattr(doctor, "load_cudart", broken)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(doctor, "open_ort", lambda data, provider: asked.append(provider))
    assert diagnose().auto == "onnxruntime on cuda"
    assert asked == ["cuda", "cpu"]


@pytest.mark.parametrize(("memory", "expected"), [("6138", 6138 << 20), ("[N/A]", 0)])
def test_a_gpu_that_only_nvidia_smi_sees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: str, expected: int
) -> None:
    if diagnose().gpu.name:
        pytest.skip("this machine has a GPU")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho 'NVIDIA RTX A2000, 8.6, 550.54.15, {memory}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = diagnose()
    assert (found.gpu.name, found.gpu.compute_capability, found.gpu.driver) == ("NVIDIA RTX A2000", "8.6", "550.54.15")
    assert found.gpu.memory_bytes == expected
    assert found.gpu.reason
    assert not any(way.works for way in found.ways[:2])


def test_a_program_that_prints_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvpmodel"
    tool.write_text("#!/bin/sh\nprintf 'mode \\377'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert diagnose().gpu.power == "mode \ufffd"


def test_a_program_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvpmodel"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(machine, "_SECONDS", 0.2)
    assert diagnose().gpu.power == ""
