"""ID images made worse: the same things under blur, little light, noise, JPEG and occlusion.

This is covariate shift, not OOD: the class is still right. Each corruption is applied to the raw frame, before resize
and crop, in sizes relative to the frame, so that a camera image and a thumbnail suffer alike. After ImageNet-C
(Hendrycks, Dietterich, arXiv 1903.12261), in Pillow and NumPy.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from grood_edge.arrays import Frame, InputFrame
from grood_edge.decoding import decoded
from grood_edge.evaluate.passes import Recorder, Rows, ScoredSet, batched
from grood_edge.images import UnreadableImageError, load_image
from grood_edge.progress import Progress, silent
from grood_edge.runtime.session import Session

__all__ = ["CORRUPTIONS", "Corruption", "ShiftedRows", "corrupted", "score_corrupted"]

MAX_IMAGES = 500


@dataclass(frozen=True)
class Corruption:
    """One kind at one strength; `strength` says in words what `amount` is."""

    kind: str
    strength: str
    amount: float


_AMOUNTS: dict[str, tuple[str, tuple[float, ...]]] = {
    "blur": ("sigma {:.1%} of the short side", (0.01, 0.02, 0.04)),
    "low light": ("{:.0%} of the light", (0.4, 0.1, 0.02)),
    "noise": ("sigma {:g} grey levels", (10.0, 25.0, 50.0)),
    "JPEG": ("quality {:g}", (40.0, 15.0, 5.0)),
    "occlusion": ("a grey square over {:.0%}", (0.1, 0.25, 0.5)),
}
CORRUPTIONS = tuple(
    Corruption(kind, text.format(amount), amount) for kind, (text, amounts) in _AMOUNTS.items() for amount in amounts
)


@dataclass(frozen=True)
class ShiftedRows:
    """What the session said under one corruption; `picked` int64 `[n]` are the rows of the clean ID set."""

    corruption: Corruption
    picked: np.ndarray
    rows: Rows


def score_corrupted(
    clean: ScoredSet, session: Session, seed: int = 0, progress: Progress = silent
) -> tuple[ShiftedRows, ...]:
    """Score at most 500 ID images, chosen by seed, under every corruption.

    Raises:
        BackendError: the device failed.
        UnreadableImageError: an image that could be read before.
    """
    rng = np.random.default_rng(seed)
    count = min(MAX_IMAGES, len(clean.paths))
    picked = np.sort(rng.permutation(len(clean.paths))[:count])
    recorder = Recorder(session)

    def load(index: np.int64) -> np.ndarray:
        frame = load_image(clean.paths[index])
        rngs = (np.random.default_rng([seed, int(index), number]) for number in range(len(CORRUPTIONS)))
        every = zip(CORRUPTIONS, rngs, strict=True)
        return np.stack([session.prepare(corrupted(frame, corruption, rng)) for corruption, rng in every])

    def frames() -> Iterator[InputFrame]:
        for done, (_, of_image) in enumerate(decoded(picked, load)):
            if isinstance(of_image, UnreadableImageError):
                raise of_image
            yield from of_image
            progress("scoring corrupted ID images", done + 1, count)

    for batch in batched(frames()):
        recorder.add(batch)
    rows = recorder.rows()
    step = len(CORRUPTIONS)
    return tuple(
        ShiftedRows(corruption, picked, _every(rows, start, step)) for start, corruption in enumerate(CORRUPTIONS)
    )


def corrupted(frame: Frame, corruption: Corruption, rng: np.random.Generator) -> Frame:
    """Return the frame under one corruption: uint8 of the same shape."""
    result: Frame = _APPLY[corruption.kind](frame, corruption.amount, rng)
    return result


def _every(rows: Rows, start: int, step: int) -> Rows:
    chosen = slice(start, None, step)
    return Rows(
        class_ids=rows.class_ids[chosen],
        scores=rows.scores[chosen],
        p_values=rows.p_values[chosen],
        flagged=rows.flagged[chosen],
        valid=rows.valid[chosen],
        others={},
    )


def _blur(frame: Frame, share: float, _: np.random.Generator) -> Frame:
    radius = share * min(frame.shape[:2])
    return _pixels(_image(frame).filter(ImageFilter.GaussianBlur(radius)), frame)


def _low_light(frame: Frame, share: float, _: np.random.Generator) -> Frame:
    """Fewer photons: the light is scaled before the camera's gamma of 2.2."""
    levels = np.round(255 * (np.arange(256) / 255) * share ** (1 / 2.2)).astype(np.uint8)
    result: Frame = levels[frame]
    return result


def _noise(frame: Frame, sigma: float, rng: np.random.Generator) -> Frame:
    noisy = frame + sigma * rng.standard_normal(frame.shape, np.float32)
    result: Frame = np.clip(np.round(noisy), 0, 255).astype(np.uint8)
    return result


def _jpeg(frame: Frame, quality: float, _: np.random.Generator) -> Frame:
    buffer = io.BytesIO()
    _image(frame).save(buffer, "JPEG", quality=int(quality))
    with Image.open(buffer) as image:
        return _pixels(image, frame)


def _occlusion(frame: Frame, share: float, rng: np.random.Generator) -> Frame:
    """A square (cut at the frame's own sides where it is long and narrow) somewhere in the frame."""
    height, width = frame.shape[:2]
    side = (share * height * width) ** 0.5
    h, w = min(height, round(side)), min(width, round(side))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    result: Frame = frame.copy()
    result[top : top + h, left : left + w] = 127
    return result


_APPLY: dict[str, Callable[[Frame, float, np.random.Generator], Frame]] = {
    "blur": _blur,
    "low light": _low_light,
    "noise": _noise,
    "JPEG": _jpeg,
    "occlusion": _occlusion,
}


def _image(frame: Frame) -> Image.Image:
    return Image.fromarray(frame[..., 0] if frame.ndim == 3 and frame.shape[2] == 1 else frame)


def _pixels(image: Image.Image, like: Frame) -> Frame:
    result: Frame = np.asarray(image, dtype=np.uint8).reshape(like.shape)
    return result
