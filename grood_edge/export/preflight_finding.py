"""What a preflight finds, and what it knows at a node."""

import math
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

__all__ = [
    "BOTH", "JETPACK", "MAX_NAME", "TENSORRT_TYPES", "Family", "Finding", "Scope", "is_large_or_outside", "name_of",
    "refused", "subgraphs", "type_name", "warning",
]  # fmt: skip

Family = Literal["tensorrt", "tensorrt-rtx"]

MAX_CONSTANT = 1 << 16  # elements; larger initializers are weights, whose values no rule reads
MAX_NAME = 200  # characters of a name that a message shows

BOTH: tuple[Family, ...] = ("tensorrt", "tensorrt-rtx")
JETPACK: tuple[Family, ...] = ("tensorrt",)
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_T = TensorProto
TENSORRT_TYPES = {_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.DOUBLE, _T.INT8, _T.UINT8, _T.INT32, _T.INT64, _T.BOOL}


@dataclass(frozen=True)
class Finding:
    """One thing in a graph that a TensorRT family refuses, or that wants attention.

    Attributes:
        node: the node's name, or its first output, or the name of a graph input or output; never empty.
        operator: its operator; `model`, `input` or `output` for findings about these.
        found: what was found.
        families: who refuses it.
        advice: what to do.
        kind: `refused` stops a build; a `warning` does not.
    """

    node: str
    operator: str
    found: str
    families: tuple[Family, ...]
    advice: str
    kind: Literal["refused", "warning"] = "refused"

    @property
    def sentence(self) -> str:
        """The finding as one message."""
        families = " and ".join(_TITLES[family] for family in self.families)
        verdict = "refused for" if self.kind == "refused" else "a warning for"
        return f"{self.operator} {self.node!r}: {self.found}; {verdict} {families}. {self.advice}"

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Scope:
    """What is known at a node: of its own graph and of those around it."""

    opset: int
    types: MutableMapping[str, int]
    shapes: MutableMapping[str, tuple[int | None, ...]]
    constants: MutableMapping[str, TensorProto]
    inputs: frozenset[str]
    outputs: frozenset[str]
    depth: int = 0

    def kind(self, name: str) -> int:
        """Element type; UNDEFINED where it could not be inferred."""
        return self.types.get(name, _T.UNDEFINED)

    def value(self, name: str) -> np.ndarray | None:
        """The value of a small constant."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type not in TENSORRT_TYPES or is_large_or_outside(tensor):
            return None
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError):  # its bytes do not fit its shape; the checker's business
            return None


def refused(node: NodeProto, found: str, advice: str) -> Finding:
    """Return a finding about a node that stops a build for both families."""
    return Finding(name_of(node), node.op_type or "node", found, BOTH, advice)


def warning(node: NodeProto, found: str, advice: str, families: tuple[Family, ...]) -> Finding:
    """Return a finding about a node that stops nothing."""
    return Finding(name_of(node), node.op_type or "node", found, families, advice, "warning")


def name_of(node: NodeProto) -> str:
    """Return the name of a node, else that of its first output, as far as a message shows it."""
    name = node.name or next((name for name in node.output if name), "") or "without name and output"
    return name[:MAX_NAME]


def type_name(kind: int) -> str:
    """Return the name of an ONNX element type as ONNX writes it: `float`, `int64`."""
    return _T.DataType.Name(kind).lower() if kind in _T.DataType.values() else f"number {kind}"


def is_large_or_outside(tensor: TensorProto) -> bool:
    """Return whether a tensor is a weight, or in another file: its values are not read."""
    return math.prod(tensor.dims) > MAX_CONSTANT or tensor.data_location == TensorProto.EXTERNAL


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs of a control flow operator."""
    for attribute in node.attribute:
        yield from (graph for graph in (attribute.g, *attribute.graphs) if graph.node or graph.output)
