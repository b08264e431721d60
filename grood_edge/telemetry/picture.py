"""A frame as a picture: whether it is one, and as a JPEG."""

import io

import numpy as np
from PIL import Image

from grood_edge.preprocessing import Color
from grood_edge.runtime.capture.sources import CapturedFrame

__all__ = ["jpeg", "picture_of"]


def picture_of(frame: CapturedFrame) -> np.ndarray | None:
    """Return the frame's pixels where they can be drawn, contiguous uint8 `[h, w, 3]`, `[h, w, 1]` or `[h, w]`.

    None where there are none, or, in an INVALID frame, others.
    """
    image = frame.image
    if image is None or image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        return None
    return np.ascontiguousarray(image) if image.ndim == 2 or image.shape[2] in (1, 3) else None


def jpeg(image: np.ndarray, color: Color, quality: int, most_wide: int | None = None) -> bytes:
    """Encode a frame, uint8 `[h, w, 3]` in `color`'s channel order, `[h, w, 1]` or `[h, w]`.

    A frame wider than `most_wide` is reduced by a whole number.
    """
    plain = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if plain.ndim == 3 and color == "bgr":
        plain = plain[..., ::-1]
    picture = Image.fromarray(np.ascontiguousarray(plain))
    if most_wide is not None and picture.width > most_wide:
        picture = picture.reduce(-(-picture.width // most_wide))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()
