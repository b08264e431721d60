"""One streaming pass over a set of images: scores, classes and decisions are kept, features and pixels are not."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grood_edge.arrays import Features, Flags, InputFrame, Labels, Logits, Scores
from grood_edge.errors import DatasetError
from grood_edge.evaluate.sets import LEAST_IMAGES, FolderSet
from grood_edge.frame_hashes import digest_of
from grood_edge.images import UNREADABLE_LIMIT, name_some
from grood_edge.outputs import Outputs
from grood_edge.progress import Progress, silent
from grood_edge.runtime.session import Session
from grood_edge.runtime.shards import Workers, infer_here

__all__ = ["Recorder", "Rows", "ScoredSet", "batched", "score_set"]

BATCH_IMAGES = 32
BATCH_BYTES = 64 << 20  # of prepared frames: the batches of a classifier with a very large input are smaller

OtherScores = Callable[[Features, Logits], dict[str, Scores]]  # baselines, from the same features and logits


@dataclass(frozen=True)
class Rows:
    """What the session said about n images, in their order; `others` holds further scores by name.

    class_ids int64, scores and p_values float32, flagged and valid bool: all `[n]`.
    """

    class_ids: Labels
    scores: Scores
    p_values: Scores
    flagged: Flags
    valid: Flags
    others: dict[str, Scores]


@dataclass(frozen=True)
class ScoredSet:
    """One set after its pass. `hashes` uint64 `[n]`: BLAKE2b of the preprocessed frames, as export counts its data."""

    name: str
    folder: Path
    paths: tuple[Path, ...]
    labels: Labels | None
    rows: Rows
    unreadable: tuple[tuple[str, str], ...]
    hashes: np.ndarray

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the sorted hashes: the contract's digest of the same images, in any order."""
        return digest_of(self.hashes)


@dataclass
class Recorder:
    """Runs batches of prepared frames through a session and keeps the few numbers an image that the metrics need."""

    session: Session
    others: OtherScores | None = None
    _parts: list[Rows] = field(default_factory=list)

    def add(self, frames: list[InputFrame]) -> None:
        """Run frames as `session.prepare` returns them."""
        self.take(self.session.infer_prepared(np.stack(frames)))

    def take(self, outputs: Outputs) -> None:
        """Record what the session, or a copy of it, gave for a batch."""
        verdicts = self.session.verdicts(outputs)
        self._parts.append(
            Rows(
                class_ids=outputs.class_id.astype(np.int64),
                scores=outputs.ood_score,
                p_values=outputs.p_value,
                flagged=np.array([verdict.is_ood for verdict in verdicts], bool),
                valid=outputs.valid,
                others=self._other_scores(outputs),
            )
        )

    def rows(self) -> Rows:
        """Return all that was recorded. At least one batch must have been added."""
        parts = self._parts
        return Rows(
            class_ids=np.concatenate([part.class_ids for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            p_values=np.concatenate([part.p_values for part in parts]),
            flagged=np.concatenate([part.flagged for part in parts]),
            valid=np.concatenate([part.valid for part in parts]),
            others={name: np.concatenate([part.others[name] for part in parts]) for name in parts[0].others},
        )

    def _other_scores(self, outputs: Outputs) -> dict[str, Scores]:
        if self.others is None:
            return {}
        found = self.others(outputs.features, outputs.logits)
        worst = np.finfo(np.float32).max  # what an artifact says of an image that is not valid
        return {
            name: np.where(outputs.valid & np.isfinite(scores), scores, worst).astype(np.float32)
            for name, scores in found.items()
        }


def score_set(
    images: FolderSet,
    session: Session,
    others: OtherScores | None = None,
    allow_unreadable: bool = False,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> ScoredSet:
    """Score every image of a set, here or with `workers`.

    Raises:
        DatasetError: more than 1 % of the images are unreadable, or fewer than two are readable.
        BackendError: the device or the workers failed.
    """
    unreadable: list[tuple[str, str]] = []
    kept: list[int] = []
    hashes = array("Q")
    recorder = Recorder(session, others)
    # Closed here: the traceback of an error would keep it until the cluster is gone.
    with closing(infer_here(images.paths, session) if workers is None else workers.infer(images.paths)) as parts:
        for part in parts:
            if part.outputs is not None:
                recorder.take(part.outputs)
            kept += part.read
            hashes.extend(part.hashes)
            unreadable += ((str(images.paths[index]), reason) for index, reason in part.unreadable)
            progress(f"scoring {images.name}", len(kept) + len(unreadable), len(images.paths))
    _require_readable(images, len(kept), unreadable, allow_unreadable)
    return ScoredSet(
        name=images.name,
        folder=images.folder,
        paths=tuple(images.paths[index] for index in kept),
        labels=None if images.labels is None else images.labels[kept],
        rows=recorder.rows(),
        unreadable=tuple(unreadable),
        hashes=np.array(hashes, np.uint64),
    )


def batched(frames: Iterable[InputFrame]) -> Iterator[list[InputFrame]]:
    """Group frames into batches that are bounded in number and in bytes."""
    batch: list[InputFrame] = []
    size = 0
    for frame in frames:
        batch.append(frame)
        size += frame.nbytes
        if len(batch) == BATCH_IMAGES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _require_readable(images: FolderSet, readable: int, unreadable: list[tuple[str, str]], allow: bool) -> None:
    too_many = len(unreadable) > UNREADABLE_LIMIT * len(images.paths) and not allow
    if too_many or readable < LEAST_IMAGES:
        remedy = "Repair or remove them" + ("" if allow else ", or go on without them with --allow-unreadable")
        raise DatasetError(
            f"{len(unreadable)} of {len(images.paths)} images in {images.folder} cannot be read: "
            f"{name_some(unreadable)}. {remedy}"
        )
