"""The decision on the host: at a session's alpha, and for an engine whose calibration is older than the contract."""

import dataclasses

import numpy as np

from grood_edge.conformal import DecisionRule
from grood_edge.outputs import Outputs

__all__ = ["class_thresholds", "decided_by", "is_alarm"]


def class_thresholds(rule: DecisionRule) -> tuple[float, ...]:
    """Return, for each predicted class, the k-th largest calibration score of its group."""
    return tuple(rule.threshold(class_id) for class_id in range(len(rule.group_of_class)))


def is_alarm(score: float, threshold: float) -> bool:
    """Decide one frame as `DecisionRule.is_alarm` does, without an array.

    Fewer than k calibration scores are >= the score exactly when the k-th largest is below it. A NaN is an alarm.
    """
    return not score <= threshold


def decided_by(rule: DecisionRule, outputs: Outputs) -> Outputs:
    """Return the outputs with `p_value` and `is_ood` computed anew from their scores, as the graph computes them.

    p_value = (1 + count) / (n + 1), 0 for rows that are not valid; is_ood = not valid or count < k; count, n and k are
    those of the group of the predicted class.
    """
    counts = rule.counts(outputs.ood_score, outputs.class_id)
    denominators = np.array([scores.size for scores in rule.scores], np.float32) + np.float32(1)
    p_values = (counts + 1).astype(np.float32) / denominators[rule.group_of_class[outputs.class_id]]
    return dataclasses.replace(
        outputs,
        p_value=np.where(outputs.valid, p_values, np.float32(0)).astype(np.float32),
        is_ood=~outputs.valid | (counts < rule.ranks_of(outputs.class_id)),
    )
