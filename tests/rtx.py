"""TensorRT-RTX as the judge: does its parser take a model, and does its builder make an engine of it? Needs no GPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest

__all__ = ["Verdict", "build_rtx", "digest_at_fixed_addresses", "rtx_operators"]

trt: Any = pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).parents[1]
BATCHES = (1, 8, 32)  # least, usual and largest batch of the one profile
NOISE = ("catchCudaError", "cudaError 35")  # what every failure drags behind itself where there is no GPU


@dataclass(frozen=True)
class Verdict:
    """How far a model came, and why no further: `message` is empty for `built`, `operator` for all but `parse`."""

    stage: Literal["parse", "build", "built"]
    message: str = ""
    operator: str = ""
    engine: bytes = field(default=b"", repr=False)


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors. TensorRT-RTX honours one logger a process, so there is one here, too."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


_LOG = _Log()


def build_rtx(model: onnx.ModelProto | bytes, compute_capabilities: tuple[str, ...] = ("SM89",)) -> Verdict:
    """Parse a model, strongly typed, and build its engine: every open dimension is 1 to 32, TF32 is off."""
    _LOG.errors.clear()
    builder = trt.Builder(_LOG)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, _LOG)
    if not parser.parse(model if isinstance(model, bytes) else model.SerializeToString()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return Verdict("parse", _without_noise(error.desc() for error in errors), errors[0].node_operator())
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = len(compute_capabilities)
    for index, name in enumerate(compute_capabilities):
        assert config.set_compute_capability(getattr(trt.ComputeCapability, name), index), name
    _add_profile(builder, network, config)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return Verdict("build", _without_noise(_LOG.errors) or "the reason went to the first logger of this process")
    return Verdict("built", engine=bytes(memoryview(engine)))


def rtx_operators(names: list[str]) -> set[str]:
    """Return those of the operators that the parser has an importer for. It may still refuse them, as NonZero."""
    builder = trt.Builder(_LOG)
    parser = trt.OnnxParser(builder.create_network(0), _LOG)
    return {name for name in names if parser.supports_operator(name)}


def digest_at_fixed_addresses(path: Path, compute_capabilities: tuple[str, ...]) -> str:
    """Build in a new process whose memory is not laid out at random; returns the engine's SHA-256.

    TensorRT-RTX orders outputs and numbers its own tensors by their addresses, so two builds of one process differ.
    """
    setarch = shutil.which("setarch")
    if setarch is None or subprocess.run([setarch, "-R", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a process fix its memory layout (setarch -R)")
    code = (
        "import hashlib, pathlib; from tests.rtx import build_rtx\n"
        f"verdict = build_rtx(pathlib.Path({str(path)!r}).read_bytes(), {compute_capabilities!r})\n"
        "print(verdict.stage, hashlib.sha256(verdict.engine).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    command = [setarch, "-R", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    stage, digest = result.stdout.split()
    assert stage == "built"
    return digest


def _add_profile(builder: Any, network: Any, config: Any) -> None:
    profile = builder.create_optimization_profile()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    open_inputs = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    for tensor in open_inputs:
        shapes = [tuple(batch if size == -1 else size for size in tensor.shape) for batch in BATCHES]
        profile.set_shape(tensor.name, *shapes)
    if open_inputs:
        assert config.add_optimization_profile(profile) >= 0


def _without_noise(messages: Iterable[str]) -> str:
    lines = [line for message in messages for line in message.splitlines()]
    return "\n".join(dict.fromkeys(line for line in lines if not any(noise in line for noise in NOISE)))
