"""Artifacts of every precision made of the digits', and engines of them that tests may spoil."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from grood_edge.artifact import Artifact, artifact_bytes, read_artifact
from grood_edge.runtime.engine import OpenedEngine, open_engine
from grood_edge.runtime.engine_spec import Device
from grood_edge.runtime.sidecar import sidecar_path
from grood_edge.runtime.trt_api import TrtApi

__all__ = ["RTX_3060", "EngineFile", "Name", "changed", "with_precision"]

Name = Literal["fp32", "fp16", "int8"]
RTX_3060 = Device("NVIDIA GeForce RTX 3060", (8, 6), "12.4")


@dataclass(frozen=True)
class EngineFile:
    """An engine beside its artifact, in a folder of its own."""

    path: Path
    artifact: Artifact
    api: TrtApi

    @property
    def sidecar(self) -> Path:
        return sidecar_path(self.path)

    def copied(self, folder: Path) -> "EngineFile":
        for source in (self.path, self.sidecar, self.path.parent / "digits.onnx"):
            shutil.copy(source, folder / source.name)
        return dataclasses.replace(self, path=folder / self.path.name)

    def opened(self, device: Device = RTX_3060, **options: Any) -> OpenedEngine:
        return open_engine(self.path, options.pop("artifact", self.artifact), self.api, device, **options)


def changed(artifact: Artifact, model: onnx.ModelProto, **contract: Any) -> Artifact:
    """Return the artifact with another graph, and with entries of its contract replaced."""
    new = dataclasses.replace(artifact.contract, **contract)
    return read_artifact(artifact_bytes(model.SerializeToString(), new))


def with_precision(artifact: Artifact, name: Name, kept: tuple[str, ...] = (), says: Name | None = None) -> Artifact:
    """Return the artifact with its convolutions in `name`, but for those in `kept`; the contract `says` so, or else.

    Its statistics stay those of float32: here only types count.
    """
    model = onnx.load_model_from_string(artifact.model)
    nodes = []
    for node in model.graph.node:
        lowered = node.op_type == "Conv" and node.name.removeprefix("classifier/") not in kept
        nodes += {"fp32": lambda n, _: [n], "fp16": _half, "int8": _quantised}[name if lowered else "fp32"](node, model)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    entry = dataclasses.replace(artifact.contract.precision, name=says or name, float_layers=kept)
    return changed(artifact, model, precision=entry)


def _half(node: onnx.NodeProto, model: onnx.ModelProto) -> list[onnx.NodeProto]:
    made = onnx.NodeProto.FromString(node.SerializeToString())
    into = helper.make_node(
        "Cast", [node.input[0]], [f"{node.name}/in"], f"{node.name}/to_half", to=TensorProto.FLOAT16
    )
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made.input[0] = f"{node.name}/in"
    for index, name in enumerate(node.input[1:], 1):
        half = numpy_helper.to_array(weights[name]).astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(half, f"{name}/half"))
        made.input[index] = f"{name}/half"
    made.output[0] = f"{node.name}/out"
    back = helper.make_node("Cast", [made.output[0]], [node.output[0]], f"{node.name}/to_float", to=TensorProto.FLOAT)
    return [into, made, back]


def _quantised(node: onnx.NodeProto, model: onnx.ModelProto) -> list[onnx.NodeProto]:
    made = onnx.NodeProto.FromString(node.SerializeToString())
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    rows = numpy_helper.to_array(weights[node.input[1]])
    scale = (np.abs(rows).max(axis=(1, 2, 3)) / 127).astype(np.float32)
    stored = np.rint(rows / scale[:, None, None, None]).astype(np.int8)
    constants = {"scale": np.array(0.05, np.float32), "zero": np.array(0, np.int8), "w_scale": scale, "w": stored}
    model.graph.initializer.extend(
        numpy_helper.from_array(value, f"{node.name}/{key}") for key, value in constants.items()
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{node.name}/w_zero"))
    n = node.name
    quantise = helper.make_node("QuantizeLinear", [node.input[0], f"{n}/scale", f"{n}/zero"], [f"{n}/q"], f"{n}/q")
    dequantise = helper.make_node("DequantizeLinear", [f"{n}/q", f"{n}/scale", f"{n}/zero"], [f"{n}/dq"], f"{n}/dq")
    weight = helper.make_node(
        "DequantizeLinear", [f"{n}/w", f"{n}/w_scale", f"{n}/w_zero"], [f"{n}/w_dq"], f"{n}/w_dq", axis=0
    )
    made.input[0], made.input[1] = f"{n}/dq", f"{n}/w_dq"
    return [quantise, dequantise, weight, made]
