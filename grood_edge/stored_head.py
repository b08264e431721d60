"""The head as it stands in an ONNX file: named initializers in, `scoring.Head` out, and back; without onnx.

The head's nodes are the same for every artifact; all that is fitted sits in initializers named `grood/...`.
So refitting an artifact on a device means replacing initializers, and `head_model` cuts the very head that
ships out of the file, to be fed with features alone.
"""

from collections.abc import Iterator, Mapping

import numpy as np

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
]

GROUP = "grood/"  # prefix of every node, tensor and initializer of the head
CENTER = GROUP + "center"
PROTOTYPES_T = GROUP + "prototypes_t"
PROTOTYPES_SQ = GROUP + "prototypes_sq"
CALIBRATION_SCORES = GROUP + "calibration_scores"
RANK = GROUP + "rank"
P_DENOMINATOR = GROUP + "p_denominator"

# Field numbers of onnx.proto3
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 2, 5, 11, 12
_NODE_NAME, _NODE_ATTRIBUTE = 3, 5
_ATTRIBUTE_T, _ATTRIBUTE_G, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 9, 13, 14
_VALUE_NAME = 1
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
    tensors = dict(_initializers(model))
    indices = range(sum(name.startswith(ood_names(0)[0][:-1]) for name in tensors))
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
        for field in wire.read_fields(_graph(model)):
            name = _name(field, _TENSOR_NAME) if field.number == _GRAPH_INITIALIZER else ""
            if name in tensors:
                missing.discard(name)
                yield wire.encode_field(_GRAPH_INITIALIZER, _encode_tensor(name, tensors[name]))
            else:
                yield field.raw

    graph = b"".join(edited())
    if missing:
        raise ArtifactError(f"the model has no initializers {sorted(missing)}: this file is not a whole artifact")
    return b"".join(
        wire.encode_field(_MODEL_GRAPH, graph) if field.number == _MODEL_GRAPH else field.raw
        for field in wire.read_fields(model)
    )


def head_model(model: bytes) -> bytes:
    """Cut the head out of an artifact: a model from `features` and `logits` to the four decision outputs.

    Raises:
        ArtifactError: the model's outputs are not those of an artifact.
    """
    graph: list[bytes | memoryview] = []
    inputs: dict[str, bytes] = {}
    for field in wire.read_fields(_graph(model)):
        if (field.number == _GRAPH_NODE and _name(field, _NODE_NAME).startswith(GROUP)) or (
            field.number == _GRAPH_INITIALIZER and _name(field, _TENSOR_NAME).startswith(GROUP)
        ):
            graph.append(field.raw)
        elif field.number == _GRAPH_OUTPUT:
            name = _name(field, _VALUE_NAME)
            if name in ("features", "logits"):
                inputs[name] = wire.encode_field(_GRAPH_INPUT, field.message())
            else:
                graph.append(field.raw)
        elif field.number == _GRAPH_NAME:
            graph.append(field.raw)
    if set(inputs) != {"features", "logits"}:
        raise ArtifactError("the model has no outputs 'features' and 'logits': this file is not an artifact")
    graph += inputs.values()
    return b"".join(
        wire.encode_field(_MODEL_GRAPH, b"".join(graph)) if field.number == _MODEL_GRAPH else field.raw
        for field in wire.read_fields(model)
    )


def refuse_external_data(model: bytes) -> None:
    """Refuse a model with data outside the file: an artifact is one file, and paths in it are not followed.

    Raises:
        ArtifactError: names the first such tensor.
    """
    _refuse_in_graph(_graph(model), depth=0)


def _refuse_in_graph(graph: memoryview | bytes, depth: int) -> None:
    if depth > 16:
        raise ArtifactError("the model nests graphs more than 16 deep; it is refused")
    for field in wire.read_fields(graph):
        if field.number == _GRAPH_INITIALIZER:
            _refuse_tensor(field.message())
        elif field.number == _GRAPH_NODE:
            for part in wire.read_fields(field.message()):
                if part.number == _NODE_ATTRIBUTE:
                    _refuse_in_attribute(part.message(), depth)


def _refuse_in_attribute(attribute: memoryview | bytes, depth: int) -> None:
    for field in wire.read_fields(attribute):
        if field.number in (_ATTRIBUTE_T, _ATTRIBUTE_TENSORS):
            _refuse_tensor(field.message())
        elif field.number in (_ATTRIBUTE_G, _ATTRIBUTE_GRAPHS):
            _refuse_in_graph(field.message(), depth + 1)


def _refuse_tensor(tensor: memoryview | bytes) -> None:
    name, external = "", False
    for field in wire.read_fields(tensor):
        if field.number == _TENSOR_NAME:
            name = field.text()
        external |= field.number == _TENSOR_EXTERNAL or (field.number == _TENSOR_LOCATION and field.value == 1)
    if external:
        raise ArtifactError(f"tensor {name!r} keeps its data in another file; an artifact is one self-contained file")


def _graph(model: bytes) -> memoryview | bytes:
    graph = wire.first_bytes(model, _MODEL_GRAPH)
    if graph is None:
        raise ArtifactError("the file has no ONNX graph: it is not an ONNX model, or it was truncated")
    return graph


def _name(field: wire.Field, number: int) -> str:
    name = wire.first_bytes(field.message(), number)
    return "" if name is None else bytes(name).decode("utf-8", errors="replace")


def _initializers(model: bytes) -> Iterator[tuple[str, np.ndarray]]:
    for field in wire.read_fields(_graph(model)):
        if field.number == _GRAPH_INITIALIZER and (name := _name(field, _TENSOR_NAME)).startswith(GROUP):
            tensor = _decode_tensor(field.message())
            if tensor is not None:
                yield name, tensor


def _decode_tensor(message: memoryview | bytes) -> np.ndarray | None:
    """Decode a float32 or int32 tensor stored as raw data; None for any other."""
    dims: list[int] = []
    dtype, raw = None, None
    for field in wire.read_fields(message):
        if field.number == _TENSOR_DIMS:
            dims += [field.value] if isinstance(field.value, int) else _packed(field.message())
        elif field.number == _TENSOR_TYPE and isinstance(field.value, int):
            dtype = _ONNX_TYPES.get(field.value)
        elif field.number == _TENSOR_RAW:
            raw = field.message()
    if dtype is None or raw is None:
        return None
    try:
        return np.frombuffer(raw, dtype=dtype).reshape(dims)
    except ValueError as error:
        raise ArtifactError(f"damaged ONNX file: a tensor's data does not fit its shape {dims}") from error


def _packed(view: memoryview | bytes) -> list[int]:
    values, position = [], 0
    while position < len(view):
        value, position = wire.read_varint(view, position)
        values.append(value)
    return values


def _encode_tensor(name: str, array: np.ndarray) -> bytes:
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    dims = [wire.encode_field(_TENSOR_DIMS, int(size)) for size in array.shape]
    return b"".join(
        [
            *dims,
            wire.encode_field(_TENSOR_TYPE, _ONNX_TYPE_OF[little.dtype]),
            wire.encode_field(_TENSOR_NAME, name.encode()),
            wire.encode_field(_TENSOR_RAW, little.tobytes()),
        ]
    )
