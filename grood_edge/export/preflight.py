"""What TensorRT would refuse or misread in an ONNX graph, said before anything is built and without TensorRT.

The rules were found with TensorRT-RTX 1.7, which parses and builds without a GPU: `tests/operators.py` is the table
that holds them to its verdicts, and `tests/export/test_preflight.py` lists where they are stricter, and why. TensorRT
itself shares the parser; where 10.3 (JetPack 6) is older or unproven, a finding names `tensorrt` alone.
"""

import contextlib
from collections import ChainMap
from collections.abc import Iterator, MutableMapping
from typing import Any

from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    TensorProto,
    ValueInfoProto,
    inliner,
    shape_inference,
)

from grood_edge.export.layers import constant_of, replace_nodes
from grood_edge.export.preflight_finding import (
    BOTH,
    JETPACK,
    TENSORRT_TYPES,
    Family,
    Finding,
    Scope,
    is_large_or_outside,
    refused,
    subgraphs,
    type_name,
    warning,
)
from grood_edge.export.preflight_rules import RULES, STANDARD_DOMAINS, operator_findings
from grood_edge.onnx_proto import OPSET

__all__ = ["Family", "Finding", "preflight"]

MAX_FINDINGS = 100  # of each kind; nobody reads more
MAX_NODES = 1_000_000  # with all local functions inlined
MAX_DEPTH = 16  # subgraphs in subgraphs
MAX_IR_VERSION = 10

_T = TensorProto


def preflight(model: ModelProto) -> tuple[Finding, ...]:
    """Return what TensorRT and TensorRT-RTX refuse in a model, then what they take with a warning.

    The model need not be valid and is not changed. Weights are not read, external data are not opened.

    Args:
        model: any ONNX model, with or without a head; local functions are judged by what they contain.
    """
    slim = _without_weights(model)
    found = list(_model_findings(slim))
    inlined = _inlined(slim)
    if isinstance(inlined, Finding):
        found.append(inlined)
    else:
        found += _graph_findings(inlined)
    by_kind = ([finding for finding in found if finding.kind == kind] for kind in ("refused", "warning"))
    return tuple(finding for some in by_kind for finding in dict.fromkeys(some[:MAX_FINDINGS]))


def _without_weights(model: ModelProto) -> ModelProto:
    """Copy a model with its large and its external initializers empty."""
    slim = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = model.graph
    slim.graph.name = graph.name or "graph"
    for field in ("node", "input", "output", "value_info"):
        getattr(slim.graph, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        if is_large_or_outside(tensor):
            slim.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        else:
            slim.graph.initializer.append(tensor)
    return slim


def _model_findings(model: ModelProto) -> Iterator[Finding]:
    name = model.graph.name
    opset, export = _opset(model), f"Export it with opset {OPSET}, which every supported TensorRT reads"
    if opset > OPSET:
        yield Finding(name, "model", f"opset {opset}, expected at most {OPSET}", JETPACK, export)
    if model.ir_version > MAX_IR_VERSION:
        found = f"IR version {model.ir_version}, expected at most {MAX_IR_VERSION}"
        yield Finding(name, "model", found, JETPACK, export)
    if model.functions:
        found = f"{len(model.functions)} local functions, which TensorRT 10.3 (JetPack 6) is not known to import"
        yield Finding(name, "model", found, JETPACK, "Inline them (onnx.inliner.inline_local_functions)", "warning")
    weights = {tensor.name for tensor in model.graph.initializer}
    yield from (f for value in model.graph.input if value.name not in weights for f in _input_findings(value))
    for value in model.graph.output:
        kind = value.type.tensor_type.elem_type
        if kind == _T.UNDEFINED:
            advice = "Give the output its type (onnx.shape_inference.infer_shapes)"
            yield Finding(value.name, "output", "the output has no type", BOTH, advice)
        elif kind == _T.INT64:
            found, advice = (
                "an int64 output, which TensorRT before 10 gives as int32",
                "Cast indices to int32: one ABI for all",
            )
            yield Finding(value.name, "output", found, BOTH, advice, "warning")


def _input_findings(value: ValueInfoProto) -> Iterator[Finding]:
    kind, dims = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
    if kind not in TENSORRT_TYPES:
        yield Finding(value.name, "input", f"an input of type {type_name(kind)}", BOTH, "Use uint8, int32 or float32")
    open_dims = [index for index, dim in enumerate(dims) if index and not dim.HasField("dim_value")]
    if open_dims:
        found = f"dimensions {open_dims} are open beside the batch, so one profile over batch sizes is not enough"
        yield Finding(value.name, "input", found, BOTH, "Fix them, or build one profile for each size", "warning")


def _inlined(model: ModelProto) -> ModelProto | Finding:
    """Inline local functions; their size with all calls resolved is bounded first."""
    if not model.functions:
        return model
    functions = {(f.domain, f.name): f for f in model.functions}
    try:
        size = _expanded(model.graph, functions, {}, 0)
        if size > MAX_NODES:
            advice = "Inline the functions and simplify the graph before exporting it"
            return Finding(model.graph.name, "model", f"local functions expand to {size:,} nodes", BOTH, advice)
        return inliner.inline_local_functions(model)
    except Exception as error:  # C++ errors of several kinds, and RecursionError for functions that call themselves
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        found = f"local functions that cannot be inlined ({reason})"
        return Finding(model.graph.name, "model", found, BOTH, "Inline them with the tool that wrote the model")


def _expanded(
    body: GraphProto | FunctionProto,
    functions: dict[tuple[str, str], FunctionProto],
    sizes: dict[tuple[str, str], int],
    depth: int,
) -> int:
    """Count the nodes of a body with every call of a local function resolved."""
    if depth > len(functions) + MAX_DEPTH:
        raise RecursionError("functions that call themselves, or subgraphs nested too deep")
    total = len(body.node)
    for node in body.node:
        key = (node.domain, node.op_type)
        if key in functions:
            if key not in sizes:
                sizes[key] = _expanded(functions[key], functions, sizes, depth + 1)
            total += sizes[key]
        total += sum(_expanded(graph, functions, sizes, depth + 1) for graph in subgraphs(node))
    return total


def _graph_findings(model: ModelProto) -> Iterator[Finding]:
    yield from _take_out_unknown(model.graph, _opset(model), 1)
    with contextlib.suppress(Exception):  # an invalid model keeps the types that it states
        model = shape_inference.infer_shapes(model)
    scope = Scope(_opset(model), ChainMap(), ChainMap(), ChainMap(), frozenset(), frozenset())
    yield from _walk(model.graph, scope)
    nodes = (n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear"))
    first = next(nodes, None)
    if first is not None:
        found = "quantised tensors, strongly typed, which TensorRT before 10.12 (JetPack 6: 10.3) is not proven to take"
        yield warning(first, found, "Build and verify on the device before relying on it", JETPACK)


def _take_out_unknown(graph: GraphProto, opset: int, depth: int) -> Iterator[Finding]:
    """Take nodes out that are refused as they are: onnx 1.23 crashes when it infers shapes of some of them."""
    kept = []
    for node in graph.node:
        findings = list(operator_findings(node, opset))
        if depth >= MAX_DEPTH and any(True for _ in subgraphs(node)):
            findings.append(refused(node, f"subgraphs nested more than {MAX_DEPTH} deep", "Flatten the control flow"))
        yield from findings
        if not findings:
            for inner in subgraphs(node):
                yield from _take_out_unknown(inner, opset, depth + 1)
            kept.append(node)
    if len(kept) < len(graph.node):
        replace_nodes(graph, kept)


def _walk(graph: GraphProto, around: Scope) -> Iterator[Finding]:
    scope = _scope_of(graph, around)
    for tensor in graph.initializer:
        if tensor.data_type not in TENSORRT_TYPES:
            found = f"an initializer of type {type_name(tensor.data_type)}"
            yield Finding(
                tensor.name or graph.name or "graph", "initializer", found, BOTH, "Store it as float32 or int32"
            )
    for node in graph.node:
        for rule in RULES:
            yield from rule(node, scope)
        for inner in subgraphs(node):
            yield from _walk(inner, scope)


def _scope_of(graph: GraphProto, around: Scope) -> Scope:
    types: dict[str, int] = {}
    shapes: dict[str, tuple[int | None, ...]] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type:
            types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.output and (tensor := constant_of(node)) is not None:
            constants[node.output[0]] = tensor
    for name, tensor in constants.items():
        types[name], shapes[name] = tensor.data_type, tuple(tensor.dims)
    inner = around.depth > 0
    return Scope(
        around.opset,
        ChainMap(types, *_maps(around.types)),
        ChainMap(shapes, *_maps(around.shapes)),
        ChainMap(constants, *_maps(around.constants)),
        around.inputs if inner else frozenset(value.name for value in graph.input if value.name not in constants),
        frozenset() if inner else frozenset(value.name for value in graph.output),
        around.depth + 1,
    )


def _maps(mapping: MutableMapping[str, Any]) -> list[MutableMapping[str, Any]]:
    return mapping.maps if isinstance(mapping, ChainMap) else [mapping]


def _opset(model: ModelProto) -> int:
    return max((o.version for o in model.opset_import if o.domain in STANDARD_DOMAINS), default=1)
