"""A frame as a JPEG."""

import io

import numpy as np
from PIL import Image

from grood_edge.runtime.sources import Color

__all__ = ["jpeg"]


def jpeg(image: np.ndarray, color: Color, quality: int, most_wide: int | None = None) -> bytes:
    """Encode a frame, uint8 `[h, w, 3]` in `color`'s channel order, `[h, w, 1]` or `[h, w]`; at most `most_wide` wide."""
    plain = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if plain.ndim == 3 and color == "bgr":
        plain = plain[..., ::-1]
    picture = Image.fromarray(np.ascontiguousarray(plain))
    if most_wide is not None and picture.width > most_wide:
        picture = picture.reduce(-(-picture.width // most_wide))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()
