"""Which images calibrate, which rule, which promise; and that no image judges itself."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.contract import Calibration, OodPrototype
from grood_edge.demo.images import DemoImages
from grood_edge.errors import CalibrationError, DatasetError, UsageError
from grood_edge.export.bank import HeadPlan, fit_head
from grood_edge.export.calibration import (
    CalibrationScores,
    Promise,
    calibration_from_scores,
    cross_fitted_scores,
    require_disjoint,
    shipped_scores,
)
from grood_edge.export.features import FeaturePass, FeatureTable, rows_of
from grood_edge.export.ood_prototype import Mixes, OodSource, plain_source
from grood_edge.images import find_images, load_image
from grood_edge.runtime import open_session

Provenance = Literal["unseen", "seen-in-training"]
Method = Literal["separate", "split", "cross-fitted"]

MEAN = plain_source("mean")
PLAN = HeadPlan((MEAN,), None, "float32", 0)
TWO = replace(PLAN, sources=(MEAN, plain_source("origin")))


def calibration_of(scores: np.ndarray, promise: Promise, digest: str = "", classes: int = 3) -> Calibration:
    """The calibration of scores whose images are predicted as each class in turn."""
    held_out = CalibrationScores(scores, np.arange(len(scores)) % classes, digest)
    return calibration_from_scores(held_out, promise, tuple("abcdefg"[:classes]))


@pytest.mark.parametrize(
    ("provenance", "method", "guarantee"),
    [
        ("unseen", "separate", "conformal"),
        ("unseen", "split", "conformal"),
        ("unseen", "cross-fitted", "approximate"),
        ("seen-in-training", "separate", "none"),
        ("seen-in-training", "split", "none"),
        ("seen-in-training", "cross-fitted", "none"),
    ],
)
def test_promise_table(provenance: Provenance, method: Method, guarantee: str) -> None:
    scores = np.random.default_rng(0).standard_normal(400).astype(np.float32)
    found = calibration_of(scores, Promise(0.05, None, provenance, method), "digest")
    assert (found.provenance, found.method, found.guarantee) == (provenance, method, guarantee)
    assert found.delta == (None if guarantee == "none" else 0.05)
    assert found.k == (20 if guarantee == "none" else 13)  # floor(0.05 * 401), and the largest with P >= 95 %
    assert (found.n, found.alpha, found.data_digest) == (400, 0.05, "digest")
    np.testing.assert_array_equal(found.sorted_scores(), np.sort(scores))
    assert found.quantiles[0] == pytest.approx(scores.min(), abs=1e-5)
    assert found.quantiles[3] == pytest.approx(np.median(scores), abs=1e-5)
    assert found.quantiles[-1] == pytest.approx(scores.max(), abs=1e-5)


@pytest.mark.parametrize("method", ["separate", "split", "cross-fitted"])
def test_delta_is_refused_for_images_seen_in_training(method: Method) -> None:
    promise = Promise(0.05, 0.05, "seen-in-training", method)
    with pytest.raises(UsageError, match=r"--delta promises a false-alarm rate.*--calibration-data DIR.*--unseen"):
        promise.usable_delta()
    with pytest.raises(UsageError, match="--delta"):
        calibration_of(np.arange(400, dtype=np.float32), promise)


def test_asked_delta_is_used() -> None:
    promise = Promise(0.05, 0.2, "unseen", "separate")
    assert promise.usable_delta() == 0.2
    loose = calibration_of(np.arange(400, dtype=np.float32), promise)
    strict = calibration_of(np.arange(400, dtype=np.float32), replace(promise, delta=0.001))
    assert strict.k < 13 < loose.k


def test_too_few_images_say_how_many_are_needed() -> None:
    scores = np.arange(58, dtype=np.float32)
    with pytest.raises(
        CalibrationError, match=r"58 calibration images cannot carry alpha 0.05 .*at least 59 are needed"
    ):
        calibration_of(scores, Promise(0.05, None, "unseen", "separate"))
    assert calibration_of(np.arange(59, dtype=np.float32), Promise(0.05, None, "unseen", "separate")).k == 1
    with pytest.raises(CalibrationError, match=r"at least 99 are needed"):
        calibration_of(scores, Promise(0.01, None, "seen-in-training", "split"))


def test_shipped_scores_are_those_of_the_whole_graph(artifact_path: Path, digits: DemoImages) -> None:
    frames = [load_image(path) for folder in (digits.test, digits.near) for path in find_images(folder)[::5]]
    with open_session(artifact_path) as session:
        outputs = session.infer(frames)
    scores = shipped_scores(read_artifact(artifact_path).model, outputs.features, "features")
    np.testing.assert_array_equal(scores, outputs.ood_score)
    assert np.ptp(scores) > 1


def fold_mates(table: FeatureTable, scores: np.ndarray, image: int, seed: int = 0) -> np.ndarray:
    """Indices of the images whose score does not depend on `image`: its own fold, itself left out."""
    features = table.features.copy()
    features[image] += 10 * features.std(axis=0) + 1
    moved = rows_of(replace(table, features=features), np.ones(len(features), bool))
    same = cross_fitted_scores(moved, replace(PLAN, seed=seed)) == scores
    return np.flatnonzero(same & (np.arange(len(scores)) != image))


@pytest.fixture(scope="module")
def small_table(digit_pass: FeaturePass) -> FeatureTable:
    """About 140 training digits."""
    return rows_of(digit_pass.fit, np.arange(digit_pass.fit.images) % 4 == 0)


@pytest.mark.parametrize("plan", [PLAN, TWO, replace(TWO, rows=16, dtype="int8"), replace(TWO, rows=0)])
def test_cross_fitting_scores_every_image_once(plan: HeadPlan, small_table: FeatureTable) -> None:
    scores = cross_fitted_scores(small_table, plan)
    assert scores.dtype == np.float32
    assert scores.shape == small_table.labels.shape
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 0.95 * len(scores)  # a score left at its initial zero would repeat


def test_no_image_is_scored_by_a_head_that_was_fitted_on_it(small_table: FeatureTable) -> None:
    scores = cross_fitted_scores(small_table, PLAN)
    count = len(scores)
    for image in (0, 17, count - 1):
        mates = fold_mates(small_table, scores, image)
        assert count / 20 < len(mates) < count / 5  # a tenth of the images; all others feel the change
        # Make the image a copy of a fold mate. Were its own head fitted on it, that head would have changed too.
        twin = int(mates[0])
        features = small_table.features.copy()
        features[image] = features[twin]
        copied = rows_of(replace(small_table, features=features), np.ones(count, bool))
        rescored = cross_fitted_scores(copied, PLAN)
        assert rescored[image] == rescored[twin] == scores[twin]


def test_folds_are_drawn_within_each_class(small_table: FeatureTable) -> None:
    scores = cross_fitted_scores(small_table, PLAN)
    mates = np.append(fold_mates(small_table, scores, 3), 3)
    share = np.bincount(small_table.labels[mates], minlength=7)
    whole = np.bincount(small_table.labels, minlength=7)
    assert (share >= whole // 10).all()
    assert (share <= -(-whole // 10)).all()


def test_cross_fitting_with_a_kmeans_bank_and_a_fixed_position(small_table: FeatureTable) -> None:
    full = cross_fitted_scores(small_table, PLAN)
    small = cross_fitted_scores(small_table, replace(PLAN, rows=16))
    moved = cross_fitted_scores(small_table, replace(PLAN, sources=(OodSource(MEAN.entry, np.full(64, 3.0)),)))
    assert np.isfinite(small).all()
    assert not np.array_equal(small, full)
    assert np.corrcoef(small, full)[0, 1] > 0.5
    assert not np.array_equal(moved, full)


def test_cross_fitting_follows_the_seed(small_table: FeatureTable) -> None:
    first, again, other = (cross_fitted_scores(small_table, replace(PLAN, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_cross_fitted_scores_are_larger_than_the_shipped_heads_own(small_table: FeatureTable) -> None:
    """The head of all images knows its own images too well: its scores of them would calibrate far too low."""
    from grood_edge.scoring import ood_scores

    own = ood_scores(small_table.features.astype(np.float64), fit_head(small_table, PLAN)[0])
    assert np.median(own) < np.median(cross_fitted_scores(small_table, PLAN)) - 3


def test_calibration_images_that_were_fitted_on_are_refused(digit_pass: FeaturePass) -> None:
    def holding(hashes: np.ndarray) -> FeaturePass:
        return replace(digit_pass, frame_hashes=hashes.astype(np.uint64))

    fit, fresh = digit_pass.frame_hashes, np.arange(200, dtype=np.uint64)
    require_disjoint(digit_pass, holding(fresh))
    require_disjoint(digit_pass, holding(np.concatenate([fresh[:198], fit[:2]])))  # 1 %: duplicates happen
    with pytest.raises(DatasetError, match="3 of 200 calibration images are also among the fit images"):
        require_disjoint(digit_pass, holding(np.concatenate([fresh[:197], fit[:3]])))
    with pytest.raises(DatasetError, match="must be new to the network"):
        require_disjoint(digit_pass, digit_pass)


def test_marginal_rule_states_no_confidence() -> None:
    promise = Promise(0.05, None, "unseen", "separate", marginal=True)
    found = calibration_of(np.arange(400, dtype=np.float32), promise)
    assert (found.guarantee, found.delta, found.k) == ("marginal", None, 20)
    assert promise.usable_delta() is None
    with pytest.raises(UsageError, match="--delta states a confidence, and --rule marginal has none"):
        replace(promise, delta=0.05).usable_delta()
    assert replace(promise, method="cross-fitted").guarantee() == "approximate"
    assert replace(promise, provenance="seen-in-training").guarantee() == "none"


def test_per_class_scores_stand_class_by_class() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(600).astype(np.float32)
    ids = rng.choice(3, 600, p=[0.5, 0.3, 0.2])
    held_out = CalibrationScores(scores, ids, "")
    promise = Promise(0.05, None, "unseen", "separate", per_class=True)
    found = calibration_from_scores(held_out, promise, ("a", "b", "c"))
    assert found.class_sizes == tuple(np.bincount(ids).tolist())
    rule = found.rule(3)
    for label in range(3):
        own = np.sort(scores[ids == label])
        np.testing.assert_array_equal(rule.scores[label], own)
        alone = calibration_of(own, Promise(0.05, None, "unseen", "separate"))
        assert found.class_ranks[label] == alone.k
        assert rule.threshold(label) == own[len(own) - alone.k]
    np.testing.assert_array_equal(found.sorted_scores(), np.sort(scores))


def test_class_that_is_too_small_is_named() -> None:
    ids = np.array([0] * 100 + [1] * 100 + [2] * 40)
    held_out = CalibrationScores(np.arange(240, dtype=np.float32), ids, "")
    promise = Promise(0.05, None, "unseen", "separate", per_class=True)
    message = "--per-class: of the images predicted as 'c', 40 calibration images cannot carry .*at least 59 are needed"
    with pytest.raises(CalibrationError, match=message):
        calibration_from_scores(held_out, promise, ("a", "b", "c"))
    calibration_from_scores(held_out, replace(promise, per_class=False), ("a", "b", "c"))


@pytest.mark.parametrize("value", [0.0, -13.8])
def test_constant_scores_are_refused(value: float) -> None:
    with pytest.raises(CalibrationError, match=r"all 400 calibration images have the same score .*Check that the"):
        calibration_of(np.full(400, value, np.float32), Promise(0.05, None, "unseen", "separate"))


def test_mixes_of_the_fold_are_dropped_in_cross_fitting(small_table: FeatureTable) -> None:
    """An image that was mixed has no part in the OOD prototype of the head that scores it."""
    own = small_table.labels
    mixes = Mixes(small_table.features + 1, own, (own + 1) % 7, small_table.names)
    source = OodSource(OodPrototype("mixup", len(own), False, "relu"), mixes=mixes)
    plan = replace(PLAN, sources=(source,))
    before = cross_fitted_scores(small_table, plan)
    moved = mixes.features.copy()
    moved[5] += 3
    after = cross_fitted_scores(
        small_table, replace(plan, sources=(replace(source, mixes=replace(mixes, features=moved)),))
    )
    assert after[5] == before[5]
    same = after == before
    assert len(own) / 20 < same.sum() < len(own) / 5  # its fold; all other heads have seen the mix
