"""What TensorRT would refuse or misread in an ONNX graph, said before anything is built and without TensorRT.

The rules were found with TensorRT-RTX 1.7, which parses and builds without a GPU: `tests/operators.py` is the table that
holds them to its verdicts, and `tests/export/test_preflight.py` lists where they are stricter, and why. TensorRT itself
shares the parser; where 10.3 (JetPack 6) is older or unproven, a finding names `tensorrt` alone.
"""

from collections import ChainMap
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    defs,
    helper,
    inliner,
    numpy_helper,
    shape_inference,
)

from grood_edge.onnx_proto import OPSET
from grood_edge.stored_head import GROUP

__all__ = ["Family", "Finding", "preflight"]

Family = Literal["tensorrt", "tensorrt-rtx"]

MAX_FINDINGS = 100  # of each kind; nobody reads more
MAX_NODES = 1_000_000  # with all local functions inlined
MAX_DEPTH = 16  # subgraphs in subgraphs
MAX_CONSTANT = 1 << 16  # elements; larger initializers are weights, whose values no rule reads
MAX_IR_VERSION = 10
MAX_K = 3840

_BOTH: tuple[Family, ...] = ("tensorrt", "tensorrt-rtx")
_JETPACK: tuple[Family, ...] = ("tensorrt",)
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_STANDARD = ("", "ai.onnx")
_T = TensorProto
_TYPES = {_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.DOUBLE, _T.INT8, _T.UINT8, _T.INT32, _T.INT64, _T.BOOL}
_LESS_PRECISE = {_T.FLOAT16, _T.BFLOAT16, _T.DOUBLE}  # double: TensorRT computes it in float32, others do not

# Operators that the parser has an importer for, less those whose plugin is missing (NonZero, NonMaxSuppression,
# RoiAlign, LinearAttention, CausalConvWithState) and Attention, which depends on shapes.
_OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BlackmanWindow Cast
    CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace
    DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND
    Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization
    HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow QuantizeLinear RMSNormalization RNN
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RotaryEmbedding Round STFT Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin
    Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh TensorScatter
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """.split()
)
_INSTEAD = {
    "NonZero": "Its output size depends on the data: use Where with a mask",
    "NonMaxSuppression": "Its output size depends on the data: select on the host",
    "Unique": "Its output size depends on the data: do it on the host",
    "QLinearConv": "Quantise with QuantizeLinear and DequantizeLinear around Conv instead",
    "QLinearMatMul": "Quantise with QuantizeLinear and DequantizeLinear around MatMul instead",
    "DynamicQuantizeLinear": "Use QuantizeLinear with a fixed scale, measured on images",
}
_REPLACE = "Replace it by standard operators that TensorRT imports, or leave it out of the exported graph"

_MODES = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
_AlwaysOf = Callable[[Any], bool]
_POOLS = "Use a convolution with dilation, or a pool without it"
_ATTRIBUTES: dict[tuple[str, str], tuple[_AlwaysOf, str]] = {
    ("Resize", "antialias"): (lambda v: v == 0, "Resize with antialias on the host, or export with antialias=0"),
    ("Resize", "coordinate_transformation_mode"): (lambda v: v in _MODES, f"Use one of {', '.join(_MODES)}"),
    ("Resize", "keep_aspect_ratio_policy"): (lambda v: v == "stretch", "Compute the sizes and use stretch"),
    ("AveragePool", "dilations"): (lambda v: set(v) <= {1}, _POOLS),
    ("MaxPool", "dilations"): (lambda v: set(v) <= {1}, _POOLS),
    ("LpPool", "dilations"): (lambda v: set(v) <= {1}, _POOLS),
    ("ScatterND", "reduction"): (lambda v: v == "none", "Use ScatterElements, or add outside the scatter"),
}


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
class _Scope:
    """What is known at a node: of its own graph and of those around it."""

    opset: int
    types: MutableMapping[str, int]
    shapes: MutableMapping[str, tuple[int | None, ...]]
    constants: MutableMapping[str, TensorProto]
    outputs: frozenset[str]
    depth: int = 0

    def kind(self, name: str) -> int:
        """Element type; UNDEFINED where it could not be inferred."""
        return self.types.get(name, _T.UNDEFINED)

    def value(self, name: str) -> np.ndarray | None:
        """The value of a small constant."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type not in _TYPES:
            return None
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError):  # its bytes do not fit its shape; the checker's business
            return None


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
    refused, warnings = ([f for f in found if f.kind == kind] for kind in ("refused", "warning"))
    return (*dict.fromkeys(refused[:MAX_FINDINGS]), *dict.fromkeys(warnings[:MAX_FINDINGS]))


def _without_weights(model: ModelProto) -> ModelProto:
    """Copy a model with its large and its external initializers empty."""
    slim = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = model.graph
    slim.graph.name = graph.name or "graph"
    for field in ("node", "input", "output", "value_info"):
        getattr(slim.graph, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        if int(np.prod(tensor.dims, dtype=object)) > MAX_CONSTANT or tensor.data_location == TensorProto.EXTERNAL:
            slim.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        else:
            slim.graph.initializer.append(tensor)
    return slim


def _model_findings(model: ModelProto) -> Iterator[Finding]:
    name = model.graph.name
    opset, export = _opset(model), f"Export it with opset {OPSET}, which every supported TensorRT reads"
    if opset > OPSET:
        yield Finding(name, "model", f"opset {opset}, expected at most {OPSET}", _JETPACK, export)
    if model.ir_version > MAX_IR_VERSION:
        found = f"IR version {model.ir_version}, expected at most {MAX_IR_VERSION}"
        yield Finding(name, "model", found, _JETPACK, export)
    if model.functions:
        found = f"{len(model.functions)} local functions, which TensorRT 10.3 (JetPack 6) is not known to import"
        yield Finding(name, "model", found, _JETPACK, "Inline them (onnx.inliner.inline_local_functions)", "warning")
    weights = {tensor.name for tensor in model.graph.initializer}
    yield from (f for value in model.graph.input if value.name not in weights for f in _input_findings(value))
    for value in model.graph.output:
        kind = value.type.tensor_type.elem_type
        if kind == _T.UNDEFINED:
            advice = "Give the output its type (onnx.shape_inference.infer_shapes)"
            yield Finding(value.name, "output", "the output has no type", _BOTH, advice)
        elif kind == _T.INT64:
            found, advice = "an int64 output, which TensorRT 8 gives as int32", "Cast indices to int32: one ABI for all"
            yield Finding(value.name, "output", found, _BOTH, advice, "warning")


def _input_findings(value: ValueInfoProto) -> Iterator[Finding]:
    kind, dims = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
    if kind not in _TYPES:
        yield Finding(value.name, "input", f"an input of type {_named(kind)}", _BOTH, "Use uint8, int32 or float32")
    open_dims = [index for index, dim in enumerate(dims) if index and not dim.HasField("dim_value")]
    if open_dims:
        found = f"dimensions {open_dims} are open beside the batch, so one profile over batch sizes is not enough"
        yield Finding(value.name, "input", found, _BOTH, "Fix them, or build one profile for each size", "warning")


def _inlined(model: ModelProto) -> ModelProto | Finding:
    """Inline local functions; their size with all calls resolved is bounded first."""
    if not model.functions:
        return model
    functions = {(f.domain, f.name): f for f in model.functions}
    try:
        size = _expanded(model.graph, functions, {}, 0)
        if size > MAX_NODES:
            advice = "Inline the functions and simplify the graph before exporting it"
            return Finding(model.graph.name, "model", f"local functions expand to {size:,} nodes", _BOTH, advice)
        return inliner.inline_local_functions(model)
    except Exception as error:  # C++ errors of several kinds, and RecursionError for functions that call themselves
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        found = f"local functions that cannot be inlined ({reason})"
        return Finding(model.graph.name, "model", found, _BOTH, "Inline them with the tool that wrote the model")


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
        total += sum(_expanded(graph, functions, sizes, depth + 1) for graph in _subgraphs(node))
    return total


def _graph_findings(model: ModelProto) -> Iterator[Finding]:
    try:
        model = shape_inference.infer_shapes(model)
    except Exception:  # noqa: S110 - an invalid model keeps the types that it states
        pass
    scope = _Scope(_opset(model), ChainMap(), ChainMap(), ChainMap(), frozenset())
    yield from _walk(model.graph, scope)
    nodes = (n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear"))
    first = next(nodes, None)
    if first is not None:
        found = "quantised tensors in a strongly typed network, which TensorRT before 10.12 (JetPack 6: 10.3) is not proven to take"
        yield _warning(first, found, "Build and verify on the device before relying on it", _JETPACK)


def _walk(graph: GraphProto, around: _Scope) -> Iterator[Finding]:
    scope = _scope_of(graph, around)
    for tensor in graph.initializer:
        if tensor.data_type not in _TYPES:
            found = f"an initializer of type {_named(tensor.data_type)}"
            yield Finding(tensor.name or graph.name or "graph", "initializer", found, _BOTH, "Store it as float32 or int32")
    for node in graph.node:
        for rule in _RULES:
            yield from rule(node, scope)
        for inner in _subgraphs(node):
            if scope.depth >= MAX_DEPTH:
                yield _refused(node, f"subgraphs nested more than {MAX_DEPTH} deep", "Flatten the control flow")
            else:
                yield from _walk(inner, scope)


def _scope_of(graph: GraphProto, around: _Scope) -> _Scope:
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
        if node.op_type == "Constant" and node.output and (tensor := _constant(node)) is not None:
            constants[node.output[0]] = tensor
    for name, tensor in constants.items():
        types[name], shapes[name] = tensor.data_type, tuple(tensor.dims)
    return _Scope(
        around.opset,
        ChainMap(types, *_maps(around.types)),
        ChainMap(shapes, *_maps(around.shapes)),
        ChainMap(constants, *_maps(around.constants)),
        frozenset(value.name for value in graph.output) if around.depth == 0 else frozenset(),
        around.depth + 1,
    )


def _maps(mapping: MutableMapping[str, Any]) -> list[MutableMapping[str, Any]]:
    return mapping.maps if isinstance(mapping, ChainMap) else [mapping]


def _constant(node: NodeProto) -> TensorProto | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
        if attribute.name in ("value_int", "value_ints"):
            values = attribute.ints if attribute.type == AttributeProto.INTS else attribute.i
            return numpy_helper.from_array(np.array(values, np.int64))
        if attribute.name in ("value_float", "value_floats"):
            floats = attribute.floats if attribute.type == AttributeProto.FLOATS else attribute.f
            return numpy_helper.from_array(np.array(floats, np.float32))
    return None


def _operator_rule(node: NodeProto, scope: _Scope) -> Iterator[Finding]:
    if node.domain not in _STANDARD:
        silent = "; the parser may drop the domain and read it as the standard operator" if _known(node) else ""
        found = f"an operator of domain {node.domain!r}{silent}"
        yield _refused(node, found, "Export the classifier with standard operators, without a runtime's own fusions")
    elif not _known(node):
        exists = _schema(node.op_type, scope.opset) is not None
        found = "TensorRT cannot import this operator" if exists else f"no operator of ONNX opset {scope.opset}"
        yield _refused(node, found, _INSTEAD.get(node.op_type, _REPLACE))


def _type_rule(node: NodeProto, scope: _Scope) -> Iterator[Finding]:
    kinds = [scope.kind(name) for name in (*node.input, *node.output) if name]
    strange = [kind for kind in kinds if kind and kind not in _TYPES]
    if strange:
        yield _refused(node, f"a tensor of type {_named(strange[0])}", "Use float32, int32 or bool for it")
    if _T.DOUBLE in [scope.kind(name) for name in node.output]:
        found = "a double tensor, which TensorRT computes in float32"
        yield _warning(node, found, "Use float32, so that every backend computes the same", _BOTH)


def _uint8_rule(node: NodeProto, scope: _Scope) -> Iterator[Finding]:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return
    if node.op_type != "Cast" and any(scope.kind(name) == _T.UINT8 for name in node.input):
        yield _refused(node, "reads a uint8 tensor", "Cast uint8 to float32 first: Cast is all that takes it")
    elif any(scope.kind(name) == _T.UINT8 and name not in scope.outputs for name in node.output):
        yield _refused(node, "makes a uint8 tensor inside the graph", "Keep it float32 or int32")


def _operand_rule(node: NodeProto, scope: _Scope) -> Iterator[Finding]:
    """Operands that share a type in ONNX's definition of the operator must share it here, and be of a type it takes."""
    schema = _schema(node.op_type, scope.opset)
    if schema is None or not schema.inputs or node.domain not in _STANDARD:
        return
    first: dict[str, tuple[str, int]] = {}
    for position, name in enumerate(node.input):
        formal = schema.inputs[min(position, len(schema.inputs) - 1)]
        kind = scope.kind(name)
        if kind not in _TYPES or not formal.is_homogeneous:
            continue
        other, expected = first.setdefault(formal.type_str, (name, kind))
        if kind != expected:
            found = f"operands of different types: {other!r} is {_named(expected)}, {name!r} is {_named(kind)}"
            yield _refused(node, found, "Cast one of them; TensorRT's networks are strongly typed")
            return
        if f"tensor({_named(kind)})" not in formal.types:
            yield _refused(node, f"{name!r} is {_named(kind)}, which {node.op_type} does not take", "Cast it first")
            return


def _integer_rule(node: NodeProto, scope: _Scope) -> Iterator[Finding]:
    """Types that ONNX allows and TensorRT does not."""
    kind = scope.kind(node.input[0]) if node.input else _T.UNDEFINED
    whole = kind in (_T.INT8, _T.INT32, _T.INT64)
    if node.op_type.startswith("Reduce") and kind == _T.BOOL:
        yield _refused(node, "reduces a bool tensor", "Cast it to int32 first, and the result back to bool")
    elif (node.op_type in ("MatMul", "Gemm") and whole) or (node.op_type == "Relu" and kind == _T.INT32):
        yield _refused(node, f"computes on {_named(kind)}", "Cast the operands to float32")
    elif node.op_type == "Mod" and kind in (_T.FLOAT, *_LESS_PRECISE) and not _attribute(node, "fmod", 0):
        yield _refused(node, f"fmod=0 on {_named(kind)}", "Set fmod=1")
    if node.op_type != "DequantizeLinear":
        for name in node.input:
            if name in scope.constants and scope.kind(name) == _T.INT8 and name != _zero_point(node):
                yield _refused(node, f"reads the int8 constant {name!r}", "Read it through DequantizeLinear, or store int32")


def _quantisation_rule(node: NodeProto, scope: _Scope) -> Iterator[Finding]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    writes = node.op_type == "QuantizeLinear"
    zero_point, scale = _zero_point(node), scope.value(node.input[1]) if len(node.input) > 1 else None
    quantised = scope.kind(zero_point or ((node.output if writes else node.input) or [""])[0])
    if writes and not zero_point and not quantised:
        quantised = _T.UINT8  # ONNX's default
    if quantised == _T.INT32:
        yield _refused(node, "dequantises int32, as a quantised bias", "Keep the bias float32 (onnxruntime: QuantizeBias=False)")
    elif quantised == _T.UINT8:
        found = "a uint8 quantisation, which the parser takes for int8 without an error: its upper half saturates"
        yield _refused(node, found, "Quantise to int8 with zero point 0 (symmetric)")
    elif quantised not in (_T.INT8, _T.UNDEFINED):
        yield _refused(node, f"a quantisation to {_named(quantised)}", "Quantise to int8 with zero point 0 (symmetric)")
    if zero_point:
        value = scope.value(zero_point)
        if value is None or value.any():
            found = "a zero point that is no constant" if value is None else f"zero point {value.flat[value.argmax()]}"
            yield _refused(node, found, "Quantise symmetrically: zero point 0")
    if scale is not None and not (scale > 0).all():
        yield _refused(node, "a scale that is not positive", "Measure the range on images that are not all equal")


def _resize_rule(node: NodeProto, scope: _Scope) -> Iterator[Finding]:
    axes = _attribute(node, "axes", None)
    if node.op_type != "Resize" or axes is None or len(node.input) < 4 or not node.input[3]:
        return
    shape = scope.shapes.get(node.input[0])
    resized = {axis % len(shape) if shape else axis for axis in axes}
    if shape is None or any(size is None for index, size in enumerate(shape) if index not in resized):
        found = f"axes={list(axes)} with sizes, while another dimension is open"
        yield _refused(node, found, "Use scales of full rank, or sizes made of Shape, Slice and Concat, without axes")


def _top_k_rule(node: NodeProto, scope: _Scope) -> Iterator[Finding]:
    if node.op_type != "TopK" or not node.input:
        return
    value = scope.value(node.input[1]) if len(node.input) > 1 else np.array([_attribute(node, "k", 0)])
    if value is None or value.size != 1:
        yield _warning(node, f"k is no constant; TensorRT takes at most {MAX_K}", "Make k an initializer", _BOTH)
        return
    k, shape, axis = int(value.item()), scope.shapes.get(node.input[0], ()), _attribute(node, "axis", -1)
    length = shape[axis] if shape and -len(shape) <= axis < len(shape) else None
    if k > MAX_K:
        yield _refused(node, f"k={k}, at most {MAX_K} are possible", "Take fewer, or search in parts")
    elif length is not None and k > length:
        yield _refused(node, f"k={k} of a dimension of {length}", "Take at most as many as there are")


def _attribute_rule(node: NodeProto, _scope: _Scope) -> Iterator[Finding]:
    for attribute in node.attribute:
        rule = _ATTRIBUTES.get((node.op_type, attribute.name))
        if rule is not None:
            value = _attribute(node, attribute.name, None)
            if not rule[0](value):
                yield _refused(node, f"{attribute.name}={value}", rule[1])
    outputs = [name for name in node.output if name]
    if node.op_type in ("MaxPool", "LayerNormalization") and len(outputs) > 1:
        yield _refused(node, f"{len(outputs)} outputs, where one is possible", "Use the first output alone")


def _head_rule(node: NodeProto, scope: _Scope) -> Iterator[Finding]:
    if not any(name.startswith(GROUP) for name in (node.name, *node.output)):
        return
    for name in (*node.input, *node.output):
        if scope.kind(name) in _LESS_PRECISE:
            found = f"the head's tensor {name!r} is {_named(scope.kind(name))}: distances lose their digits"
            yield _refused(node, found, "Keep the head float32: Cast right after pooling")
            return


_RULES: tuple[Callable[[NodeProto, _Scope], Iterator[Finding]], ...] = (
    _operator_rule,
    _type_rule,
    _uint8_rule,
    _operand_rule,
    _integer_rule,
    _quantisation_rule,
    _resize_rule,
    _top_k_rule,
    _attribute_rule,
    _head_rule,
)


def _refused(node: NodeProto, found: str, advice: str) -> Finding:
    return Finding(_name_of(node), node.op_type or "node", found, _BOTH, advice)


def _warning(node: NodeProto, found: str, advice: str, families: tuple[Family, ...]) -> Finding:
    return Finding(_name_of(node), node.op_type or "node", found, families, advice, "warning")


def _name_of(node: NodeProto) -> str:
    return node.name or next((name for name in node.output if name), "") or "without name and output"


def _named(kind: int) -> str:
    return _T.DataType.Name(kind).lower() if kind in _T.DataType.values() else f"number {kind}"


def _opset(model: ModelProto) -> int:
    return max((o.version for o in model.opset_import if o.domain in _STANDARD), default=1)


def _known(node: NodeProto) -> bool:
    return node.op_type in _OPERATORS


@lru_cache(maxsize=1024)
def _schema(operator: str, opset: int) -> Any:
    try:
        return defs.get_schema(operator, min(opset, defs.onnx_opset_version()), "")
    except defs.SchemaError:
        return None


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return default


def _zero_point(node: NodeProto) -> str:
    quantises = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    return node.input[2] if quantises and len(node.input) > 2 else ""


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        yield from (graph for graph in (attribute.g, *attribute.graphs) if graph.node or graph.output)
