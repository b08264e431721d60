"""Leave-class-out: what is left out stays out, and what is scored has no part in the head that scores it."""

from dataclasses import replace

import numpy as np
import pytest

from grood_edge.contract import OodPrototype
from grood_edge.export import leave_class_out as module
from grood_edge.export.bank import HeadPlan, bank_rows, fit_head, head_of
from grood_edge.export.features import FeaturePass, FeatureTable
from grood_edge.export.leave_class_out import LeaveOut, class_aurocs, combined, leave_out, left_out_scores
from grood_edge.export.ood_prototype import Mixes, OodSource, plain_source
from grood_edge.export.prototypes import class_prototypes
from grood_edge.ranking import auroc
from grood_edge.scoring import nearest_rows
from tests.export.gaussians import Gaussians, centers, table_of

PLAN = HeadPlan((plain_source("mean"), plain_source("origin")), None, "float32", 0)


@pytest.fixture(scope="module")
def table(digit_pass: FeaturePass) -> FeatureTable:
    return digit_pass.fit


@pytest.fixture(scope="module")
def half(table: FeatureTable) -> LeaveOut:
    return leave_out(table, 0)


def scored_names(half: LeaveOut, table: FeatureTable) -> set[str]:
    place = {row.tobytes(): name for row, name in zip(table.features.astype(np.float64), table.names, strict=True)}
    return {place[row.tobytes()] for row in half.scored}


def test_scored_images_are_not_in_the_bank_half(half: LeaveOut, table: FeatureTable) -> None:
    names = scored_names(half, table)
    assert len(names) == len(half.scored) == len(half.labels)
    assert not names.intersection(half.bank.names)
    assert len(names) + len(half.bank.names) == len(table.names)
    assert abs(len(names) - len(half.bank.names)) <= 7  # half and half, class by class


def test_prototypes_are_of_the_images_that_are_not_scored(half: LeaveOut, table: FeatureTable) -> None:
    scored = np.isin(np.array(table.names), list(scored_names(half, table)))
    for row, label in enumerate(half.class_ids):
        others = (table.labels == label) & ~scored
        expected = table.features[others].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(half.prototypes[row], expected, rtol=1e-9, atol=1e-9)


def test_sums_of_images_without_a_kept_row_stay_in_the_prototypes(table: FeatureTable) -> None:
    """Of a large set a sample of rows is kept, and the sums cover all images: those are used as well."""
    extra = table.class_sums + 1000 * np.ones_like(table.class_sums)
    more = replace(table, class_sums=extra, class_counts=table.class_counts + 100)
    half = leave_out(more, 0)
    plain = leave_out(table, 0)
    counts = plain.bank.class_counts[:, None]
    expected = (plain.prototypes * counts + 1000) / (counts + 100)
    np.testing.assert_allclose(half.prototypes, expected, rtol=1e-9)


def test_halves_follow_the_seed_alone(table: FeatureTable, half: LeaveOut) -> None:
    again, other = leave_out(table, 0), leave_out(table, 1)
    np.testing.assert_array_equal(again.scored, half.scored)
    assert again.bank.names == half.bank.names
    assert set(other.bank.names) != set(half.bank.names)


def mixes_of(table: FeatureTable) -> OodSource:
    rows = np.arange(0, len(table.labels), 5)
    own = table.labels[rows]
    names = tuple(table.names[i] for i in rows)
    mixes = Mixes(table.features[rows] + 1, own, (own + 1) % 7, names)
    return OodSource(OodPrototype("mixup", len(rows), False, "relu"), mixes=mixes)


@pytest.mark.parametrize("rows", [None, 40, 0])
def test_left_out_class_has_no_part(rows: int | None, half: LeaveOut, table: FeatureTable) -> None:
    """No prototype, no bank image, no mix: the head is one fitted to a table in which the class does not exist."""
    plan = replace(PLAN, sources=(*PLAN.sources, mixes_of(table)), rows=rows)
    fitted = bank_rows(half.bank, half.prototypes, plan)
    scores = left_out_scores(half, fitted, plan, 3)
    rest = fitted.without_class(3)
    assert 3 not in rest.labels
    mixup = plan.sources[2].without_class(3)
    assert mixup.mixes is not None
    assert 3 not in mixup.mixes.own
    assert 3 not in mixup.mixes.other
    expected = head_of(rest, np.delete(half.prototypes, 3, axis=0), replace(plan, sources=(*PLAN.sources, mixup)))
    for found, nearest in zip(scores, nearest_rows(half.scored, expected), strict=True):
        np.testing.assert_allclose(found, nearest.score, rtol=1e-9)
    # Whatever the class's own images in the bank half are, the scores stay the same.
    moved = half.bank.features.copy()
    moved[half.bank.labels == 3] += 50
    prototypes = half.prototypes.copy()
    prototypes[3] += 50
    changed = replace(half, bank=replace(half.bank, features=moved), prototypes=prototypes)
    if rows is None:
        others = left_out_scores(changed, bank_rows(changed.bank, prototypes, plan), plan, 3)
        for found, again in zip(scores, others, strict=True):
            np.testing.assert_allclose(found, again, rtol=1e-9)


def test_class_aurocs_are_those_of_the_scores(half: LeaveOut) -> None:
    found = class_aurocs(half, PLAN, fit_head(half.bank, PLAN))
    assert set(found) == {"mean", "origin", "combination"}
    rows = bank_rows(half.bank, half.prototypes, PLAN)
    maps = [ood_head.score_map for ood_head in head_of(rows, half.prototypes, PLAN).ood_heads]
    for index, label in enumerate(half.classes):
        scores = left_out_scores(half, rows, PLAN, label)
        out = half.labels == label
        for name, values in (("mean", scores[0]), ("origin", scores[1]), ("combination", combined(maps, scores))):
            assert found[name][index] == pytest.approx(auroc(values[~out], values[out]))
    assert min(values.mean() for values in found.values()) > 0.9  # a digit nobody knows is found


def test_combination_is_the_sum_of_the_mapped_scores(half: LeaveOut) -> None:
    rows = bank_rows(half.bank, half.prototypes, PLAN)
    maps = [ood_head.score_map for ood_head in head_of(rows, half.prototypes, PLAN).ood_heads]
    scores = left_out_scores(half, rows, PLAN, 0)
    np.testing.assert_allclose(combined(maps, scores), maps[0](scores[0]) + maps[1](scores[1]), rtol=1e-12)


@pytest.mark.parametrize(("classes", "each"), [(7, 900), (60, 100), (1500, 6)])
@pytest.mark.parametrize("ordered", [True, False])
def test_large_tables_stay_within_the_limits(classes: int, each: int, ordered: bool) -> None:
    """At most 20 classes, 1,000 scored images and 2,048 of the bank; every left-out class has images to score."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    if not ordered:
        labels = rng.permutation(labels)
    half = leave_out(Gaussians(centers(rng, classes, 6, 8.0)).table(rng, labels), 0)
    assert len(half.classes) == min(classes, module.MAX_CLASSES) == len(set(half.classes))
    assert len(half.scored) <= module.MAX_SCORED
    assert len(half.bank.labels) <= module.MAX_BANK
    assert len(half.scored) + len(half.bank.labels) <= 4096
    assert set(half.classes) <= set(half.labels.tolist())
    assert len(set(half.labels.tolist()) - set(half.classes)) > 0 or classes <= module.MAX_CLASSES
    found = class_aurocs(half, PLAN, fit_head(half.bank, PLAN))
    assert all(np.isfinite(values).all() for values in found.values())


def test_classes_with_one_kept_image_are_not_left_out() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0] * 20 + [1] * 20 + [2] + [3] * 20)
    half = leave_out(Gaussians(centers(rng, 4, 5, 9.0)).table(rng, labels), 0)
    assert half.classes == (0, 1, 3)
    assert half.class_ids == (0, 1, 2, 3)
    assert 2 not in half.labels


def test_misclassified_images_are_scored_and_shape_prototypes_but_are_no_bank_rows() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    features = Gaussians(centers(rng, 4, 5, 9.0)).draw(rng, labels)
    predictions = np.where(np.arange(200) % 3 == 0, (labels + 1) % 4, labels)
    half = leave_out(table_of(features, labels, predictions), 0)
    rows = bank_rows(half.bank, half.prototypes, PLAN)
    assert len(rows.labels) == (half.bank.labels == half.bank.predictions).sum() < len(half.bank.labels)
    np.testing.assert_allclose(
        half.prototypes[0], half.bank.features[half.bank.labels == 0].astype(np.float64).mean(axis=0), rtol=1e-6
    )
    assert class_prototypes(half.bank).class_ids == half.class_ids
