"""The rules of the preflight: what TensorRT refuses or misreads at one node, by its operator, types and constants."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, defs

from grood_edge.export.preflight_finding import (
    BOTH,
    TENSORRT_TYPES,
    Finding,
    Scope,
    refused,
    type_name,
    warning,
)
from grood_edge.stored_head import GROUP

__all__ = ["RULES", "STANDARD_DOMAINS", "operator_findings"]

MAX_K = 3840

STANDARD_DOMAINS = ("", "ai.onnx")
_T = TensorProto
_LESS_PRECISE = {_T.FLOAT16, _T.BFLOAT16, _T.DOUBLE}  # double: TensorRT computes it in float32, others do not

# Operators that the parser has an importer for, less those whose plugin is missing (NonZero, NonMaxSuppression,
# RoiAlign, LinearAttention, CausalConvWithState) and Attention, which depends on shapes.
_OPERATORS = {
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "BlackmanWindow", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div",
    "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "GRU", "Gather",
    "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater",
    "GreaterOrEqual", "GridSample", "GroupNormalization", "HammingWindow", "HannWindow", "HardSigmoid", "HardSwish",
    "Hardmax", "Identity", "If", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop", "LpNormalization", "LpPool", "MatMul", "Max",
    "MaxPool", "Mean", "MeanVarianceNormalization", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "OneHot", "Or",
    "PRelu", "Pad", "Pow", "QuantizeLinear", "RMSNormalization", "RNN", "RandomNormal", "RandomNormalLike",
    "RandomUniform", "RandomUniformLike", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu",
    "Reshape", "Resize", "ReverseSequence", "RotaryEmbedding", "Round", "STFT", "Scan", "Scatter",
    "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice",
    "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Swish", "Tan",
    "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor",
}  # fmt: skip
_INSTEAD = {
    "NonZero": "Its output size depends on the data: use Where with a mask",
    "NonMaxSuppression": "Its output size depends on the data: select on the host",
    "Unique": "Its output size depends on the data: do it on the host",
    "QLinearConv": "Quantise with QuantizeLinear and DequantizeLinear around Conv instead",
    "QLinearMatMul": "Quantise with QuantizeLinear and DequantizeLinear around MatMul instead",
    "DynamicQuantizeLinear": "Use QuantizeLinear with a fixed scale, measured on images",
}
_REPLACE = "Replace it by standard operators that TensorRT imports, or leave it out of the exported graph"

_MODES = (b"half_pixel", b"pytorch_half_pixel", b"tf_half_pixel_for_nn", b"asymmetric", b"align_corners")
_DILATION = "Use a convolution with dilation, or a pool without it"
_ATTRIBUTES: dict[tuple[str, str], tuple[Callable[[AttributeProto], bool], str]] = {
    ("Resize", "antialias"): (lambda a: a.i == 0, "Resize with antialias on the host, or export with antialias=0"),
    ("Resize", "coordinate_transformation_mode"): (
        lambda a: a.s in _MODES,
        f"Use one of {', '.join(mode.decode() for mode in _MODES)}",
    ),
    ("Resize", "keep_aspect_ratio_policy"): (lambda a: a.s == b"stretch", "Compute the sizes and use stretch"),
    ("AveragePool", "dilations"): (lambda a: set(a.ints) <= {1}, _DILATION),
    ("MaxPool", "dilations"): (lambda a: set(a.ints) <= {1}, _DILATION),
    ("LpPool", "dilations"): (lambda a: set(a.ints) <= {1}, _DILATION),
    ("LpPool", "p"): (lambda a: a.i in (1, 2), "Use p=1 or p=2"),
    ("ScatterND", "reduction"): (lambda a: a.s == b"none", "Use ScatterElements, or add outside the scatter"),
    ("BatchNormalization", "training_mode"): (lambda a: a.i == 0, "Call model.eval() before exporting"),
}

# Inputs that set shapes or axes, by position: TensorRT wants them known when it builds.
_PARAMETERS = {
    **dict.fromkeys((name for name in _OPERATORS if name.startswith("Reduce")), (1,)),
    **{"Squeeze": (1,), "Unsqueeze": (1,), "OneHot": (1,), "Reshape": (1,), "Expand": (1,), "Tile": (1,), "Pad": (1,)},
    **{"Resize": (2, 3), "Upsample": (1,), "TopK": (1,), "Slice": (1, 2, 3, 4), "ConstantOfShape": (0,), "STFT": (1,)},
}


def operator_findings(node: NodeProto, opset: int) -> Iterator[Finding]:
    """Yield what is wrong with a node's operator as such: its domain, or that it cannot be imported."""
    if node.domain not in STANDARD_DOMAINS:
        silent = "; the parser may drop the domain and read it as the standard operator" if _known(node) else ""
        found = f"an operator of domain {node.domain!r}{silent}"
        yield refused(node, found, "Export the classifier with standard operators, without a runtime's own fusions")
    elif not _known(node):
        exists = _schema(node.op_type, opset) is not None
        found = "TensorRT cannot import this operator" if exists else f"no operator of ONNX opset {opset}"
        yield refused(node, found, _INSTEAD.get(node.op_type, _REPLACE))


def _type_rule(node: NodeProto, scope: Scope) -> Iterator[Finding]:
    kinds = [scope.kind(name) for name in (*node.input, *node.output) if name]
    strange = [kind for kind in kinds if kind and kind not in TENSORRT_TYPES]
    if strange:
        yield refused(node, f"a tensor of type {type_name(strange[0])}", "Use float32, int32 or bool for it")
    if _T.DOUBLE in [scope.kind(name) for name in node.output]:
        found = "a double tensor, which TensorRT computes in float32"
        yield warning(node, found, "Use float32, so that every backend computes the same", BOTH)


def _uint8_rule(node: NodeProto, scope: Scope) -> Iterator[Finding]:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return
    if node.op_type != "Cast" and any(scope.kind(name) == _T.UINT8 for name in node.input):
        yield refused(node, "reads a uint8 tensor", "Cast uint8 to float32 first: Cast is all that takes it")
    elif any(scope.kind(name) == _T.UINT8 and name not in scope.outputs for name in node.output):
        yield refused(node, "makes a uint8 tensor inside the graph", "Keep it float32 or int32")


def _operand_rule(node: NodeProto, scope: Scope) -> Iterator[Finding]:
    """Operands that share a type in ONNX's definition of the operator must share it here, and be of a type it takes."""
    schema = _schema(node.op_type, scope.opset)
    if schema is None or not schema.inputs:
        return
    first: dict[str, tuple[str, int]] = {}
    for position, name in enumerate(node.input):
        formal = schema.inputs[min(position, len(schema.inputs) - 1)]
        kind = scope.kind(name)
        if kind not in TENSORRT_TYPES or not formal.is_homogeneous:
            continue
        other, expected = first.setdefault(formal.type_str, (name, kind))
        if kind != expected:
            found = f"operands of different types: {other!r} is {type_name(expected)}, {name!r} is {type_name(kind)}"
            yield refused(node, found, "Cast one of them; TensorRT's networks are strongly typed")
            return
        if f"tensor({type_name(kind)})" not in formal.types:
            yield refused(node, f"{name!r} is {type_name(kind)}, which {node.op_type} does not take", "Cast it first")
            return


def _integer_rule(node: NodeProto, scope: Scope) -> Iterator[Finding]:
    """Types that ONNX allows and TensorRT does not."""
    kind = scope.kind(node.input[0]) if node.input else _T.UNDEFINED
    whole = kind in (_T.INT8, _T.INT32, _T.INT64)
    if node.op_type.startswith("Reduce") and kind == _T.BOOL:
        yield refused(node, "reduces a bool tensor", "Cast it to int32 first, and the result back to bool")
    elif (
        (node.op_type in ("MatMul", "Gemm") and whole)
        or (node.op_type == "Relu" and kind == _T.INT32)
        or (node.op_type == "Clip" and kind == _T.INT8)
    ):
        yield refused(node, f"computes on {type_name(kind)}", "Cast the operands to float32")
    elif node.op_type == "Resize" and kind in (_T.BOOL, _T.INT64):
        yield refused(node, f"resizes a tensor of type {type_name(kind)}", "Cast it to float32 first")
    elif node.op_type == "Mod" and kind in (_T.FLOAT, *_LESS_PRECISE) and not _integer(node, "fmod", 0):
        yield refused(node, f"fmod=0 on {type_name(kind)}", "Set fmod=1")
    if node.op_type != "DequantizeLinear":
        for name in node.input:
            if name in scope.constants and scope.kind(name) == _T.INT8 and name != _zero_point(node):
                yield refused(
                    node, f"reads the int8 constant {name!r}", "Read it through DequantizeLinear, or store int32"
                )


def _quantisation_rule(node: NodeProto, scope: Scope) -> Iterator[Finding]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    writes = node.op_type == "QuantizeLinear"
    zero_point, scale = _zero_point(node), scope.value(node.input[1]) if len(node.input) > 1 else None
    quantised = scope.kind(zero_point or ((node.output if writes else node.input) or [""])[0])
    if writes and not zero_point and not quantised:
        quantised = _T.UINT8  # ONNX's default
    if quantised == _T.INT32:
        yield refused(
            node, "dequantises int32, as a quantised bias", "Keep the bias float32 (onnxruntime: QuantizeBias=False)"
        )
    elif quantised == _T.UINT8:
        found = "a uint8 quantisation, which the parser takes for int8 without an error: its upper half saturates"
        yield refused(node, found, "Quantise to int8 with zero point 0 (symmetric)")
    elif quantised not in (_T.INT8, _T.UNDEFINED):
        yield refused(
            node, f"a quantisation to {type_name(quantised)}", "Quantise to int8 with zero point 0 (symmetric)"
        )
    if zero_point:
        value = scope.value(zero_point)
        if value is None or value.any():
            found = "a zero point that is no constant" if value is None else f"zero point {value.flat[value.argmax()]}"
            yield refused(node, found, "Quantise symmetrically: zero point 0")
    if scale is not None and not (scale > 0).all():
        yield refused(node, "a scale that is not positive", "Measure the range on images that are not all equal")


def _resize_rule(node: NodeProto, scope: Scope) -> Iterator[Finding]:
    attribute = _attribute(node, "axes")
    if node.op_type != "Resize" or attribute is None or len(node.input) < 4 or not node.input[3]:
        return
    axes = list(attribute.ints)
    shape = scope.shapes.get(node.input[0])
    resized = {axis % len(shape) if shape else axis for axis in axes}
    if shape is None or any(size is None for index, size in enumerate(shape) if index not in resized):
        found = f"axes={axes} with sizes, while another dimension is open"
        yield refused(node, found, "Use scales of full rank, or sizes made of Shape, Slice and Concat, without axes")


def _top_k_rule(node: NodeProto, scope: Scope) -> Iterator[Finding]:
    if node.op_type != "TopK" or not node.input:
        return
    value = scope.value(node.input[1]) if len(node.input) > 1 else np.array([_integer(node, "k", 0)])
    if value is None or value.size != 1 or value.dtype.kind not in "iu":
        yield warning(node, f"k is no constant; TensorRT takes at most {MAX_K}", "Make k an initializer", BOTH)
        return
    k, shape, axis = int(value.item()), scope.shapes.get(node.input[0], ()), _integer(node, "axis", -1)
    length = shape[axis] if shape and -len(shape) <= axis < len(shape) else None
    if k > MAX_K:
        yield refused(node, f"k={k}, at most {MAX_K} are possible", "Take fewer, or search in parts")
    elif length is not None and k > length:
        yield refused(node, f"k={k} of a dimension of {length}", "Take at most as many as there are")


def _attribute_rule(node: NodeProto, _scope: Scope) -> Iterator[Finding]:
    for attribute in node.attribute:
        allowed, advice = _ATTRIBUTES.get((node.op_type, attribute.name), (None, ""))
        if allowed is not None and not allowed(attribute):
            value = attribute.s.decode("utf-8", "replace") or list(attribute.ints) or attribute.i
            yield refused(node, f"{attribute.name}={value}", advice)
    outputs = [name for name in node.output if name]
    if node.op_type in ("MaxPool", "LayerNormalization") and len(outputs) > 1:
        yield refused(node, f"{len(outputs)} outputs, where one is possible", "Use the first output alone")


def _parameter_rule(node: NodeProto, scope: Scope) -> Iterator[Finding]:
    for position in _PARAMETERS.get(node.op_type, ()):
        name = node.input[position] if len(node.input) > position else ""
        if name and name in scope.inputs:
            yield refused(node, f"its parameter {name!r} is an input of the graph", "Make it an initializer")


def _head_rule(node: NodeProto, scope: Scope) -> Iterator[Finding]:
    if not any(name.startswith(GROUP) for name in (node.name, *node.output)):
        return
    for name in (*node.input, *node.output):
        if scope.kind(name) in _LESS_PRECISE:
            found = f"the head's tensor {name!r} is {type_name(scope.kind(name))}: distances lose their digits"
            yield refused(node, found, "Keep the head float32: Cast right after pooling")
            return


RULES: tuple[Callable[[NodeProto, Scope], Iterator[Finding]], ...] = (
    _type_rule,
    _uint8_rule,
    _operand_rule,
    _integer_rule,
    _quantisation_rule,
    _resize_rule,
    _top_k_rule,
    _attribute_rule,
    _parameter_rule,
    _head_rule,
)


def _known(node: NodeProto) -> bool:
    return node.op_type in _OPERATORS


@lru_cache(maxsize=1024)
def _schema(operator: str, opset: int) -> Any:
    try:
        return defs.get_schema(operator, min(opset, defs.onnx_opset_version()), "")
    except defs.SchemaError:
        return None


def _attribute(node: NodeProto, name: str) -> AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _integer(node: NodeProto, name: str, default: int) -> int:
    attribute = _attribute(node, name)
    return default if attribute is None else attribute.i


def _zero_point(node: NodeProto) -> str:
    quantises = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    return node.input[2] if quantises and len(node.input) > 2 else ""
