"""The scale of the distances: shuffled images, the choice among scales, and what a scale does to the score."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.errors import UsageError
from grood_edge.export import ExportOptions, export_model
from grood_edge.export.bank import HeadPlan, fit_head
from grood_edge.export.features import FeaturePass, Reading
from grood_edge.export.ood_prototype import plain_source
from grood_edge.export.scale import SCALES, choose_scale, shuffled_features, shuffled_patches
from grood_edge.ort import OrtModel
from grood_edge.preprocessing import Preprocessing
from grood_edge.scoring import ood_scores
from tests.export.conftest import DIGIT_PREPROCESSING, Batches

PLAN = HeadPlan((plain_source("mean"), plain_source("origin")), None, "int8", 0)


@pytest.fixture(scope="module")
def shuffled(digit_pass: FeaturePass, digit_model: OrtModel, digit_preprocessing: Preprocessing) -> np.ndarray:
    return shuffled_features(digit_model, digit_pass, Reading(digit_preprocessing, 7))


def test_shuffled_patches_are_the_same_patches_elsewhere() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 34, 41, 3), dtype=np.uint8)
    shuffled = shuffled_patches(frames, seed=3)

    def patches(frame: np.ndarray) -> list[bytes]:
        return [frame[y : y + 8, x : x + 10].tobytes() for y in range(0, 32, 8) for x in range(0, 40, 10)]

    for before, after in zip(frames, shuffled, strict=True):
        assert sorted(patches(before)) == sorted(patches(after))
        assert patches(before) != patches(after)
    np.testing.assert_array_equal(shuffled[:, 32:], frames[:, 32:])  # what is left over stays
    np.testing.assert_array_equal(shuffled[:, :, 40:], frames[:, :, 40:])
    orders = {tuple(patches(a).index(p) for p in patches(b)) for a, b in zip(frames, shuffled, strict=True)}
    assert len(orders) == len(frames)  # each frame has its own order
    np.testing.assert_array_equal(shuffled, shuffled_patches(frames, seed=3))
    assert (shuffled != shuffled_patches(frames, seed=4)).any()


def test_images_of_seven_pixels_can_be_shuffled() -> None:
    frames = np.arange(2 * 7 * 7, dtype=np.uint8).reshape(2, 7, 7, 1)
    assert sorted(shuffled_patches(frames, 0).ravel()) == sorted(frames.ravel())


def test_choice_is_the_scale_that_finds_shuffled_images_best(digit_pass: FeaturePass, shuffled: np.ndarray) -> None:
    chosen = choose_scale(digit_pass.fit, shuffled, PLAN)
    assert [trial.scale for trial in chosen.trials] == list(SCALES)
    best = max(trial.auroc for trial in chosen.trials)
    assert {trial.auroc for trial in chosen.trials if trial.scale == chosen.value} == {best}
    assert 0.9 < best <= 1  # digits cut into pieces are no digits
    assert chosen == choose_scale(digit_pass.fit, shuffled, PLAN)


def test_choice_follows_the_length_of_the_features(digit_pass: FeaturePass, shuffled: np.ndarray) -> None:
    """Features ten times as long are the same network: the scale falls by ten, to within the grid's factor of two."""
    table = digit_pass.fit
    longer = replace(table, features=table.features * np.float32(16), class_sums=table.class_sums * 16)
    before = choose_scale(table, shuffled, PLAN)
    after = choose_scale(longer, shuffled * np.float32(16), PLAN)
    measured = {trial.scale: trial.auroc for trial in before.trials}
    for trial in after.trials:
        if trial.scale * 16 in measured:
            assert trial.auroc == pytest.approx(measured[trial.scale * 16], abs=1e-3)


def test_without_a_difference_the_scale_stays_one(digit_pass: FeaturePass) -> None:
    far = np.full((32, 64), -3, np.float32)  # behind the ReLU: found at every scale
    chosen = choose_scale(digit_pass.fit, far, PLAN)
    assert {trial.auroc for trial in chosen.trials} == {1.0}
    assert chosen.value == 1


def test_scale_is_a_factor_on_features_and_prototypes(digit_pass: FeaturePass) -> None:
    """Source: softmax(-a d) over features h is softmax(-d) over a h; directions do not change."""
    table = digit_pass.fit
    single = replace(PLAN, sources=PLAN.sources[:1], dtype="float32")
    features = table.features[:50].astype(np.float64) + 0.01
    head, _ = fit_head(table, replace(single, scale=4.0))
    longer = replace(table, features=table.features * np.float32(4), class_sums=table.class_sums * 4)
    plain, _ = fit_head(longer, single)
    np.testing.assert_allclose(ood_scores(features, head), ood_scores(4 * features, plain), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), 1e7])
def test_scale_out_of_range_is_refused(scale: float, digit_onnx: Path, train_batches: Batches, tmp_path: Path) -> None:
    options = ExportOptions(preprocessing=DIGIT_PREPROCESSING, scale=scale)
    with pytest.raises(UsageError, match=r"--scale .*; expected auto or a number from 1e-06 to 1e\+06"):
        export_model(digit_onnx, train_batches, tmp_path / "out.onnx", options)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_artifact_has_the_scale_that_was_asked_for(
    scale: float, digit_onnx: Path, train_batches: Batches, tmp_path: Path
) -> None:
    options = ExportOptions(preprocessing=DIGIT_PREPROCESSING, scale=scale, bank=32)
    report = export_model(digit_onnx, train_batches, tmp_path / "out.onnx", options)
    assert report.verification.largest_score_error < 2e-4
    entry = read_artifact(tmp_path / "out.onnx").contract.scale
    assert (entry.value, entry.reason, entry.trials) == (scale, "as asked for", ())
