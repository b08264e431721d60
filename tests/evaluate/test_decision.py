"""The groups say what the session decides, also where each predicted class has calibration scores of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grood_edge.conformal import DecisionRule
from grood_edge.evaluate.decision import groups_of, one_threshold
from grood_edge.evaluate.passes import score_set
from grood_edge.evaluate.promise import check_promise
from grood_edge.evaluate.results import Evaluation
from grood_edge.evaluate.sets import id_set
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


@pytest.fixture
def by_class(session: Session) -> Session:
    """Every second calibration score decides about the even classes, the others about the odd ones."""
    scores = session.contract.calibration.sorted_scores()
    classes = len(session.contract.classes)
    session.rule = DecisionRule((scores[::2], scores[1::2]), (20, 3), (np.arange(classes) % 2).astype(np.int32))
    return session


def test_groups_by_class_decide_as_the_session_does(by_class: Session, few: Path) -> None:
    groups = groups_of(by_class)
    assert [(group.k, group.class_ids.tolist()) for group in groups] == [(20, [0, 2, 4, 6]), (3, [1, 3, 5])]
    assert one_threshold(by_class) is None
    known, _ = id_set(few / "test", by_class.contract.classes)
    rows = score_set(known, by_class).rows
    for group in groups:
        mine = np.isin(rows.class_ids, group.class_ids)
        np.testing.assert_array_equal(rows.scores[mine] > group.threshold, rows.flagged[mine])


def test_the_band_of_groups_adds_up(by_class: Session, few: Path) -> None:
    known, _ = id_set(few / "test", by_class.contract.classes)
    scored = score_set(known, by_class)
    band = check_promise(by_class, scored).band
    by_class.rule = replace(by_class.rule, ranks=(3, 3))
    strict = check_promise(by_class, scored).band
    assert band is not None
    assert strict is not None
    assert strict[1] < band[1] < len(scored.paths)
