"""Run the classifier graph that ships over the images, and keep what the statistics need: one pass, bounded memory.

Kept are float64 class sums and counts over all images, a seeded sample of feature rows (d floats each), and some
frames. With a spool (see `spool`) a pass that was interrupted goes on where it stopped, to the same result.
"""

import contextlib
from array import array
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from grood_edge.arrays import Flags, Frames, Labels
from grood_edge.errors import DatasetError
from grood_edge.export.batches import BATCH, Network, batches_of, frame_hashes
from grood_edge.export.dataset import Dataset, Sample, Work, restart_of
from grood_edge.export.kept_frames import KEPT_BYTES, KEPT_FRAMES, CheckSamples, KeptFrames
from grood_edge.export.reservoir import Rows
from grood_edge.export.shards import Workers, batches_of_workers, require_listing
from grood_edge.export.spool import BatchShape, Spool, SpooledBatch, SpoolPlan, opened_spool
from grood_edge.export.table import FeatureTable, Gatherer, merged, rows_of
from grood_edge.frame_hashes import digest_of
from grood_edge.images import UNREADABLE_LIMIT, name_some
from grood_edge.ort import OrtModel
from grood_edge.preprocessing import Preprocessing
from grood_edge.progress import Progress, silent

__all__ = [
    "DEFAULT_ROWS",
    "MAX_ROWS",
    "FeaturePass",
    "FeatureTable",
    "Reading",
    "collect_features",
    "merged",
    "rows_of",
]

DEFAULT_ROWS = 20_000  # feature rows kept of a pass; sums and counts always cover every image
MAX_ROWS = 100_000  # the most that may be asked for
HELD_OUT_EVERY = 5  # in a split, every fifth image of a class calibrates


@dataclass(frozen=True)
class FeaturePass:
    """What one pass found: `fit` rows, `held_out` rows (None without a split), and the images that failed.

    `check_samples` are some raw samples for verification; `frame_hashes` uint64 `[n]` are BLAKE2b of the
    preprocessed frames, to find images that two passes share; `digest` is the SHA-256 of the sorted hashes: the same
    images give the same digest in any order and with any labels. `frames` uint8 `[q, h, w, c]` with `frame_labels`
    int64 `[q]` and `frame_names` are the first preprocessed frames of each class, equally many of each, never held-out
    ones. `notes` are for the user.
    """

    fit: FeatureTable
    held_out: FeatureTable | None
    unreadable: tuple[tuple[str, str], ...]
    check_samples: tuple[Sample, ...]
    digest: str
    frame_hashes: np.ndarray
    frames: Frames
    frame_labels: np.ndarray
    frame_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How a pass reads.

    hold_out: every fifth image of a class goes to `held_out`. space: the graph's output that is kept as features.
    max_rows: rows kept, of fit images and of held-out ones each. stratified: fit rows cover the classes as evenly as
    they can; False keeps a uniform sample, which calibration needs (held-out rows always are one). spool: None keeps
    nothing on disk. camera: the open camera part of the graph, through which frames of the camera go. keep_frames: for
    diagnosis and a second run of the network; False keeps what verification needs alone, for a device. workers: None
    decodes and runs here.
    """

    preprocessing: Preprocessing
    class_count: int
    hold_out: bool = False
    seed: int = 0
    allow_unreadable: bool = False
    space: Literal["features", "logits"] = "features"
    max_rows: int = DEFAULT_ROWS
    stratified: bool = True
    spool: SpoolPlan | None = None
    camera: OrtModel | None = None
    keep_frames: bool = True
    workers: Workers | None = None

    def for_calibration(self) -> "Reading":
        """Return how separate calibration images are read: a uniform sample, nothing held out, a spool of its own."""
        spool = None if self.spool is None else replace(self.spool, name="calibration")
        return replace(self, hold_out=False, stratified=False, spool=spool)


def collect_features(dataset: Dataset, model: OrtModel, reading: Reading, progress: Progress = silent) -> FeaturePass:
    """Run `model` (`image` to `features` and `logits`) over the data set.

    Without a label a sample takes its prediction. With `hold_out`, every fifth image of each class goes to
    `held_out` instead of `fit`.

    Raises:
        DatasetError: no images, labels out of range, or more than 1 % unreadable.
        ClassifierError: features or logits that are not finite.
        UsageError: a spool for a data set that cannot be read from the middle, or in a folder that holds other files;
            workers for a data set without files.
        OutputError: a spool that cannot be written.
        BackendError: the device or the workers failed.
    """
    found = _Pass(reading)
    network = Network(model, reading.preprocessing, reading.class_count, reading.space, reading.camera)
    label = f"reading {dataset.name}"
    with _spool_of(dataset, reading, model.batch(BATCH)) as spool:
        if spool is not None:
            if spool.replaced:
                found.notes.append(_replaced(reading))
                progress(found.notes[0], 0, None)
            for stored in iter(spool.read, None):
                found.restore(stored, spool)
                progress(label, found.images, dataset.count)
        reported = len(found.unreadable)
        # Closed here: the traceback of an error would keep it until the cluster is gone.
        with contextlib.closing(_batches(dataset, network, reading.workers, found)) as batches:
            for rows, hashes, frames_at in batches:
                kept = frames_at(found.take(rows, hashes))
                found.keep(kept)
                if spool is not None:
                    spool.append(SpooledBatch(rows, hashes, kept, tuple(found.unreadable[reported:])))
                    reported = len(found.unreadable)
                progress(label, found.images, dataset.count)
    _require_readable(dataset, found.images, found.unreadable, reading.allow_unreadable)
    return found.result()


class _Pass:
    """What a pass has found so far."""

    def __init__(self, reading: Reading) -> None:
        self.unreadable: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.check = CheckSamples(few=not reading.keep_frames)
        self._hold_out = reading.hold_out
        rng = np.random.default_rng([reading.seed, HELD_OUT_EVERY])
        self._first = rng.integers(0, HELD_OUT_EVERY, reading.class_count)
        self._fit = Gatherer(reading.class_count, reading.max_rows, reading.seed, reading.stratified)
        self._held = Gatherer(reading.class_count, reading.max_rows, reading.seed + 1, stratified=False)
        self._hashes = array("Q")
        self._frames = KeptFrames(reading.preprocessing, reading.class_count, none=not reading.keep_frames)

    @property
    def images(self) -> int:
        return len(self._hashes)

    def take(self, rows: Rows, hashes: np.ndarray) -> np.ndarray:
        """Gather a batch; return which of its frames, int64 `[q]`, `keep` has to get."""
        held_out = self._held_out(rows.labels)
        self._fit.add(rows.where(~held_out))
        self._held.add(rows.where(held_out))
        self._hashes.frombytes(hashes.astype("u8").tobytes())
        return self._frames.wanted(rows.labels, rows.names, held_out)

    def keep(self, frames: Frames) -> None:
        self._frames.add(frames)

    def restore(self, stored: SpooledBatch, spool: Spool) -> None:
        """Gather a batch of an earlier run."""
        wanted = self.take(stored.rows, stored.hashes)
        if len(wanted) != len(stored.frames) or (frame_hashes(stored.frames) != stored.hashes[wanted]).any():
            spool.refuse()
        self.keep(stored.frames)
        self.unreadable += stored.unreadable

    def result(self) -> FeaturePass:
        hashes = np.array(self._hashes, np.uint64)
        return FeaturePass(
            fit=self._fit.table(),
            held_out=self._held.table() if self._hold_out else None,
            unreadable=tuple(self.unreadable),
            check_samples=tuple(self.check.kept),
            digest=digest_of(hashes),
            frame_hashes=hashes,
            frames=self._frames.frames[: self._frames.count],
            frame_labels=np.array(self._frames.labels, np.int64),
            frame_names=tuple(self._frames.names),
            notes=tuple(self.notes),
        )

    def _held_out(self, labels: Labels) -> Flags:
        """Mark every fifth image of each class, counted over the whole pass from a random start.

        Else classes with fewer than five images would never calibrate. A class keeps its first two for the fit.
        """
        chosen = np.zeros(len(labels), bool)
        if self._hold_out:
            fitted, seen = self._fit.counts.copy(), self._fit.counts + self._held.counts + self._first
            for row, label in enumerate(labels):
                seen[label] += 1
                chosen[row] = seen[label] % HELD_OUT_EVERY == 0 and fitted[label] >= 2
                fitted[label] += not chosen[row]
        return chosen


def _spool_of(
    dataset: Dataset, reading: Reading, batch: int
) -> contextlib.AbstractContextManager[Spool] | contextlib.nullcontext[None]:
    if reading.spool is None:
        return contextlib.nullcontext()
    p = reading.preprocessing
    inputs = {
        "images": restart_of(dataset).identity(),
        "graph": reading.spool.graph,
        "preprocessing": asdict(p),
        "space": reading.space,
        "seed": reading.seed,
        "hold_out": reading.hold_out,
        "kept_frames": [KEPT_FRAMES, KEPT_BYTES, HELD_OUT_EVERY],
    }
    shape = BatchShape(batch, reading.class_count, (p.height, p.width, p.channels))
    return opened_spool(reading.spool.path, inputs, shape)


def _replaced(reading: Reading) -> str:
    assert reading.spool is not None
    return f"{reading.spool.path} was of other images, options or versions; all images are read from the beginning"


def _batches(
    dataset: Dataset, network: Network, workers: Workers | None, found: _Pass
) -> Generator[tuple[Rows, np.ndarray, Callable[[np.ndarray], Frames]], None, None]:
    """Run the images that the spool did not give: rows, hashes of the frames uint64 `[n]`, and what gives some frames.

    The raw frames for the checks are in no spool and come from no worker; they are decoded here.
    """
    taken = found.images
    start = taken + len(found.unreadable)
    if start or workers is not None:
        _offer_first(dataset, found, None if workers is not None else start)
    if workers is not None:
        yield from batches_of_workers(workers, require_listing(dataset), network, start, found.unreadable.extend)
        return
    work = _preparing(network, found.check)
    # Iterators without a name go with the loop that takes them, and their threads too.
    for group, frames in batches_of(
        _samples(dataset, found, work, start), network, lambda: taken + len(found.unreadable)
    ):
        yield *network.run(group, frames), frames.__getitem__


def _samples(dataset: Dataset, found: _Pass, work: Work, start: int) -> Iterator[Sample]:
    def on_unreadable(name: str, reason: str) -> None:
        found.unreadable.append((name, reason))

    for sample in (
        restart_of(dataset).samples(on_unreadable, work, start) if start else dataset.samples(on_unreadable, work)
    ):
        found.check.offer(replace(sample, prepared=None))
        yield sample


def _preparing(network: Network, check: CheckSamples) -> Work:
    """Resize as soon as a frame is decoded, and drop the raw one once no check wants it.

    A batch of camera frames would be a hundred times larger. Whether `check` is full is asked before the samples ahead
    of this one were offered, so that one that it still takes has its raw frame.
    """

    def work(sample: Sample) -> Sample:
        prepared = network.prepared(sample)
        return prepared if check.full else replace(prepared, frame=sample.frame)

    return work


def _offer_first(dataset: Dataset, found: _Pass, stop: int | None) -> None:
    for sample in restart_of(dataset).samples(lambda *_: None, stop=stop):
        found.check.offer(sample)
        if found.check.full:
            break


def _require_readable(dataset: Dataset, done: int, unreadable: list[tuple[str, str]], allow: bool) -> None:
    total = done + len(unreadable)
    if total == 0:
        raise DatasetError(f"{dataset.name} gave no images")
    if len(unreadable) > UNREADABLE_LIMIT * total and not (allow and done):
        raise DatasetError(
            f"{len(unreadable)} of {total} images in {dataset.name} cannot be read: {name_some(unreadable)}. "
            "Repair or remove them, or go on without them with --allow-unreadable"
        )
