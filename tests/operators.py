"""The operator matrix: 108 small graphs, each around one operator, and where TensorRT-RTX 1.7 stops.

A row is the graph in ONNX's text form. Names given as keywords are its constants: an int or a list of ints is int64, a
float or a list of floats is float32, an array is what it is. `stops` names the operator at which the parser or the
builder gives up; rows without it become engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, numpy_helper, parser

__all__ = ["OPERATOR_GRAPHS", "OperatorGraph", "model_of", "weights"]

Named = dict[str, Any]

IMAGES = "float[N,3,32,32] x"
ROWS = "float[N,1000] x"


@dataclass(frozen=True)
class OperatorGraph:
    """A graph of the matrix; `stops` is None where TensorRT-RTX builds an engine."""

    name: str
    model: ModelProto
    stops: str | None


def weights(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Return seeded normal weights, or whole numbers from -127 to 127 for an integer type."""
    rng = np.random.default_rng(len(shape))
    integer = np.issubdtype(dtype, np.integer)
    return (rng.integers(-127, 128, shape) if integer else rng.standard_normal(shape)).astype(dtype)


def model_of(signature: str, body: str, constants: Mapping[str, Any], **header: Any) -> ModelProto:
    """Make a model of `inputs -> outputs`, the nodes, and the constants.

    `header` may hold opset, ir, domains (imported beside the standard one) and functions (text).
    """
    opset, domains = header.get("opset", 17), header.get("domains", ())
    imports = ", ".join(f'"{name}" : {version}' for name, version in [("", opset), *((name, 1) for name in domains)])
    inputs, outputs = signature.split(" -> ")
    text = f"<ir_version: {header.get('ir', 8 if opset < 19 else 10)}, opset_import: [{imports}]>"
    model = parser.parse_model(f"{text} graph ({inputs}) => ({outputs}) {{ {body} }} {header.get('functions', '')}")
    model.graph.initializer.extend(numpy_helper.from_array(_array(a), name) for name, a in constants.items())
    return model


def _array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    array = np.array(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array.astype(np.int64)


def _row(name: str, signature: str, body: str, stops: str | None = None, **named: Any) -> OperatorGraph:
    header = {key: named.pop(key) for key in ("opset", "ir", "domains", "functions") if key in named}
    return OperatorGraph(name, model_of(signature, body, named, **header), stops)


W = weights(8, 3, 3, 3)
U8 = "uint8[N,32,32,3] x"
PLANES = "float[N,8,30,30] y"
UINT8 = [
    _row("conv", f"{IMAGES} -> float[N,8,32,32] y", "y = Conv<pads=[1,1,1,1]>(x, w)", w=W),
    _row("uint8-cast-conv", f"uint8[N,3,32,32] x -> {PLANES}", "f = Cast<to=1>(x) y = Conv(f, w)", w=W),
    _row("uint8-cast-transpose-normalise-conv", f"{U8} -> {PLANES}",
         "f = Cast<to=1>(x) t = Transpose<perm=[0,3,1,2]>(f) c = Sub(t, m) s = Mul(c, i) y = Conv(s, w)",
         w=W, m=weights(1, 3, 1, 1), i=weights(1, 3, 1, 1)),
    _row("uint8-transpose-cast-conv", f"{U8} -> {PLANES}",
         "t = Transpose<perm=[0,3,1,2]>(x) f = Cast<to=1>(t) y = Conv(f, w)", "Transpose", w=W),
    _row("uint8-cast-half-conv", "uint8[N,3,32,32] x -> float16[N,8,30,30] y", "f = Cast<to=10>(x) y = Conv(f, w)",
         w=W.astype(np.float16)),
    _row("uint8-output", f"{IMAGES} -> uint8[N,3,32,32] y", "y = Cast<to=2>(x)"),
    _row("uint8-slice-cast", "uint8[N,3,32,32] x -> float[N,3,28,28] y", "c = Slice(x, s, e, a) y = Cast<to=1>(c)",
         "Slice", s=[2, 2], e=[30, 30], a=[2, 3]),
    _row("uint8-div", "uint8[N,3,32,32] x -> uint8[N,3,32,32] y", "y = Div(x, c)", "Div", c=np.uint8(2)),
]  # fmt: skip

HALVED = "float[N,3,16,16] y"
SCALES = [1.0, 1.0, 0.5, 0.5]


def _resize(name: str, mode: str, stops: str | None = None, kind: str = "float", opset: int = 17) -> OperatorGraph:
    signature = f"{kind}[N,3,32,32] x -> {kind}[N,3,16,16] y"
    return _row(name, signature, f'y = Resize<mode="{mode}>(x, , scales)', stops, scales=SCALES, opset=opset)


LINEAR = 'linear", coordinate_transformation_mode="'
SIZED = f'y = Resize<mode="{LINEAR}half_pixel">(x, , , sizes)'
RESIZE = [
    _row("resize-sizes", "float[1,3,32,32] x -> float[1,3,16,16] y", SIZED, sizes=[1, 3, 16, 16]),
    _row("resize-sizes-of-any-image", "float[1,3,H,V] x -> float[1,3,16,16] y", SIZED, sizes=[1, 3, 16, 16]),
    _resize("resize-half-pixel", LINEAR + 'half_pixel"'),
    _resize("resize-pytorch-half-pixel", LINEAR + 'pytorch_half_pixel"'),
    _resize("resize-align-corners", LINEAR + 'align_corners"'),
    _resize("resize-asymmetric", LINEAR + 'asymmetric"'),
    _resize("resize-nearest", 'nearest"'),
    _resize("resize-cubic", 'cubic"'),
    _resize("resize-antialias", 'linear", antialias=1', "Resize", opset=18),
    _resize("resize-half-pixel-18", LINEAR + 'half_pixel"', opset=18),
    _resize("resize-half-pixel-symmetric", LINEAR + 'half_pixel_symmetric"', "Resize", opset=19),
    _row("resize-keep-aspect", "float[1,3,32,32] x -> float[1,3,h,w] y",
         'y = Resize<mode="linear", keep_aspect_ratio_policy="not_larger">(x, , , sizes)',
         "Resize", sizes=[1, 3, 16, 16], opset=18),
    _resize("resize-uint8", 'linear"', "Resize", kind="uint8"),
    _resize("resize-half", 'linear"', kind="float16"),
    _row("resize-sizes-from-shape", f"{IMAGES} -> {HALVED}",
         f"s = Shape(x) n = Slice(s, zero, two) sizes = Concat<axis=0>(n, hw) {SIZED}", zero=[0], two=[2], hw=[16, 16]),
    _row("resize-axes", f"{IMAGES} -> {HALVED}", 'y = Resize<mode="linear", axes=[2,3]>(x, , , sizes)',
         "Resize", sizes=[16, 16], opset=18),
]  # fmt: skip

ACTIVATION = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
ZERO: Named = {"s": 0.02, "z": np.int8(0)}
CHANNELS: Named = {"ws": np.full(8, 0.01, np.float32), "wz": np.zeros(8, np.int8)}
INT8_W: Named = {"w": weights(8, 3, 3, 3, dtype=np.int8)}


def _quantised(name: str, stops: str | None = None, per_channel: bool = True, **changed: Any) -> OperatorGraph:
    """A quantised convolution with ReLU and pooling, and what one row changes in it."""
    scales = CHANNELS if per_channel else {"ws": 0.01, "wz": np.int8(0)}
    axis = "<axis=0>" if per_channel else ""
    bias, output = (
        changed.pop("bias", ""),
        changed.pop("output", "oq = QuantizeLinear(r, s, z) o = DequantizeLinear(oq, s, z)"),
    )
    body = (
        f"{ACTIVATION} dw = DequantizeLinear{axis}(w, ws, wz) {bias} c = Conv(d, dw, b) r = Relu(c) {output} "
        "g = GlobalAveragePool(o) y = Flatten(g)"
    )
    constants = {**ZERO, **INT8_W, **scales, **({} if bias else {"b": weights(8)}), **changed}
    return _row(name, f"{IMAGES} -> float[N,8] y", body, stops, **constants)


BANK: Named = {
    "w": weights(512, 1000, dtype=np.int8),
    "ws": np.full(1000, 0.01, np.float32),
    "wz": np.zeros(1000, np.int8),
}
QUANTISED = [
    _quantised("int8-per-channel"),
    _quantised("int8-per-tensor", per_channel=False),
    _quantised("uint8-activation", z=np.uint8(0)),
    _quantised("uint8-activation-128", "QuantizeLinear", z=np.uint8(128)),
    _quantised("int8-zero-point-3", "QuantizeLinear", z=np.int8(3)),
    _quantised("int32-bias", "DequantizeLinear", bias="b = DequantizeLinear<axis=0>(bi, bs, bz)",
               bi=weights(8, dtype=np.int32), bs=np.full(8, 0.001, np.float32), bz=np.zeros(8, np.int32)),
    _quantised("int8-opset-13", opset=13),
    _quantised("int8-opset-21", opset=21),
    _quantised("int8-float-output", output="o = Identity(r)"),
    _row("int8-weights-quantised-in-graph", f"{IMAGES} -> {PLANES}",
         f"{ACTIVATION} qw = QuantizeLinear<axis=0>(w, ws, wz) dw = DequantizeLinear<axis=0>(qw, ws, wz) "
         "y = Conv(d, dw)",
         w=W, **ZERO, **CHANNELS),
    _row("int8-matmul", "float[N,512] x -> float[N,1000] y",
         f"{ACTIVATION} dw = DequantizeLinear<axis=1>(w, ws, wz) y = MatMul(d, dw)", **ZERO, **BANK),
    _row("int8-weights-only-matmul", "float[N,512] x -> float[N,1000] y",
         "dw = DequantizeLinear<axis=1>(w, ws, wz) y = MatMul(x, dw)", **BANK),
    _row("int8-weights-only-half-matmul", "float16[N,512] x -> float16[N,1000] y",
         "dw = DequantizeLinear<axis=1>(w, ws, wz) y = MatMul(x, dw)",
         opset=19, **(BANK | {"ws": np.full(1000, 0.01, np.float16)})),
    _row("qlinear-conv", f"{IMAGES} -> {PLANES}",
         "q = QuantizeLinear(x, s, z) c = QLinearConv(q, s, z, w, s, z, s, z) y = DequantizeLinear(c, s, z)",
         "QLinearConv", **ZERO, **INT8_W),
    _row("dynamic-quantise", "float[N,512] x -> float[N,512] y",
         "q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z)", "DynamicQuantizeLinear"),
    _row("half-backbone-float-head", f"{IMAGES} -> float[N,16] y",
         "h = Cast<to=10>(x) c = Conv(h, w) r = Relu(c) g = GlobalAveragePool(r) k = Flatten(g) f = Cast<to=1>(k) "
         "l = MatMul(f, b) y = Softmax<axis=1>(l)", w=W.astype(np.float16), b=weights(8, 16)),
    _row("bfloat16-matmul", "float[N,512] x -> float[N,100] y",
         "h = Cast<to=16>(x) w16 = Cast<to=16>(w) m = MatMul(h, w16) y = Cast<to=1>(m)", w=weights(512, 100)),
    _row("half-times-float", "float[N,512] x -> float[N,512] y", "h = Cast<to=10>(x) y = Mul(h, c)", "Mul", c=2.0),
]  # fmt: skip


def _top(name: str, k: int, of: str = "N,1000", kind: str = "float", **named: Any) -> OperatorGraph:
    output = of.replace("1000", str(k)).replace("8000", str(k))
    signature = f"{kind}[{of}] x -> {kind}[{output}] v, int64[{output}] i"
    order = named.pop("order", "")
    return _row(name, signature, f"v, i = TopK{order}(x, k)", k=[k], **named)


CHOICES = [
    _top("topk-5", 5),
    _top("topk-1", 1),
    _top("topk-smallest-unsorted", 10, order="<largest=0, sorted=0>"),
    _top("topk-all", 1000),
    _top("topk-5000", 5000, of="N,8000", stops="TopK"),
    _top("topk-vector", 5, of="1000"),
    _top("topk-half", 5, kind="float16"),
    _top("topk-int64", 5, kind="int64"),
    _row("argmax", f"{ROWS} -> int64[N] y", "y = ArgMax<axis=1, keepdims=0>(x)"),
    _row("argmin-last", f"{ROWS} -> int64[N] y", "y = ArgMin<axis=1, keepdims=0, select_last_index=1>(x)"),
    _row("argmax-int32", f"{ROWS} -> int32[N] y", "a = ArgMax<axis=1, keepdims=0>(x) y = Cast<to=6>(a)"),
    _row("gather-by-argmax", f"{ROWS} -> float[N,16] y",
         "a = ArgMax<axis=1, keepdims=0>(x) y = Gather<axis=0>(t, a)", t=weights(1000, 16)),
    _row("gather-elements", f"{ROWS} -> float[N] y",
         "a = ArgMax<axis=1>(x) g = GatherElements<axis=1>(x, a) y = Squeeze(g, one)", one=[1]),
    _row("onehot", f"{ROWS} -> float[N,1000] y",
         "a = ArgMax<axis=1, keepdims=0>(x) y = OneHot<axis=1>(a, d, v)", d=1000, v=[0.0, 1.0]),
    _row("scatter-elements", "float[4,1000] x -> float[4,1000] y",
         "a = ArgMax<axis=1>(x) y = ScatterElements<axis=1>(x, a, u)", u=weights(4, 1)),
]  # fmt: skip

SAME = f"{ROWS} -> float[N,1000] y"
CONDITION = f"bool[N,1000] b, {ROWS} -> float[N,1000] y"
LOGIC = [
    _row("isnan-where", SAME, "b = IsNaN(x) y = Where(b, z, x)", z=0.0),
    _row("isinf-where", SAME, "b = IsInf(x) y = Where(b, z, x)", z=0.0),
    _row("isinf-positive", f"{ROWS} -> bool[N,1000] y", "y = IsInf<detect_negative=0>(x)"),
    _row("isnan-half", "float16[N,10] x -> bool[N,10] y", "y = IsNaN(x)"),
    _row("less", f"{ROWS} -> bool[N,1000] y", "y = Less(x, t)", t=0.5),
    _row("comparisons-and-logic", f"{ROWS} -> bool[N,1000] y",
         "a = LessOrEqual(x, t) b = GreaterOrEqual(x, u) c = And(a, b) d = Not(c) y = Or(d, a)", t=0.5, u=0.1),
    _row("reduce-bool-as-int32", f"{ROWS} -> bool[N] y",
         "b = IsNaN(x) i = Cast<to=6>(b) m = ReduceMax<axes=[1], keepdims=0>(i) y = Cast<to=9>(m)"),
    _row("reduce-bool", f"{ROWS} -> bool[N] y", "b = IsNaN(x) y = ReduceMax<keepdims=0>(b, a)", "ReduceMax",
         a=[1], opset=20),
    _row("bool-input", "bool[N,1] b, float[N,8] x -> float[N,8] y", "y = Where(b, x, z)", z=0.0),
    _row("infinite-constant", CONDITION, "y = Where(b, x, z)", z=-np.inf),
    _row("nan-constant", CONDITION, "y = Where(b, x, z)", z=np.nan),
    _row("if", SAME, "m = ReduceMax<keepdims=0>(x) c = Greater(m, z) y = If (c) <"
         "then_branch = t () => (float[N,1000] to) { to = Identity(x) }, "
         "else_branch = e () => (float[N,1000] eo) { eo = Neg(x) }>", z=0.0),
]  # fmt: skip

ARITHMETIC = [
    _row("clip", SAME, "y = Clip(x, a, b)", a=0.0, b=1.0),
    _row("clip-below", SAME, "y = Clip(x, a)", a=0.0),
    _row("clip-half", "float16[N,8] x -> float16[N,8] y", "y = Clip(x, a, b)", a=np.float16(0), b=np.float16(1)),
    _row("clip-int64", "int64[N,8] x -> int64[N,8] y", "y = Clip(x, a, b)", a=0, b=7),
    _row("softmax-logsoftmax-exp-log", SAME,
         "s = Softmax<axis=-1>(x) l = LogSoftmax<axis=-1>(x) e = Exp(l) a = Add(s, e) y = Log(a)"),
    _row("softmax-opset-12", f"{IMAGES} -> float[N,3,32,32] y", "y = Softmax<axis=1>(x)", opset=12),
    _row("reduce-logsumexp", f"{ROWS} -> float[N] y", "y = ReduceLogSumExp<axes=[1], keepdims=0>(x)"),
    _row("int64-arithmetic", "int64[N,8] x -> int64[N,8] y", "a = Add(x, one) y = Mul(a, a)", one=1),
    _row("int64-beyond-int32", "int64[N,8] x -> int64[N,8] y", "y = Add(x, c)", c=2**40),
    _row("double", SAME, "d = Cast<to=11>(x) m = Mul(d, c) y = Cast<to=1>(m)", c=np.float64(2)),
    _row("int16", SAME, "d = Cast<to=5>(x) y = Cast<to=1>(d)", "Cast"),
    _row("einsum", f"{ROWS} -> float[N,50] y", 'y = Einsum<equation="nd,kd->nk">(x, p)', p=weights(50, 1000)),
    _row("gemm", f"{ROWS} -> float[N,50] y", "y = Gemm<transB=1>(x, p, b)", p=weights(50, 1000), b=weights(50)),
    _row("distances", f"{ROWS} -> float[N,50] y",
         "u = Unsqueeze(x, a) d = Sub(u, p) y = ReduceL2<axes=[2], keepdims=0>(d)", a=[1], p=weights(1, 50, 1000)),
    _row("reductions", f"{ROWS} -> float[N,1] y", "a = ReduceL1<axes=[1]>(x) b = ReduceMean<axes=[1]>(x) "
         "c = ReduceMin<axes=[1]>(x) d = ReduceMax<axes=[1]>(x) y = Sum(a, b, c, d)"),
    _row("lp-normalization", SAME, "y = LpNormalization<axis=1, p=2>(x)"),
    _row("cumsum", SAME, "y = CumSum(x, a)", a=1),
    _row("erf-gelu-pow-reciprocal-sign-floor-round", SAME, "a = Erf(x) b = Gelu(a) c = Pow(b, two) d = Reciprocal(c) "
         "e = Sign(d) f = Floor(e) y = Round(f)", two=2.0, opset=20),
    _row("layer-norm", SAME, "y = LayerNormalization<axis=-1>(x, s, b)", s=weights(1000), b=weights(1000)),
    _row("batch-norm", f"{IMAGES} -> float[N,3,32,32] y", "y = BatchNormalization(x, s, b, m, v)",
         s=weights(3), b=weights(3), m=weights(3), v=np.abs(weights(3))),
]  # fmt: skip

CALL: Named = {"domains": ("grood",)}
MICROSOFT: Named = {"domains": ("com.microsoft",)}
FUSED_ADD = "a = com.microsoft.QLinearAdd(q, s, z, q, s, z, s, z)"
DOMAINS = [
    _row("nonzero", f"{ROWS} -> int64[2,k] y", "y = NonZero(x)", "NonZero"),
    _row("function", "float[N,1000] x -> float[N] y", "y = grood.Distance(x, p)", p=weights(1, 1000), **CALL,
         functions='<domain: "grood", opset_import: ["" : 17]> Distance (a, b) => (o) '
         "{ i = Constant<value_ints=[1]>() d = Sub(a, b) s = Mul(d, d) r = ReduceSum<keepdims=0>(s, i) o = Sqrt(r) }"),
    _row("functions-in-functions", SAME, "y = grood.Outer(x)", **CALL,
         functions='<domain: "grood", opset_import: ["" : 17]> Inner <axis>(a) => (o) '
         "{ o = Softmax<axis: int = @axis>(a) } "
         '<domain: "grood", opset_import: ["" : 17, "grood" : 1]> Outer (a) => (o) '
         "{ b = Neg(a) o = grood.Inner<axis=1>(b) }"),
    _row("microsoft-fused-matmul", f"{ROWS} -> float[N,50] y", "y = com.microsoft.FusedMatMul(x, w)", "FusedMatMul",
         w=weights(1000, 50), **MICROSOFT),
    _row("microsoft-gelu", SAME, "y = com.microsoft.Gelu(x)", **MICROSOFT),
    _row("microsoft-fused-conv", f"{IMAGES} -> {PLANES}", 'y = com.microsoft.FusedConv<activation="Relu">(x, w)',
         "FusedConv", w=W, **MICROSOFT),
    _row("microsoft-qlinear-add", SAME, f"q = QuantizeLinear(x, s, z) {FUSED_ADD} y = DequantizeLinear(a, s, z)",
         "QLinearAdd", **ZERO, **MICROSOFT),
    _row("unknown", SAME, "y = Foo(x)", "Foo"),
    _row("det", "float[N,3,3] x -> float[N] y", "y = Det(x)", "Det"),
    _row("unique", "float[100] x -> float[u] y", "y = Unique(x)", "Unique"),
    _row("random-normal-like", SAME, "y = RandomNormalLike(x)"),
    _row("dropout", SAME, "y = Dropout(x)"),
]  # fmt: skip

INPUTS_AND_OUTPUTS = [
    _row("passthrough", f"{ROWS} -> float[N,1000] a, float[N,1000] b", "a = Identity(x) b = Relu(x)"),
    _row("scalar-output", f"{ROWS} -> float y", "y = ReduceMax<keepdims=0>(x)"),
    _row("string-output", f"{ROWS} -> string[1] y", 's = Constant<value_strings=["a"]>() y = Identity(s)', "Constant"),
    _row("constant-output", f"{ROWS} -> float[N,1000] y, float[3] z", "y = Relu(x) z = Identity(c)", c=weights(3)),
    _row("weights-as-input", f"{ROWS}, float[1000,50] w -> float[N,50] y", "y = MatMul(x, w)", w=weights(1000, 50)),
    _row("grid-sample", "float[N,3,32,32] x, float[N,8,8,2] g -> float[N,3,8,8] y", "y = GridSample(x, g)"),
    _row("pads", f"{IMAGES} -> float[N,3,h,w] y",
         'a = Pad<mode="reflect">(x, p) b = Pad<mode="edge">(a, p) y = Pad(b, p)', p=[0, 0, 1, 1, 0, 0, 1, 1]),
]  # fmt: skip

OPERATOR_GRAPHS = (
    *UINT8, *RESIZE, *QUANTISED, *CHOICES, *LOGIC, *ARITHMETIC, *DOMAINS, *INPUTS_AND_OUTPUTS
)  # fmt: skip
