"""Engines that do not fit or cannot be trusted are refused, each with its own sentence and the command to rebuild."""

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.contract import Contract
from grood_edge.demo.images import DemoImages
from grood_edge.errors import BackendError, OutputError, UsageError
from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate
from grood_edge.runtime import sidecar as sidecar_module
from grood_edge.runtime.build import BuildSettings, Built
from grood_edge.runtime.compile import NO_DEVICE, CompileOptions, compile_artifact
from grood_edge.runtime.engine import OpenedEngine, open_engine, rebuild_command, require_safe_folder, runs_on
from grood_edge.runtime.engine_spec import BuildSpec, Device, engine_name
from grood_edge.runtime.sidecar import MAX_SIDECAR_BYTES, publish_engine, sidecar_of, sidecar_path
from grood_edge.runtime.trt_api import TrtApi
from grood_edge.runtime.user_key import key_path
from tests.runtime.engines import RTX_3060, EngineFile, changed, with_precision
from tests.without_hook import without_hook

ORIN = Device("Orin", (8, 7), "12.6")
JETPACK = TrtApi(SimpleNamespace(), "tensorrt", "10.3.0")


@pytest.fixture
def engine(built_engine: EngineFile, tmp_path: Path) -> EngineFile:
    return built_engine.copied(tmp_path)


def edited(engine: EngineFile, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(engine.sidecar.read_text())
    change(document)
    engine.sidecar.write_text(json.dumps(document))


def refused(engine: EngineFile, message: str, **options: Any) -> str:
    with pytest.raises(BackendError, match=message) as caught:
        engine.opened(**options)
    text = str(caught.value)
    assert text.startswith(engine.path.name)
    assert "Build it again: " in text
    assert f"grood-edge compile {engine.path.parent / 'digits.onnx'} --backend {engine.api.family}" in text
    assert "\n" not in text
    return text


class TestOpens:
    def test_what_compile_built(self, engine: EngineFile) -> None:
        opened = engine.opened()
        assert isinstance(opened, OpenedEngine)
        assert opened.plan == engine.path.read_bytes()
        assert opened.knots_match
        assert opened.contract == engine.artifact.contract
        assert opened.sidecar.targets == ("SM86", "SM89")
        assert opened.sidecar.engine_sha256 == hashlib.sha256(opened.plan).hexdigest()
        assert opened.sidecar.layer_types["FLOAT"] > 100
        assert opened.sidecar.device is None

    def test_on_every_target_and_with_any_driver(self, engine: EngineFile) -> None:
        for capability in ((8, 6), (8, 9)):
            assert engine.opened(Device("a card", capability, "99.0")).knots_match

    def test_after_recalibration_and_says_so(self, engine: EngineFile, digits: DemoImages) -> None:
        model = engine.path.parent / "digits.onnx"
        recalibrate(model, digits.test, None, RecalibrateOptions(threshold_only=True, alpha=0.2))
        again = read_artifact(model)
        opened = engine.opened(artifact=again)
        assert not opened.knots_match
        assert opened.contract == engine.artifact.contract
        name = engine_name("digits", again, engine.api, RTX_3060, opened.sidecar.spec)
        assert name == engine.path.name, "the next build would find it"


class TestRefusesSpoiltFiles:
    def test_corrupted(self, engine: EngineFile) -> None:
        data = bytearray(engine.path.read_bytes())
        data[len(data) // 2] ^= 1
        engine.path.write_bytes(data)
        refused(engine, "not the engine of its sidecar: it was corrupted, or the sidecar belongs to another engine. ")

    def test_truncated_and_longer(self, engine: EngineFile) -> None:
        data = engine.path.read_bytes()
        engine.path.write_bytes(data[:-1])
        refused(engine, f"it was truncated, .*: it has {len(data) - 1:,} bytes, and its sidecar says {len(data):,}")
        engine.path.write_bytes(data + b"x")
        refused(engine, "it was added to, or")

    def test_foreign(self, engine: EngineFile) -> None:
        size = engine.path.stat().st_size
        engine.path.write_bytes(b"\x7fELF".ljust(size, b"\0"))
        refused(engine, "does not begin like an engine at all")
        engine.path.write_bytes((b"vtrt".ljust(24, b"\0") + bytes([1, 6, 1, 120])).ljust(size, b"\0"))
        refused(engine, "looks like one of version 1.6.1.120")

    def test_swapped_sidecar(self, engine: EngineFile, tmp_path: Path) -> None:
        options = CompileOptions(BuildSpec(targets=("SM80", "SM86")))
        other = compile_artifact(tmp_path / "digits.onnx", engine.api, NO_DEVICE, options)
        assert other.path.stat().st_size == engine.path.stat().st_size
        shutil.copy(sidecar_path(other.path), engine.sidecar)
        refused(engine, "it was corrupted, or the sidecar belongs to another engine")
        larger = other.path.read_bytes() + b"x"
        engine.path.write_bytes(larger)
        refused(engine, "or the sidecar belongs to another engine: it has")

    def test_sidecar_missing(self, engine: EngineFile) -> None:
        engine.sidecar.unlink()
        refused(engine, "its sidecar .*json is missing")

    def test_engine_missing(self, engine: EngineFile) -> None:
        engine.path.unlink()
        refused(engine, r"it cannot be read \(No such file or directory\)")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "malformed"),
            (b"\xff\xfe", "malformed"),
            (b"[" * 100_000, "nested too deeply"),
            (b"[1,2]", "schema"),
            (b'{"schema": "grood-edge.engine", "schema": "x"}', "twice"),
            (b'{"schema": "grood-edge.engine", "version": 2}', "version is 2; this grood-edge reads version 1"),
            (b'{"schema": "grood-edge.engine", "version": true}', "version is True"),
            (b'{"schema": "grood-edge.engine", "version": 1}', "malformed"),
            (b'{"schema": "grood-edge.engine", "version": NaN}', "NaN is not a JSON number"),
            (b"[" + b"[]," * 1_200_000 + b"[]]", "too many values"),
        ],
    )
    def test_sidecar_malformed(self, engine: EngineFile, content: bytes, reason: str) -> None:
        engine.sidecar.write_bytes(content)
        refused(engine, f"its sidecar .*json is malformed: .*{reason}|malformed")
        with pytest.raises(BackendError, match=reason):
            engine.opened()

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d.pop("key"),
            lambda d: d.update(more=1),
            lambda d: d.update(engine_bytes="many"),
            lambda d: d.update(engine_bytes=-1),
            lambda d: d.update(engine_bytes=1 << 50),
            lambda d: d.update(engine_sha256="../../etc"),
            lambda d: d.update(batch=[1, 8]),
            lambda d: d.update(batch=[8, 1, 1]),
            lambda d: d.update(targets=["SM75"]),
            lambda d: d.update(targets=["SM86; rm -rf /"]),
            lambda d: d.update(backend="tensorrt"),
            lambda d: d.update(device={"name": "x", "compute_capability": [8], "driver": None}),
            lambda d: d.update(warnings=["\x1b[31m"]),
            lambda d: d.update(precision="fp16"),
            lambda d: d["settings"].update(tf32="no"),
            lambda d: d["contract"].update(classes=["a", "b"]),
            lambda d: d["contract"]["fit"].update(seed=77),
            lambda d: d.update(contract=None),
        ],
    )
    def test_sidecar_with_wrong_entries(self, engine: EngineFile, change: Callable[[dict[str, Any]], Any]) -> None:
        edited(engine, change)
        with without_hook():
            refused(engine, "its sidecar .*json is malformed")

    def test_oversized_sidecar_is_not_read(self, engine: EngineFile) -> None:
        with engine.sidecar.open("r+b") as file:
            file.truncate(MAX_SIDECAR_BYTES + 1)
        refused(engine, f"has {MAX_SIDECAR_BYTES + 1:,} bytes; at most {MAX_SIDECAR_BYTES:,} are read")


class TestRefusesUnsafePlaces:
    @pytest.mark.parametrize("which", ["path", "sidecar"])
    @pytest.mark.parametrize("mode", [0o664, 0o646])
    def test_files_that_others_can_write(self, engine: EngineFile, which: str, mode: int) -> None:
        item: Path = getattr(engine, which)
        item.chmod(mode)
        refused(engine, rf"others can write {item.name} \(mode {mode:04o}\)")

    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
    def test_a_folder_that_others_can_write(self, engine: EngineFile, mode: int) -> None:
        folder = engine.path.parent
        folder.chmod(mode)
        text = refused(engine, "others can write its folder")
        assert f"chmod go-w {folder} && grood-edge compile" in text
        with pytest.raises(BackendError, match="chmod go-w"):
            require_safe_folder(folder)
        folder.chmod(0o755)
        require_safe_folder(folder)
        engine.opened()

    @pytest.mark.parametrize("which", ["path", "sidecar"])
    def test_symbolic_links(self, engine: EngineFile, which: str) -> None:
        item: Path = getattr(engine, which)
        item.rename(item.with_suffix(".moved"))
        item.symlink_to(item.with_suffix(".moved"))
        text = refused(engine, f"{item.name} is a symbolic link")
        assert f"rm {item} && grood-edge compile" in text

    @pytest.mark.parametrize("which", ["path", "sidecar"])
    def test_pipes_and_folders(self, engine: EngineFile, which: str) -> None:
        item: Path = getattr(engine, which)
        item.unlink()
        os.mkfifo(item, 0o600)
        refused(engine, f"{item.name} is not a regular file")
        item.unlink()
        item.mkdir()
        refused(engine, f"{item.name} is not a regular file")


class TestRefusesWhatNobodyVouchesFor:
    def test_signature_stripped(self, engine: EngineFile) -> None:
        edited(engine, lambda d: d.pop("hmac"))
        refused(engine, "is not signed, so nobody vouches for it.*--i-trust-this-engine SHA256")

    @pytest.mark.parametrize("value", ["0" * 64, "", 1, None, ["x"], "é" * 64])
    def test_signature_wrong(self, engine: EngineFile, value: Any) -> None:
        edited(engine, lambda d: d.update(hmac=value))
        refused(engine, "signature is not yours|is not signed")

    @pytest.mark.parametrize("entry", ["seconds", "tools", "warnings", "backend_version", "graph_digest"])
    def test_any_edit_breaks_the_signature(self, engine: EngineFile, entry: str) -> None:
        new: Any = {"tools": {"grood-edge": "9"}, "warnings": ["x"], "backend_version": "1.2", "graph_digest": "0" * 64}
        if entry == "seconds":
            edited(engine, lambda d: d["layer_types"].update(HALF=1))
        else:
            edited(engine, lambda d: d.update({entry: new[entry]}))
        refused(engine, "signature is not yours")

    def test_another_layout_of_the_same_document_is_the_same(self, engine: EngineFile) -> None:
        edited(engine, lambda d: None)
        assert engine.opened().knots_match

    def test_another_users_key(self, engine: EngineFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
        refused(engine, "there is no key here")
        key_path().parent.mkdir(parents=True)
        key_path().write_bytes(bytes(32))
        key_path().chmod(0o600)
        refused(engine, "signature is not yours")
        key_path().chmod(0o644)
        with pytest.raises(BackendError, match="has mode 0644"):
            engine.opened()

    def test_trusted_by_name(self, engine: EngineFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        digest = hashlib.sha256(engine.path.read_bytes()).hexdigest()
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
        for trusted in (digest, digest.upper()):
            assert engine.opened(trusted=trusted).plan == engine.path.read_bytes()
        refused(engine, f"names {'0' * 12}, and this engine is {digest[:12]}", trusted="0" * 64)
        assert not key_path().exists()

    def test_trust_still_wants_an_engine_that_fits(self, engine: EngineFile) -> None:
        digest = hashlib.sha256(engine.path.read_bytes()).hexdigest()
        refused(engine, "is none of its targets", device=Device("RTX 5090", (12, 0), "13.0"), trusted=digest)
        engine.path.write_bytes(b"vtrt".ljust(engine.path.stat().st_size, b"\0"))
        refused(engine, "not the engine of its sidecar", trusted=digest)

    @pytest.mark.parametrize("trusted", ["", "yes", "0" * 63, "g" * 64])
    def test_trust_in_no_digest(self, engine: EngineFile, trusted: str) -> None:
        with pytest.raises(UsageError, match="expected the engine's SHA-256"):
            engine.opened(trusted=trusted)


class TestRefusesWhatDoesNotFit:
    def test_another_family(self, engine: EngineFile) -> None:
        api = dataclasses.replace(JETPACK, version=engine.api.version)
        refused(dataclasses.replace(engine, api=api), "it is one of tensorrt-rtx, and tensorrt was to run it")

    @pytest.mark.parametrize("version", ["1.6.1.120", "1.8.0.1"])
    def test_another_version(self, engine: EngineFile, version: str) -> None:
        api = dataclasses.replace(engine.api, version=version)
        text = refused(
            dataclasses.replace(engine, api=api), f"{engine.api.version} built it, and {version} is installed"
        )
        assert "--force" not in text, "the new engine has another name"

    def test_another_network(self, engine: EngineFile) -> None:
        model = onnx.load_model_from_string(engine.artifact.model)
        relu = next(node for node in model.graph.node if node.op_type == "Relu")
        relu.op_type = "Elu"
        refused(engine, "built from another network", artifact=changed(engine.artifact, model))

    def test_new_statistics(self, engine: EngineFile, digits: DemoImages, tmp_path: Path) -> None:
        recalibrate(tmp_path / "digits.onnx", digits.test, tmp_path / "new.onnx", RecalibrateOptions())
        refused(engine, "with other prototypes or another bank", artifact=read_artifact(tmp_path / "new.onnx"))

    def test_another_precision(self, engine: EngineFile) -> None:
        artifact = with_precision(engine.artifact, "fp16")
        refused(engine, "it computes in fp32, and the artifact in fp16", artifact=artifact)

    def test_another_compute_capability(self, engine: EngineFile) -> None:
        blackwell = Device("B", (12, 0), "13.0")
        text = refused(engine, "compute capability 12.0, is none of its targets SM86, SM89", device=blackwell)
        assert text.endswith("--sm 86,89,120")
        text = refused(engine, "is none of its targets", device=Device("Orin", (8, 7), "12.6"))
        assert "--sm" not in text, "TensorRT-RTX does not build for it"

    def test_no_gpu(self, engine: EngineFile) -> None:
        refused(engine, "this machine has no usable GPU", device=NO_DEVICE)

    def test_other_rules_of_building(self, engine: EngineFile, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("grood_edge.runtime.engine_spec.BUILD_RULES", 2)
        refused(engine, "built it, by other rules than this one's")


def test_what_runs_where() -> None:
    assert all(runs_on((), capability) for capability in ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1)))
    assert not any(runs_on((), capability) for capability in ((7, 5), (8, 7), (9, 0), (11, 0)))
    assert runs_on(("SM86",), (8, 6))
    assert not runs_on(("SM86",), (8, 9))
    assert runs_on(("SM120",), (12, 0))
    assert not runs_on(("SM120",), (12, 1))


@pytest.fixture
def jetson(digit_artifact: Artifact, artifact_path: Path, tmp_path: Path, user_home: Path) -> EngineFile:
    """What TensorRT on a Jetson would have written; its bytes are only bytes."""
    shutil.copy(artifact_path, tmp_path / "digits.onnx")
    built = Built(b"ftrt" + bytes(range(200)), BuildSettings(True, False, False, True, 3), {"FLOAT": 9}, ("a\nb",), 1.0)
    sidecar = sidecar_of(digit_artifact, JETPACK, ORIN, BuildSpec(), built, {"FP32": 3})
    path = tmp_path / engine_name("digits", digit_artifact, JETPACK, ORIN, BuildSpec())
    publish_engine(path, built.plan, sidecar, digit_artifact.contract, force=False)
    return EngineFile(path, digit_artifact, JETPACK)


class TestEnginesOfOneGpu:
    def test_open_on_that_gpu(self, jetson: EngineFile) -> None:
        opened = jetson.opened(ORIN)
        assert opened.sidecar.device == ORIN
        assert opened.sidecar.inspected == {"FP32": 3}
        assert opened.sidecar.warnings == ("a b",)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"compute_capability": (11, 0), "name": "Thor"}, r"built for Orin \(compute capability 8.7\), .*11.0"),
            ({"name": "Orin NX"}, "it was built for Orin .*GPU, Orin NX,"),
            ({"driver": "12.8"}, "it was built with driver 12.6, and 12.8 is installed"),
        ],
    )
    def test_are_refused_on_others(self, jetson: EngineFile, change: dict[str, Any], message: str) -> None:
        text = refused(jetson, message, device=dataclasses.replace(ORIN, **change))
        assert "--sm" not in text

    def test_files_are_not_writable_by_others_whatever_the_umask(self, jetson: EngineFile) -> None:
        before = os.umask(0)
        try:
            sidecar = jetson.opened(ORIN).sidecar
            publish_engine(jetson.path, jetson.path.read_bytes(), sidecar, jetson.artifact.contract, force=True)
        finally:
            os.umask(before)
        assert jetson.opened(ORIN).knots_match


class TestPublishing:
    def publish(self, engine: EngineFile, folder: Path, contract: Contract, force: bool = False) -> Path:
        path = folder / "x.engine"
        publish_engine(path, engine.path.read_bytes(), engine.opened().sidecar, contract, force)
        return path

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
    @pytest.mark.parametrize("at", [0, 1])
    def test_leaves_nothing_when_it_fails(
        self, engine: EngineFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
    ) -> None:
        written: list[Path] = []

        def failing(path: Path, data: bytes) -> None:
            written.append(path)
            if len(written) == at + 1:
                path.write_bytes(data[:10])
                raise error
            path.write_bytes(data)

        monkeypatch.setattr(sidecar_module, "write_through", failing)
        (tmp_path / "out").mkdir()
        with pytest.raises((KeyboardInterrupt, OutputError)):
            self.publish(engine, tmp_path / "out", engine.artifact.contract)
        assert list((tmp_path / "out").iterdir()) == []

    def test_takes_the_engine_back_when_the_sidecar_cannot_follow(
        self, engine: EngineFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out").mkdir()
        real = os.link

        def link(source: Any, target: Any) -> None:
            if str(target).endswith(".json"):
                raise OSError(5, "Input/output error")
            real(source, target)

        monkeypatch.setattr(os, "link", link)
        with pytest.raises(OutputError, match="Input/output error"):
            self.publish(engine, tmp_path / "out", engine.artifact.contract)
        assert list((tmp_path / "out").iterdir()) == []

    def test_replaces_only_with_force(self, engine: EngineFile, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        path = self.publish(engine, tmp_path / "out", engine.artifact.contract)
        with pytest.raises(OutputError, match="use --force"):
            self.publish(engine, tmp_path / "out", engine.artifact.contract)
        self.publish(engine, tmp_path / "out", engine.artifact.contract, force=True)
        assert sorted(path.parent.iterdir()) == [path, sidecar_path(path)]


class TestRebuildCommand:
    def test_names_what_the_engine_was_built_with(self, digit_artifact: Artifact, rtx: TrtApi, tmp_path: Path) -> None:
        path, model = tmp_path / "an engine.engine", tmp_path / "models" / "my model.onnx"
        spec = BuildSpec((1, 4, 16), ("SM86",))
        command = rebuild_command(path, digit_artifact, rtx, RTX_3060, spec, model)
        assert shlex.split(command) == [
            "grood-edge", "compile", str(model), "--backend", "tensorrt-rtx", "--batch", "1,4,16", "--sm", "86",
            "--out", str(tmp_path),
        ]  # fmt: skip

    def test_is_one_that_works(self, engine: EngineFile, monkeypatch: pytest.MonkeyPatch) -> None:
        """The very command of the message, run, makes an engine that opens."""
        from typer.testing import CliRunner

        from grood_edge.cli import app

        engine.path.write_bytes(b"spoilt")
        with pytest.raises(BackendError) as caught:
            engine.opened()
        command = shlex.split(str(caught.value).split("Build it again: ")[1])
        assert command[0] == "grood-edge"
        assert command[-1] == "--force" or "--sm" not in command
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
        (made,) = engine.path.parent.glob("*portable*.engine")
        assert dataclasses.replace(engine, path=made).opened().knots_match


def test_open_engine_takes_positional_arguments_as_documented(engine: EngineFile) -> None:
    assert open_engine(engine.path, engine.artifact, engine.api, RTX_3060, None).knots_match
