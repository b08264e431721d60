"""The head as ONNX nodes: from `features` and `logits` to the decision, float32, standard operators.

The equations are those of `scoring`; the names follow its variables. All fitted values are initializers
(`stored_head`), so the nodes depend on the number of OOD prototypes, the kind of bank and the space alone.
"""

from functools import partial
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from grood_edge import stored_head as stored
from grood_edge.scoring import INVALID_SCORE, MIN_RELATIVE_GAP, BankDtype

__all__ = ["DECISION_OUTPUTS", "head_constants", "head_nodes"]

DECISION_OUTPUTS = {
    "class_id": TensorProto.INT32,
    "ood_score": TensorProto.FLOAT,
    "p_value": TensorProto.FLOAT,
    "is_ood": TensorProto.BOOL,
    "valid": TensorProto.BOOL,
}

_F = np.float32
_CONSTANTS: dict[str, np.ndarray] = {
    "zero": np.array(0, _F),
    "half": np.array(0.5, _F),
    "one": np.array(1, _F),
    "two": np.array(2, _F),
    "min_gap": np.array(MIN_RELATIVE_GAP, _F),
    "invalid_score": np.array(INVALID_SCORE, _F),
    "axis": np.array([1], np.int64),
}


_SHARED = {*_CONSTANTS, "h", "class_distance", "h_dot_b"}  # tensors that every OOD head reads


def head_constants() -> list[TensorProto]:
    """Return the constants that the head's nodes share."""
    return [numpy_helper.from_array(value, _t(name)) for name, value in _CONSTANTS.items()]


def head_nodes(heads: int, bank_dtype: BankDtype | None, space: str) -> list[NodeProto]:
    """Return the head's nodes in topological order.

    Args:
        heads: number of OOD prototypes.
        bank_dtype: how the bank's rows are stored; None without a bank.
        space: the output that the head reads, `features` or `logits`.
    """
    nodes = [*_class_distance_nodes("=" + space), *_validity_nodes(), *_dot_nodes(bank_dtype)]
    for index in range(heads):
        names = stored.ood_names(index)
        nodes += _log_s_nodes(names, index)
        nodes += _bank_nodes(names, index) if bank_dtype is not None else []
    score = "log_s" if bank_dtype is None else "log_distance"
    return [*nodes, *_combination_nodes(score, heads), *_decision_nodes()]


def _t(name: str) -> str:
    return stored.GROUP + name


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    """Make a node named after its output. Bare names are the head's own tensors; `=name` is taken as it is."""
    names = [name[1:] if name.startswith("=") else _t(name) for name in inputs]
    target = output[1:] if output.startswith("=") else _t(output)
    return helper.make_node(operator, names, [target], name=_t(output.lstrip("=")), **attributes)


def _node_of(index: int, operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    """Make a node of OOD head `index`: its own tensors carry the index."""
    here = [name if name in _SHARED or name.startswith("=") else f"{name}.{index}" for name in inputs]
    return _node(operator, here, f"{output}.{index}", **attributes)


def _stored(name: str) -> str:
    return "=" + name


def _class_distance_nodes(source: str) -> list[NodeProto]:
    """D_c = a sqrt(max(|h'|^2 + |P'_c|^2 - 2 h'P'^T, 0)), h' = h - center: `[N, k]`.

    The expanded form loses |h'|^2 / D_c^2 digits, most where it matters most: at the nearest prototype (log S was
    wrong by 8e-3 for features of length 100). That one distance is computed again, directly.
    """
    return [
        _node("Sub", [source, _stored(stored.CENTER)], "h"),
        _node("Mul", ["h", "h"], "h_squares"),
        _node("ReduceSum", ["h_squares", "axis"], "h_sq", keepdims=1),
        _node("MatMul", ["h", _stored(stored.PROTOTYPES_T)], "h_dot_p"),
        _node("Mul", ["h_dot_p", "two"], "h_dot_p_twice"),
        _node("Add", ["h_sq", _stored(stored.PROTOTYPES_SQ)], "sq_sum"),
        _node("Sub", ["sq_sum", "h_dot_p_twice"], "class_sq_raw"),
        _node("Max", ["class_sq_raw", "zero"], "class_sq"),
        _node("Sqrt", ["class_sq"], "class_distance_raw"),
        _node("ReduceMin", ["class_distance_raw", "axis"], "nearest_class_raw", keepdims=1),
        _node("ArgMin", ["class_distance_raw"], "nearest_class_id", axis=1, keepdims=0),
        _node("Gather", [_stored(stored.PROTOTYPES_T), "nearest_class_id"], "nearest_prototype_t", axis=1),
        _node("Transpose", ["nearest_prototype_t"], "nearest_prototype", perm=[1, 0]),
        _node("Sub", ["h", "nearest_prototype"], "from_nearest"),
        _node("Mul", ["from_nearest", "from_nearest"], "from_nearest_squares"),
        _node("ReduceSum", ["from_nearest_squares", "axis"], "from_nearest_sq", keepdims=1),
        _node("Sqrt", ["from_nearest_sq"], "nearest_class"),
        _node("LessOrEqual", ["class_distance_raw", "nearest_class_raw"], "is_nearest_class"),
        _node("Where", ["is_nearest_class", "nearest_class", "class_distance_raw"], "class_distance_plain"),
        _node("Mul", ["class_distance_plain", _stored(stored.SCALE)], "class_distance"),
    ]


def _validity_nodes() -> list[NodeProto]:
    """valid: features, logits and |h'|^2 are finite, read before any Min, Max or Clip (they may drop NaN)."""
    nodes = []
    for source, name in (("=features", "features"), ("=logits", "logits"), ("h_sq", "h_sq")):
        nodes += [
            _node("IsNaN", [source], f"{name}_nan"),
            _node("IsInf", [source], f"{name}_inf"),
            _node("Or", [f"{name}_nan", f"{name}_inf"], f"{name}_bad"),
            _node("Cast", [f"{name}_bad"], f"{name}_bad_number", to=TensorProto.FLOAT),
            _node("ReduceSum", [f"{name}_bad_number", "axis"], f"{name}_bad_count", keepdims=0),
        ]
    return [
        *nodes,
        _node("Add", ["features_bad_count", "logits_bad_count"], "bad_count_outputs"),
        _node("Add", ["bad_count_outputs", "h_sq_bad_count"], "bad_count"),
        _node("Less", ["bad_count", "half"], "=valid"),
    ]


def _dot_nodes(bank_dtype: BankDtype | None) -> list[NodeProto]:
    """h'.b_i for every bank row, `[N, m]`: the one large product.

    Gemm with transB, and not MatMul: onnxruntime (1.32) turns DequantizeLinear + MatMul into MatMulNBits, which rounds
    h' to 8 bits as well (5e-3 of the largest value); a test holds it to float32.
    """
    if bank_dtype is None:
        return []
    rows, nodes = _stored(stored.BANK), []
    if bank_dtype == "int8":
        nodes.append(_node("DequantizeLinear", [rows, _stored(stored.BANK_SCALE)], "bank_rows", axis=0))
        rows = "bank_rows"
    return [*nodes, _node("Gemm", ["h", rows], "h_dot_b", transB=1)]


def _log_s_nodes(names: stored.OodNames, index: int) -> list[NodeProto]:
    """Log s = m - d_ood - log(sum_j exp(m - D_j)) `[N, 1]`, with d_ood = |h' - p_ood| computed directly."""
    node = partial(_node_of, index)
    return [
        node("Sub", ["h", _stored(names.prototype)], "v"),
        node("Mul", ["v", "v"], "v_squares"),
        node("ReduceSum", ["v_squares", "axis"], "v_sq", keepdims=1),
        node("Sqrt", ["v_sq"], "ood_distance"),
        node("Mul", ["ood_distance", _stored(stored.SCALE)], "ood_distance_scaled"),
        node("Concat", ["class_distance", "ood_distance_scaled"], "distance", axis=1),
        node("ReduceMin", ["distance", "axis"], "nearest", keepdims=1),
        node("Sub", ["nearest", "distance"], "below_nearest"),
        node("Exp", ["below_nearest"], "weights"),
        node("ReduceSum", ["weights", "axis"], "weight_sum", keepdims=1),
        node("Log", ["weight_sum"], "log_weight_sum"),
        node("Sub", ["nearest", "ood_distance_scaled"], "log_weight_ood"),
        node("Sub", ["log_weight_ood", "log_weight_sum"], "log_s"),
    ]


def _bank_nodes(names: stored.OodNames, index: int) -> list[NodeProto]:
    """Log S = min_i [max(ls, l_i) + 0.5 log(max((1 - r)^2 + 2 r max(1 - u.u_i, 0), floor))], `[N, 1]`.

    u.u_i = (h'.b_i - h'.p + p.p - p.b_i) / (max(d_ood, least) |b_i - p|).
    """
    node = partial(_node_of, index)
    return [
        node("Mul", ["h", _stored(names.prototype)], "h_times_p"),
        node("ReduceSum", ["h_times_p", "axis"], "h_dot_p_ood", keepdims=1),
        node("Sub", ["h_dot_b", "h_dot_p_ood"], "numerator_raw"),
        node("Add", ["numerator_raw", _stored(names.bank_offset)], "numerator"),
        node("Max", ["ood_distance", _stored(names.least_distance)], "ood_distance_safe"),
        node("Div", ["numerator", "ood_distance_safe"], "along_u"),
        node("Mul", ["along_u", _stored(names.bank_inverse_length)], "cosine"),
        node("Sub", ["one", "cosine"], "one_minus_cosine_raw"),
        node("Max", ["one_minus_cosine_raw", "zero"], "one_minus_cosine"),
        node("Sub", ["log_s", _stored(names.bank_log_s)], "log_ratio"),
        node("Abs", ["log_ratio"], "log_ratio_abs"),
        node("Neg", ["log_ratio_abs"], "log_ratio_down"),
        node("Exp", ["log_ratio_down"], "ratio"),
        node("Sub", ["one", "ratio"], "one_minus_ratio"),
        node("Mul", ["one_minus_ratio", "one_minus_ratio"], "radial_gap"),
        node("Mul", ["ratio", "one_minus_cosine"], "angular_half"),
        node("Mul", ["angular_half", "two"], "angular_gap"),
        node("Add", ["radial_gap", "angular_gap"], "gap_raw"),
        node("Max", ["gap_raw", "min_gap"], "gap"),
        node("Log", ["gap"], "log_gap"),
        node("Mul", ["log_gap", "half"], "half_log_gap"),
        node("Max", ["log_s", _stored(names.bank_log_s)], "larger_log_s"),
        node("Add", ["larger_log_s", "half_log_gap"], "log_distance_row"),
        node("ReduceMin", ["log_distance_row", "axis"], "log_distance", keepdims=1),
    ]


def _combination_nodes(score: str, heads: int) -> list[NodeProto]:
    """The score `[N]`: log S of the one OOD prototype, or sum_k T_k(log S_k), T = b + a x + sum_j w_j relu(x - t_j)."""
    if heads == 1:
        return [_node("Squeeze", [f"{score}.0", "axis"], "score")]
    nodes, total = [], ""
    for index in range(heads):
        names, node = stored.ood_names(index), partial(_node_of, index)
        nodes += [
            node("Sub", [score, _stored(names.map_knots)], "beyond_knot"),
            node("Relu", ["beyond_knot"], "hinge"),
            node("Mul", ["hinge", _stored(names.map_weights)], "weighted_hinge"),
            node("ReduceSum", ["weighted_hinge", "axis"], "bend", keepdims=1),
            node("Mul", [score, _stored(names.map_slope)], "sloped"),
            node("Add", ["sloped", _stored(names.map_bias)], "line"),
            node("Add", ["line", "bend"], "mapped"),
        ]
        if index:
            nodes.append(_node("Add", [total, f"mapped.{index}"], f"total.{index}"))
        total = f"total.{index}" if index else "mapped.0"
    return [*nodes, _node("Squeeze", [total, "axis"], "score")]


def _decision_nodes() -> list[NodeProto]:
    """class_id, ood_score, p_value = (1 + count) / (n + 1), is_ood = not valid or count < k.

    count, n and k are those of the group of the predicted class; there is one group, or one a class.
    """
    return [
        _node("ArgMax", ["=logits"], "argmax", axis=1, keepdims=0),
        _node("Cast", ["argmax"], "=class_id", to=TensorProto.INT32),
        _node("Where", ["=valid", "score", "invalid_score"], "=ood_score"),
        _node("Unsqueeze", ["=ood_score", "axis"], "score_column"),
        _node("Gather", [_stored(stored.GROUP_OF_CLASS), "=class_id"], "group"),
        _node("Unsqueeze", ["group", "axis"], "group_column"),
        _node("Equal", [_stored(stored.CALIBRATION_GROUPS), "group_column"], "of_group"),
        _node("GreaterOrEqual", [_stored(stored.CALIBRATION_SCORES), "score_column"], "at_least"),
        _node("And", ["of_group", "at_least"], "counted"),
        _node("Cast", ["counted"], "counted_number", to=TensorProto.INT32),
        _node("ReduceSum", ["counted_number", "axis"], "count", keepdims=0),
        _node("Cast", ["count"], "count_number", to=TensorProto.FLOAT),
        _node("Add", ["count_number", "one"], "p_numerator"),
        _node("Gather", [_stored(stored.P_DENOMINATOR), "group"], "p_denominator_of_group"),
        _node("Div", ["p_numerator", "p_denominator_of_group"], "p_finite"),
        _node("Where", ["=valid", "p_finite", "zero"], "=p_value"),
        _node("Gather", [_stored(stored.RANK), "group"], "rank_of_group"),
        _node("Less", ["count", "rank_of_group"], "alarm"),
        _node("Not", ["=valid"], "invalid"),
        _node("Or", ["invalid", "alarm"], "=is_ood"),
    ]
