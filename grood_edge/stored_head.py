"""The head as it stands in an ONNX file: named initializers in, `scoring.Head` out, and back; without onnx.

The head's nodes are the same for every artifact; all that is fitted sits in initializers named `grood/...`.
So refitting an artifact on a device means replacing initializers, and `head_model` cuts the very head that
ships out of the file, to be fed with features alone.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from grood_edge import wire
from grood_edge.arrays import IdScores
from grood_edge.contract import Contract
from grood_edge.errors import ArtifactError
from grood_edge.scoring import Head, OodHead

__all__ = [
    "GROUP",
    "calibration_tensors",
    "head_from_model",
    "head_model",
    "head_tensors",
    "model_with_tensors",
    "refuse_external_data",
    "require_agreement",
]

GROUP = "grood/"  # prefix of every node, tensor and initializer of the head
CENTER = GROUP + "center"
PROTOTYPES_T = GROUP + "prototypes_t"
PROTOTYPES_SQ = GROUP + "prototypes_sq"
CALIBRATION_SCORES = GROUP + "calibration_scores"
RANK = GROUP + "rank"
P_DENOMINATOR = GROUP + "p_denominator"
STANDARD_DOMAINS = (b"", b"ai.onnx")
MAX_GRAPH_DEPTH = 16
MAX_GRAPH_FIELDS = 1 << 21  # of nodes, attributes and tensors: read in seconds; real networks have a tenth at most
_MAX_DIMS = 8

# Field numbers of onnx.proto3
_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 2, 5, 11, 12, 15
_FUNCTION_NODE, _FUNCTION_ATTRIBUTE = 7, 11
_NODE_NAME, _NODE_ATTRIBUTE, _NODE_DOMAIN = 3, 5, 7
_ATTRIBUTE_T, _ATTRIBUTE_G, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_SPARSE_PARTS = (1, 2)  # values and indices
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 9, 13, 14
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_TYPE_ELEMENT, _TENSOR_TYPE_SHAPE, _DIM_VALUE = 1, 2, 1, 1, 2, 1
_UINT8 = 2
_ONNX_TYPES = {1: np.dtype("<f4"), 6: np.dtype("<i4")}
_ONNX_TYPE_OF = {dtype: number for number, dtype in _ONNX_TYPES.items()}
_OUTPUTS = {"logits": 1, "features": 1, "class_id": 6, "ood_score": 1, "p_value": 1, "is_ood": 9, "valid": 9}


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

    Operators outside the standard domain are refused as well: some of them read files.

    Raises:
        ArtifactError: names the first such tensor or operator, or says that the graph is too deep or too large.
    """
    walk = _Walk()
    walk.graph(_graph(model), depth=0)
    for field in wire.read_fields(model):
        if field.number == _MODEL_FUNCTION:
            walk.function(field.message())


class _Walk:
    """One pass over a graph and everything inside it, with a bound on the fields read."""

    def __init__(self) -> None:
        self._left = MAX_GRAPH_FIELDS

    def _fields(self, message: memoryview | bytes) -> Iterator[wire.Field]:
        for field in wire.read_fields(message):
            self._left -= 1
            if self._left < 0:
                raise ArtifactError(f"the model has more than {MAX_GRAPH_FIELDS:,} fields; it is refused")
            yield field

    def graph(self, graph: memoryview | bytes, depth: int) -> None:
        if depth > MAX_GRAPH_DEPTH:
            raise ArtifactError(f"the model nests graphs more than {MAX_GRAPH_DEPTH} deep; it is refused")
        for field in self._fields(graph):
            if field.number == _GRAPH_INITIALIZER:
                self._tensor(field.message())
            elif field.number == _GRAPH_SPARSE:
                self._sparse(field.message())
            elif field.number == _GRAPH_NODE:
                self._node(field.message(), depth)

    def function(self, function: memoryview | bytes) -> None:
        for field in self._fields(function):
            if field.number == _FUNCTION_NODE:
                self._node(field.message(), depth=0)
            elif field.number == _FUNCTION_ATTRIBUTE:
                self._attribute(field.message(), depth=0)

    def _node(self, node: memoryview | bytes, depth: int) -> None:
        for field in self._fields(node):
            if field.number == _NODE_ATTRIBUTE:
                self._attribute(field.message(), depth)
            elif field.number == _NODE_DOMAIN and field.message() not in STANDARD_DOMAINS:
                raise ArtifactError(f"an operator is of domain {field.text()!r}; an artifact has standard ones only")

    def _attribute(self, attribute: memoryview | bytes, depth: int) -> None:
        for field in self._fields(attribute):
            if field.number in (_ATTRIBUTE_T, _ATTRIBUTE_TENSORS):
                self._tensor(field.message())
            elif field.number in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
                self._sparse(field.message())
            elif field.number in (_ATTRIBUTE_G, _ATTRIBUTE_GRAPHS):
                self.graph(field.message(), depth + 1)

    def _sparse(self, sparse: memoryview | bytes) -> None:
        for field in self._fields(sparse):
            if field.number in _SPARSE_PARTS:
                self._tensor(field.message())

    def _tensor(self, tensor: memoryview | bytes) -> None:
        name, external = "", False
        for field in self._fields(tensor):
            if field.number == _TENSOR_NAME:
                name = field.text()
            external |= field.number == _TENSOR_EXTERNAL or (field.number == _TENSOR_LOCATION and field.value != 0)
        if external:
            raise ArtifactError(
                f"tensor {name!r} keeps its data in another file; an artifact is one self-contained file"
            )


def require_agreement(model: bytes, contract: Contract) -> None:
    """Check that the graph has the inputs, outputs and head that the contract describes, and decides as it says.

    Raises:
        ArtifactError: an input, output or stored tensor is missing, is there twice, or differs from the contract.
    """
    found: dict[int, list[tuple[str, int, list[int | str]]]] = {_GRAPH_INPUT: [], _GRAPH_OUTPUT: []}
    names: set[str] = set()
    for field in wire.read_fields(_graph(model)):
        if field.number == _GRAPH_SPARSE:
            raise ArtifactError("the model has a sparse initializer; an artifact has none")
        if field.number in found:
            found[field.number].append(_signature(field.message()))
        if field.number == _GRAPH_INITIALIZER:
            name = _name(field, _TENSOR_NAME)
            if name in names:  # readers differ in which one counts
                raise ArtifactError(f"the model has initializer {name!r} twice; it is refused")
            names.add(name)
    for number, expected in zip((_GRAPH_INPUT, _GRAPH_OUTPUT), _signatures(contract), strict=True):
        if found[number] != expected:
            raise ArtifactError(f"the contract says that the graph has {expected}; it has {found[number][:10]}")
    _require_stored(dict(_initializers(model)), contract)


def _require_stored(tensors: Mapping[str, np.ndarray], contract: Contract) -> None:
    d, rows = contract.classifier.dimension, contract.bank.rows
    classes = len(contract.classes) - len(contract.fit.classes_without_prototype)
    shapes = {CENTER: (d,), PROTOTYPES_T: (d, classes), PROTOTYPES_SQ: (classes,)}
    for index in range(len(contract.ood_prototypes)):
        shapes |= dict(zip(ood_names(index), ((d,), (d, rows), (rows,)), strict=True))
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None or found.dtype != np.float32 or found.shape != shape:
            raise ArtifactError(f"the contract says that {name} is float32 {list(shape)}, and the graph does not")
    calibration = contract.calibration
    for name, value in calibration_tensors(calibration.sorted_scores(), calibration.k).items():
        found = tensors.get(name)
        if found is None or found.dtype != value.dtype or not np.array_equal(found, value):
            raise ArtifactError(f"{name} in the graph is not what the contract says; export the artifact again")


def _signatures(contract: Contract) -> tuple[list[tuple[str, int, list[int | str]]], ...]:
    """Return name, element type and shape of the graph's input and outputs, as `docs/format.md` fixes them."""
    batch: int | str = 1 if contract.classifier.batch == "1" else "N"
    p, wide = contract.preprocessing, {"logits": len(contract.classes), "features": contract.classifier.dimension}
    outputs: list[tuple[str, int, list[int | str]]] = [
        (name, kind, [batch, wide[name]] if name in wide else [batch]) for name, kind in _OUTPUTS.items()
    ]
    return [("image", _UINT8, [batch, p.height, p.width, p.channels])], outputs


def _signature(value: memoryview | bytes) -> tuple[str, int, list[int | str]]:
    """Read a ValueInfoProto: name, element type, shape. A free dimension is 'N', whatever its name."""
    name = bytes(wire.only_bytes(value, _VALUE_NAME) or b"").decode("utf-8", errors="replace")
    tensor = wire.only_bytes(wire.only_bytes(value, _VALUE_TYPE) or b"", _TYPE_TENSOR) or b""
    kinds = [field.value for field in wire.read_fields(tensor) if field.number == _TENSOR_TYPE_ELEMENT]
    dims: list[int | str] = []
    for dim in wire.read_fields(wire.only_bytes(tensor, _TENSOR_TYPE_SHAPE) or b""):
        sizes = [field.value for field in wire.read_fields(dim.message()) if field.number == _DIM_VALUE]
        dims.append(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else "N")
    return name, kinds[0] if len(kinds) == 1 and isinstance(kinds[0], int) else 0, dims


def _graph(model: bytes) -> memoryview | bytes:
    graphs = [field.message() for field in wire.read_fields(model) if field.number == _MODEL_GRAPH]
    if len(graphs) != 1:  # protobuf would merge several, so that what is checked is not what runs
        raise ArtifactError(f"the file has {len(graphs)} ONNX graphs: it is not an ONNX model, or it was damaged")
    return graphs[0]


def _name(field: wire.Field, number: int) -> str:
    name = wire.only_bytes(field.message(), number)
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
    dims = [wire.encode_field(_TENSOR_DIMS, int(size)) for size in array.shape]
    return b"".join(
        [
            *dims,
            wire.encode_field(_TENSOR_TYPE, _ONNX_TYPE_OF[little.dtype]),
            wire.encode_field(_TENSOR_NAME, name.encode()),
            wire.encode_field(_TENSOR_RAW, little.tobytes()),
        ]
    )
