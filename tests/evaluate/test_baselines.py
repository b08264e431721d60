"""Each baseline against scikit-learn or against its paper's own formula, on features with classes."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import spearmanr
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from grood_edge.evaluate import baselines as module
from grood_edge.evaluate.baselines import BASELINES, FitRows, build_baselines
from grood_edge.evaluate.linear import LinearLayer
from grood_edge.evaluate.metrics import auroc

D, K = 24, 5


def features_of(seed: int, count: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative features around K class means, as after a ReLU."""
    means = np.random.default_rng(99).normal(0, 3, (K, D))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, count)
    rows = np.maximum(means[labels] + rng.normal(0, 1, (count, D)) + shift * rng.normal(0, 1, (count, D)), 0)
    return rows.astype(np.float32), labels.astype(np.int64)


LAYER = LinearLayer(*(np.random.default_rng(7).normal(0, 1, shape).astype(np.float32) for shape in ((K, D), (K,))))
FIT, FIT_LABELS = features_of(0, 600)
MEANS = np.stack([FIT[c == FIT_LABELS].mean(axis=0, dtype=np.float64) for c in range(K)])
ROWS = FitRows(FIT, LAYER.logits(FIT), FIT_LABELS, MEANS, "", len(FIT))
TEST, _ = features_of(1, 200)
LOGITS = LAYER.logits(TEST)


@pytest.fixture(scope="module")
def scores() -> dict[str, np.ndarray]:
    return build_baselines(ROWS, LAYER, "", TEST)(TEST, LOGITS)


def test_all_eight_are_there_and_none_is_left_out(scores: dict[str, np.ndarray]) -> None:
    assert tuple(scores) == BASELINES
    assert {values.dtype for values in scores.values()} == {np.dtype(np.float32)}
    assert build_baselines(ROWS, LAYER, "", TEST).left_out == ()


def test_those_of_the_logits(scores: dict[str, np.ndarray]) -> None:
    largest = softmax(LOGITS.astype(np.float64), axis=1).max(axis=1)
    np.testing.assert_allclose(1 / (1 + np.exp(scores["MSP"])), largest, rtol=1e-5)
    np.testing.assert_allclose(scores["max logit"], -LOGITS.max(axis=1))
    np.testing.assert_allclose(scores["energy"], -logsumexp(LOGITS, axis=1), rtol=1e-5)


def test_msp_does_not_saturate() -> None:
    """Softmax in float32 gives exactly 1 for both, and ties would cost AUROC."""
    sure, surer = np.array([[30.0, 0.0], [60.0, 0.0]], np.float32)
    values = build_baselines(None, None, "", TEST).scores["MSP"](np.zeros((2, D), np.float32), np.stack([sure, surer]))
    assert values[0] > values[1]


def test_those_of_distances_equal_scikit_learn(scores: dict[str, np.ndarray]) -> None:
    nearest, _ = NearestNeighbors(n_neighbors=1).fit(MEANS).kneighbors(TEST)
    np.testing.assert_allclose(scores["nearest prototype"], nearest[:, 0], rtol=1e-5)
    unit = FIT / np.linalg.norm(FIT, axis=1, keepdims=True)
    tenth, _ = NearestNeighbors(n_neighbors=10).fit(unit).kneighbors(TEST / np.linalg.norm(TEST, axis=1, keepdims=True))
    np.testing.assert_allclose(scores["KNN"], tenth[:, 9], atol=1e-4)
    covariance = EmpiricalCovariance(assume_centered=True).fit(FIT - MEANS[FIT_LABELS])
    squares = np.stack([covariance.mahalanobis(TEST - mean) for mean in MEANS]).min(axis=0)
    np.testing.assert_allclose(scores["Mahalanobis"] ** 2, squares, rtol=1e-4)


def test_vim_equals_the_papers_formula(scores: dict[str, np.ndarray]) -> None:
    """Virtual logit alpha ||x_R||; the score is the probability of the virtual class, monotone in ours."""
    origin = -np.linalg.pinv(LAYER.weight.astype(np.float64)) @ LAYER.bias
    covariance = EmpiricalCovariance(assume_centered=True).fit(FIT - origin)
    values, vectors = np.linalg.eig(covariance.covariance_)
    rest = np.ascontiguousarray(vectors.T[np.argsort(-values)[D // 2 :]].T)
    virtual = np.linalg.norm((FIT - origin) @ rest, axis=-1)
    alpha = ROWS.logits.max(axis=-1).mean() / virtual.mean()
    test_virtual = np.linalg.norm((TEST - origin) @ rest, axis=-1) * alpha
    np.testing.assert_allclose(scores["ViM"], test_virtual - logsumexp(LOGITS, axis=1), rtol=1e-4, atol=1e-4)
    probability = softmax(np.column_stack([LOGITS, test_virtual]), axis=1)[:, -1]
    assert spearmanr(probability, scores["ViM"]).statistic > 0.9999


def test_scale_equals_the_papers_formula(scores: dict[str, np.ndarray]) -> None:
    kept = D - int(np.round(D * 85 / 100))
    factor = np.exp(TEST.sum(axis=1) / np.sort(TEST, axis=1)[:, -kept:].sum(axis=1))
    expected = -logsumexp((TEST * factor[:, None]) @ LAYER.weight.T + LAYER.bias, axis=1)
    np.testing.assert_allclose(scores["SCALE"], expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["nearest prototype", "KNN", "Mahalanobis", "ViM"])
def test_higher_means_more_ood(name: str, scores: dict[str, np.ndarray]) -> None:
    far, _ = features_of(2, 200, shift=3.0)
    assert auroc(scores[name], build_baselines(ROWS, LAYER, "", TEST)(far, LAYER.logits(far))[name]) > 0.8


def test_what_is_missing_leaves_out_what_needs_it_and_says_why() -> None:
    nothing = build_baselines(None, None, "no last layer", TEST)
    assert tuple(nothing.scores) == ("MSP", "max logit", "energy")
    reasons = dict(nothing.left_out)
    assert "--fit DIR" in reasons["KNN"]
    assert reasons["ViM"] == reasons["SCALE"] == "no last layer"
    assert "--fit DIR" in dict(build_baselines(None, LAYER, "", TEST).left_out)["ViM"]
    negative = build_baselines(ROWS, LAYER, "", TEST - 1)
    assert "negative" in dict(negative.left_out)["SCALE"]


def test_wide_features_need_no_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DIMENSION", D - 1)
    wide = build_baselines(ROWS, LAYER, "", TEST)
    assert [name for name, _ in wide.left_out] == ["Mahalanobis", "ViM"]
    assert "KNN" in wide.scores


def test_fewer_images_than_features_or_neighbours_still_give_finite_scores() -> None:
    few = FitRows(FIT[:6], ROWS.logits[:6], FIT_LABELS[:6], FIT[:6].astype(np.float64), "", 6)
    for name, values in build_baselines(few, LAYER, "", TEST)(TEST, LOGITS).items():
        assert np.isfinite(values).all(), name
