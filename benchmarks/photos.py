"""JPEGs of 640x480 as a camera writes them: seeded crops of the photographs that scikit-image packages."""

from pathlib import Path

import numpy as np
import skimage
from PIL import Image

__all__ = ["NAMES", "write_photos"]

NAMES = (
    "astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "ihc.png",
    "hubble_deep_field.jpg", "retina.jpg",
)  # fmt: skip


def write_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` JPEGs into one class folder a photograph."""
    rng = np.random.default_rng(seed)
    photos = {}
    for name in NAMES:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            photos[name] = image.convert("RGB")
        (folder / Path(name).stem).mkdir(parents=True)
    for index in range(count):
        name = NAMES[index % len(NAMES)]
        photo = photos[name]
        width = int(rng.integers(200, min(photo.width, photo.height * 4 // 3)))
        height = width * 3 // 4
        left, top = (int(rng.integers(0, side + 1)) for side in (photo.width - width, photo.height - height))
        crop = photo.crop((left, top, left + width, top + height)).resize((640, 480), Image.Resampling.BICUBIC)
        crop.save(folder / Path(name).stem / f"{index:05d}.jpg", quality=90)
