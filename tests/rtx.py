"""TensorRT-RTX as the judge: does its parser take a model, and does its builder make an engine of it? Needs no GPU."""

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx
import pytest

from grood_edge.runtime.trt_api import load_api, process_logger, without_noise

__all__ = ["Verdict", "build_rtx", "require_fixed_addresses", "rtx_operators"]

trt: Any = pytest.importorskip("tensorrt_rtx")

BATCHES = (1, 8, 32)  # least, usual and largest batch of the one profile


@dataclass(frozen=True)
class Verdict:
    """How far a model came, and why no further: `message` is empty for `built`, `operator` for all but `parse`."""

    stage: Literal["parse", "build", "built"]
    message: str = ""
    operator: str = ""
    engine: bytes = field(default=b"", repr=False)


_LOG: Any = process_logger(load_api("tensorrt-rtx"))  # the project's own: TensorRT honours one logger a process


def build_rtx(model: onnx.ModelProto | bytes, compute_capabilities: tuple[str, ...] = ("SM89",)) -> Verdict:
    """Parse a model, strongly typed, and build its engine: every open dimension is 1 to 32, TF32 is off."""
    said = _LOG.count
    builder = trt.Builder(_LOG)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, _LOG)
    if not parser.parse(model if isinstance(model, bytes) else model.SerializeToString()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return Verdict("parse", _said(error.desc() for error in errors), errors[0].node_operator())
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = len(compute_capabilities)
    for index, name in enumerate(compute_capabilities):
        assert config.set_compute_capability(getattr(trt.ComputeCapability, name), index), name
    _add_profile(builder, network, config)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return Verdict("build", _said(_LOG.since(said)))
    return Verdict("built", engine=bytes(memoryview(engine)))


def rtx_operators(names: list[str]) -> set[str]:
    """Return those of the operators that the parser has an importer for. It may still refuse them, as NonZero."""
    builder = trt.Builder(_LOG)
    parser = trt.OnnxParser(builder.create_network(0), _LOG)
    return {name for name in names if parser.supports_operator(name)}


def require_fixed_addresses() -> None:
    """Skip where no process can fix its memory layout: TensorRT-RTX orders what it builds by addresses."""
    setarch = shutil.which("setarch")
    if setarch is None or subprocess.run([setarch, "-R", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a process fix its memory layout (setarch -R)")


def _add_profile(builder: Any, network: Any, config: Any) -> None:
    profile = builder.create_optimization_profile()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    open_inputs = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    for tensor in open_inputs:
        shapes = [tuple(batch if size == -1 else size for size in tensor.shape) for batch in BATCHES]
        profile.set_shape(tensor.name, *shapes)
    if open_inputs:
        assert config.add_optimization_profile(profile) >= 0


def _said(texts: Iterable[str]) -> str:
    return "\n".join(dict.fromkeys(line for text in texts for line in without_noise(text).splitlines()))
