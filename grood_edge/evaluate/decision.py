"""Which calibration scores decide about which predicted class: all that evaluate needs to know of a session's rule."""

from dataclasses import dataclass

import numpy as np

from grood_edge.runtime.session import Session

__all__ = ["Group", "groups_of", "one_threshold"]


@dataclass(frozen=True)
class Group:
    """An image of these predicted classes is OOD above `threshold`, the k-th largest of n calibration scores."""

    class_ids: np.ndarray
    n: int
    k: int
    threshold: float


def groups_of(session: Session) -> tuple[Group, ...]:
    """Return one group over all classes, or one a class where the artifact has p-values by predicted class."""
    rule = session.rule
    return tuple(
        Group(ids, scores.size, k, rule.threshold(int(ids[0])))
        for group, (scores, k) in enumerate(zip(rule.scores, rule.ranks, strict=True))
        if (ids := np.flatnonzero(rule.group_of_class == group)).size
    )


def one_threshold(session: Session) -> float | None:
    """Return the threshold, None where each predicted class has its own."""
    groups = groups_of(session)
    return groups[0].threshold if len(groups) == 1 else None
