"""Where the OOD prototypes lie: mean, origin, mixes, noise and the user's own images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from grood_edge.contract import OodPrototype
from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError, UsageError
from grood_edge.export.features import Reading
from grood_edge.export.ood_prototype import (
    NOISE_KEPT,
    NOISE_PER_ROUND,
    NOISE_ROUNDS,
    Mixes,
    OodSource,
    images_source,
    noise_images,
    noise_source,
    plain_source,
    source_names,
)
from grood_edge.images import find_images, load_image
from grood_edge.ort import OrtModel
from grood_edge.preprocessing import Preprocessing, preprocess_frame


@pytest.fixture
def reading(digit_preprocessing: Preprocessing) -> Reading:
    return Reading(digit_preprocessing, 7)


def test_mean_and_origin_follow_from_the_class_prototypes() -> None:
    prototypes = np.random.default_rng(0).standard_normal((4, 6))
    for name, expected in (("mean", prototypes.mean(axis=0)), ("origin", np.zeros(6))):
        source = plain_source(name)
        assert source.position is None
        np.testing.assert_array_equal(source.at(prototypes), expected)
        entry = source.entry
        assert (entry.source, entry.images, entry.uses_ood_data, entry.layer) == (name, 0, False, None)
        assert source.without_class(1) is source
        assert source.without_images(("a",)) is source


@pytest.fixture
def mixed() -> OodSource:
    features = np.arange(12, dtype=np.float32).reshape(4, 3)
    mixes = Mixes(features, np.array([0, 0, 1, 2]), np.array([1, 2, 2, 0]), ("a", "b", "c", "d"))
    return OodSource(OodPrototype("mixup", 4, False, "relu"), mixes=mixes)


def test_mixes_lose_a_class_and_images(mixed: OodSource) -> None:
    prototypes = np.zeros((3, 3))
    np.testing.assert_array_equal(mixed.at(prototypes), [4.5, 5.5, 6.5])
    without = mixed.without_class(1)  # "b" and "d" have no part of class 1
    assert without.mixes is not None
    assert without.mixes.names == ("b", "d")
    np.testing.assert_array_equal(without.at(prototypes), [6, 7, 8])
    np.testing.assert_array_equal(mixed.without_images(("a", "d", "z")).at(prototypes), [4.5, 5.5, 6.5])
    np.testing.assert_array_equal(mixed.without_images(("a",)).at(prototypes), [6, 7, 8])
    assert mixed.without_class(3) is mixed
    assert mixed.without_images(("a", "b", "c", "d")) is mixed  # with none left, all are the best guess


@pytest.mark.parametrize("text", ["magic", "", "Mean", "images", "noise:3", "mean,", "mean;origin"])
def test_unknown_source_is_refused(text: str) -> None:
    expected = "is unknown; expected auto, or some of mean, mixup, noise, origin and images:DIR"
    with pytest.raises(UsageError, match=expected):
        source_names(text)


@pytest.mark.parametrize("text", ["mean,mean", "auto,mean", "noise,auto", "auto,auto"])
def test_repeated_sources_and_auto_beside_others_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected every source once, and auto alone"):
        source_names(text)


def test_several_sources_and_a_folder(digits: DemoImages) -> None:
    folder = f"images:{digits.far_photos}"
    assert source_names("auto") == ("auto",)
    assert source_names("mixup") == ("mixup",)
    assert source_names(f"mean, {folder},origin") == ("mean", folder, "origin")


def test_folder_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        source_names(f"mean,images:{tmp_path / 'nowhere'}")


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
    source = noise_source(digit_model, reading)
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
    positions = [noise_source(digit_model, Reading(digit_preprocessing, 7, seed=seed)).position for seed in (0, 0, 1)]
    np.testing.assert_array_equal(positions[0], positions[1])
    assert not np.allclose(np.asarray(positions[0]), np.asarray(positions[2]))
    calls: list[int] = []
    noise_source(digit_model, reading, lambda label, done, total: calls.append(done))
    assert calls == list(range(1, NOISE_ROUNDS + 1))


def test_images_give_the_mean_of_their_features_and_say_so(
    digits: DemoImages, digit_model: OrtModel, reading: Reading
) -> None:
    source = images_source(f"images:{digits.far_photos}", digit_model, reading)
    frames = np.stack(
        [preprocess_frame(load_image(path), reading.preprocessing) for path in find_images(digits.far_photos)]
    )
    expected = digit_model.run({"image": frames})["features"].astype(np.float64).mean(axis=0)
    assert source.position is not None
    np.testing.assert_allclose(source.position, expected, rtol=1e-4, atol=1e-5)
    assert (source.entry.source, source.entry.images, source.entry.uses_ood_data) == ("images", len(frames), True)


def test_images_of_an_empty_folder_are_refused(digit_model: OrtModel, reading: Reading, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="contains no image file"):
        images_source(f"images:{tmp_path}", digit_model, reading)


def test_sources_in_the_logit_space(digits: DemoImages, digit_model: OrtModel, reading: Reading) -> None:
    in_logits = replace(reading, space="logits")
    frames = np.stack(
        [preprocess_frame(load_image(path), reading.preprocessing) for path in find_images(digits.far_photos)]
    )
    source = images_source(f"images:{digits.far_photos}", digit_model, in_logits)
    expected = digit_model.run({"image": frames})["logits"].astype(np.float64).mean(axis=0)
    assert source.position is not None
    np.testing.assert_allclose(source.position, expected, rtol=1e-4, atol=1e-5)
    noise = noise_source(digit_model, in_logits).position
    assert noise is not None
    assert noise.shape == (7,)
