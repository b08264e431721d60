"""The head as it stands in an ONNX file: named initializers in, `scoring.Head` out, and back; without onnx.

All that is fitted sits in initializers named `grood/...`; the nodes depend on the number of OOD prototypes and the
kind of bank alone. So refitting an artifact on a device means replacing initializers, and `head_model` cuts the very
head that ships out of the file, to be fed with features alone.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from grood_edge import onnx_proto as proto
from grood_edge import wire
from grood_edge.arrays import Bank, Prototypes
from grood_edge.conformal import DecisionRule
from grood_edge.errors import ArtifactError
from grood_edge.scoring import BankDtype, Head, OodHead, ScoreMap, SeenBank

__all__ = [
    "GROUP",
    "OodNames",
    "calibration_tensors",
    "head_from_model",
    "head_model",
    "head_tensors",
    "model_with_tensors",
    "ood_names",
    "quantised",
    "rounded_rows",
    "stored_tensors",
    "without_head",
]

GROUP = "grood/"  # prefix of every node, tensor and initializer of the head
PREPROCESS = "preprocess/"  # prefix of the nodes that normalise the image
FEATURES = "output/features"  # prefix of the nodes that only the features need
CENTER = GROUP + "center"
PROTOTYPES_T = GROUP + "prototypes_t"
PROTOTYPES_SQ = GROUP + "prototypes_sq"
SCALE = GROUP + "scale"
BANK = GROUP + "bank"
BANK_SCALE = GROUP + "bank_scale"
CALIBRATION_SCORES = GROUP + "calibration_scores"
CALIBRATION_GROUPS = GROUP + "calibration_groups"
GROUP_OF_CLASS = GROUP + "group_of_class"
RANK = GROUP + "rank"
P_DENOMINATOR = GROUP + "p_denominator"
_NAMED = {
    proto.GRAPH_NODE: proto.NODE_NAME, proto.GRAPH_INITIALIZER: proto.TENSOR_NAME, proto.GRAPH_OUTPUT: proto.VALUE_NAME,
}  # fmt: skip
_MAX_DIMS = 8
_INT8_MAX = 127

_ONNX_TYPES: dict[int, np.dtype] = {1: np.dtype("<f4"), 3: np.dtype("i1"), 6: np.dtype("<i4")}
_ONNX_TYPE_OF = {dtype: number for number, dtype in _ONNX_TYPES.items()}


@dataclass(frozen=True)
class OodNames:
    """Initializer names of one OOD head; the map's are there when the head has several OOD prototypes."""

    ood_prototype: str
    bank_log_s: str
    bank_inverse_length: str
    bank_offset: str
    least_distance: str
    map_bias: str
    map_slope: str
    map_knots: str
    map_weights: str


def ood_names(index: int) -> OodNames:
    """Return the initializer names of OOD head `index`."""
    return OodNames(**{field.name: f"{GROUP}{field.name}.{index}" for field in dataclasses.fields(OodNames)})


def head_tensors(head: Head) -> dict[str, np.ndarray]:
    """Return the head's initializers, everything relative to the mean class prototype (method: robust head).

    center `[d]`, prototypes_t `[d, k]`, prototypes_sq `[k]`, scale `[]`; with a bank: bank `[m, d]` float32, or int8
    with bank_scale `[m]`; per OOD prototype what `OodNames` lists. All but int8 bank rows is float32.
    """
    center = head.prototypes.mean(axis=0).astype(np.float32)
    centred = (head.prototypes - center).astype(np.float32)
    tensors = {
        CENTER: center,
        PROTOTYPES_T: np.ascontiguousarray(centred.T),
        PROTOTYPES_SQ: (centred.astype(np.float64) ** 2).sum(axis=1).astype(np.float32),
        SCALE: np.array(head.scale, np.float32),
    }
    rows = (head.bank - center).astype(np.float32)
    if len(rows) and head.bank_dtype == "int8":
        tensors[BANK], tensors[BANK_SCALE] = quantised(rows)
        rows = _dequantised(tensors[BANK], tensors[BANK_SCALE])
    elif len(rows):
        tensors[BANK] = rows
    for index, ood_head in enumerate(head.ood_heads):
        tensors |= _ood_tensors(ood_head, center, rows.astype(np.float64), ood_names(index))
        if len(head.ood_heads) > 1:
            tensors |= _map_tensors(ood_head.score_map, ood_names(index))
    return tensors


def quantised(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 rows `[m, d]` and one float32 scale a row, symmetric: row = scale * int8."""
    scale = np.maximum(np.abs(rows).max(axis=1, initial=0.0) / _INT8_MAX, np.finfo(np.float32).tiny).astype(np.float32)
    return np.clip(np.rint(rows / scale[:, None]), -_INT8_MAX, _INT8_MAX).astype(np.int8), scale


def rounded_rows(rows: Bank, prototypes: Prototypes, dtype: BankDtype) -> Bank:
    """Return bank rows float64 `[m, d]` as they will be read back from a file that keeps them in `dtype`."""
    if dtype == "float32":
        return rows
    center = prototypes.mean(axis=0).astype(np.float32)
    rounded: Bank = _dequantised(*quantised((rows - center).astype(np.float32))).astype(np.float64) + center
    return rounded


def _dequantised(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    values: np.ndarray = rows.astype(np.float32) * scale[:, None]  # float32, as DequantizeLinear computes it
    return values


def _ood_tensors(ood_head: OodHead, center: np.ndarray, rows: np.ndarray, names: OodNames) -> dict[str, np.ndarray]:
    """The graph computes (h - p).(b_i - p) as h.b_i - h.p + (p.p - p.b_i): one product serves every OOD prototype."""
    prototype = (ood_head.prototype - center).astype(np.float32)
    tensors = {names.ood_prototype: prototype}
    if len(rows):
        p = prototype.astype(np.float64)
        seen = SeenBank.of(rows, p)
        tensors |= {
            names.bank_log_s: ood_head.bank_log_s.astype(np.float32),
            names.bank_inverse_length: (1.0 / seen.lengths).astype(np.float32),
            names.bank_offset: seen.offset.astype(np.float32),
            names.least_distance: np.array(seen.least, np.float32),
        }
    return tensors


def _map_tensors(score_map: ScoreMap, names: OodNames) -> dict[str, np.ndarray]:
    empty = np.zeros(1, np.float32)  # a straight line: one knot without weight, because no stored tensor is empty
    return {
        names.map_bias: np.array(score_map.bias, np.float32),
        names.map_slope: np.array(score_map.slope, np.float32),
        names.map_knots: score_map.knots.astype(np.float32) if score_map.knots.size else empty,
        names.map_weights: score_map.weights.astype(np.float32) if score_map.knots.size else empty,
    }


def calibration_tensors(rule: DecisionRule) -> dict[str, np.ndarray]:
    """Return the decision's initializers.

    Scores float32 `[n]` group by group, the group of each int32 `[n]`, the group of each class int32 `[k]`; rank k
    int32 and n + 1 float32 of each group `[g]`.
    """
    sizes = [group.size for group in rule.scores]
    return {
        CALIBRATION_SCORES: np.concatenate(rule.scores).astype(np.float32),
        CALIBRATION_GROUPS: np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
        GROUP_OF_CLASS: rule.group_of_class.astype(np.int32),
        RANK: np.array(rule.ranks, dtype=np.int32),
        P_DENOMINATOR: np.array(sizes, dtype=np.float32) + np.float32(1),
    }


def head_from_model(model: bytes) -> Head:
    """Read the stored statistics back as the float64 head they define.

    Raises:
        ArtifactError: an initializer is missing or damaged.
    """
    tensors = dict(stored_tensors(model))
    count = max(1, sum(name.startswith(ood_names(0).ood_prototype[:-1]) for name in tensors))
    dtype: BankDtype = "int8" if BANK_SCALE in tensors else "float32"
    try:
        center = tensors[CENTER].astype(np.float64)
        prototypes = np.ascontiguousarray(tensors[PROTOTYPES_T].T).astype(np.float64) + center
        scale = float(tensors[SCALE])
        rows = np.zeros((0, center.size), np.float32)
        if BANK in tensors:
            stored = tensors[BANK]
            rows = stored if stored.dtype == np.float32 else _dequantised(stored, tensors[BANK_SCALE])
        if prototypes.ndim != 2 or rows.ndim != 2:
            raise ValueError(f"prototypes of shape {prototypes.shape}, bank rows of {rows.shape}")
        ood_heads = tuple(_read_ood_head(tensors, ood_names(i), center, len(rows), count > 1) for i in range(count))
        return Head(prototypes, rows.astype(np.float64) + center, ood_heads, dtype, scale)
    except KeyError as error:
        raise ArtifactError(f"the head's initializer {error} is missing: this file is not a whole artifact") from error
    except (TypeError, ValueError, IndexError) as error:  # NumPy's, of arrays that do not fit together
        raise ArtifactError(
            f"the head's initializers contradict each other: {error}; export the artifact again"
        ) from error


def _read_ood_head(
    tensors: Mapping[str, np.ndarray], names: OodNames, center: np.ndarray, rows: int, mapped: bool
) -> OodHead:
    prototype = tensors[names.ood_prototype].astype(np.float64) + center
    log_s = tensors[names.bank_log_s].astype(np.float64) if rows else np.zeros(0)
    if not mapped:
        return OodHead(prototype, log_s)
    bias, slope = float(tensors[names.map_bias]), float(tensors[names.map_slope])
    knots, weights = (tensors[n].astype(np.float64) for n in (names.map_knots, names.map_weights))
    return OodHead(prototype, log_s, ScoreMap(bias, slope, knots, weights))


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
    return proto.with_graph(model, [graph])


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
    return proto.with_graph(model, graph)


def without_head(model: bytes) -> bytes:
    """Cut the head off: a model from `image` to `logits` alone, which is the classifier with its preprocessing.

    Raises:
        ArtifactError: there is no head, or no output `logits`.
    """
    graph: list[bytes | memoryview] = []
    head_nodes = logits = 0
    for field in wire.read_fields(proto.graph_of(model)):
        name = proto.name_of(field, _NAMED[field.number]) if field.number in _NAMED else ""
        if field.number == proto.GRAPH_OUTPUT and name != "logits":
            continue
        if field.number != proto.GRAPH_OUTPUT and name.startswith((GROUP, FEATURES)):
            head_nodes += field.number == proto.GRAPH_NODE and name.startswith(GROUP)
            continue
        logits += field.number == proto.GRAPH_OUTPUT
        graph.append(field.raw)
    if not head_nodes or logits != 1:
        raise ArtifactError(
            f"the model has {head_nodes} nodes of a head and {logits} outputs 'logits'; export it again"
        )
    return proto.with_graph(model, graph)


def stored_tensors(model: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Iterate over the head's float32, int32 and int8 initializers: name and array.

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
    """Decode a float32, int32 or int8 tensor stored as raw data; None for any other."""
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
