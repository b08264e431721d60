"""`grood-edge compile`: which TensorRT, what is written, what is said, and what an interruption leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner, Result

from grood_edge.artifact import read_artifact
from grood_edge.cli import app
from grood_edge.errors import BackendError, MissingExtraError
from grood_edge.runtime import compile as module
from grood_edge.runtime.build import BuildSettings, Built
from grood_edge.runtime.compile import (
    NO_DEVICE,
    CompileOptions,
    choose_api,
    compile_artifact,
    engine_path,
    present_device,
)
from grood_edge.runtime.engine import open_engine
from grood_edge.runtime.engine_spec import BuildSpec, Device
from grood_edge.runtime.sidecar import sidecar_path
from grood_edge.runtime.trt_api import TrtApi
from grood_edge.runtime.user_key import key_path
from tests.runtime.engines import RTX_3060, changed

ORIN = Device("Orin", (8, 7), "12.6")


@pytest.fixture
def model(artifact_path: Path, tmp_path: Path, user_home: Path, rtx: TrtApi) -> Path:
    return Path(shutil.copy(artifact_path, tmp_path / "my model.onnx"))


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, ["compile", *map(str, arguments)], env={"COLUMNS": "200"})
    assert "Traceback" not in result.output
    return result


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestCommand:
    def test_writes_engine_and_sidecar_and_says_what_they_are(self, model: Path, rtx: TrtApi) -> None:
        result = run(model, "--sm", "86,89", "--batch", "1,2,4")
        assert result.exit_code == 0, result.output
        (engine,) = model.parent.glob("*.engine")
        (beside,) = model.parent.glob("*.json")
        assert engine.name.startswith(f"my model.tensorrt-rtx-{rtx.version}-sm86_89-fp32-")
        assert beside == sidecar_path(engine)
        document = json.loads(beside.read_text())
        for said in (f"{engine.stat().st_size:,} bytes", "SM86, SM89", "1 to 4, tuned for 2", "FLOAT", "fp32"):
            assert said in result.output
        assert f"--i-trust-this-engine {document['engine_sha256']}" in result.output
        assert document["schema"] == "grood-edge.engine"
        assert document["contract"] == json.loads(read_artifact(model).contract.to_json())
        opened = open_engine(engine, read_artifact(model), rtx, RTX_3060, model=model)
        assert opened.sidecar.batch == (1, 2, 4)

    def test_as_json_into_another_folder(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir(mode=0o755)
        result = run(model, "--out", tmp_path / "out", "--json", "--backend", "tensorrt-rtx")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert sorted([document["path"], document["sidecar"]]) == [str(p) for p in sorted((tmp_path / "out").iterdir())]
        assert (document["backend"], document["targets"], document["device"]) == ("tensorrt-rtx", [], None)
        assert document["batch"] == [1, 1, 8]
        again = run(model, "--out", tmp_path / "out")
        assert again.exit_code == 1
        assert "use --force" in again.output

    def test_one_image_at_a_time_needs_no_batch(self, single_path: Path, tmp_path: Path, user_home: Path) -> None:
        single = shutil.copy(single_path, tmp_path / "single.onnx")
        result = run(single, "--json", "--sm", "86")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["batch"] == [1, 1, 1]

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (("--sm", "75"), 2, "no float32 matrix product on Turing"),
            (("--sm", "87"), 2, "A Jetson builds its own engine"),
            (("--sm", "current"), 2, "no usable GPU"),
            (("--sm", "x"), 2, "expected compute capabilities such as 86,89,120"),
            (("--batch", "8"), 2, "expected three numbers"),
            (("--batch", "8,4,2"), 2, "ascending order"),
            (("--backend", "tensorrt", "--sm", "86"), 2, "leave it out"),
            (("--out", "/nowhere/at/all"), 1, "does not exist"),
            (("--check", "--sm", "86", "--force"), 2, "--sm and --force would do nothing"),
        ],
    )
    def test_refuses_with_a_sentence(self, model: Path, options: tuple[str, ...], code: int, message: str) -> None:
        result = run(model, *options)
        assert (result.exit_code, message in result.output) == (code, True), result.output
        assert files(model.parent) == [model.name]

    def test_refuses_what_is_no_artifact(self, tmp_path: Path) -> None:
        (tmp_path / "x.onnx").write_bytes(b"no model")
        for options in ((), ("--check",)):
            result = run(tmp_path / "x.onnx", *options)
            assert result.exit_code == 1
            assert result.output.startswith("error: ")

    def test_refuses_a_folder_that_others_can_write_before_it_builds(self, model: Path) -> None:
        model.parent.chmod(0o777)
        result = run(model)
        assert result.exit_code == 1
        assert f"chmod go-w '{model.parent}'" in result.output or f"chmod go-w {model.parent}" in result.output
        assert files(model.parent) == [model.name]

    def test_refuses_a_key_that_others_could_read(self, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        key_path().parent.mkdir(parents=True)
        key_path().write_bytes(bytes(32))
        key_path().chmod(0o644)
        result = run(model, "--sm", "86")
        assert result.exit_code == 1
        assert "has mode 0644" in result.output
        assert not list(model.parent.glob("*.engine*"))

    def test_never_writes_through_a_link(self, model: Path, tmp_path: Path, rtx: TrtApi) -> None:
        options = CompileOptions(BuildSpec(targets=("SM86",)))
        engine_path(model, read_artifact(model), rtx, NO_DEVICE, options).symlink_to(tmp_path / "elsewhere")
        result = run(model, "--sm", "86", "--force")
        assert result.exit_code == 1
        assert "is a symbolic link; delete it" in result.output
        assert not (tmp_path / "elsewhere").exists()


class TestCheck:
    def test_of_a_good_artifact(self, model: Path) -> None:
        result = run(model, "--check", "--backend", "tensorrt-rtx")
        assert result.exit_code == 0, result.output
        assert "nothing in the graph that tensorrt-rtx refuses" in result.output
        assert "Next: grood-edge compile" in result.output
        document = json.loads(run(model, "--check", "--json").stdout)
        assert document["refused"] == 0
        assert files(model.parent) == [model.name]

    def test_of_a_graph_that_tensorrt_refuses(self, model: Path) -> None:
        artifact = read_artifact(model)
        graph = onnx.load_model_from_string(artifact.model)
        (last,) = (node for node in graph.graph.node if "logits" in node.output)
        graph.graph.node.insert(
            len(graph.graph.node),
            helper.make_node("DynamicQuantizeLinear", [last.input[0]], ["q", "s", "z"], "dynamic"),
        )
        model.write_bytes(changed(artifact, graph).model)
        result = run(model, "--check")
        assert result.exit_code == 1
        assert "refused: DynamicQuantizeLinear 'dynamic'" in result.output
        assert "Next" not in result.output
        document = json.loads(run(model, "--check", "--json").stdout)
        assert document["refused"] == 1
        assert document["findings"][0]["node"] == "dynamic"
        assert files(model.parent) == [model.name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(model: Path, number: signal.Signals) -> None:
    """The build of a larger network is stopped while TensorRT is at work."""
    command = [sys.executable, "-m", "grood_edge", "compile", str(model), "--sm", "86,89,120"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as process:
        child = _child_at_work(process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "nothing was written" in errors
    assert files(model.parent) == [model.name]
    assert _has_ended(child)


def _has_ended(number: int) -> bool:
    """Give a process that was ended the time to be gone."""
    for _ in range(100):
        if not Path(f"/proc/{number}").exists():
            return True
        time.sleep(0.05)
    return False


def _child_at_work(process: "subprocess.Popen[str]") -> int:
    """Wait until the build's own process has TensorRT's parser loaded."""
    while process.poll() is None:
        for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if "onnxparser" in Path(f"/proc/{number}/maps").read_text():
                return int(number)
        time.sleep(0.01)
    raise AssertionError(process.communicate())


class TestChoice:
    """Which module is taken; `tensorrt` cannot be had here, so a stand-in says it is there."""

    @pytest.fixture
    def tensorrt(self, monkeypatch: pytest.MonkeyPatch, rtx: TrtApi) -> dict[str, Any]:
        state: dict[str, Any] = {"tensorrt": TrtApi(SimpleNamespace(), "tensorrt", "10.3.0"), "tensorrt-rtx": rtx}

        def load(family: str) -> TrtApi:
            found = state[family]
            if isinstance(found, Exception):
                raise found
            api: TrtApi = found
            return api

        def usable(api: TrtApi) -> None:
            if api.version == "broken":
                raise BackendError("no driver")

        monkeypatch.setattr(module, "load_api", load)
        monkeypatch.setattr(module, "require_usable", usable)
        return state

    def test_tensorrt_where_there_is_a_gpu(self, tensorrt: dict[str, Any]) -> None:
        assert choose_api(None, ORIN).family == "tensorrt"

    def test_tensorrt_rtx_without_one(self, tensorrt: dict[str, Any]) -> None:
        assert choose_api(None, NO_DEVICE).family == "tensorrt-rtx"

    def test_tensorrt_rtx_when_tensorrt_does_not_start(self, tensorrt: dict[str, Any]) -> None:
        tensorrt["tensorrt"] = TrtApi(SimpleNamespace(), "tensorrt", "broken")
        assert choose_api(None, ORIN).family == "tensorrt-rtx"

    def test_what_was_asked_for_is_taken_or_refused(self, tensorrt: dict[str, Any]) -> None:
        assert choose_api("tensorrt-rtx", ORIN).family == "tensorrt-rtx"
        with pytest.raises(BackendError, match="builds for the GPU of this machine, and there is none"):
            choose_api("tensorrt", NO_DEVICE)
        tensorrt["tensorrt"] = BackendError("tensorrt cannot be imported")
        with pytest.raises(BackendError, match="cannot be imported"):
            choose_api("tensorrt", ORIN)

    def test_neither_gives_both_reasons(self, tensorrt: dict[str, Any]) -> None:
        tensorrt["tensorrt"] = BackendError("tensorrt cannot be imported (no module)")
        tensorrt["tensorrt-rtx"] = MissingExtraError("tensorrt-rtx", "rtx", "Building TensorRT-RTX engines")
        with pytest.raises(BackendError, match=r"no TensorRT can be used here.*no module.*grood-edge\[rtx\]"):
            choose_api(None, ORIN)


class TestDevice:
    def test_of_a_machine_with_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "load_cudart", lambda: None)
        info = SimpleNamespace(name="Orin", compute_capability=(8, 7), driver=(12, 6))
        monkeypatch.setattr(module, "device_info", lambda cudart: info)
        assert present_device() == ORIN

    @pytest.mark.parametrize(
        "error", [BackendError("no driver"), MissingExtraError("cuda-bindings", "cuda", "Running")]
    )
    def test_of_a_machine_without(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def nothing() -> None:
            raise error

        monkeypatch.setattr(module, "load_cudart", nothing)
        assert present_device() == NO_DEVICE


def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(b"vtrt", BuildSettings(True, False, True, False, 3), {"FLOAT": 1}, (), 0.1)
    monkeypatch.setattr(module, "build_apart", lambda *arguments: built)


def test_what_the_inspector_finds_is_kept(model: Path, rtx: TrtApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU that the engine is for, and on no other."""
    no_build(monkeypatch)
    monkeypatch.setattr(module, "inspected_types", lambda api, plan, contract: {"FP32": len(plan)})
    options = CompileOptions(BuildSpec(targets=("SM86",)))
    here = compile_artifact(model, rtx, RTX_3060, options)
    assert here.sidecar.inspected == {"FP32": here.sidecar.engine_bytes}
    other = CompileOptions(BuildSpec(targets=("SM89",)))
    assert compile_artifact(model, rtx, RTX_3060, other).sidecar.inspected is None
    assert compile_artifact(model, rtx, NO_DEVICE, CompileOptions(options.spec, force=True)).sidecar.inspected is None


def test_an_inspector_that_finds_something_else_stops_the_publication(
    model: Path, rtx: TrtApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_build(monkeypatch)

    def refuse(*arguments: Any) -> None:
        raise BackendError("the contract says fp32, but the inspector does not")

    monkeypatch.setattr(module, "inspected_types", refuse)
    with pytest.raises(BackendError, match="the inspector does not"):
        compile_artifact(model, rtx, RTX_3060, CompileOptions(BuildSpec(targets=("SM86",))))
    assert files(model.parent) == [model.name]
