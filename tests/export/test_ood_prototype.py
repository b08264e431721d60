"""Where the OOD prototype lies: mean, noise and the user's own images."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError, UsageError
from grood_edge.export.features import Reading
from grood_edge.export.ood_prototype import NOISE_KEPT, NOISE_PER_ROUND, NOISE_ROUNDS, noise_images, ood_source
from grood_edge.images import find_images, load_image
from grood_edge.ort import OrtModel
from grood_edge.preprocessing import Preprocessing, preprocess_frame


@pytest.fixture
def reading(digit_preprocessing: Preprocessing) -> Reading:
    return Reading(digit_preprocessing, 7)


def test_mean_leaves_the_position_to_the_fit(digit_model: OrtModel, reading: Reading) -> None:
    source = ood_source("mean", digit_model, reading)
    assert source.position is None
    assert (source.entry.source, source.entry.images, source.entry.uses_ood_data) == ("mean", 0, False)


@pytest.mark.parametrize("text", ["mixup", "", "Mean", "images", "noise:3"])
def test_unknown_source_is_refused(text: str, digit_model: OrtModel, reading: Reading) -> None:
    with pytest.raises(UsageError, match="is unknown; expected mean, noise or images:DIR"):
        ood_source(text, digit_model, reading)


def test_blur_is_a_gaussian_of_the_stated_kernel() -> None:
    images = noise_images(np.random.default_rng(5), 4, 20, 23, 3)
    assert images.dtype == np.uint8
    assert images.shape == (4, 20, 23, 3)
    rng = np.random.default_rng(5)
    raw = rng.random((4, 20, 23, 3), dtype=np.float32).astype(np.float64)
    sigmas = rng.uniform(0.2, 5.0, size=4)
    for image, noise, sigma in zip(images, raw, sigmas, strict=True):
        blurred = noise
        for axis, radius in ((0, 2), (1, 3)):  # kernel height 5, width 7
            blurred = ndimage.gaussian_filter1d(blurred, sigma, axis=axis, radius=radius, mode="reflect")
        np.testing.assert_allclose(image, 255 * blurred, atol=0.51)
    assert images[sigmas.argmin()].std() > images[sigmas.argmax()].std()


def test_noise_keeps_the_least_id_like_images(digit_model: OrtModel, reading: Reading) -> None:
    source = ood_source("noise", digit_model, reading)
    rng = np.random.default_rng(reading.seed)
    kept, left = [], []
    for _ in range(NOISE_ROUNDS):
        frames = noise_images(rng, NOISE_PER_ROUND, 32, 32, 1)
        outputs = digit_model.run({"image": frames})
        energy = np.log(np.exp(outputs["logits"].astype(np.float64)).sum(axis=1))
        order = energy.argsort()
        kept.append(outputs["features"][order[:NOISE_KEPT]])
        left.append(outputs["features"][order[NOISE_KEPT:]])
    expected = np.concatenate(kept).astype(np.float64).mean(axis=0)
    assert source.position is not None
    np.testing.assert_allclose(source.position, expected, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(source.position - np.concatenate(left).mean(axis=0)) > 10 * np.linalg.norm(
        source.position - expected
    )
    assert (source.entry.source, source.entry.images, source.entry.uses_ood_data) == ("noise", 100, False)


def test_noise_depends_on_the_seed_alone(
    digit_model: OrtModel, reading: Reading, digit_preprocessing: Preprocessing
) -> None:
    positions = [
        ood_source("noise", digit_model, Reading(digit_preprocessing, 7, seed=seed)).position for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(positions[0], positions[1])
    assert not np.allclose(np.asarray(positions[0]), np.asarray(positions[2]))
    calls: list[int] = []
    ood_source("noise", digit_model, reading, lambda label, done, total: calls.append(done))
    assert calls == list(range(1, NOISE_ROUNDS + 1))


def test_images_give_the_mean_of_their_features_and_say_so(
    digits: DemoImages, digit_model: OrtModel, reading: Reading
) -> None:
    source = ood_source(f"images:{digits.far_photos}", digit_model, reading)
    frames = np.stack(
        [preprocess_frame(load_image(path), reading.preprocessing) for path in find_images(digits.far_photos)]
    )
    expected = digit_model.run({"image": frames})["features"].astype(np.float64).mean(axis=0)
    assert source.position is not None
    np.testing.assert_allclose(source.position, expected, rtol=1e-4, atol=1e-5)
    assert (source.entry.source, source.entry.images, source.entry.uses_ood_data) == ("images", len(frames), True)


def test_images_of_an_empty_folder_are_refused(digit_model: OrtModel, reading: Reading, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="contains no image file"):
        ood_source(f"images:{tmp_path}", digit_model, reading)
