"""Is a file's graph what an artifact may have? Self-contained, standard operators, and as its contract says."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from grood_edge import onnx_proto as proto
from grood_edge import wire
from grood_edge.camera_part import require_camera_part
from grood_edge.contract import Contract
from grood_edge.errors import ArtifactError
from grood_edge.stored_head import (
    BANK,
    BANK_SCALE,
    CENTER,
    PROTOTYPES_SQ,
    PROTOTYPES_T,
    SCALE,
    calibration_tensors,
    ood_names,
    stored_tensors,
)

__all__ = ["STANDARD_DOMAINS", "refuse_external_data", "require_agreement"]

STANDARD_DOMAINS = (b"", b"ai.onnx")
MAX_GRAPH_DEPTH = 16
MAX_GRAPH_FIELDS = 1 << 21  # of nodes, attributes and tensors: read in seconds; real networks have a tenth at most
MAX_KNOTS = 64  # of the map of an OOD head's score
_HEAD_PARTS = (BANK, *(name.removesuffix("0") for name in dataclasses.astuple(ood_names(0))))
_UINT8 = 2
_OUTPUTS = {"logits": 1, "features": 1, "class_id": 6, "ood_score": 1, "p_value": 1, "is_ood": 9, "valid": 9}


def refuse_external_data(model: bytes) -> None:
    """Refuse a model with data outside the file: an artifact is one file, and paths in it are not followed.

    Operators outside the standard domain are refused as well: some of them read files.

    Raises:
        ArtifactError: names the first such tensor or operator, or says that the graph is too deep or too large.
    """
    walk = _Walk()
    walk.graph(proto.graph_of(model), depth=0)
    for field in wire.read_fields(model):
        if field.number == proto.MODEL_FUNCTION:
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
            if field.number == proto.GRAPH_INITIALIZER:
                self._tensor(field.message())
            elif field.number == proto.GRAPH_SPARSE:
                self._sparse(field.message())
            elif field.number == proto.GRAPH_NODE:
                self._node(field.message(), depth)

    def function(self, function: memoryview | bytes) -> None:
        for field in self._fields(function):
            if field.number == proto.FUNCTION_NODE:
                self._node(field.message(), depth=0)
            elif field.number == proto.FUNCTION_ATTRIBUTE:
                self._attribute(field.message(), depth=0)

    def _node(self, node: memoryview | bytes, depth: int) -> None:
        for field in self._fields(node):
            if field.number == proto.NODE_ATTRIBUTE:
                self._attribute(field.message(), depth)
            elif field.number == proto.NODE_DOMAIN and field.message() not in STANDARD_DOMAINS:
                raise ArtifactError(f"an operator is of domain {field.text()!r}; an artifact has standard ones only")

    def _attribute(self, attribute: memoryview | bytes, depth: int) -> None:
        for field in self._fields(attribute):
            if field.number in (proto.ATTRIBUTE_T, proto.ATTRIBUTE_TENSORS):
                self._tensor(field.message())
            elif field.number in (proto.ATTRIBUTE_SPARSE, proto.ATTRIBUTE_SPARSES):
                self._sparse(field.message())
            elif field.number in (proto.ATTRIBUTE_G, proto.ATTRIBUTE_GRAPHS):
                self.graph(field.message(), depth + 1)

    def _sparse(self, sparse: memoryview | bytes) -> None:
        for field in self._fields(sparse):
            if field.number in proto.SPARSE_PARTS:
                self._tensor(field.message())

    def _tensor(self, tensor: memoryview | bytes) -> None:
        name, external = "", False
        for field in self._fields(tensor):
            if field.number == proto.TENSOR_NAME:
                name = field.text()
            external |= field.number == proto.TENSOR_EXTERNAL or (
                field.number == proto.TENSOR_LOCATION and field.value != 0
            )
        if external:
            raise ArtifactError(
                f"tensor {name!r} keeps its data in another file; an artifact is one self-contained file"
            )


def require_agreement(model: bytes, contract: Contract) -> None:
    """Check that the graph has the inputs, outputs and head that the contract describes, and decides as it says.

    Raises:
        ArtifactError: an input, output or stored tensor is missing, is there twice, or differs from the contract.
    """
    found: dict[int, list[tuple[str, int, list[int | str]]]] = {proto.GRAPH_INPUT: [], proto.GRAPH_OUTPUT: []}
    names: set[str] = set()
    for field in wire.read_fields(proto.graph_of(model)):
        if field.number == proto.GRAPH_SPARSE:
            raise ArtifactError("the model has a sparse initializer; an artifact has none")
        if field.number in found:
            found[field.number].append(_signature(field.message()))
        if field.number == proto.GRAPH_INITIALIZER:
            name = proto.name_of(field, proto.TENSOR_NAME)
            if name in names:  # readers differ in which one counts
                raise ArtifactError(f"the model has initializer {name!r} twice; it is refused")
            names.add(name)
    for number, expected in zip((proto.GRAPH_INPUT, proto.GRAPH_OUTPUT), _signatures(contract), strict=True):
        if found[number] != expected:
            raise ArtifactError(f"the contract says that the graph has {expected}; it has {found[number][:10]}")
    if contract.preprocessing.camera is not None:
        require_camera_part(model)
    _require_stored(dict(stored_tensors(model)), contract)


def _require_stored(tensors: Mapping[str, np.ndarray], contract: Contract) -> None:
    expected_tensors = _expected_tensors(contract)
    surplus = [name for name in tensors if name.startswith(_HEAD_PARTS) and name not in expected_tensors]
    if surplus:  # such as an OOD prototype more than the contract names: readers would differ in what the head is
        raise ArtifactError(f"the graph has {surplus[:3]}, and the contract does not; export the artifact again")
    for name, (dtype, shape) in expected_tensors.items():
        found = tensors.get(name)
        if found is None or found.dtype != dtype or not _fits(found.shape, shape):
            expected = f"{dtype.__name__} {['?' if size is None else size for size in shape]}"
            raise ArtifactError(f"the contract says that {name} is {expected}, and the graph does not")
    if tensors[SCALE] != np.float32(contract.scale.value):
        raise ArtifactError(f"{SCALE} in the graph is not what the contract says; export the artifact again")
    for index in range(len(contract.ood_prototypes) if len(contract.ood_prototypes) > 1 else 0):
        knots, weights = (tensors[name].size for name in (ood_names(index).map_knots, ood_names(index).map_weights))
        if knots != weights:
            raise ArtifactError(f"the map of OOD prototype {index} has {knots} knots and {weights} weights")
    for name, value in calibration_tensors(contract.calibration.rule(len(contract.classes))).items():
        found = tensors.get(name)
        if found is None or found.dtype != value.dtype or not np.array_equal(found, value):
            raise ArtifactError(f"{name} in the graph is not what the contract says; export the artifact again")


def _fits(found: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    """None in `shape` stands for any number from 1 to `MAX_KNOTS`."""
    pairs = zip(found, shape, strict=False)
    return len(found) == len(shape) and all(1 <= n <= MAX_KNOTS if size is None else n == size for n, size in pairs)


def _expected_tensors(contract: Contract) -> dict[str, tuple[type, tuple[int | None, ...]]]:
    """Return dtype and shape of every stored tensor of the head, as `docs/format.md` lists them."""
    d, rows, classes = contract.head_dimension, contract.bank.rows, contract.prototype_count
    heads = len(contract.ood_prototypes)
    shapes: dict[str, tuple[int | None, ...]] = {
        CENTER: (d,),
        PROTOTYPES_T: (d, classes),
        PROTOTYPES_SQ: (classes,),
        SCALE: (),
    }
    for names in map(ood_names, range(heads)):
        shapes[names.ood_prototype] = (d,)
        if rows:
            shapes |= dict.fromkeys((names.bank_log_s, names.bank_inverse_length, names.bank_offset), (rows,))
            shapes[names.least_distance] = ()
        if heads > 1:
            shapes |= {names.map_bias: (), names.map_slope: (), names.map_knots: (None,), names.map_weights: (None,)}
    expected: dict[str, tuple[type, tuple[int | None, ...]]] = {n: (np.float32, s) for n, s in shapes.items()}
    if rows:
        int8 = contract.bank.dtype == "int8"
        expected[BANK] = (np.int8 if int8 else np.float32, (rows, d))
        if int8:
            expected[BANK_SCALE] = (np.float32, (rows,))
    return expected


def _signatures(contract: Contract) -> tuple[list[tuple[str, int, list[int | str]]], ...]:
    """Return name, element type and shape of the graph's input and outputs, as `docs/format.md` fixes them."""
    batch: int | str = 1 if contract.classifier.batch == "1" else "N"
    p, wide = contract.preprocessing, {"logits": len(contract.classes), "features": contract.classifier.dimension}
    outputs: list[tuple[str, int, list[int | str]]] = [
        (name, kind, [batch, wide[name]] if name in wide else [batch]) for name, kind in _OUTPUTS.items()
    ]
    return [("image", _UINT8, [batch, *p.input_shape])], outputs


def _signature(value: memoryview | bytes) -> tuple[str, int, list[int | str]]:
    """Read a ValueInfoProto: name, element type, shape. A free dimension is 'N', whatever its name."""
    name = bytes(wire.only_bytes(value, proto.VALUE_NAME) or b"").decode("utf-8", errors="replace")
    tensor = wire.only_bytes(wire.only_bytes(value, proto.VALUE_TYPE) or b"", proto.TYPE_TENSOR) or b""
    kinds = [field.value for field in wire.read_fields(tensor) if field.number == proto.TENSOR_TYPE_ELEMENT]
    dims: list[int | str] = []
    for dim in wire.read_fields(wire.only_bytes(tensor, proto.TENSOR_TYPE_SHAPE) or b""):
        sizes = [field.value for field in wire.read_fields(dim.message()) if field.number == proto.DIM_VALUE]
        dims.append(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else "N")
    return name, kinds[0] if len(kinds) == 1 and isinstance(kinds[0], int) else 0, dims
