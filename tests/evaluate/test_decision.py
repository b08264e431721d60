"""The groups say what the session decides."""

import numpy as np

from grood_edge.evaluate.decision import groups_of, one_threshold
from grood_edge.evaluate.results import Evaluation
from grood_edge.runtime.session import Session


def test_the_threshold_separates_what_is_flagged_from_what_is_not(session: Session, evaluation: Evaluation) -> None:
    threshold = one_threshold(session)
    assert threshold is not None
    assert threshold == evaluation.threshold
    for one in (evaluation.id_set, *evaluation.ood_sets):
        np.testing.assert_array_equal(one.rows.scores > threshold, one.rows.flagged)


def test_one_group_covers_all_classes(session: Session) -> None:
    (group,) = groups_of(session)
    calibration = session.contract.calibration
    assert (group.n, group.k) == (calibration.n, calibration.k)
    assert group.class_ids.tolist() == list(range(len(session.contract.classes)))
