"""The demo's images, as folders of PNG: scikit-learn's digits, crops of scikit-image's photos, and noise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from grood_edge.arrays import Frame
from grood_edge.errors import MissingExtraError

try:
    import skimage
    from sklearn.datasets import load_digits
except ImportError as error:
    raise MissingExtraError(str(error.name), "demo", "The demo") from error

__all__ = ["SIZE", "DemoImages", "write_images"]

SIZE = 32  # pixels; the digits are 8x8 and are enlarged, so that people can look at them
ID_DIGITS = range(7)
NEAR_DIGITS = (7, 8, 9)
PHOTOS = ("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
          "ihc.png", "page.png", "rocket.jpg", "text.png")  # fmt: skip
CROPS_PER_PHOTO = 20
NOISE_IMAGES = 100
_SHARES = {"train": 0.5, "calibration": 0.25, "test": 0.25}


@dataclass(frozen=True)
class DemoImages:
    """Folders of the demo: class folders for the first three, images for the others."""

    train: Path
    calibration: Path
    test: Path
    near: Path
    far_photos: Path
    far_noise: Path


def write_images(folder: Path, seed: int = 0) -> DemoImages:
    """Write all images below `folder`; each digit is in exactly one of train, calibration and test."""
    rng = np.random.default_rng(seed)
    images = DemoImages(
        train=folder / "train",
        calibration=folder / "calibration",
        test=folder / "test",
        near=folder / "near",
        far_photos=folder / "far-photos",
        far_noise=folder / "far-noise",
    )
    digits = load_digits()
    for digit in range(10):
        frames = [_digit_frame(pixels) for pixels in digits.images[digits.target == digit]]
        order = rng.permutation(len(frames))
        if digit in NEAR_DIGITS:
            _write(images.near / str(digit), {int(index): frames[index] for index in order})
            continue
        ends = (np.cumsum(list(_SHARES.values())) * len(order)).astype(int)
        for part, chosen in zip(_SHARES, np.split(order, ends[:-1]), strict=True):
            _write(folder / part / str(digit), {int(index): frames[index] for index in chosen})
    _write(images.far_photos, dict(enumerate(_photo_crops(rng))))
    noise = rng.integers(0, 256, (NOISE_IMAGES, SIZE, SIZE), dtype=np.uint8)
    _write(images.far_noise, dict(enumerate(noise)))
    return images


def _digit_frame(pixels: np.ndarray) -> Frame:
    small = Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _photo_crops(rng: np.random.Generator) -> list[Frame]:
    """Cut squares out of the photos that scikit-image carries in its package: no download."""
    crops = []
    for name in PHOTOS:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            grey = image.convert("L")
        for _ in range(CROPS_PER_PHOTO):
            side = int(rng.integers(48, min(grey.size) // 2))
            left, top = (int(rng.integers(0, length - side)) for length in grey.size)
            crop = grey.crop((left, top, left + side, top + side))
            crops.append(np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
    return crops


def _write(folder: Path, frames: dict[int, Frame]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in frames.items():
        Image.fromarray(frame).save(folder / f"{index:04d}.png")
