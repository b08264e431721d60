"""The head as ONNX nodes: from `features` and `logits` to the decision, float32, standard operators.

The equations are those of `scoring`; the names follow its variables. All fitted values are initializers
(`stored_head`), so the nodes are the same for every artifact.
"""

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from grood_edge import stored_head as stored
from grood_edge.scoring import INVALID_SCORE, MIN_DISTANCE, MIN_RELATIVE_GAP

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
    "min_distance": np.array(MIN_DISTANCE, _F),
    "min_gap": np.array(MIN_RELATIVE_GAP, _F),
    "invalid_score": np.array(INVALID_SCORE, _F),
    "axis": np.array([1], np.int64),
}


def head_constants() -> list[TensorProto]:
    """Return the constants that the head's nodes share."""
    return [numpy_helper.from_array(value, _t(name)) for name, value in _CONSTANTS.items()]


def head_nodes(ood_heads: int) -> list[NodeProto]:
    """Return the head's nodes in topological order, for this many OOD prototypes.

    Raises:
        ValueError: more than one; their combination belongs to a later version of the format.
    """
    if ood_heads != 1:
        raise ValueError(f"{ood_heads} OOD prototypes; this version of the head scores exactly one")
    log_s_name, bank_names = "log_s.0", stored.ood_names(0)
    return [
        *_class_distance_nodes(),
        *_validity_nodes(),
        *_log_s_nodes(bank_names[0]),
        *_bank_nodes(log_s_name, bank_names[1], bank_names[2]),
        *_decision_nodes(log_s_name),
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


def _class_distance_nodes() -> list[NodeProto]:
    """D_c = sqrt(max(|h'|^2 + |P'_c|^2 - 2 h'P'^T, 0)), h' = h - center: `[N, k]`.

    The expanded form loses |h'|^2 / D_c^2 digits, most where it matters most: at the nearest prototype (log S was
    wrong by 8e-3 for features of length 100). That one distance is computed again, directly.
    """
    return [
        _node("Sub", ["=features", _stored(stored.CENTER)], "h"),
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
        _node("Where", ["is_nearest_class", "nearest_class", "class_distance_raw"], "class_distance"),
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


def _log_s_nodes(ood_prototype: str) -> list[NodeProto]:
    """Log s = m - d_ood - log(sum_j exp(m - D_j)) `[N, 1]` and u = v / max(d_ood, eps) `[N, d]`."""
    return [
        _node("Sub", ["h", _stored(ood_prototype)], "v"),
        _node("Mul", ["v", "v"], "v_squares"),
        _node("ReduceSum", ["v_squares", "axis"], "v_sq", keepdims=1),
        _node("Sqrt", ["v_sq"], "ood_distance"),
        _node("Concat", ["class_distance", "ood_distance"], "distance", axis=1),
        _node("ReduceMin", ["distance", "axis"], "nearest", keepdims=1),
        _node("Sub", ["nearest", "distance"], "below_nearest"),
        _node("Exp", ["below_nearest"], "weights"),
        _node("ReduceSum", ["weights", "axis"], "weight_sum", keepdims=1),
        _node("Log", ["weight_sum"], "log_weight_sum"),
        _node("Sub", ["nearest", "ood_distance"], "log_weight_ood"),
        _node("Sub", ["log_weight_ood", "log_weight_sum"], "sample_log_s"),
        _node("Max", ["ood_distance", "min_distance"], "ood_distance_safe"),
        _node("Div", ["v", "ood_distance_safe"], "u"),
    ]


def _bank_nodes(output: str, bank_t: str, bank_log_s: str) -> list[NodeProto]:
    """Log S = min_i [max(ls, l_i) + 0.5 log(max((1 - r)^2 + 2 r max(1 - u.u_i, 0), floor))]: `[N]`."""
    return [
        _node("MatMul", ["u", _stored(bank_t)], "cosine"),
        _node("Sub", ["one", "cosine"], "one_minus_cosine_raw"),
        _node("Max", ["one_minus_cosine_raw", "zero"], "one_minus_cosine"),
        _node("Sub", ["sample_log_s", _stored(bank_log_s)], "log_ratio"),
        _node("Abs", ["log_ratio"], "log_ratio_abs"),
        _node("Neg", ["log_ratio_abs"], "log_ratio_down"),
        _node("Exp", ["log_ratio_down"], "ratio"),
        _node("Sub", ["one", "ratio"], "one_minus_ratio"),
        _node("Mul", ["one_minus_ratio", "one_minus_ratio"], "radial_gap"),
        _node("Mul", ["ratio", "one_minus_cosine"], "angular_half"),
        _node("Mul", ["angular_half", "two"], "angular_gap"),
        _node("Add", ["radial_gap", "angular_gap"], "gap_raw"),
        _node("Max", ["gap_raw", "min_gap"], "gap"),
        _node("Log", ["gap"], "log_gap"),
        _node("Mul", ["log_gap", "half"], "half_log_gap"),
        _node("Max", ["sample_log_s", _stored(bank_log_s)], "larger_log_s"),
        _node("Add", ["larger_log_s", "half_log_gap"], "log_distance"),
        _node("ReduceMin", ["log_distance", "axis"], output, keepdims=0),
    ]


def _decision_nodes(score: str) -> list[NodeProto]:
    """class_id, ood_score, p_value = (1 + count) / (n + 1), is_ood = not valid or count < k."""
    return [
        _node("ArgMax", ["=logits"], "argmax", axis=1, keepdims=0),
        _node("Cast", ["argmax"], "=class_id", to=TensorProto.INT32),
        _node("Where", ["=valid", score, "invalid_score"], "=ood_score"),
        _node("Unsqueeze", ["=ood_score", "axis"], "score_column"),
        _node("GreaterOrEqual", [_stored(stored.CALIBRATION_SCORES), "score_column"], "at_least"),
        _node("Cast", ["at_least"], "at_least_number", to=TensorProto.INT32),
        _node("ReduceSum", ["at_least_number", "axis"], "count", keepdims=0),
        _node("Cast", ["count"], "count_number", to=TensorProto.FLOAT),
        _node("Add", ["count_number", "one"], "p_numerator"),
        _node("Div", ["p_numerator", _stored(stored.P_DENOMINATOR)], "p_finite"),
        _node("Where", ["=valid", "p_finite", "zero"], "=p_value"),
        _node("Less", ["count", _stored(stored.RANK)], "alarm"),
        _node("Not", ["=valid"], "invalid"),
        _node("Or", ["invalid", "alarm"], "=is_ood"),
    ]
