"""From a frame of any size to the graph's input: resize and crop on the host, normalisation in the graph.

The same function serves `export` and `score`. Only the part of the frame that the crop keeps is resampled
(`box=`), which bounds memory whatever the frame's aspect ratio. It is within one grey level of resizing first and
cropping then; two where both axes round the other way, a few pixels in a million. (`nearest` picks the same source
pixel, or its neighbour where the rule falls between two.) The axes are resampled in a fixed order: Pillow 13 began
to choose it by the frame's shape, and filters that overshoot give other pixels then, by up to 50 grey levels.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from grood_edge.arrays import Frame, InputFrame
from grood_edge.errors import FrameError, UsageError

__all__ = ["PRESETS", "Camera", "Preprocessing", "PreprocessingOptions", "preprocess_frame", "resolve_preprocessing"]

MAX_SIDE = 16_384
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TALL = 100  # a kept part this many times higher than wide is resampled rows first
_CROP_FRACTION = 224 / 256  # short side before the crop = input size / this, rounded to the nearest pixel


@dataclass(frozen=True)
class Camera:
    """The raw frames that the graph itself resizes and crops: height and width in pixels, order of the channels."""

    height: int
    width: int
    layout: Literal["rgb", "bgr", "gray"]

    def __post_init__(self) -> None:
        """Refuse what no camera delivers.

        Raises:
            UsageError: a side outside 1..16,384.
        """
        if not (1 <= self.height <= MAX_SIDE and 1 <= self.width <= MAX_SIDE):
            raise UsageError(f"a camera of {self.height}x{self.width} pixels; expected sides of 1 to {MAX_SIDE:,}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a frame."""
        return self.height, self.width, 1 if self.layout == "gray" else 3


@dataclass(frozen=True)
class Preprocessing:
    """What happens between a camera frame and the classifier.

    height, width: the classifier's input size in pixels. channels: 3 (RGB) or 1 (grey).
    crop `center`: the short side is resized to `short_side`, the long side to floor(long * short_side / short),
    then the centre is cut out, offsets rounded half to even. crop `stretch`: the whole frame is resized to
    the input size, whatever its aspect ratio (`short_side` is None).
    mean, std: per channel, in grey levels 0..255: the classifier sees (pixel - mean) / std.
    camera: None, or the frames that the graph takes and brings to the classifier's input size itself.
    """

    preset: str
    height: int
    width: int
    channels: int
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    crop: Literal["center", "stretch"]
    short_side: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    camera: Camera | None = None

    def __post_init__(self) -> None:
        """Refuse what no frame could be put through.

        Raises:
            UsageError: names the field, the value and what was expected.
        """
        rules = [
            (1 <= self.height <= MAX_SIDE and 1 <= self.width <= MAX_SIDE, f"input size {self.height}x{self.width}"),
            (self.channels in (1, 3), f"{self.channels} channels (expected 1 or 3)"),
            (len(self.mean) == len(self.std) == self.channels, f"{len(self.mean)} means, {len(self.std)} stds"),
            (all(map(math.isfinite, self.mean)), f"mean {self.mean} (expected finite numbers)"),
            (all(0 < value < math.inf for value in self.std), f"std {self.std} (expected finite numbers above 0)"),
            (
                (self.crop == "stretch") == (self.short_side is None),
                f"crop {self.crop} with short side {self.short_side}",
            ),
            (
                self.short_side is None or max(self.height, self.width) <= self.short_side <= MAX_SIDE,
                f"short side {self.short_side} (expected at least the input size {self.height}x{self.width})",
            ),
        ]
        for holds, found in rules:
            if not holds:
                raise UsageError(f"preprocessing cannot use {found}; see the presets in docs/preprocessing.md")


@dataclass(frozen=True)
class Preset:
    """Default size, filter, crop and normalisation (grey levels) of a family of networks."""

    size: int | None
    filter: Literal["bilinear", "bicubic"]
    crop: Literal["center", "stretch"]
    mean: tuple[float, ...]
    std: tuple[float, ...]


PRESETS = {
    "imagenet": Preset(224, "bilinear", "center", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "efficientnet-lite": Preset(224, "bicubic", "center", (127.0,) * 3, (128.0,) * 3),
    "inception": Preset(299, "bilinear", "center", (127.5,) * 3, (127.5,) * 3),
    "none": Preset(None, "bilinear", "stretch", (0.0,) * 3, (1.0,) * 3),
}


@dataclass(frozen=True)
class PreprocessingOptions:
    """What the user asked for; None means "as the preset says".

    input_size: (height, width). resize: short side. mean, std: fractions of full scale, as torchvision writes
    them: `--mean 0 --std 1` is ToTensor alone.
    """

    preset: str | None = None
    input_size: tuple[int, int] | None = None
    resize: int | None = None
    crop: Literal["center", "stretch"] | None = None
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def resolve_preprocessing(
    options: PreprocessingOptions, channels: int, graph_size: tuple[int | None, int | None]
) -> Preprocessing:
    """Combine the user's options, the preset and what the graph itself fixes.

    Without a preset and without mean and std, `imagenet` is assumed for three channels and ToTensor (pixel /
    255) for one.

    Raises:
        UsageError: an unknown preset, an input size that the graph contradicts, or none at all.
    """
    name = options.preset or ("imagenet" if channels == 3 else "none")
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is unknown; expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if options.preset is None and channels == 1:
        preset = replace(preset, std=(255.0,))
    height, width = _input_size(options, preset, graph_size)
    crop = options.crop or ("center" if options.resize is not None else preset.crop)
    short_side = None
    if crop == "center":
        short_side = options.resize if options.resize is not None else round(max(height, width) / _CROP_FRACTION)
    elif options.resize is not None:
        raise UsageError("--resize sets the short side before a centre crop; it cannot be used with --crop stretch")
    changed = any(
        value is not None for value in (options.resize, options.crop, options.filter, options.mean, options.std)
    )
    return Preprocessing(
        preset="custom" if changed or (options.preset is None and channels == 1) else name,
        height=height,
        width=width,
        channels=channels,
        filter=options.filter or preset.filter,
        crop=crop,
        short_side=short_side,
        mean=_levels(options.mean, preset.mean, channels),
        std=_levels(options.std, preset.std, channels),
    )


def preprocess_frame(frame: Frame, preprocessing: Preprocessing) -> InputFrame:
    """Return the frame resized, cropped and colour-converted: uint8 `[height, width, channels]`, C-contiguous.

    `frame` is uint8 `[h, w, 3]` (RGB), `[h, w, 1]` or `[h, w]` (grey), any size. Grey frames are repeated to
    three channels, RGB frames become grey by Pillow's ITU-R 601-2 luma, as the classifier needs.

    Raises:
        FrameError: another dtype or shape.
    """
    array = _check_frame(frame)
    target = (preprocessing.height, preprocessing.width, preprocessing.channels)
    grey = array.ndim == 2 or array.shape[2] == 1
    image = Image.fromarray(np.ascontiguousarray(array[..., 0] if grey and array.ndim == 3 else array))
    mode = "L" if preprocessing.channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    return np.asarray(_resized(image, preprocessing), dtype=np.uint8).reshape(target)


def _resized(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resample columns first, as Pillow before 13 always did; rows first where that would need far more memory."""
    size = (preprocessing.width, preprocessing.height)
    resampling = _FILTERS[preprocessing.filter]
    left, top, right, bottom = _kept_box(image.height, image.width, preprocessing)
    if bottom - top > _TALL * (right - left):
        rows = image.resize((image.width, size[1]), resampling, box=(0, top, image.width, bottom))
        return rows.resize(size, resampling, box=(left, 0, right, size[1]))
    columns = image.resize((size[0], image.height), resampling, box=(left, 0, right, image.height))
    return columns.resize(size, resampling, box=(0, top, size[0], bottom))


def _kept_box(height: int, width: int, preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """Return the part of the frame that the crop keeps: left, top, right, bottom, in source pixels."""
    if preprocessing.short_side is None:
        return (0.0, 0.0, float(width), float(height))
    short = min(height, width)
    resized_h = max(preprocessing.height, preprocessing.short_side * height // short)
    resized_w = max(preprocessing.width, preprocessing.short_side * width // short)
    top = round((resized_h - preprocessing.height) / 2)
    left = round((resized_w - preprocessing.width) / 2)
    scale_h, scale_w = height / resized_h, width / resized_w
    right = min(float(width), (left + preprocessing.width) * scale_w)
    bottom = min(float(height), (top + preprocessing.height) * scale_h)
    return (left * scale_w, top * scale_h, right, bottom)


def _check_frame(frame: Frame) -> np.ndarray:
    array = np.asarray(frame)
    shape_ok = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if array.dtype != np.uint8 or not shape_ok or 0 in array.shape:
        raise FrameError(
            f"the frame has dtype {array.dtype} and shape {list(array.shape)}; expected uint8 [height, width, 3], "
            "[height, width, 1] or [height, width], not empty"
        )
    return array


def _input_size(
    options: PreprocessingOptions, preset: Preset, graph_size: tuple[int | None, int | None]
) -> tuple[int, int]:
    fallback = (preset.size, preset.size)
    size: list[int] = []
    for side, asked, fixed, default in zip(
        ("height", "width"), options.input_size or (None, None), graph_size, fallback, strict=True
    ):
        if asked is not None and fixed is not None and asked != fixed:
            raise UsageError(f"--input-size asks for {side} {asked}, but the classifier's input is fixed at {fixed}")
        value = fixed if fixed is not None else asked if asked is not None else default
        if value is None:
            raise UsageError("the classifier does not fix its input size; give it with --input-size, such as 224x224")
        size.append(value)
    return size[0], size[1]


def _levels(fractions: tuple[float, ...] | None, preset: tuple[float, ...], channels: int) -> tuple[float, ...]:
    values = preset if fractions is None else tuple(round(255.0 * value, 9) for value in fractions)
    if len(values) == 1:
        return values * channels
    if fractions is None and channels == 1:
        return values[:1] if len(set(values)) == 1 else (sum(values) / len(values),)
    return values
