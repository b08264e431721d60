"""The head as ONNX nodes: from `features` and `logits` to the decision, float32, standard operators.

The equations are those of `scoring`; the names follow its variables. All fitted values are initializers
(`stored_head`), so the nodes depend on the number of OOD prototypes, the kind of bank and the space alone.
"""

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
    "first_axis": np.array([0], np.int64),
    "axis": np.array([1], np.int64),
    "last_axis": np.array([2], np.int64),
}


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
    score = "log_s" if bank_dtype is None else "log_distance"
    return [
        *_class_distance_nodes("=" + space),
        *_validity_nodes("=logits" if space == "features" else "=features"),
        *_log_s_nodes(heads),
        *(_bank_nodes(heads, bank_dtype) if bank_dtype is not None else []),
        *_combination_nodes(score, heads),
        *_decision_nodes(),
    ]


def _t(name: str) -> str:
    return stored.GROUP + name


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    """Make a node named after its output. Bare names are the head's own tensors; `=name` is taken as it is."""
    names = [name[1:] if name.startswith("=") else _t(name) for name in inputs]
    target = output[1:] if output.startswith("=") else _t(output)
    return helper.make_node(operator, names, [target], name=_t(output.lstrip("=")), **attributes)


def _stored(name: str) -> str:
    return "=" + name


def _stacked_nodes(field: str, heads: int) -> list[NodeProto]:
    """What is stored for each OOD prototype as one tensor `[heads, ...]`, called `field`: runtimes fold it on loading.

    One operator on all OOD prototypes takes hardly longer than on one: starting it is most of its time.
    """
    names = [getattr(stored.ood_names(index), field) for index in range(heads)]
    rows = [f"{field}_row.{index}" for index in range(heads)]
    nodes = [_node("Unsqueeze", [_stored(n), "first_axis"], row) for n, row in zip(names, rows, strict=True)]
    return [*nodes, _node("Concat", rows, field, axis=0)]


def _class_distance_nodes(source: str) -> list[NodeProto]:
    """D_c = a sqrt(max(|h'|^2 + |P'_c|^2 - 2 h'P'^T, 0)), h' = h - center: `[N, k]`.

    The expanded form loses |h'|^2 / D_c^2 digits, most where it matters most: at the nearest prototype (log S was
    wrong by 8e-3 for features of length 100). That one distance is computed again, directly.
    """
    return [
        _node("Sub", [source, _stored(stored.CENTER)], "h"),
        _node("Mul", ["h", "h"], "h_squares"),
        _node("ReduceSum", ["h_squares", "axis"], "h_sq", keepdims=1),
        # One prototype a row, folded on loading: a column would be gathered from as many places as there are features.
        _node("Transpose", [_stored(stored.PROTOTYPES_T)], "prototypes", perm=[1, 0]),
        _node("Gemm", ["h", "prototypes", _stored(stored.PROTOTYPES_SQ)], "class_sq_of_h", alpha=-2.0, transB=1),
        _node("Add", ["class_sq_of_h", "h_sq"], "class_sq_raw"),
        _node("Max", ["class_sq_raw", "zero"], "class_sq"),
        _node("Sqrt", ["class_sq"], "class_distance_raw"),
        _node("ReduceMin", ["class_distance_raw", "axis"], "nearest_class_raw", keepdims=1),
        _node("ArgMin", ["class_distance_raw"], "nearest_class_id", axis=1, keepdims=0),
        _node("Gather", ["prototypes", "nearest_class_id"], "nearest_prototype", axis=0),
        _node("Sub", ["h", "nearest_prototype"], "from_nearest"),
        _node("Mul", ["from_nearest", "from_nearest"], "from_nearest_squares"),
        _node("ReduceSum", ["from_nearest_squares", "axis"], "from_nearest_sq", keepdims=1),
        _node("Sqrt", ["from_nearest_sq"], "nearest_class"),
        _node("LessOrEqual", ["class_distance_raw", "nearest_class_raw"], "is_nearest_class"),
        _node("Where", ["is_nearest_class", "nearest_class", "class_distance_raw"], "class_distance_plain"),
        _node("Mul", ["class_distance_plain", _stored(stored.SCALE)], "class_distance"),
    ]


def _validity_nodes(other: str) -> list[NodeProto]:
    """valid: features, logits and |h'|^2 are finite, read before any Min, Max or Clip (they may drop NaN).

    |h'|^2 is finite only where all that the head reads is; `other` is the output that it does not read.
    """
    return [
        _node("Concat", [other, "h_sq"], "finite_if_valid", axis=1),
        _node("IsNaN", ["finite_if_valid"], "nan"),
        _node("IsInf", ["finite_if_valid"], "inf"),
        _node("Or", ["nan", "inf"], "bad"),
        _node("Cast", ["bad"], "bad_number", to=TensorProto.FLOAT),
        _node("ReduceSum", ["bad_number", "axis"], "bad_count", keepdims=0),
        _node("Less", ["bad_count", "half"], "=valid"),
    ]


def _log_s_nodes(heads: int) -> list[NodeProto]:
    """Log s = m - d_ood - log(sum_j exp(m - D_j)) `[N, heads]`, m = min(D_j, d_ood), d_ood = |h' - p_ood| directly.

    The sum over the classes is made once, relative to the nearest of them.
    """
    return [
        _node("ReduceMin", ["class_distance", "axis"], "nearest_known", keepdims=1),
        _node("Sub", ["nearest_known", "class_distance"], "below_nearest_known"),
        _node("Exp", ["below_nearest_known"], "class_weights"),
        _node("ReduceSum", ["class_weights", "axis"], "class_weight", keepdims=1),
        *_stacked_nodes("ood_prototype", heads),
        _node("Unsqueeze", ["h", "axis"], "h_row"),
        _node("Sub", ["h_row", "ood_prototype"], "v"),
        _node("Mul", ["v", "v"], "v_squares"),
        _node("ReduceSum", ["v_squares", "last_axis"], "v_sq", keepdims=0),
        _node("Sqrt", ["v_sq"], "ood_distance"),
        _node("Mul", ["ood_distance", _stored(stored.SCALE)], "ood_distance_scaled"),
        _node("Min", ["nearest_known", "ood_distance_scaled"], "nearest"),
        _node("Sub", ["nearest", "nearest_known"], "below_known"),
        _node("Exp", ["below_known"], "known_factor"),
        _node("Mul", ["known_factor", "class_weight"], "known_weight"),
        _node("Sub", ["nearest", "ood_distance_scaled"], "log_weight_ood"),
        _node("Exp", ["log_weight_ood"], "ood_weight"),
        _node("Add", ["known_weight", "ood_weight"], "weight_sum"),
        _node("Log", ["weight_sum"], "log_weight_sum"),
        _node("Sub", ["log_weight_ood", "log_weight_sum"], "log_s"),
    ]


def _bank_nodes(heads: int, bank_dtype: BankDtype) -> list[NodeProto]:
    """Log S = min_i [max(ls, l_i) + 0.5 log(max((1 - r)^2 + r max(2 - 2 u.u_i, 0), floor))], `[N, heads]`.

    u.u_i = (h'.b_i - h'.p + p.p - p.b_i) / (max(d_ood, least) |b_i - p|): the product h'.b_i `[N, m]` is the one large
    one, and made once. Gemm with transB, and not MatMul: onnxruntime (1.32) turns DequantizeLinear + MatMul into
    MatMulNBits, which rounds h' to 8 bits as well (5e-3 of the largest value); a test holds it to float32.
    """
    rows, nodes = _stored(stored.BANK), []
    if bank_dtype == "int8":
        nodes = [_node("DequantizeLinear", [rows, _stored(stored.BANK_SCALE)], "bank_rows", axis=0)]
        rows = "bank_rows"
    for field in ("bank_log_s", "bank_inverse_length", "bank_offset", "least_distance"):
        nodes += _stacked_nodes(field, heads)
    return [
        *nodes,
        _node("Gemm", ["h", rows], "h_dot_b", transB=1),
        _node("Unsqueeze", ["h_dot_b", "axis"], "h_dot_b_row"),
        _node("Mul", ["h_row", "ood_prototype"], "h_times_p"),
        _node("ReduceSum", ["h_times_p", "last_axis"], "h_dot_p", keepdims=1),
        _node("Sub", ["h_dot_b_row", "h_dot_p"], "numerator_raw"),
        _node("Add", ["numerator_raw", "bank_offset"], "numerator"),
        _node("Max", ["ood_distance", "least_distance"], "ood_distance_safe"),
        _node("Mul", ["ood_distance_safe", "half"], "half_distance"),
        _node("Unsqueeze", ["half_distance", "last_axis"], "half_distance_column"),
        _node("Div", ["numerator", "half_distance_column"], "twice_along_u"),
        _node("Mul", ["twice_along_u", "bank_inverse_length"], "twice_cosine"),
        _node("Sub", ["two", "twice_cosine"], "angular_raw"),
        _node("Max", ["angular_raw", "zero"], "angular"),
        _node("Unsqueeze", ["log_s", "last_axis"], "log_s_column"),
        _node("Max", ["log_s_column", "bank_log_s"], "larger_log_s"),
        _node("Min", ["log_s_column", "bank_log_s"], "smaller_log_s"),
        _node("Sub", ["smaller_log_s", "larger_log_s"], "log_ratio"),
        _node("Exp", ["log_ratio"], "ratio"),
        _node("Sub", ["one", "ratio"], "one_minus_ratio"),
        _node("Mul", ["one_minus_ratio", "one_minus_ratio"], "radial_gap"),
        _node("Mul", ["ratio", "angular"], "angular_gap"),
        _node("Add", ["radial_gap", "angular_gap"], "gap_raw"),
        _node("Max", ["gap_raw", "min_gap"], "gap"),
        _node("Log", ["gap"], "log_gap"),
        _node("Mul", ["log_gap", "half"], "half_log_gap"),
        _node("Add", ["larger_log_s", "half_log_gap"], "log_distance_row"),
        _node("ReduceMin", ["log_distance_row", "last_axis"], "log_distance", keepdims=0),
    ]


def _combination_nodes(score: str, heads: int) -> list[NodeProto]:
    """The score `[N]`: log S of the one OOD prototype, or sum_k T_k(log S_k), T = b + a x + sum_j w_j relu(x - t_j)."""
    if heads == 1:
        return [_node("Squeeze", [score, "axis"], "score")]
    names = [stored.ood_names(index) for index in range(heads)]
    parts, beyond = (
        [f"score_part.{index}" for index in range(heads)],
        [f"beyond_knot.{index}" for index in range(heads)],
    )
    split = helper.make_node(
        "Split", [_t(score)], [_t(part) for part in parts], _t(parts[0]), axis=1, num_outputs=heads
    )
    return [
        split,
        *(_node("Sub", [p, _stored(n.map_knots)], b) for p, n, b in zip(parts, names, beyond, strict=True)),
        _node("Concat", beyond, "beyond_knot", axis=1),
        _node("Relu", ["beyond_knot"], "hinge"),
        _node("Concat", [_stored(n.map_weights) for n in names], "map_weights", axis=0),
        _node("Mul", ["hinge", "map_weights"], "weighted_hinge"),
        _node("ReduceSum", ["weighted_hinge", "axis"], "bend", keepdims=0),
        *_stacked_nodes("map_slope", heads),
        *_stacked_nodes("map_bias", heads),
        _node("Mul", [score, "map_slope"], "sloped"),
        _node("Add", ["sloped", "map_bias"], "lines"),
        _node("ReduceSum", ["lines", "axis"], "line", keepdims=0),
        _node("Add", ["line", "bend"], "score"),
    ]


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
