"""The head as it stands in an ONNX file: named initializers in, `scoring.Head` out, and back; without onnx.

The head's nodes are the same for every artifact; all that is fitted sits in initializers named `grood/...`.
So refitting an artifact on a device means replacing initializers, and `head_model` cuts the very head that
ships out of the file, to be fed with features alone.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from grood_edge import onnx_proto as proto
from grood_edge import wire
from grood_edge.arrays import IdScores
from grood_edge.errors import ArtifactError
from grood_edge.scoring import Head, OodHead

__all__ = [
    "GROUP",
    "calibration_tensors",
    "head_from_model",
    "head_model",
    "head_tensors",
    "model_with_tensors",
    "stored_tensors",
]

GROUP = "grood/"  # prefix of every node, tensor and initializer of the head
CENTER = GROUP + "center"
PROTOTYPES_T = GROUP + "prototypes_t"
PROTOTYPES_SQ = GROUP + "prototypes_sq"
CALIBRATION_SCORES = GROUP + "calibration_scores"
RANK = GROUP + "rank"
P_DENOMINATOR = GROUP + "p_denominator"
_MAX_DIMS = 8

_ONNX_TYPES = {1: np.dtype("<f4"), 6: np.dtype("<i4")}
_ONNX_TYPE_OF = {dtype: number for number, dtype in _ONNX_TYPES.items()}


def ood_names(index: int) -> tuple[str, str, str]:
    """Return the initializer names of OOD head `index`: prototype, bank (transposed), log s of the bank."""
    return f"{GROUP}ood_prototype.{index}", f"{GROUP}bank_t.{index}", f"{GROUP}bank_log_s.{index}"


def head_tensors(head: Head) -> dict[str, np.ndarray]:
    """Return the head's initializers: float32, class prototypes centred on their mean (method: robust head).

    center `[d]`, prototypes_t `[d, k]`, prototypes_sq `[k]`; per OOD prototype: ood_prototype `[d]`,
    bank_t `[d, m]`, bank_log_s `[m]`.
    """
    center = head.prototypes.mean(axis=0).astype(np.float32)
    centred = (head.prototypes - center).astype(np.float32)
    tensors = {
        CENTER: center,
        PROTOTYPES_T: np.ascontiguousarray(centred.T),
        PROTOTYPES_SQ: (centred.astype(np.float64) ** 2).sum(axis=1).astype(np.float32),
    }
    for index, ood_head in enumerate(head.ood_heads):
        prototype, bank_t, bank_log_s = ood_names(index)
        tensors[prototype] = (ood_head.prototype - center).astype(np.float32)
        tensors[bank_t] = np.ascontiguousarray(ood_head.bank.T.astype(np.float32))
        tensors[bank_log_s] = ood_head.bank_log_s.astype(np.float32)
    return tensors


def calibration_tensors(sorted_scores: IdScores, rank: int) -> dict[str, np.ndarray]:
    """Return the decision's initializers: calibration scores float32 `[n]` ascending, k int32, n + 1 float32."""
    return {
        CALIBRATION_SCORES: sorted_scores.astype(np.float32),
        RANK: np.array(rank, dtype=np.int32),
        P_DENOMINATOR: np.array(sorted_scores.size + 1, dtype=np.float32),
    }


def head_from_model(model: bytes) -> Head:
    """Read the stored statistics back as the float64 head they define.

    Raises:
        ArtifactError: an initializer is missing or damaged.
    """
    tensors = dict(stored_tensors(model))
    indices = range(max(1, sum(name.startswith(ood_names(0)[0][:-1]) for name in tensors)))
    try:
        center = tensors[CENTER].astype(np.float64)
        ood_heads = []
        for prototype, bank_t, bank_log_s in map(ood_names, indices):
            ood_heads.append(
                OodHead(
                    prototype=tensors[prototype].astype(np.float64) + center,
                    bank=np.ascontiguousarray(tensors[bank_t].T).astype(np.float64),
                    bank_log_s=tensors[bank_log_s].astype(np.float64),
                )
            )
        prototypes = np.ascontiguousarray(tensors[PROTOTYPES_T].T).astype(np.float64) + center
    except KeyError as error:
        raise ArtifactError(f"the head's initializer {error} is missing: this file is not a whole artifact") from error
    return Head(prototypes, tuple(ood_heads))


def model_with_tensors(model: bytes, tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the model with these initializers replaced; everything else is carried over byte by byte.

    Raises:
        ArtifactError: the model has no initializer of one of the names.
    """
    missing = set(tensors)

    def edited() -> Iterator[bytes | memoryview]:
        for field in wire.read_fields(proto.graph_of(model)):
            name = proto.name_of(field, proto.TENSOR_NAME) if field.number == proto.GRAPH_INITIALIZER else ""
            if name in tensors:
                missing.discard(name)
                yield wire.encode_field(proto.GRAPH_INITIALIZER, _encode_tensor(name, tensors[name]))
            else:
                yield field.raw

    graph = b"".join(edited())
    if missing:
        raise ArtifactError(f"the model has no initializers {sorted(missing)}: this file is not a whole artifact")
    return b"".join(
        wire.encode_field(proto.MODEL_GRAPH, graph) if field.number == proto.MODEL_GRAPH else field.raw
        for field in wire.read_fields(model)
    )


def head_model(model: bytes) -> bytes:
    """Cut the head out of an artifact: a model from `features` and `logits` to the five decision outputs.

    Raises:
        ArtifactError: the model's outputs are not those of an artifact.
    """
    graph: list[bytes | memoryview] = []
    inputs: dict[str, bytes] = {}
    for field in wire.read_fields(proto.graph_of(model)):
        if (field.number == proto.GRAPH_NODE and proto.name_of(field, proto.NODE_NAME).startswith(GROUP)) or (
            field.number == proto.GRAPH_INITIALIZER and proto.name_of(field, proto.TENSOR_NAME).startswith(GROUP)
        ):
            graph.append(field.raw)
        elif field.number == proto.GRAPH_OUTPUT:
            name = proto.name_of(field, proto.VALUE_NAME)
            if name in ("features", "logits"):
                inputs[name] = wire.encode_field(proto.GRAPH_INPUT, field.message())
            else:
                graph.append(field.raw)
        elif field.number == proto.GRAPH_NAME:
            graph.append(field.raw)
    if set(inputs) != {"features", "logits"}:
        raise ArtifactError("the model has no outputs 'features' and 'logits': this file is not an artifact")
    graph += inputs.values()
    return b"".join(
        wire.encode_field(proto.MODEL_GRAPH, b"".join(graph)) if field.number == proto.MODEL_GRAPH else field.raw
        for field in wire.read_fields(model)
    )


def stored_tensors(model: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Iterate over the head's float32 and int32 initializers: name and array.

    Raises:
        ArtifactError: a tensor's data do not fit its shape.
    """
    for field in wire.read_fields(proto.graph_of(model)):
        if field.number == proto.GRAPH_INITIALIZER and (name := proto.name_of(field, proto.TENSOR_NAME)).startswith(
            GROUP
        ):
            tensor = _decode_tensor(field.message())
            if tensor is not None:
                yield name, tensor


def _decode_tensor(message: memoryview | bytes) -> np.ndarray | None:
    """Decode a float32 or int32 tensor stored as raw data; None for any other."""
    dims: list[int] = []
    dtype, raw = None, None
    for field in wire.read_fields(message):
        if field.number == proto.TENSOR_DIMS:
            dims += [field.value] if isinstance(field.value, int) else _packed(field.message())
        elif field.number == proto.TENSOR_TYPE and isinstance(field.value, int):
            dtype = _ONNX_TYPES.get(field.value)
        elif field.number == proto.TENSOR_RAW:
            raw = field.message()
    if dtype is None or raw is None:
        return None
    if len(dims) > _MAX_DIMS or 0 in dims or math.prod(dims) * dtype.itemsize != len(raw):
        raise ArtifactError(
            f"damaged ONNX file: a tensor's data does not fit its shape {dims[:_MAX_DIMS]}, it has {len(raw):,} bytes"
        )
    return np.frombuffer(raw, dtype=dtype).reshape(dims)


def _packed(view: memoryview | bytes) -> list[int]:
    values: list[int] = []
    position = 0
    while position < len(view) and len(values) <= _MAX_DIMS:
        value, position = wire.read_varint(view, position)
        values.append(value)
    return values


def _encode_tensor(name: str, array: np.ndarray) -> bytes:
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    dims = [wire.encode_field(proto.TENSOR_DIMS, int(size)) for size in array.shape]
    return b"".join(
        [
            *dims,
            wire.encode_field(proto.TENSOR_TYPE, _ONNX_TYPE_OF[little.dtype]),
            wire.encode_field(proto.TENSOR_NAME, name.encode()),
            wire.encode_field(proto.TENSOR_RAW, little.tobytes()),
        ]
    )
