"""The sentence about the promise, on scored sets whose false alarms are known."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from grood_edge.contract import encode_array
from grood_edge.demo.images import DemoImages
from grood_edge.evaluate.metrics import beta_binomial_band
from grood_edge.evaluate.passes import ScoredSet, score_set
from grood_edge.evaluate.promise import check_promise, sentence_of_missed
from grood_edge.evaluate.results import Evaluation
from grood_edge.evaluate.sets import id_set, ood_set
from grood_edge.runtime.session import Session


@pytest.fixture
def scored(session: Session, digits: DemoImages) -> ScoredSet:
    known, _ = id_set(digits.test, session.contract.classes)
    return score_set(known, session)


def with_alarms(scored: ScoredSet, count: int) -> ScoredSet:
    flagged = np.arange(len(scored.paths)) < count
    return replace(scored, rows=replace(scored.rows, flagged=flagged))


def guaranteed(session: Session, guarantee: Literal["none", "approximate"]) -> None:
    calibration = session.contract.calibration
    session.contract = replace(session.contract, calibration=replace(calibration, guarantee=guarantee))


def test_fresh_digits_keep_the_promise(session: Session, scored: ScoredSet) -> None:
    promise = check_promise(session, scored)
    calibration = session.contract.calibration
    assert promise.band == beta_binomial_band(len(scored.paths), calibration.n, calibration.k)
    assert promise.outcome in ("kept", "stricter")
    assert promise.count == scored.rows.flagged.sum()


def test_above_the_band_it_is_broken_and_the_remedy_is_named(session: Session, scored: ScoredSet) -> None:
    band = check_promise(session, scored).band
    assert band is not None
    edge = check_promise(session, with_alarms(scored, band[1]))
    assert edge.outcome == "kept"
    assert "chance" in edge.sentence, "the rate is above alpha, and the sentence says why that is no broken promise"
    broken = check_promise(session, with_alarms(scored, band[1] + 1))
    assert broken.outcome == "broken"
    assert "grood-edge calibrate MODEL --data FRESH --threshold-only" in broken.sentence
    assert check_promise(session, with_alarms(scored, band[0])).outcome == "kept"
    assert check_promise(session, with_alarms(scored, band[0] - 1)).outcome == "stricter"


def test_the_band_follows_the_sessions_rank(session: Session, scored: ScoredSet) -> None:
    usual = check_promise(session, scored).band
    session.rule = replace(session.rule, ranks=(60,))
    eager = check_promise(session, scored).band
    assert usual is not None
    assert eager is not None
    assert eager[0] > usual[1]


def test_without_a_guarantee_there_is_no_band_and_the_reason_is_given(session: Session, scored: ScoredSet) -> None:
    guaranteed(session, "none")
    promise = check_promise(session, scored)
    assert (promise.outcome, promise.band) == ("none", None)
    assert "seen in training" in promise.sentence
    assert "--threshold-only" in promise.sentence
    guaranteed(session, "approximate")
    assert "measured, not proven" in check_promise(session, with_alarms(scored, 9)).sentence


@pytest.mark.parametrize("name", ["calibration", "train"])
def test_images_that_the_artifact_knows_prove_nothing(name: str, session: Session, digits: DemoImages) -> None:
    known, _ = id_set(getattr(digits, name), session.contract.classes)
    promise = check_promise(session, score_set(known, session))
    assert (promise.outcome, promise.band) == ("untested", None)
    assert ("calibrated the artifact" if name == "calibration" else "was fitted on 100% of them") in promise.sentence


def test_a_few_fitted_images_among_fresh_ones_are_found_by_the_sketch(
    session: Session, scored: ScoredSet, digits: DemoImages
) -> None:
    fitted = score_set(ood_set("fitted", digits.train / "3"), session)
    hashes = scored.hashes.copy()
    hashes[:16] = fitted.hashes[:16]
    assert "was fitted on 5% of them" in check_promise(session, replace(scored, hashes=hashes)).sentence
    fit = session.contract.fit
    smallest = fit.sketch_hashes()[:200]  # of 630 images; a full sketch knows all that are as small
    full = np.concatenate([smallest, smallest[-1] + np.arange(1, 825, dtype=np.uint64)])
    small = replace(fit, sketch=encode_array(full.astype("<u8")))
    session.contract = replace(session.contract, fit=small)
    all_known = replace(scored, hashes=np.resize(fitted.hashes, len(scored.hashes)))
    assert "was fitted on 100% of them" in check_promise(session, all_known).sentence
    assert check_promise(session, scored).outcome in ("kept", "stricter")


def test_a_part_of_the_calibration_images_is_found_by_its_scores(session: Session, digits: DemoImages) -> None:
    part = ood_set("part", digits.calibration / "3")
    promise = check_promise(session, score_set(part, session))
    assert promise.outcome == "untested"
    assert "exactly the ood_score of a calibration image" in promise.sentence


def test_what_is_missed_most_is_named(evaluation: Evaluation) -> None:
    near, photos = evaluation.ood
    half = replace(near, found=near.images // 3)
    assert sentence_of_missed([half, photos]).startswith('Missed most is "near"')
    assert "Do not count on it" in sentence_of_missed([half, photos])
    assert sentence_of_missed([half]).startswith('Of "near"')
    perfect = replace(near, found=near.images)
    assert sentence_of_missed([perfect]) == "Every OOD image was found, in the one set given here."


def test_calibration_scores_repeat_only_by_accident(session: Session, few: Path) -> None:
    known, _ = id_set(few / "test", session.contract.classes)
    assert check_promise(session, score_set(known, session)).outcome in ("kept", "stricter")
