"""Resize and crop against torchvision's rule written out with Pillow, on real photos; options and bad frames."""

import hashlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image
from sklearn.datasets import load_digits

from grood_edge.arrays import Frame
from grood_edge.errors import FrameError, UsageError
from grood_edge.preprocessing import (
    PRESETS,
    Camera,
    Preprocessing,
    PreprocessingOptions,
    camera_frame,
    placement_of,
    preprocess_frame,
    resolve_preprocessing,
)
from tests.without_hook import without_hook

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
LARGEST_DIFFERENCE = 2  # grey levels: each axis is rounded once, and `box=` rounds some halves the other way
SHARE_ABOVE_ONE = 2e-5  # of all values


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    folder = Path(skimage.__file__).parent / "data"
    names = ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg", "text.png", "page.png", "brick.png")
    return [Image.open(folder / name).convert("RGB") for name in names]


def options(**values: Any) -> PreprocessingOptions:
    return PreprocessingOptions(**values)


def resolved(channels: int = 3, **values: Any) -> Preprocessing:
    return resolve_preprocessing(options(**values), channels, (None, None))


def torchvision_rule(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """torchvision.transforms.Resize(short side) and CenterCrop, or Resize((h, w)); columns before rows, as in Pillow
    before version 13, with which today's networks were trained."""
    resampling = FILTERS[p.filter]

    def resize(size: tuple[int, int]) -> Image.Image:
        return image.resize((size[0], image.height), resampling).resize(size, resampling)

    if p.short_side is None:
        return np.asarray(resize((p.width, p.height)))
    w, h = image.size
    size = (p.short_side, int(p.short_side * h / w)) if w <= h else (int(p.short_side * w / h), p.short_side)
    top, left = round((size[1] - p.height) / 2.0), round((size[0] - p.width) / 2.0)
    return np.asarray(resize(size).crop((left, top, left + p.width, top + p.height)))


def differences(image: Image.Image, p: Preprocessing) -> np.ndarray:
    expected, found = torchvision_rule(image, p), preprocess_frame(np.asarray(image), p)
    return np.asarray(np.abs(found.astype(int) - expected.reshape(found.shape).astype(int)))


def random_part(rng: np.random.Generator, image: Image.Image, largest: int) -> Image.Image:
    w, h = (int(rng.integers(1, min(side, largest) + 1)) for side in image.size)
    left, top = int(rng.integers(0, image.width - w + 1)), int(rng.integers(0, image.height - h + 1))
    return image.crop((left, top, left + w, top + h))


@pytest.mark.parametrize("name", list(FILTERS))
@pytest.mark.parametrize("crop", ["center", "stretch"])
def test_geometry_on_random_sizes(photos: list[Image.Image], name: Any, crop: Any) -> None:
    rng = np.random.default_rng(0)
    values = above_one = 0
    for i in range(160):
        image = random_part(rng, photos[i % len(photos)], (40, 400)[i % 2])
        if i % 5 == 0:
            image = image.resize((min(image.size),) * 2)
        height, width = (int(v) for v in rng.integers(8, 100, 2))
        resize = int(max(height, width) + rng.integers(0, 40)) if crop == "center" and i % 3 else None
        p = resolved(input_size=(height, width), filter=name, crop=crop, resize=resize)
        difference = differences(image, p)
        assert difference.max() <= LARGEST_DIFFERENCE, (image.size, p)
        values += difference.size
        above_one += int((difference > 1).sum())
    assert above_one <= SHARE_ABOVE_ONE * values


@pytest.mark.parametrize("preset", ["imagenet", "efficientnet-lite", "inception"])
def test_presets_on_whole_photos(photos: list[Image.Image], preset: str) -> None:
    for photo in photos:
        assert differences(photo, resolved(preset=preset)).max() <= 1


def test_real_digits(photos: list[Image.Image]) -> None:
    p = resolved(channels=1, input_size=(28, 28))
    for pixels in load_digits().images[:50]:
        image = Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8))
        assert differences(image, p).max() <= 1


def test_a_frame_of_the_input_size_is_cropped_like_any_other(photos: list[Image.Image]) -> None:
    """224x224 is not "already preprocessed": the network saw the inner part of such frames in training."""
    image = photos[0].resize((224, 224))
    p = resolved(preset="imagenet")
    assert differences(image, p).max() <= 1
    assert np.abs(preprocess_frame(np.asarray(image), p).astype(int) - np.asarray(image)).max() > 50


def test_a_frame_that_needs_nothing_is_left_alone(photos: list[Image.Image]) -> None:
    frame = np.asarray(photos[1].resize((64, 48)))
    np.testing.assert_array_equal(preprocess_frame(frame, resolved(input_size=(48, 64), crop="stretch")), frame)
    p = resolved(input_size=(48, 48), resize=48)
    np.testing.assert_array_equal(preprocess_frame(frame, p), frame[:, 8:56])


def test_nearest_takes_source_pixels(photos: list[Image.Image]) -> None:
    """An index in every pixel: each output pixel comes from where the rule points, or from its neighbour."""
    for height, width, short in [(40, 30, 70), (77, 200, 70), (201, 99, 80), (1, 50, 64)]:
        index = np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.arange(width)[None], 0), axis=-1)
        p = resolved(input_size=(60, 52), filter="nearest", resize=short)
        found = preprocess_frame(index.astype(np.uint8), p).astype(int)
        scale = min(height, width) / short
        size = [short * side // min(height, width) for side in (height, width)]
        for axis, (kept, resized, source) in enumerate(zip((60, 52), size, (height, width), strict=True)):
            exact = (np.arange(kept) + 0.5 + round((resized - kept) / 2)) * source / resized
            rows = np.take(found[..., axis], 0, axis=1 - axis)
            assert np.abs(rows + 0.5 - exact).max() <= 0.5 + 1e-3, (height, width, scale)


def test_result_does_not_depend_on_the_pillow_version(photos: list[Image.Image]) -> None:
    """Pillow 13 resamples some tall frames rows first, and bicubic clips its overshoots in between: other pixels."""
    scan = Image.fromarray((np.asarray(photos[5].crop((0, 0, 60, 172))) > 128).astype(np.uint8) * 255)
    p = resolved(input_size=(60, 90), filter="bicubic", crop="stretch")

    def resize(between: tuple[int, int]) -> np.ndarray:
        both = scan.resize(between, FILTERS["bicubic"]).resize((90, 60), FILTERS["bicubic"])
        return np.asarray(both).astype(int)

    columns_first, rows_first = resize((90, 172)), resize((60, 60))
    assert np.abs(rows_first - columns_first).max() > 10  # the order does matter
    assert np.abs(preprocess_frame(np.asarray(scan), p) - columns_first).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 8000), (8000, 1), (3, 3000), (4320, 7680), (7680, 4320), (2, 2)])
@pytest.mark.parametrize("crop", ["center", "stretch"])
def test_any_size(shape: tuple[int, int], crop: Any) -> None:
    p = resolved(preset="imagenet", crop=crop)
    ramp = np.linspace(0, 255, shape[1]).astype(np.uint8)
    frame = np.broadcast_to(ramp[None, :, None], (*shape, 3))
    result = preprocess_frame(frame, p)
    assert result.shape == (224, 224, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert (np.diff(result[100, :, 0].astype(int)) >= 0).all()
    if shape[1] > 1 and crop == "stretch":
        assert result[0, 0, 0] < 5
        assert result[0, -1, 0] > 250


@pytest.mark.parametrize("shape", [(1, 200_000), (200_000, 1)])
def test_memory_stays_small_for_a_line(shape: tuple[int, int]) -> None:
    """Resizing first would take a picture of 256 x 51 million pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert preprocess_frame(pixels, resolved(preset="imagenet")).shape == (224, 224, 3)
    assert preprocess_frame(pixels, resolved(input_size=(64, 64), crop="stretch")).shape == (64, 64, 3)


def test_grey_becomes_rgb_and_rgb_becomes_grey(photos: list[Image.Image]) -> None:
    rgb = np.asarray(photos[2].resize((40, 30)))
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    to_rgb, to_grey = resolved(input_size=(30, 40), crop="stretch"), resolved(channels=1, input_size=(30, 40))
    for frame in (grey, grey[..., None]):
        np.testing.assert_array_equal(preprocess_frame(frame, to_rgb), np.repeat(grey[..., None], 3, axis=2))
        np.testing.assert_array_equal(preprocess_frame(frame, to_grey), grey[..., None])
    np.testing.assert_array_equal(preprocess_frame(rgb, to_grey)[..., 0], grey)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    assert np.abs(preprocess_frame(rgb, to_grey)[..., 0] - luma).max() <= 1


def test_read_only_and_strided_frames(photos: list[Image.Image]) -> None:
    frame = np.asarray(photos[0])
    p = resolved(input_size=(50, 60))
    expected = preprocess_frame(frame.copy(), p)
    read_only = frame.copy()
    read_only.flags.writeable = False
    bgr_view = frame[..., ::-1].copy()[..., ::-1]
    for view in (read_only, bgr_view, np.asfortranarray(frame), np.repeat(frame, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(preprocess_frame(view, p), expected)


@pytest.mark.parametrize("crop", ["center", "letterbox", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_rows_that_lie_apart(photos: list[Image.Image], crop: Any, channels: int) -> None:
    p = resolve_preprocessing(PreprocessingOptions(crop=crop, input_size=(48, 48)), channels, (None, None))
    whole = np.asarray(photos[0])
    for mine in (whole[20:-7, 31:-40], whole[::3], whole[20:21, 5:], whole[::-1], whole[:, ::-2], whole[5:90, 7:8]):
        for frame in (mine, mine[..., 1]):
            together = preprocess_frame(np.array(frame, order="C"), p)
            np.testing.assert_array_equal(preprocess_frame(frame, p), together)


@pytest.mark.parametrize("channels", [1, 3])
def test_bgr_is_rgb_in_another_order(photos: list[Image.Image], channels: int) -> None:
    p = resolve_preprocessing(PreprocessingOptions(crop="letterbox", input_size=(48, 48)), channels, (None, None))
    whole = np.asarray(photos[0])
    for frame in (whole, whole[20:-7, 31:-40]):
        swapped = np.ascontiguousarray(frame[..., ::-1])
        np.testing.assert_array_equal(preprocess_frame(swapped, p, "bgr"), preprocess_frame(frame, p))
        assert (preprocess_frame(swapped, p) != preprocess_frame(frame, p)).any()
        np.testing.assert_array_equal(preprocess_frame(frame[..., 0], p, "bgr"), preprocess_frame(frame[..., 0], p))


def test_the_frame_is_not_changed(photos: list[Image.Image]) -> None:
    frame = np.array(photos[0])
    digest = hashlib.sha256(frame.tobytes()).digest()
    result = preprocess_frame(frame, resolved(input_size=frame.shape[:2], crop="stretch"))
    assert not np.shares_memory(result, frame)
    assert hashlib.sha256(frame.tobytes()).digest() == digest


BAD_FRAMES = [
    (np.zeros((4, 4, 3), np.float32), "dtype float32"),
    (np.zeros((4, 4, 3), np.uint16), "dtype uint16"),
    (np.zeros((4, 4, 3), bool), "dtype bool"),
    (np.zeros((4, 4, 4), np.uint8), r"shape \[4, 4, 4\]"),
    (np.zeros((3, 4, 4), np.uint8), r"shape \[3, 4, 4\]"),
    (np.zeros((1, 4, 4, 3), np.uint8), r"shape \[1, 4, 4, 3\]"),
    (np.zeros(4, np.uint8), r"shape \[4\]"),
    (np.zeros((), np.uint8), r"shape \[\]"),
    (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\]"),
    (np.zeros((4, 0), np.uint8), r"shape \[4, 0\]"),
]


@pytest.mark.parametrize(("frame", "message"), BAD_FRAMES)
def test_frames_that_are_none(frame: Frame, message: str) -> None:
    with without_hook(), pytest.raises(FrameError, match=message) as error:
        preprocess_frame(frame, resolved(preset="imagenet"))
    assert "expected uint8 [height, width, 3], [height, width, 1] or [height, width]" in str(error.value)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("imagenet", (224, 256, "bilinear", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))),
        ("efficientnet-lite", (224, 256, "bicubic", (127.0,) * 3, (128.0,) * 3)),
        ("inception", (299, 342, "bilinear", (127.5,) * 3, (127.5,) * 3)),
    ],
)
def test_presets(preset: str, expected: tuple[int, int, str, tuple[float, ...], tuple[float, ...]]) -> None:
    p = resolved(preset=preset)
    size, short, name, mean, std = expected
    assert (p.preset, p.height, p.width, p.short_side, p.filter, p.crop) == (preset, size, size, short, name, "center")
    np.testing.assert_allclose(p.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(p.std, std, rtol=1e-12)
    assert set(PRESETS) == {"imagenet", "efficientnet-lite", "inception", "none"}


def test_preset_none_passes_pixels_through() -> None:
    p = resolve_preprocessing(options(preset="none"), 3, (60, 80))
    assert (p.height, p.width, p.crop, p.short_side, p.mean, p.std) == (60, 80, "stretch", None, (0, 0, 0), (1, 1, 1))


def test_defaults_without_options() -> None:
    rgb = resolve_preprocessing(options(), 3, (None, None))
    assert (rgb.preset, rgb.height, rgb.short_side) == ("imagenet", 224, 256)
    grey = resolve_preprocessing(options(), 1, (28, 28))
    assert (grey.preset, grey.mean, grey.std, grey.crop) == ("custom", (0.0,), (255.0,), "stretch")


def test_mean_and_std_are_fractions_of_full_scale() -> None:
    p = resolved(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    preset = PRESETS["imagenet"]
    np.testing.assert_allclose(p.mean, preset.mean, atol=1e-6)
    np.testing.assert_allclose(p.std, preset.std, atol=1e-6)
    assert p.preset == "custom"
    assert resolved(mean=(0.5,), std=(0.5,)).mean == (127.5, 127.5, 127.5)


def test_grey_from_a_three_channel_preset() -> None:
    p = resolved(channels=1, preset="imagenet")
    assert p.mean == pytest.approx((sum(PRESETS["imagenet"].mean) / 3,))
    assert resolved(channels=1, preset="efficientnet-lite").mean == (127.0,)


def test_the_graphs_own_size_wins_where_nothing_else_is_said() -> None:
    assert resolve_preprocessing(options(), 3, (160, None)).height == 160
    p = resolve_preprocessing(options(), 3, (160, 192))
    assert (p.height, p.width, p.short_side) == (160, 192, round(192 / 0.875))
    assert resolve_preprocessing(options(input_size=(160, 192)), 3, (160, 192)) == p


REFUSED = [
    ({"preset": "imagnet"}, 3, (None, None), r"preset 'imagnet' is unknown; expected one of imagenet"),
    ({"preset": "none"}, 3, (None, None), r"give it with --input-size"),
    ({}, 1, (28, None), r"give it with --input-size"),
    ({"input_size": (96, 96)}, 3, (224, None), r"asks for height 96, but .* fixed at 224"),
    ({"input_size": (224, 96)}, 3, (None, 224), r"asks for width 96, but .* fixed at 224"),
    ({"resize": 256, "crop": "stretch"}, 3, (None, None), r"cannot be used with --crop stretch"),
    ({"resize": 200}, 3, (None, None), r"short side 200 \(expected at least the input size 224x224\)"),
    ({"input_size": (0, 224)}, 3, (None, None), r"input size 0x224"),
    ({"input_size": (224, 100_000)}, 3, (None, None), r"input size 224x100000"),
    ({"mean": (0.5, 0.5)}, 3, (None, None), r"2 means, 3 stds"),
    ({"std": (1.0,) * 4}, 3, (None, None), r"3 means, 4 stds"),
    ({"mean": ()}, 3, (None, None), r"0 means"),
    ({"std": (0.0,)}, 3, (None, None), r"std .*expected finite numbers above 0"),
    ({"std": (-1.0,)}, 3, (None, None), r"std .*expected finite numbers above 0"),
    ({"std": (math.nan,)}, 3, (None, None), r"std .*expected finite numbers above 0"),
    ({"std": (math.inf,)}, 3, (None, None), r"std .*expected finite numbers above 0"),
    ({"mean": (math.nan,)}, 3, (None, None), r"mean .*expected finite numbers"),
    ({"mean": (math.inf,)}, 3, (None, None), r"mean .*expected finite numbers"),
    ({}, 2, (224, 224), r"2 channels \(expected 1 or 3\)"),
]


@pytest.mark.parametrize(("values", "channels", "size", "message"), REFUSED)
def test_options_that_contradict(
    values: dict[str, Any], channels: int, size: tuple[int | None, int | None], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_preprocessing(options(**values), channels, size)


def letterbox_rule(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """Scale until one side fits, the other rounded half up; paste in the middle, an odd pixel below or right."""
    w, h = image.size
    scale = min(Fraction(p.height, h), Fraction(p.width, w))
    w2, h2 = (max(1, math.floor(side * scale + Fraction(1, 2))) for side in (w, h))
    page = Image.new("RGB", (p.width, p.height), p.padding)
    small = image.resize((w2, h), FILTERS[p.filter]).resize((w2, h2), FILTERS[p.filter])
    page.paste(small, ((p.width - w2) // 2, (p.height - h2) // 2))
    return np.asarray(page)


@pytest.mark.parametrize("name", list(FILTERS))
def test_letterbox_on_random_sizes(photos: list[Image.Image], name: Any) -> None:
    rng = np.random.default_rng(2)
    padded = 0
    for i in range(60):
        image = random_part(rng, photos[i % len(photos)], (40, 400)[i % 2])
        height, width = (int(v) for v in rng.integers(1, 100, 2))
        p = resolved(input_size=(height, width), filter=name, crop="letterbox")
        found, expected = preprocess_frame(np.asarray(image), p), letterbox_rule(image, p)
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1, (image.size, p)
        padded += int((found[0, 0] == p.padding).all() and (found[-1, -1] == p.padding).all())
    assert padded > 30


def test_letterbox_pads_with_the_rounded_mean() -> None:
    frame = np.full((10, 40, 3), 7, np.uint8)
    p = resolved(input_size=(20, 20), crop="letterbox")
    assert (p.short_side, p.padding) == (None, (124, 116, 104))
    found = preprocess_frame(frame, p)
    np.testing.assert_array_equal(found[7:12], 7)  # 5 of 20 rows, one fewer above than below
    np.testing.assert_array_equal(found[:7], np.broadcast_to([124, 116, 104], (7, 20, 3)))
    np.testing.assert_array_equal(found[12:], np.broadcast_to([124, 116, 104], (8, 20, 3)))
    assert resolved(channels=1, input_size=(4, 4), crop="letterbox", mean=(0.5,), std=(0.5,)).padding == (128,)
    assert resolved(channels=1, input_size=(4, 4), crop="letterbox", mean=(9.0,)).padding == (255,)
    assert resolved(channels=1, input_size=(4, 4), crop="letterbox", mean=(-1.0,)).padding == (0,)


def whole_frame_first(frame: np.ndarray, p: Preprocessing) -> np.ndarray:
    """Resample columns of all rows, then rows, as was done before pixels beyond the filter's reach were left out."""
    placement = placement_of(frame.shape[0], frame.shape[1], p)
    rows, columns = placement.rows, placement.columns
    size, resampling = (columns.out, rows.out), FILTERS[p.filter]
    image = Image.fromarray(frame)
    if rows.high - rows.low > 100 * (columns.high - columns.low):
        between = image.resize((image.width, size[1]), resampling, box=(0, rows.low, image.width, rows.high))
        return np.asarray(between.resize(size, resampling, box=(columns.low, 0, columns.high, size[1])))
    between = image.resize((size[0], image.height), resampling, box=(columns.low, 0, columns.high, image.height))
    return np.asarray(between.resize(size, resampling, box=(0, rows.low, size[0], rows.high)))


@pytest.mark.parametrize("name", list(FILTERS))
def test_pixels_that_do_not_count_change_no_bit(name: Any) -> None:
    rng = np.random.default_rng(3)
    for i in range(120):
        height, width = (int(v) for v in rng.integers(1, (50, 600)[i % 2], 2))
        frame = rng.integers(0, 256, (height, width, 3), np.uint8)
        size = tuple(int(v) for v in rng.integers(1, 80, 2))
        p = resolved(input_size=size, filter=name, resize=max(size) + int(rng.integers(0, 60)))
        np.testing.assert_array_equal(preprocess_frame(frame, p), whole_frame_first(frame, p))


def test_a_camera_changes_the_graphs_input_alone(photos: list[Image.Image]) -> None:
    frame = np.asarray(photos[0].resize((64, 48)))
    host = resolved(input_size=(20, 30), crop="letterbox")
    p = resolved(input_size=(20, 30), crop="letterbox", camera=Camera(48, 64, "bgr"))
    assert (host.input_shape, p.input_shape) == ((20, 30, 3), (48, 64, 3))
    np.testing.assert_array_equal(preprocess_frame(frame, p), preprocess_frame(frame, host))
    bgr, grey = Camera(48, 64, "bgr"), Camera(48, 64, "gray")
    np.testing.assert_array_equal(camera_frame(frame, bgr, "rgb"), frame[..., ::-1])
    assert np.shares_memory(camera_frame(frame, bgr, "bgr"), frame)
    assert camera_frame(frame[..., 0], grey, "bgr").shape == (48, 64, 1)
    with pytest.raises(FrameError, match=r"has shape \[47, 64, 3\]; expected \[48, 64, 3\].*--camera-size"):
        camera_frame(frame[1:], bgr, "rgb")
    with pytest.raises(FrameError, match=r"has shape \[48, 64, 3\]; expected \[48, 64, 1\]"):
        camera_frame(frame, grey, "rgb")
