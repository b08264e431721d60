"""The gradient bank: every correctly classified image, or k-means centres of (u, log s)."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.cluster import KMeans

from grood_edge.errors import DatasetError, MissingExtraError
from grood_edge.evaluate.metrics import auroc
from grood_edge.export import bank as bank_module
from grood_edge.export.bank import bank_candidates, fit_head
from grood_edge.export.features import FeaturePass, FeatureTable, rows_of
from grood_edge.export.prototypes import class_prototypes
from grood_edge.scoring import gradients, ood_scores


@pytest.fixture
def table(digit_pass: FeaturePass) -> FeatureTable:
    """The training digits, every ninth of them called misclassified."""
    fit = digit_pass.fit
    predictions = np.where(np.arange(len(fit.labels)) % 9 == 0, (fit.labels + 1) % 7, fit.labels)
    return rows_of(replace(fit, predictions=predictions), np.ones(len(predictions), bool))


def test_full_bank_holds_the_gradients_of_the_correct_images(table: FeatureTable) -> None:
    head = fit_head(table, None, None, 0)
    correct = table.labels == table.predictions
    prototypes = class_prototypes(table).prototypes
    g = gradients(table.features[correct].astype(np.float64), prototypes, prototypes.mean(axis=0))
    np.testing.assert_array_equal(head.only().prototype, prototypes.mean(axis=0))
    np.testing.assert_array_equal(head.only().bank, g.u)
    np.testing.assert_array_equal(head.only().bank_log_s, g.log_s)
    assert bank_candidates(table) == correct.sum() == len(head.only().bank)
    np.testing.assert_allclose(np.linalg.norm(head.only().bank, axis=1), 1, rtol=1e-12)


def test_given_position_is_the_ood_prototype(table: FeatureTable) -> None:
    position = np.linspace(0, 1, 64)
    np.testing.assert_array_equal(fit_head(table, position, None, 0).only().prototype, position)


def test_kmeans_centres_are_unit_rows_with_mean_log_s(table: FeatureTable) -> None:
    full, small = fit_head(table, None, None, 0).only(), fit_head(table, None, 12, 0).only()
    assert small.bank.shape == (12, 64)
    np.testing.assert_allclose(np.linalg.norm(small.bank, axis=1), 1, rtol=1e-12)
    # Every centre is the mean of the gradients nearest to it, in (u, log s): k-means' own fixed point.
    points = np.concatenate([full.bank, full.bank_log_s[:, None]], axis=1)
    lengths = np.ones(12)
    for _ in range(50):  # the length that u had before it was brought to one is found by iterating
        centres = np.concatenate([small.bank * lengths[:, None], small.bank_log_s[:, None]], axis=1)
        owner = ((points[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        means = np.stack([points[owner == row].mean(axis=0) for row in range(12)])
        lengths = np.linalg.norm(means[:, :-1], axis=1)
    np.testing.assert_allclose(means[:, -1], small.bank_log_s, atol=1e-6)
    np.testing.assert_allclose(means[:, :-1] / lengths[:, None], small.bank, atol=1e-6)
    assert np.bincount(owner, minlength=12).min() > 0


def test_small_bank_ranks_like_the_full_one(digit_pass: FeaturePass) -> None:
    features = digit_pass.fit.features.astype(np.float64)
    shifted = features + np.random.default_rng(0).standard_normal(features.shape) * features.std()
    areas = []
    for rows in (None, 64):
        head = fit_head(digit_pass.fit, None, rows, 0)
        scores = [ood_scores(values, head).astype(np.float32) for values in (features[::2] * 1.01, shifted)]
        areas.append(auroc(scores[0], scores[1]))
    assert areas[0] > 0.9
    assert abs(areas[0] - areas[1]) < 0.03


@pytest.mark.parametrize("surplus", [0, 1, 1000])
def test_as_many_rows_as_candidates_keep_all(surplus: int, table: FeatureTable) -> None:
    head = fit_head(table, None, bank_candidates(table) + surplus, 0)
    np.testing.assert_array_equal(head.only().bank, fit_head(table, None, None, 0).only().bank)


def test_kmeans_is_deterministic_and_follows_the_seed(table: FeatureTable) -> None:
    a, b, c = (fit_head(table, None, 20, seed).only() for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.bank, b.bank)
    np.testing.assert_array_equal(a.bank_log_s, b.bank_log_s)
    assert not np.array_equal(a.bank, c.bank)


def test_duplicate_images_are_no_trouble(table: FeatureTable) -> None:
    same = replace(
        table, features=np.repeat(table.features[:4], len(table.features) // 4 + 1, 0)[: len(table.features)]
    )
    head = fit_head(rows_of(same, np.ones(len(same.labels), bool)), None, 20, 0)
    assert np.isfinite(head.only().bank).all()
    assert np.isfinite(head.only().bank_log_s).all()


def test_kmeans_sees_a_bounded_sample(table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "KMEANS_ROWS", 150)
    head = fit_head(table, None, 30, 4)
    features = table.features[table.labels == table.predictions].astype(np.float64)
    chosen = np.sort(np.random.default_rng(4).choice(len(features), 150, replace=False))
    g = gradients(features[chosen], head.prototypes, head.only().prototype)
    points = np.concatenate([g.u, g.log_s[:, None]], axis=1)
    centres = KMeans(30, n_init=1, max_iter=50, random_state=4).fit(points).cluster_centers_
    np.testing.assert_allclose(head.only().bank_log_s, centres[:, -1], rtol=1e-9)
    assert len(fit_head(table, None, 200, 4).only().bank) == 200  # a larger bank sees more


def test_no_correct_image_is_refused(table: FeatureTable) -> None:
    with pytest.raises(DatasetError, match="no image is classified correctly; check class order"):
        fit_head(replace(table, predictions=(table.labels + 1) % 7), None, None, 0)


def test_full_bank_of_too_many_images_is_refused(table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "MAX_ROWS", 100)
    with pytest.raises(DatasetError, match=rf"a full bank of {table.images} images does not fit.* Use --bank N"):
        fit_head(table, None, None, 0)
    assert len(fit_head(table, None, 30, 0).only().bank) == 30


def test_kmeans_without_scikit_learn(table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtraError, match=r"k-means bank \(--bank N\) needs .*scikit-learn"):
        fit_head(table, None, 30, 0)
    fit_head(table, None, None, 0)  # a full bank does not need it
