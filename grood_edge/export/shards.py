"""A pass over images on a Ray cluster: workers decode and run the network, the driver gathers in order.

A shard is a pure function of its files: features, labels, predictions and frame hashes, in the very batches that a
local pass has. Workers send no pixels: the few frames that a pass keeps are decoded again here, to the same hashes.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.camera_part import prepared_frame
from grood_edge.errors import BackendError, DatasetError, UsageError
from grood_edge.export.batches import Network, batches_of, frame_hashes
from grood_edge.export.dataset import Dataset, Listing, Sample
from grood_edge.export.reservoir import Rows
from grood_edge.images import UnreadableImageError, load_image
from grood_edge.ort import open_ort
from grood_edge.ray_engine import SHARD_IMAGES, Cluster, Work, load_shared, shards_of

__all__ = ["Workers", "batches_of_workers", "require_listing"]

_Unreadable = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Workers:
    """Where a pass runs, and with what: the classifier graph's bytes, and its camera part's where there is one."""

    cluster: Cluster
    graph: bytes
    camera: bytes | None


@dataclass(frozen=True)
class _Shard:
    """Files below `folder` with their labels; `start` is the place of the first in the data set."""

    folder: str
    start: int
    names: tuple[str, ...]
    labels: tuple[int | None, ...]


@dataclass(frozen=True)
class _Batch:
    """Rows of a batch, hashes of its frames uint64 `[n]`, and images that could not be read since the batch before."""

    rows: Rows
    hashes: np.ndarray
    unreadable: _Unreadable


def require_listing(dataset: Dataset) -> Listing:
    """Return the files of a data set.

    Raises:
        UsageError: it has none that a worker could open.
    """
    if dataset.files is None:
        raise UsageError(
            f"--engine ray needs a folder of image files, which every worker opens by itself, but {dataset.name} is an "
            ".npz or a stream. Write the images to a folder, or leave --engine ray out"
        )
    return dataset.files


def batches_of_workers(
    workers: Workers, files: Listing, network: Network, start: int, report: Callable[[_Unreadable], None]
) -> Generator[tuple[Rows, np.ndarray, Callable[[np.ndarray], Frames]], None, None]:
    """Run the files from place `start` on: rows, hashes of the frames, and what decodes chosen frames once more.

    `report` gets the images that cannot be read, in their order, before the batch that follows them. Whoever may leave
    early closes it before the cluster.

    Raises:
        DatasetError: a label that the classifier has not, a file that a worker does not see, or one that changes.
        ClassifierError: features or logits that are not finite.
        BackendError: workers died again and again, or are not like this process.
    """
    graph, camera = (
        None if part is None else np.frombuffer(part, np.uint8) for part in (workers.graph, workers.camera)
    )
    work = Work(_open, _read, (graph, camera, (network.preprocessing, network.class_count, network.space)))
    spans = list(shards_of(start, len(files.names), SHARD_IMAGES))
    with closing(workers.cluster.ordered(work, (_shard(files, *span) for span in spans))) as results:
        for (first, end), (batches, rest) in zip(spans, results, strict=True):
            told = sum(len(batch.rows.names) + len(batch.unreadable) for batch in batches) + len(rest)
            if told != end - first:
                raise BackendError(f"a Ray worker told of {told} images, not {end - first}; nothing was written")
            for batch in batches:
                report(batch.unreadable)
                yield batch.rows, batch.hashes, _Again(files.folder, network, batch).frames
            report(rest)


@dataclass(frozen=True)
class _Again:
    folder: Path
    network: Network
    batch: _Batch

    def frames(self, chosen: np.ndarray) -> Frames:
        """Decode the chosen images of the batch here, uint8 `[q, h, w, c]`."""
        p = self.network.preprocessing
        frames = np.empty((len(chosen), p.height, p.width, p.channels), np.uint8)
        for frame, row in zip(frames, chosen, strict=True):
            path = self.folder / self.batch.rows.names[row]
            try:
                frame[...] = prepared_frame(load_image(path), p, self.network.camera)
            except UnreadableImageError as error:
                raise DatasetError(f"{path} can be read by a Ray worker, but not here: {error}") from error
        if (frame_hashes(frames) != self.batch.hashes[chosen]).any():
            raise DatasetError(
                f"images in {self.folder} are not the same here as on the Ray workers; expected one shared folder that "
                "nobody changes meanwhile. Mount the same one everywhere and start again"
            )
        return frames


def _shard(files: Listing, start: int, stop: int) -> _Shard:
    places = files.order[start:stop].tolist()
    names, labels = (tuple(values[place] for place in places) for values in (files.names, files.labels))
    return _Shard(str(files.folder.absolute()), start, names, labels)


def _open(job: Any) -> Network:
    """In a worker: open the graph, on one thread."""
    graph, camera, (preprocessing, class_count, space) = job
    part = None if camera is None else open_ort(camera.tobytes(), threads=1)
    return Network(open_ort(graph.tobytes(), threads=1), preprocessing, class_count, space, part)


def _read(network: Network, shard: _Shard) -> tuple[tuple[_Batch, ...], _Unreadable]:
    """In a worker: decode and run the files of a shard; the last value are unreadable images after the last batch."""
    unreadable: list[tuple[str, str]] = []
    told = 0

    def samples() -> Iterator[Sample]:
        for name, label in zip(shard.names, shard.labels, strict=True):
            try:
                yield network.prepared(Sample(name, load_shared(Path(shard.folder) / name), label))
            except UnreadableImageError as error:
                unreadable.append((name, str(error)))

    batches = []
    for group, frames in batches_of(samples(), network, lambda: shard.start + len(unreadable)):
        rows, hashes = network.run(group, frames)
        batches.append(_Batch(rows, hashes, tuple(unreadable[told:])))
        told = len(unreadable)
    return tuple(batches), tuple(unreadable[told:])
