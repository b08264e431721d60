"""Archives through copies of a session on a Ray cluster: rows for `score`, raw outputs for `evaluate`.

Every worker opens the artifact from its bytes, on one CPU thread. Images go by path, and results come in their order.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grood_edge.arrays import Frame, InputFrame
from grood_edge.artifact import read_artifact
from grood_edge.camera_part import open_camera, prepared_model
from grood_edge.decoding import decoded
from grood_edge.errors import ArtifactError, BackendError, UsageError
from grood_edge.frame_hashes import frame_hash
from grood_edge.images import UnreadableImageError, find_images, load_image
from grood_edge.outputs import Outputs
from grood_edge.progress import Progress, silent
from grood_edge.ray_engine import SHARD_IMAGES, Cluster, Work, load_shared, shards_of
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.score import ScoreRow, ScoreSummary, Write, require_batch_size, rows_of, summarised
from grood_edge.runtime.session import Session

__all__ = ["Part", "Workers", "infer_here", "score_with_workers", "workers_for"]

BATCH_IMAGES = 32
BATCH_BYTES = 64 << 20  # of prepared frames; those of a camera's artifact may be large

_Load = Callable[[Path], Frame]


@dataclass(frozen=True)
class Part:
    """One batch: its outputs (None where no image could be read), and of each readable image its index and frame hash.

    `unreadable`: index and reason. A batch is what can be read of as many images as `batch_size` says, in their order.
    """

    outputs: Outputs | None
    read: tuple[int, ...]
    hashes: tuple[int, ...]
    unreadable: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Workers:
    """Copies of a session on a cluster: the artifact's bytes, and the alpha that decides."""

    cluster: Cluster
    artifact: bytes
    alpha: float

    def infer(self, paths: Sequence[Path]) -> Generator[Part, None, None]:
        """Run image files, in their order; whoever may leave early closes it before the cluster.

        Raises:
            DatasetError: a file that a worker does not see.
            BackendError: workers died again and again, or are not like this process.
        """
        with closing(self._ordered(_infer, paths, SHARD_IMAGES, ())) as results:
            for first, parts in results:
                for part in parts:
                    read = tuple(first + index for index in part.read)
                    unreadable = tuple((first + index, reason) for index, reason in part.unreadable)
                    yield replace(part, read=read, unreadable=unreadable)

    def rows(
        self, paths: Sequence[str], batch_size: int, explain: bool, unreadable: list[tuple[str, str]]
    ) -> Generator[list[ScoreRow], None, None]:
        """Score image files, in their order; those that cannot be read go to `unreadable`, with the reason.

        Whoever may leave early closes it before the cluster.

        Raises:
            DatasetError, BackendError: as `infer`.
        """
        size = batch_size * max(1, SHARD_IMAGES // batch_size)
        with closing(self._ordered(_rows, paths, size, (batch_size, explain))) as results:
            for first, (rows, failed) in results:
                unreadable += ((paths[first + index], reason) for index, reason in failed)
                yield [replace(ScoreRow(*values), path=paths[first + index]) for index, values in rows]

    def _ordered(
        self, run: Any, paths: Sequence[str | Path], size: int, options: tuple[Any, ...]
    ) -> Generator[tuple[int, Any], None, None]:
        spans = list(shards_of(0, len(paths), size))
        shards = (([str(Path(path).absolute()) for path in paths[a:b]], *options) for a, b in spans)
        work = Work(_open, run, (np.frombuffer(self.artifact, np.uint8), self.alpha))
        with closing(self.cluster.ordered(work, shards)) as results:
            for (first, end), (told, result) in zip(spans, results, strict=True):
                if told != end - first:
                    raise BackendError(f"a Ray worker told of {told} images, not {end - first}; nothing was written")
                yield first, result


def workers_for(cluster: Cluster, path: Path | str, session: Session) -> Workers:
    """Return the workers that answer like `session`, which was opened from `path`.

    Raises:
        UsageError: the session does not run on onnxruntime's CPU provider.
        ArtifactError: the file was replaced since.
    """
    if session.backend.provider != "cpu":
        raise UsageError(
            f"--engine ray runs onnxruntime on CPUs, and the session is on {session.backend.provider}; leave out "
            "--backend and --provider, or --engine ray"
        )
    artifact = read_artifact(Path(path))
    if artifact.contract != session.contract:
        raise ArtifactError(f"{path} was replaced since the session was opened; start again")
    return Workers(cluster, artifact.model, session.alpha)


def score_with_workers(
    workers: Workers,
    sources: Iterable[str | Path],
    write: Write,
    batch_size: int = 32,
    progress: Progress = silent,
    explain: bool = False,
) -> ScoreSummary:
    """Score images as `score.score_images` does, to the same rows.

    Raises:
        DatasetError: a source is missing or empty, or a worker does not see a file.
        UsageError: a batch size below 1, or an .npz.
        BackendError: workers died again and again, or are not like this process.
    """
    require_batch_size(batch_size)
    paths: list[str] = []
    for source in sources:
        if str(source).lower().endswith(".npz"):
            raise UsageError(
                f"--engine ray needs image files, which every worker opens by itself, and {source} is an .npz. Write "
                "the images to a folder, or leave --engine ray out"
            )
        paths += map(str, find_images(source))
    unreadable: list[tuple[str, str]] = []
    progress("scoring", 0, len(paths))
    # Closed here: the traceback of an error would keep it until the cluster is gone.
    with closing(workers.rows(paths, batch_size, explain, unreadable)) as rows:
        return summarised(rows, unreadable, write, lambda done: progress("scoring", done, len(paths)))


def infer_here(paths: Sequence[Path], session: Session) -> Generator[Part, None, None]:
    """Run image files through a session of this process, as workers do.

    Raises:
        BackendError: the device failed.
    """
    return _parts(paths, session, load_image)


def _parts(paths: Sequence[Path], session: Session, load: _Load) -> Generator[Part, None, None]:
    for frames, read, unreadable in _batches(paths, _batch_size(session), session, load):
        outputs = session.infer_prepared(np.stack(frames)) if frames else None
        yield Part(outputs, tuple(read), tuple(map(frame_hash, frames)), tuple(unreadable))


def _batches(
    paths: Sequence[Path], size: int, session: Session, load: _Load
) -> Iterator[tuple[list[InputFrame], list[int], list[tuple[int, str]]]]:
    """Give prepared frames, their indices, and index and reason of what cannot be read, of `size` paths at a time."""
    frames: list[InputFrame] = []
    read: list[int] = []
    unreadable: list[tuple[int, str]] = []
    threads = 1 if load is load_shared else None  # a worker has one CPU
    for index, (_, frame) in enumerate(decoded(paths, lambda path: session.prepare(load(path)), threads)):
        if isinstance(frame, UnreadableImageError):
            unreadable.append((index, str(frame)))
        else:
            frames.append(frame)
            read.append(index)
        if (index + 1) % size == 0 or index + 1 == len(paths):
            yield frames, read, unreadable
            frames, read, unreadable = [], [], []


def _batch_size(session: Session) -> int:
    """Return a power of two, so that a shard holds whole batches."""
    p = session.contract.preprocessing
    size = BATCH_IMAGES
    while size > 1 and size * np.prod(p.input_shape) > BATCH_BYTES:
        size //= 2
    return size


def _open(job: tuple[np.ndarray, float]) -> Session:
    """In a worker: open the artifact, on one thread."""
    artifact = read_artifact(job[0].tobytes())
    p = artifact.contract.preprocessing
    camera = open_camera(artifact.model, p, threads=1)
    artifact = replace(artifact, model=prepared_model(artifact.model, p))
    return Session(artifact, OnnxRuntimeBackend(artifact, threads=1), job[1], camera=camera)


def _infer(session: Session, shard: tuple[list[str]]) -> tuple[int, tuple[Part, ...]]:
    """In a worker: the number of images, and the parts with indices in the shard."""
    parts = tuple(_parts([Path(path) for path in shard[0]], session, load_shared))
    return sum(len(part.read) + len(part.unreadable) for part in parts), parts


def _rows(session: Session, shard: tuple[list[str], int, bool]) -> tuple[int, Any]:
    """In a worker: the number of images, the rows with their index in the shard, and what could not be read."""
    paths, size, explain = shard
    rows: list[tuple[int, tuple[Any, ...]]] = []
    failed: list[tuple[int, str]] = []
    for frames, read, unreadable in _batches([Path(path) for path in paths], size, session, load_shared):
        failed += unreadable
        if frames:
            found = rows_of(session, [paths[index] for index in read], frames, explain)
            rows += zip(read, map(astuple, found), strict=True)
    return len(rows) + len(failed), (rows, failed)
