"""The most confident mistakes as small pictures: known things called OOD, and OOD things accepted as known."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from grood_edge.evaluate.passes import ScoredSet
from grood_edge.evaluate.results import Evaluation
from grood_edge.images import UnreadableImageError, load_image

__all__ = ["Mistake", "mistakes_of"]

MOST = 12  # a set
SIDE = 104  # pixels of the longer side


@dataclass(frozen=True)
class Mistake:
    """One image: `name` within its set's folder, the predicted class, its own class where known, a JPEG as base64."""

    name: str
    class_name: str
    own_class: str | None
    ood_score: float
    p_value: float
    jpeg: str


def mistakes_of(evaluation: Evaluation) -> Iterator[tuple[str, tuple[Mistake, ...]]]:
    """Yield (title, up to 12 mistakes) for the ID set, then for each OOD set; sets without mistakes are left out."""
    known = evaluation.id_set
    wrong = np.flatnonzero(known.rows.flagged)
    if wrong.size:
        order = wrong[np.argsort(-known.rows.scores[wrong], kind="stable")]
        yield f"ID called OOD, highest ood_score first ({wrong.size} in all)", _mistakes(evaluation, known, order)
    for one in evaluation.ood_sets:
        wrong = np.flatnonzero(~one.rows.flagged)
        if wrong.size:
            order = wrong[np.argsort(one.rows.scores[wrong], kind="stable")]
            title = f'"{one.name}" accepted as known, lowest ood_score first ({wrong.size} in all)'
            yield title, _mistakes(evaluation, one, order)


def _mistakes(evaluation: Evaluation, one: ScoredSet, order: np.ndarray) -> tuple[Mistake, ...]:
    found = []
    for index in order[:MOST]:
        try:
            jpeg = _thumbnail(one, int(index))
        except UnreadableImageError:  # it could be read a minute ago
            continue
        found.append(
            Mistake(
                name=one.paths[index].relative_to(one.folder).as_posix(),
                class_name=evaluation.classes[one.rows.class_ids[index]],
                own_class=None if one.labels is None else evaluation.classes[one.labels[index]],
                ood_score=float(one.rows.scores[index]),
                p_value=float(one.rows.p_values[index]),
                jpeg=jpeg,
            )
        )
    return tuple(found)


def _thumbnail(one: ScoredSet, index: int) -> str:
    frame = load_image(one.paths[index])
    image = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
