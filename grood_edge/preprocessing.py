"""From a frame of any size to the classifier's input: resize and crop on the host, normalisation in the graph.

The same function serves `export` and `score`. Only the part of the frame that the crop keeps is resampled
(`resampling`), which bounds memory whatever the frame's aspect ratio. It is within one grey level of resizing first
and cropping then; two where both axes round the other way, a few pixels in a million. (`nearest` picks the same source
pixel, or its neighbour where the rule falls between two.) With a `Camera` the graph itself resizes and crops frames of
one size, and takes no others.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from grood_edge.arrays import Frame, Frames, InputFrame
from grood_edge.errors import FrameError, UsageError
from grood_edge.resampling import Placement, SourceSpan, resample

__all__ = [
    "PRESETS",
    "Camera",
    "Color",
    "Preprocessing",
    "PreprocessingOptions",
    "camera_frame",
    "normalised_frames",
    "placement_of",
    "preprocess_frame",
    "resolve_preprocessing",
]

Color = Literal["rgb", "bgr"]  # order of the channels of a frame

MAX_SIDE = 16_384
MAX_CAMERA_PIXELS = 1 << 25  # an 8k frame has 33,177,600
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
            UsageError: a side outside 1..16,384, or more than 33,554,432 pixels.
        """
        sides = 1 <= self.height <= MAX_SIDE and 1 <= self.width <= MAX_SIDE
        if not sides or self.height * self.width > MAX_CAMERA_PIXELS:
            raise UsageError(
                f"a camera of {self.height}x{self.width} pixels; expected sides of 1 to {MAX_SIDE:,} (height x width) "
                f"and at most {MAX_CAMERA_PIXELS:,} pixels"
            )

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
    the input size, whatever its aspect ratio (`short_side` is None). crop `letterbox`: the whole frame, its aspect
    ratio kept, as large as fits, in the middle; the rest has the colour `padding` (`short_side` is None).
    mean, std: per channel, in grey levels 0..255: the classifier sees (pixel - mean) / std.
    camera: None, or the frames that the graph takes and brings to the classifier's input size itself.
    """

    preset: str
    height: int
    width: int
    channels: int
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    crop: Literal["center", "letterbox", "stretch"]
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
                (self.crop != "center") == (self.short_side is None),
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
        if self.camera is not None and self.filter != "bilinear":
            raise UsageError(
                f"the filter is {self.filter}, and with --camera-size the graph itself resizes: there only bilinear "
                "equals the host's pixels (bicubic and lanczos overshoot, and are clipped between the axes). Use "
                "--filter bilinear, or leave --camera-size out"
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the graph's input: the camera's frames, or the classifier's input."""
        return (self.height, self.width, self.channels) if self.camera is None else self.camera.shape

    @property
    def padding(self) -> tuple[int, ...]:
        """Grey level a channel, 0..255, of what a letterbox leaves free: the mean, rounded half up."""
        return tuple(min(255, max(0, math.floor(value + 0.5))) for value in self.mean)


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
    them: `--mean 0 --std 1` is ToTensor alone. camera: None leaves resize and crop to the host.
    """

    preset: str | None = None
    input_size: tuple[int, int] | None = None
    resize: int | None = None
    crop: Literal["center", "letterbox", "stretch"] | None = None
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    camera: Camera | None = None


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
        raise UsageError(f"--resize sets the short side before a centre crop; it cannot be used with --crop {crop}")
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
        camera=options.camera,
    )


def preprocess_frame(frame: Frame, preprocessing: Preprocessing, color: Color = "rgb") -> InputFrame:
    """Return the frame resized, cropped and colour-converted: uint8 `[height, width, channels]`, C-contiguous.

    `frame` is uint8 `[h, w, 3]` (in the order `color`), `[h, w, 1]` or `[h, w]` (grey), any size. Grey frames are
    repeated to three channels, colours become grey by Pillow's ITU-R 601-2 luma, as the classifier needs.

    Raises:
        FrameError: another dtype or shape.
    """
    array, p = _check_frame(frame), preprocessing
    pixels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    placement = placement_of(array.shape[0], array.shape[1], p)
    image = resample(pixels, placement, p.filter, "L" if p.channels == 1 else "RGB", color.upper())
    if image.size != (p.width, p.height):  # the letterbox; what it leaves free is filled
        page = Image.new(image.mode, (p.width, p.height), p.padding)
        page.paste(image, (placement.columns.start, placement.rows.start))
        image = page
    return np.asarray(image).reshape(p.height, p.width, p.channels)


def normalised_frames(
    frames: Frames, preprocessing: Preprocessing, layout: Literal["NCHW", "NHWC"], bgr: bool
) -> np.ndarray:
    """Return prepared frames uint8 `[n, h, w, c]` as a classifier sees them: float32, in its layout, C-contiguous.

    In NumPy: what the graph's own preprocessing is held against, and what a classifier without it is fed with.
    """
    mean, std = np.array(preprocessing.mean, np.float32), np.array(preprocessing.std, np.float32)
    images = (frames.astype(np.float32) - mean) / std
    if bgr:
        images = images[..., ::-1]
    if layout == "NCHW":
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def camera_frame(frame: Frame, camera: Camera, color: Color) -> InputFrame:
    """Return a raw frame of the camera in the camera's order of channels; it is copied only where that differs.

    Raises:
        FrameError: another dtype, or another shape than the camera's.
    """
    array = _check_frame(frame)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape != camera.shape:
        raise FrameError(
            f"the frame has shape {list(np.shape(frame))}; expected {list(camera.shape)}, the camera that the artifact "
            "was exported for (--camera-size, --layout). Set the camera to that size, or export without --camera-size"
        )
    return np.ascontiguousarray(array if camera.layout in ("gray", color) else array[..., ::-1])


def placement_of(height: int, width: int, preprocessing: Preprocessing) -> Placement:
    """Return which part of a frame of this size is kept, and where it lands; edges are in source pixels."""
    p = preprocessing
    if p.short_side is not None:
        return _center(height, width, p.short_side, p)
    out_h, out_w = p.height, p.width
    if p.crop == "letterbox" and height * p.width > width * p.height:  # the rows fill the input
        out_w = max(1, (2 * width * p.height + height) // (2 * height))
    elif p.crop == "letterbox":
        out_h = max(1, (2 * height * p.width + width) // (2 * width))
    return Placement(
        SourceSpan(height, 0.0, float(height), (p.height - out_h) // 2, out_h),
        SourceSpan(width, 0.0, float(width), (p.width - out_w) // 2, out_w),
    )


def _center(height: int, width: int, short_side: int, p: Preprocessing) -> Placement:
    short = min(height, width)
    resized_h = max(p.height, short_side * height // short)
    resized_w = max(p.width, short_side * width // short)
    top = round((resized_h - p.height) / 2)
    left = round((resized_w - p.width) / 2)
    scale_h, scale_w = height / resized_h, width / resized_w
    bottom = min(float(height), (top + p.height) * scale_h)
    right = min(float(width), (left + p.width) * scale_w)
    return Placement(
        SourceSpan(height, top * scale_h, bottom, 0, p.height), SourceSpan(width, left * scale_w, right, 0, p.width)
    )


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
