"""Real TensorRT-RTX builds: for several GPUs, in every precision, refused with words, interrupted in the middle."""

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.cli import _interrupt
from grood_edge.errors import BackendError
from grood_edge.progress import silent
from grood_edge.runtime.build import Built, build_engine, require_usable
from grood_edge.runtime.engine_spec import BuildSpec
from grood_edge.runtime.trt_api import TrtApi
from tests.runtime.engines import Name, with_precision

HANDLED = (signal.SIGINT, signal.SIGTERM)


def build(api: TrtApi, artifact: Artifact, *targets: str, **spec: Any) -> Built:
    return build_engine(api, artifact, BuildSpec(targets=targets, **spec), silent)


def header(plan: bytes) -> tuple[bytes, bytes, int]:
    """Magic, version, and mask of compute capabilities, as TensorRT-RTX 1.7 writes them."""
    return plan[:4], plan[24:28], int.from_bytes(plan[32:36], "little")


class TestBuilds:
    def test_for_named_gpus_and_for_all(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        masks = {}
        for targets in (("SM80",), ("SM86",), ("SM89",), ("SM120",), ("SM86", "SM120"), ()):
            built = build(rtx, digit_artifact, *targets)
            magic, version, masks[targets] = header(built.plan)
            assert magic == b"vtrt"
            assert ".".join(map(str, version)) == rtx.version
            assert len(built.plan) > len(digit_artifact.model)
        assert len(set(masks.values())) == len(masks)
        assert masks["SM86", "SM120"] == masks["SM86",] | masks["SM120",]

    def test_with_settings_that_keep_numbers_right(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        told: list[tuple[str, Any]] = []

        class Told:
            """A builder that notes what its configuration is told."""

            def __init__(self, logger: Any) -> None:
                self._builder = rtx.module.Builder(logger)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._builder, name)

            def create_builder_config(self) -> Any:
                return Config(self._builder.create_builder_config())

            def build_serialized_network(self, network: Any, config: Any) -> Any:
                trt = rtx.module
                told.append(("tf32", config.real.get_flag(trt.BuilderFlag.TF32)))
                told.append(("nans", config.real.get_flag(trt.BuilderFlag.STRICT_NANS)))
                shapes = [network.get_input(i).shape[0] for i in range(network.num_inputs)]
                told.append(("inputs", shapes))
                return self._builder.build_serialized_network(network, config.real)

        class Config:
            def __init__(self, real: Any) -> None:
                object.__setattr__(self, "real", real)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

            def __setattr__(self, name: str, value: Any) -> None:
                setattr(self.real, name, value)

        names = {name: getattr(rtx.module, name) for name in dir(rtx.module)} | {"Builder": Told}
        built = build_engine(
            dataclasses.replace(rtx, module=SimpleNamespace(**names)), digit_artifact, BuildSpec(), silent
        )
        assert told == [("tf32", False), ("nans", True), ("inputs", [-1])]
        assert (built.settings.strongly_typed, built.settings.tf32, built.settings.strict_nans) == (True, False, True)
        assert not built.settings.timing_cache

    @pytest.mark.parametrize("name", ["fp16", "int8"])
    def test_in_lower_precision(self, rtx: TrtApi, digit_artifact: Artifact, name: Name) -> None:
        built = build(rtx, with_precision(digit_artifact, name), "SM89")
        assert ("HALF" in built.layer_types) == (name == "fp16")
        assert ("INT8" in built.layer_types) == (name == "int8")

    def test_of_one_image_at_a_time(self, rtx: TrtApi, single_path: Path) -> None:
        assert build(rtx, read_artifact(single_path), "SM86", batch=(1, 1, 1)).plan[:4] == b"vtrt"

    def test_report_phases_up_to_their_end(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        seen: dict[str, list[tuple[int, int | None]]] = {}
        progress = lambda label, done, total: seen.setdefault(label, []).append((done, total))  # noqa: E731
        build_engine(rtx, digit_artifact, BuildSpec(targets=("SM86",)), progress)
        assert {"reading the graph", "Building engine"} <= set(seen)
        assert len(seen) < 10, "inner phases would fill the screen"
        assert all(steps[-1][0] == steps[-1][1] for steps in seen.values())

    def test_what_was_not_asked_for_is_not_built(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        with pytest.raises(BackendError, match="the contract says fp16, but TensorRT would build something else"):
            build(rtx, with_precision(digit_artifact, "fp32", says="fp16"), "SM86")


def spoiled(artifact: Artifact, node: onnx.NodeProto) -> Artifact:
    """Return the artifact with a node between the classifier and its logits."""
    model = onnx.load_model_from_string(artifact.model)
    (last,) = (n for n in model.graph.node if "logits" in n.output)
    node.input[0], node.output[0] = last.input[0], "spoiled"
    last.input[0] = "spoiled"
    nodes = list(model.graph.node)
    nodes.insert(nodes.index(last), node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return dataclasses.replace(artifact, model=model.SerializeToString())


class TestRefusals:
    def test_of_the_parser_name_node_operator_and_reason(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        node = helper.make_node("Cast", [""], [""], "to int16", to=TensorProto.INT16)
        with pytest.raises(BackendError) as caught:
            build(rtx, spoiled(digit_artifact, node), "SM86")
        message = str(caught.value)
        assert "node 'to int16' (Cast)" in message
        assert "Unsupported data type" in message
        assert "grood-edge compile --check" in message
        assert "cudaError" not in message
        assert "\n" not in message

    def test_of_an_operator_that_does_not_exist(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        node = helper.make_node("Det", [""], [""], "determinant")
        with pytest.raises(BackendError, match=r"node 'determinant' \(Det\): UNSUPPORTED_NODE"):
            build(rtx, spoiled(digit_artifact, node), "SM86")

    def test_of_the_builder(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        spec = BuildSpec(targets=("SM86",))
        object.__setattr__(spec, "targets", ("SM75",))  # what BuildSpec itself refuses, for this very reason
        with pytest.raises(BackendError, match=r"built no engine: .*What to do: "):
            build_engine(rtx, digit_artifact, spec, silent)

    def test_of_a_gpu_that_the_module_does_not_know(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        spec = BuildSpec(targets=("SM86",))
        object.__setattr__(spec, "targets", ("NONE",))
        with pytest.raises(BackendError, match="refuses to build for NONE"):
            build_engine(rtx, digit_artifact, spec, silent)

    def test_no_driver(self, rtx: TrtApi) -> None:
        def nothing(logger: Any) -> Any:
            raise TypeError("pybind11::init(): factory function returned nullptr")

        names = {name: getattr(rtx.module, name) for name in dir(rtx.module)} | {"Builder": nothing}
        with pytest.raises(BackendError, match=r"cannot start: it gave no reason.*grood-edge doctor"):
            require_usable(TrtApi(SimpleNamespace(**names), "tensorrt", "10.3.0"))


@pytest.fixture
def as_in_the_command() -> Iterator[None]:
    """SIGTERM as `grood_edge.cli.main` sets it."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


class TestInterruptions:
    @pytest.mark.parametrize("number", HANDLED)
    def test_end_the_build_in_an_orderly_way(
        self, rtx: TrtApi, digit_artifact: Artifact, number: signal.Signals, as_in_the_command: None
    ) -> None:
        seen: list[str] = []

        def progress(label: str, done: int, total: int | None) -> None:
            seen.append(label)
            if seen.count("Building engine") == 2:
                os.kill(os.getpid(), number)

        before = [signal.getsignal(n) for n in HANDLED]
        with pytest.raises(KeyboardInterrupt):
            build_engine(rtx, digit_artifact, BuildSpec(targets=("SM86",)), progress)
        assert "Building engine" in seen
        assert [signal.getsignal(n) for n in HANDLED] == before
        assert build(rtx, digit_artifact, "SM86").plan  # TensorRT is whole

    def test_before_the_build_begins(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        def progress(label: str, done: int, total: int | None) -> None:
            assert label == "reading the graph", "the build went on"
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            build_engine(rtx, digit_artifact, BuildSpec(targets=("SM86",)), progress)

    def test_an_error_of_the_callers_own_comes_back(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        def progress(label: str, done: int, total: int | None) -> None:
            if label == "Building engine":
                raise BrokenPipeError("nobody reads this")

        with pytest.raises(BrokenPipeError, match="nobody reads this"):
            build_engine(rtx, digit_artifact, BuildSpec(targets=("SM86",)), progress)

    def test_other_threads_build_too(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        plans: list[bytes] = []
        thread = threading.Thread(target=lambda: plans.append(build(rtx, digit_artifact, "SM86").plan))
        thread.start()
        thread.join()
        assert plans[0][:4] == b"vtrt"


class FakeConfig:
    """The part of a builder configuration that has to do with the timing cache."""

    def __init__(self) -> None:
        self.created: list[bytes] = []

    def create_timing_cache(self, content: bytes) -> Any:
        self.created.append(content)
        return None if content == b"foreign" else SimpleNamespace(serialize=lambda: b"timed more")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not ignore_mismatch

    def get_timing_cache(self) -> Any:
        return self.cache


class TestTimingCache:
    """TensorRT itself cannot run here: the cache's file is real, the configuration is not."""

    @pytest.mark.parametrize("stored", [None, b"timed", b"foreign"])
    def test_is_read_kept_and_started_anew(self, tmp_path: Path, stored: bytes | None) -> None:
        from grood_edge.runtime.build import _open_timing_cache, _save_timing_cache

        path, config = tmp_path / "cache" / "timing.cache", FakeConfig()
        if stored is not None:
            path.parent.mkdir()
            path.write_bytes(stored)
        module = SimpleNamespace(IBuilderConfig=FakeConfig)
        cache = _open_timing_cache(TrtApi(module, "tensorrt", "10.3.0"), config, path)
        assert config.created == ([b"foreign", b""] if stored == b"foreign" else [stored or b""])
        _save_timing_cache(config, cache, path)
        assert path.read_bytes() == b"timed more"
        assert path.stat().st_mode & 0o077 == 0
        assert list(path.parent.iterdir()) == [path]

    def test_is_left_out_where_it_does_nothing(self, tmp_path: Path) -> None:
        from grood_edge.runtime.build import _open_timing_cache

        config = FakeConfig()
        module = SimpleNamespace(IBuilderConfig=FakeConfig)
        assert _open_timing_cache(TrtApi(module, "tensorrt-rtx", "1.7"), config, tmp_path / "x") is None
        assert config.created == []
