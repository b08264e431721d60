"""Was built what was asked for? The types of a network's layers, held against the ONNX graph and the contract.

TensorRT 11 dropped the flags for FP16 and INT8: a tool that still passes them gets float32, without a word.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grood_edge import onnx_proto as proto
from grood_edge import wire
from grood_edge.contract import Contract
from grood_edge.errors import BackendError
from grood_edge.runtime.engine_spec import precision_of
from grood_edge.runtime.trt_api import TrtApi, process_logger
from grood_edge.runtime.trt_plan import open_plan
from grood_edge.stored_head import GROUP

__all__ = ["Layer", "Product", "count_types", "graph_products", "inspected_types", "read_layers", "require_precision"]

_REDUCED = frozenset({"HALF", "BF16", "FP8", "INT8", "INT4", "FP4", "E8M0"})
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FLOAT_TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16"}  # of onnx.proto3's TensorProto
_FLOAT_OUTPUTS = ("logits", "features", "ood_score", "p_value")
_NAMED = 3  # mismatches that a message names
# How inspectors of TensorRT 10 and 11 name types, in texts such as "Channel major FP16 format"
_INSPECTED = {"fp16": re.compile(r"\b(FP16|Half)\b", re.I), "int8": re.compile(r"\bInt8\b", re.I)}
_INSPECTED_ANY = re.compile(r"\b(FP32|Float|FP16|Half|Int8)\b", re.I)


@dataclass(frozen=True)
class Layer:
    """A layer of a TensorRT network: its kind, inputs, and the name and type of each output."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product of the ONNX graph.

    type: `FLOAT` or `HALF` as its weights say; None where both factors are computed. quantised: DequantizeLinear makes
    all of its factors.
    """

    node: str
    operator: str
    output: str
    type: str | None
    quantised: bool


def read_layers(network: Any) -> tuple[Layer, ...]:
    """Read the layers of a parsed TensorRT network."""
    return tuple(_layer(network.get_layer(index)) for index in range(network.num_layers))


def _layer(layer: Any) -> Layer:
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    return Layer(
        layer.type.name,
        layer.name,
        tuple(tensor.name for tensor in inputs if tensor is not None),
        tuple((tensor.name, tensor.dtype.name) for tensor in outputs if tensor is not None),
    )


def count_types(layers: tuple[Layer, ...]) -> dict[str, int]:
    """Return how many layers have a first output of each type; constants are not counted."""
    counts = Counter(layer.outputs[0][1] for layer in layers if layer.outputs and layer.kind != "CONSTANT")
    return dict(sorted(counts.items()))


def graph_products(model: bytes) -> tuple[Product, ...]:
    """Return the convolutions and matrix products of an ONNX model, without the head's.

    Raises:
        ArtifactError: not a whole ONNX model.
    """
    graph = proto.graph_of(model)
    types: dict[str, str] = {}
    for field in wire.read_fields(graph):
        if field.number == proto.GRAPH_INITIALIZER:
            name, kind = _tensor_type(field.message())
            types[name] = kind
    dequantised: set[str] = set()
    products = []
    for field in wire.read_fields(graph):
        if field.number != proto.GRAPH_NODE:
            continue
        node = _Node.of(field.message())
        if node.operator == "Cast":
            types[node.outputs[0]] = _FLOAT_TYPES.get(node.cast_to, "")
        elif node.operator == "DequantizeLinear":
            types[node.outputs[0]] = types.get(node.inputs[1], "")
            dequantised.add(node.outputs[0])
        elif node.operator in _PRODUCTS and not node.name.startswith(GROUP):
            known = {types.get(name, "") for name in node.inputs} & set(_FLOAT_TYPES.values())
            kind_or_none = known.pop() if len(known) == 1 else None
            quantised = dequantised.issuperset(node.inputs[:2])
            products.append(Product(node.name, node.operator, node.outputs[0], kind_or_none, quantised))
    return tuple(products)


@dataclass(frozen=True)
class _Node:
    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cast_to: int

    @classmethod
    def of(cls, message: memoryview | bytes) -> "_Node":
        texts: dict[int, list[str]] = {number: [""] for number in (3, 4)} | {1: [], 2: []}
        cast_to = 0
        for field in wire.read_fields(message):
            if field.number in texts:
                texts[field.number].append(field.text())
            elif field.number == proto.NODE_ATTRIBUTE:
                attribute = {part.number: part for part in wire.read_fields(field.message())}
                if 1 in attribute and 3 in attribute and attribute[1].text() == "to":
                    value = attribute[3].value
                    cast_to = value if isinstance(value, int) else 0
        return cls(texts[3][-1], texts[4][-1], tuple(texts[1]), tuple(texts[2] or [""]), cast_to)


def _tensor_type(message: memoryview | bytes) -> tuple[str, str]:
    name, kind = "", ""
    for field in wire.read_fields(message):
        if field.number == proto.TENSOR_NAME:
            name = field.text()
        elif field.number == proto.TENSOR_TYPE and isinstance(field.value, int):
            kind = _FLOAT_TYPES.get(field.value, "")
    return name, kind


def require_precision(layers: tuple[Layer, ...], products: tuple[Product, ...], contract: Contract) -> None:
    """Hold the types of a strongly typed network against the ONNX graph and the contract.

    Raises:
        BackendError: names layers that would compute in another type than was asked for.
    """
    asked = precision_of(contract).name
    found = [*_of_the_contract(layers, products, contract), *_of_the_graph(layers, products), *_of_the_head(layers)]
    if found:
        more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise BackendError(
            f"the contract says {asked}, but TensorRT would build something else: {'; '.join(found[:_NAMED])}{more}. "
            f"Nothing was written; export the artifact again with --precision {asked}"
        )


def _of_the_contract(layers: tuple[Layer, ...], products: tuple[Product, ...], contract: Contract) -> Iterator[str]:
    precision = precision_of(contract)
    kept = {name if name.startswith("classifier/") else f"classifier/{name}" for name in precision.float_layers}
    types = _tensor_types(layers)
    if precision.name == "fp32":
        bank = _bank_tensors(layers)
        for layer in layers:
            for name, kind in layer.outputs:
                if kind in _REDUCED and name not in bank:
                    yield f"layer {layer.name!r} ({layer.kind}) is {kind} and should be FLOAT"
        return
    lowered = [p for p in products if p.quantised or types.get(p.output) == "HALF"]
    wanted = "HALF" if precision.name == "fp16" else "quantised"
    if not any(p.quantised == (precision.name == "int8") for p in lowered):
        yield f"none of the {len(products)} convolutions and products is {wanted}"
    for product in lowered:
        if product.node in kept:
            yield f"node {product.node!r} ({product.operator}) is {wanted}, and the contract keeps it in float32"


def _of_the_graph(layers: tuple[Layer, ...], products: tuple[Product, ...]) -> Iterator[str]:
    types, makers = _tensor_types(layers), {name: layer for layer in layers for name, _ in layer.outputs}
    checked = 0
    for product in products:
        kind = types.get(product.output)
        checked += kind is not None
        if kind is not None and product.type is not None and kind != product.type:
            yield f"node {product.node!r} ({product.operator}) is {kind} and should be {product.type}"
        maker = makers.get(product.output)
        if product.quantised and maker is not None and maker.kind == "CONVOLUTION":
            before = makers.get(maker.inputs[0])
            if before is None or before.kind != "DEQUANTIZE":
                yield f"node {product.node!r} ({product.operator}) reads no quantised activations"
    if products and not checked:
        yield f"none of the {len(products)} convolutions and products is found in TensorRT's network"


def _of_the_head(layers: tuple[Layer, ...]) -> Iterator[str]:
    bank, types = _bank_tensors(layers), _tensor_types(layers)
    for layer in layers:
        for name, kind in layer.outputs:
            if layer.name.startswith(GROUP) and kind in _REDUCED and name not in bank:
                yield f"layer {layer.name!r} of the head is {kind} and should be FLOAT"
    for name in _FLOAT_OUTPUTS:
        if types.get(name, "FLOAT") != "FLOAT":
            yield f"output {name!r} is {types[name]} and should be FLOAT"


def _bank_tensors(layers: tuple[Layer, ...]) -> set[str]:
    """Return the stored int8 rows of the gradient bank: what the head's own DequantizeLinear reads."""
    return {
        name for layer in layers if layer.kind == "DEQUANTIZE" and layer.name.startswith(GROUP) for name in layer.inputs
    }


def _tensor_types(layers: tuple[Layer, ...]) -> Mapping[str, str]:
    return {name: kind for layer in layers for name, kind in layer.outputs}


def inspected_types(api: TrtApi, plan: bytes, contract: Contract) -> dict[str, int] | None:
    """Deserialise a plan of our own and count the types that its inspector names. Needs a GPU.

    Returns None where its inspector names no types.

    Raises:
        BackendError: the engine cannot be opened, or the inspector names types, and the contract's precision is not
            among them.
    """
    if not api.capabilities.inspector:
        return None
    _runtime, engine = open_plan(api, plan, process_logger(api))
    inspector = engine.create_engine_inspector()
    if inspector is None:
        return None
    text = inspector.get_engine_information(api.module.LayerInformationFormat.JSON)
    try:
        found = json.loads(text or "{}")
    except ValueError:  # an inspector without words; the network's own types were compared before
        return None
    counts = Counter(word for value in _type_texts(found) for word in _INSPECTED_ANY.findall(value))
    asked = precision_of(contract).name
    if counts and asked in _INSPECTED and not any(_INSPECTED[asked].fullmatch(word) for word in counts):
        raise BackendError(
            f"the contract says {asked}, but the engine's inspector names only {', '.join(sorted(counts))}. Nothing "
            f"was written; export the artifact again with --precision {asked}"
        )
    return dict(sorted(counts.items())) or None


def _type_texts(value: Any, key: str = "") -> Iterator[str]:
    """Iterate over all texts under keys such as `Format/DataType` (TensorRT 10) or `DataType` (11)."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _type_texts(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _type_texts(item, key)
    elif isinstance(value, str) and "datatype" in key.lower():
        yield value
