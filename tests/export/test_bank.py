"""The gradient bank: every correctly classified image, or k-means centres of them; and the head that is made of it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.cluster import KMeans, kmeans_plusplus

from grood_edge.errors import DatasetError, MissingExtraError
from grood_edge.evaluate.metrics import auroc
from grood_edge.export import bank as bank_module
from grood_edge.export.bank import BankRows, HeadPlan, bank_candidates, bank_rows, fit_head, head_of, heads_by_scale
from grood_edge.export.features import FeaturePass, FeatureTable, rows_of
from grood_edge.export.ood_prototype import Mixes, OodSource, plain_source
from grood_edge.export.prototypes import class_prototypes
from grood_edge.scoring import IDENTITY, class_distances, log_s_of, nearest_rows, ood_scores, ood_scores_by_scale
from grood_edge.stored_head import head_from_model, head_tensors

MEAN, ORIGIN = plain_source("mean"), plain_source("origin")
PLAN = HeadPlan((MEAN,), None, "float32", 0)
TWO = replace(PLAN, sources=(MEAN, ORIGIN))


@pytest.fixture
def table(digit_pass: FeaturePass) -> FeatureTable:
    """The training digits, every ninth of them called misclassified."""
    fit = digit_pass.fit
    predictions = np.where(np.arange(len(fit.labels)) % 9 == 0, (fit.labels + 1) % 7, fit.labels)
    return rows_of(replace(fit, predictions=predictions), np.ones(len(predictions), bool))


def correct_features(table: FeatureTable) -> np.ndarray:
    features: np.ndarray = table.features[table.labels == table.predictions].astype(np.float64)
    return features


def log_s(features: np.ndarray, prototypes: np.ndarray, position: np.ndarray, scale: float = 1.0) -> np.ndarray:
    return log_s_of(class_distances(features, prototypes), np.linalg.norm(features - position, axis=1), scale)


def test_scale_of_the_distances_reaches_the_bank(table: FeatureTable) -> None:
    head, rows = fit_head(table, replace(TWO, scale=4.0))
    assert head.scale == 4.0
    for ood_head in head.ood_heads:
        expected = log_s(rows.features.astype(np.float64), head.prototypes, ood_head.prototype, 4.0)
        np.testing.assert_allclose(ood_head.bank_log_s, expected, rtol=1e-12)


def test_full_bank_holds_the_features_of_the_correct_images(table: FeatureTable) -> None:
    head, rows = fit_head(table, PLAN)
    correct = correct_features(table)
    prototypes = class_prototypes(table).prototypes
    (ood_head,) = head.ood_heads
    np.testing.assert_array_equal(ood_head.prototype, prototypes.mean(axis=0))
    np.testing.assert_array_equal(head.bank, correct)
    np.testing.assert_allclose(ood_head.bank_log_s, log_s(correct, prototypes, prototypes.mean(axis=0)), rtol=1e-12)
    assert bank_candidates(table) == len(correct) == len(head.bank) == rows.count
    assert ood_head.score_map == IDENTITY  # of one OOD prototype the score is log S itself
    np.testing.assert_array_equal(rows.row_classes(), table.labels[table.labels == table.predictions])


def test_given_position_is_the_ood_prototype(table: FeatureTable) -> None:
    position = np.linspace(0, 1, 64)
    head, _ = fit_head(table, replace(PLAN, sources=(OodSource(MEAN.entry, position),)))
    np.testing.assert_array_equal(head.ood_heads[0].prototype, position)


def test_kmeans_rows_are_means_of_their_images(table: FeatureTable) -> None:
    head, rows = fit_head(table, replace(TWO, rows=12))
    features = correct_features(table)
    assert head.bank.shape == (12, 64)
    assert sorted(set(rows.assignment.tolist())) == list(range(12))
    for row in range(12):
        own = rows.assignment == row
        np.testing.assert_allclose(head.bank[row], features[own].mean(axis=0), rtol=1e-9, atol=1e-12)
        for ood_head in head.ood_heads:  # one bank: of either OOD prototype its own mean log s
            own_log_s = log_s(features[own], head.prototypes, ood_head.prototype)
            assert ood_head.bank_log_s[row] == pytest.approx(own_log_s.mean(), rel=1e-9)
        votes = np.bincount(rows.labels[own], minlength=7)
        assert votes[rows.row_classes()[row]] == votes.max()


def test_clusters_are_those_of_the_first_prototypes_direction_and_log_s(table: FeatureTable) -> None:
    _, rows = fit_head(table, replace(TWO, rows=12))
    features, prototypes = correct_features(table), class_prototypes(table).prototypes
    v = features - prototypes.mean(axis=0)
    points = np.column_stack([v / np.linalg.norm(v, axis=1)[:, None], log_s(features, prototypes, prototypes.mean(0))])
    start, _ = kmeans_plusplus(points, 12, random_state=0, n_local_trials=1)
    found = KMeans(12, init=start, n_init=1, max_iter=bank_module.KMEANS_ITERATIONS, random_state=0).fit(points)
    np.testing.assert_array_equal(rows.assignment, found.labels_)


def test_nearest_names_are_of_an_image_of_the_row(table: FeatureTable) -> None:
    head, rows = fit_head(table, replace(PLAN, rows=12))
    place = {name: i for i, name in enumerate(rows.names)}
    for row, name in enumerate(rows.nearest_names()):
        own = np.flatnonzero((rows.assignment == row) & (rows.labels == rows.row_classes()[row]))
        distance = np.linalg.norm(rows.features[own] - head.bank[row], axis=1)
        assert place[name] == own[distance.argmin()]
    full, all_rows = fit_head(table, PLAN)
    assert all_rows.nearest_names() == all_rows.names
    assert len(full.bank) == len(all_rows.names)


@pytest.mark.parametrize("rows", [None, 24])
def test_int8_rows_equal_what_the_file_reads_back(rows: int | None, table: FeatureTable) -> None:
    plan = replace(TWO, rows=rows, dtype="int8")
    head, fitted = fit_head(table, plan)
    exact, _ = fit_head(table, replace(plan, dtype="float32"))
    largest = np.abs(exact.bank - exact.prototypes.mean(axis=0)).max(axis=1, keepdims=True)
    assert (np.abs(head.bank - exact.bank) <= largest / 127 * 0.5001 + 1e-6).all()
    assert not np.array_equal(head.bank, exact.bank)
    stored = head_from_model(_model_with(head_tensors(head)))
    assert stored.bank_dtype == "int8"
    np.testing.assert_allclose(stored.bank, head.bank, atol=1e-6)
    for ours, read in zip(head.ood_heads, stored.ood_heads, strict=True):
        np.testing.assert_allclose(read.bank_log_s, ours.bank_log_s, rtol=1e-6)
    images = correct_features(table)
    np.testing.assert_array_equal(fitted.features, images)  # the rounding is of the rows, not of the images


def _model_with(tensors: dict[str, np.ndarray]) -> bytes:
    from onnx import helper, numpy_helper

    graph = helper.make_graph([], "head", [], [], [numpy_helper.from_array(v, name) for name, v in tensors.items()])
    model: bytes = helper.make_model(graph).SerializeToString()
    return model


def test_no_rows_leave_log_s_as_the_score(table: FeatureTable) -> None:
    head, rows = fit_head(table, replace(PLAN, rows=0, dtype="int8"))
    assert head.bank.shape == (0, 64)
    features = table.features.astype(np.float64)
    position = head.ood_heads[0].prototype
    np.testing.assert_allclose(ood_scores(features, head), log_s(features, head.prototypes, position), rtol=1e-12)
    assert len(rows.features) == bank_candidates(table)  # what the maps of several prototypes are fitted on


def test_small_bank_ranks_like_the_full_one(digit_pass: FeaturePass) -> None:
    features = digit_pass.fit.features.astype(np.float64)
    shifted = features + np.random.default_rng(0).standard_normal(features.shape) * features.std()
    areas = []
    for rows in (None, 64):
        head, _ = fit_head(digit_pass.fit, replace(PLAN, rows=rows))
        scores = [ood_scores(values, head).astype(np.float32) for values in (features[::2] * 1.01, shifted)]
        areas.append(auroc(scores[0], scores[1]))
    assert areas[0] > 0.9
    assert abs(areas[0] - areas[1]) < 0.03


@pytest.mark.parametrize("surplus", [0, 1, 1000])
def test_as_many_rows_as_candidates_keep_all(surplus: int, table: FeatureTable) -> None:
    head, _ = fit_head(table, replace(PLAN, rows=bank_candidates(table) + surplus))
    np.testing.assert_array_equal(head.bank, fit_head(table, PLAN)[0].bank)


def test_kmeans_is_deterministic_and_follows_the_seed(table: FeatureTable) -> None:
    a, b, c = (fit_head(table, replace(TWO, rows=20, seed=seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.bank, b.bank)
    for first, again in zip(a.ood_heads, b.ood_heads, strict=True):
        np.testing.assert_array_equal(first.bank_log_s, again.bank_log_s)
        np.testing.assert_array_equal(first.score_map.knots, again.score_map.knots)
    assert not np.array_equal(a.bank, c.bank)


def test_duplicate_images_are_no_trouble(table: FeatureTable) -> None:
    same = replace(
        table, features=np.repeat(table.features[:4], len(table.features) // 4 + 1, 0)[: len(table.features)]
    )
    head, rows = fit_head(rows_of(same, np.ones(len(same.labels), bool)), replace(TWO, rows=20))
    assert np.isfinite(head.bank).all()
    assert all(np.isfinite(ood_head.bank_log_s).all() for ood_head in head.ood_heads)
    assert rows.count == len(head.bank) <= 20
    assert np.isfinite(ood_scores(table.features.astype(np.float64), head)).all()


def test_maps_are_fitted_on_scores_without_the_images_own_row(table: FeatureTable) -> None:
    """With rows of one image each, the map sees the distance to the nearest other image's gradient."""
    small = rows_of(table, np.arange(len(table.labels)) % 3 == 0)
    head, rows = fit_head(small, TWO)
    (scores,) = bank_module._own_row_left_out(rows, [head], 0)
    for place in range(0, len(rows.features), 29):
        rest = np.arange(len(rows.features)) != place
        ood_heads = tuple(replace(h, bank_log_s=h.bank_log_s[rest]) for h in head.ood_heads)
        others = replace(head, bank=head.bank[rest], ood_heads=ood_heads)
        expected = nearest_rows(rows.features[place : place + 1].astype(np.float64), others)
        for found, nearest in zip(scores, expected, strict=True):
            assert found[place] == pytest.approx(nearest.score[0], abs=2e-2)


def test_maps_of_kmeans_rows_leave_the_image_out_of_its_row(table: FeatureTable) -> None:
    small = rows_of(table, np.arange(len(table.labels)) % 3 == 0)
    head, rows = fit_head(small, replace(TWO, rows=15))
    (scores,) = bank_module._own_row_left_out(rows, [head], 0)
    sizes = np.bincount(rows.assignment)
    for place in range(0, len(rows.features), 29):
        own = rows.assignment[place]
        rest = np.arange(len(rows.features)) != place
        bank = head.bank.copy()
        siblings = rest & (rows.assignment == own)
        keep = np.arange(len(bank)) != own if sizes[own] == 1 else np.ones(len(bank), bool)
        bank[own] = rows.features[siblings].mean(axis=0, dtype=np.float64) if siblings.any() else bank[own]
        ood_heads = []
        for ood_head in head.ood_heads:
            values = ood_head.bank_log_s.copy()
            if siblings.any():
                x = rows.features[siblings].astype(np.float64)
                values[own] = log_s(x, head.prototypes, ood_head.prototype).mean()
            ood_heads.append(replace(ood_head, bank_log_s=values[keep]))
        expected = nearest_rows(
            rows.features[place : place + 1].astype(np.float64),
            replace(head, bank=bank[keep], ood_heads=tuple(ood_heads)),
        )
        for found, nearest in zip(scores, expected, strict=True):
            assert found[place] == pytest.approx(nearest.score[0], abs=2e-2)


@pytest.mark.parametrize("rows", [None, 24, 0])
def test_tail_slopes_of_the_combination_add_up_to_one(rows: int | None, table: FeatureTable) -> None:
    head, _ = fit_head(table, replace(TWO, rows=rows))
    far = np.array([1e6])
    slopes = [float(ood_head.score_map.slope_at(far)[0]) for ood_head in head.ood_heads]
    assert min(slopes) > 0
    assert sum(slopes) == pytest.approx(1, rel=1e-9)


def test_without_class_leaves_its_images_and_empty_rows_out(table: FeatureTable) -> None:
    prototypes = class_prototypes(table).prototypes
    rows = bank_rows(table, prototypes, replace(PLAN, rows=30))
    left = rows.without_class(2)
    assert 2 not in left.labels
    assert len(left.labels) == (rows.labels != 2).sum()
    assert left.count <= rows.count
    assert sorted(set(left.assignment.tolist())) == list(range(left.count))
    kept = rows.labels != 2
    for row in range(left.count):  # the same images stay together
        (old,) = set(rows.assignment[kept][left.assignment == row].tolist())
        np.testing.assert_array_equal(left.assignment == row, rows.assignment[kept] == old)
    head = head_of(left, np.delete(prototypes, 2, axis=0), PLAN)
    np.testing.assert_allclose(head.bank, left.means(left.features))


@pytest.mark.parametrize("rows", [None, 15, 0])
def test_heads_of_several_scales_are_those_of_each_scale(rows: int | None, table: FeatureTable) -> None:
    """To the last bit: what is chosen must not depend on what is computed together."""
    plan, scales = replace(TWO, rows=rows, dtype="int8"), (0.25, 1.0, 8.0)
    fitted = fit_head(table, plan)[1]
    heads = heads_by_scale(fitted, class_prototypes(table).prototypes, plan, scales)
    features = table.features.astype(np.float64)
    for scale, head, scores in zip(scales, heads, ood_scores_by_scale(features, heads), strict=True):
        alone = head_of(fitted, head.prototypes, replace(plan, scale=scale))
        assert head.scale == alone.scale == scale
        np.testing.assert_array_equal(head.bank, alone.bank)
        for found, expected in zip(head.ood_heads, alone.ood_heads, strict=True):
            np.testing.assert_array_equal(found.bank_log_s, expected.bank_log_s)
            assert found.score_map.bias == expected.score_map.bias
            np.testing.assert_array_equal(found.score_map.knots, expected.score_map.knots)
        np.testing.assert_array_equal(scores, ood_scores(features, alone))
    assert not np.array_equal(heads[0].ood_heads[0].score_map.knots, heads[2].ood_heads[0].score_map.knots)


def test_rows_of_no_images_are_none() -> None:
    empty = BankRows(np.zeros((0, 3), np.float32), np.zeros(0, np.int64), (), np.zeros(0, np.int64))
    assert empty.count == 0


def test_no_correct_image_is_refused(table: FeatureTable) -> None:
    with pytest.raises(DatasetError, match="no image is classified correctly; check class order"):
        fit_head(replace(table, predictions=(table.labels + 1) % 7), PLAN)


def test_many_images_are_clustered_in_batches(table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = fit_head(table, replace(PLAN, rows=30))
    monkeypatch.setattr(bank_module, "FULL_KMEANS", 1000)
    head, rows = fit_head(table, replace(PLAN, rows=30))
    assert not np.array_equal(head.bank[: len(exact.bank)], exact.bank[: len(head.bank)])
    assert 15 < rows.count <= 30
    np.testing.assert_allclose(head.bank, rows.means(rows.features))


def test_maps_look_at_a_bounded_number_of_images(table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "MAP_IMAGES", 50)
    head, rows = fit_head(table, TWO)
    (scores,) = bank_module._own_row_left_out(rows, [head], 0)
    assert [len(of_one) for of_one in scores] == [50, 50]


def test_kmeans_without_scikit_learn(table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtraError, match=r"k-means bank \(--bank N\) needs .*scikit-learn"):
        fit_head(table, replace(PLAN, rows=30))
    fit_head(table, PLAN)  # a full bank does not need it


def test_a_mixup_source_moves_with_its_mixes(table: FeatureTable) -> None:
    features = table.features[:6]
    mixes = Mixes(features, table.labels[:6], (table.labels[:6] + 1) % 7, table.names[:6])
    source = OodSource(replace(MEAN.entry, source="mixup"), mixes=mixes)
    head, _ = fit_head(table, replace(PLAN, sources=(source,)))
    np.testing.assert_allclose(head.ood_heads[0].prototype, features.astype(np.float64).mean(axis=0))
