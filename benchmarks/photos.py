"""JPEGs of 640x480 as a camera writes them: seeded crops of the photographs that scikit-image packages."""

from pathlib import Path

import numpy as np
import skimage
from PIL import Image

__all__ = ["NAMES", "write_photos"]

NAMES = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "rocket.jpg",
)  # fmt: skip
HEIGHT, WIDTH = 480, 640


def write_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` JPEGs, as many as possible of each photograph, into one class folder a photograph."""
    rng = np.random.default_rng(seed)
    for first, name in enumerate(NAMES):
        target = folder / Path(name).stem
        target.mkdir(parents=True, exist_ok=True)
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            photo = image.convert("RGB")
        for index in range(first, count, len(NAMES)):
            _crop(photo, rng).save(target / f"{index:05d}.jpg", quality=90)


def _crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut out half to all of what fits, in the shape of a camera's frame."""
    fitting = min(photo.width / WIDTH, photo.height / HEIGHT)
    scale = fitting * rng.uniform(0.5, 1.0)
    width, height = int(scale * WIDTH), int(scale * HEIGHT)
    left, top = (int(rng.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
    return photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
