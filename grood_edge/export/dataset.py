"""The user's images with their labels, streamed one at a time, whatever they come from.

Class folders, a flat folder, an .npz, `package.module:factory` or any iterable of (images, labels) batches all
become one `Dataset`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from grood_edge.arrays import Frame, InputFrame
from grood_edge.contract_reader import MAX_CONTRACT_BYTES
from grood_edge.decoding import decoded
from grood_edge.errors import DatasetError, UsageError
from grood_edge.export.factory import call_factory, import_attribute
from grood_edge.images import UnreadableImageError, find_images, load_image, open_npz

__all__ = [
    "Dataset",
    "LabelSource",
    "Listing",
    "Restart",
    "Sample",
    "Work",
    "as_it_is",
    "open_dataset",
    "read_class_names",
    "restart_of",
]

LabelSource = Literal["folder", "predicted"]
OnUnreadable = Callable[[str, str], None]


@dataclass(frozen=True)
class Sample:
    """One frame, uint8 `[h, w, c]` of any size, with its label (None: unlabelled) and a name for messages.

    `prepared` uint8 `[height, width, channels]`: the frame as the network takes it, where a `Work` made it.
    """

    name: str
    frame: Frame
    label: int | None
    prepared: InputFrame | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes of its pixels."""
        return self.frame.nbytes + (0 if self.prepared is None else self.prepared.nbytes)


Work = Callable[[Sample], Sample]  # what is done to a sample by the thread that decoded it


def as_it_is(sample: Sample) -> Sample:
    """Return the sample itself."""
    return sample


@runtime_checkable
class Samples(Protocol):
    """Iterates over samples, in order; `work` is done to each, for files in several threads at once."""

    def __call__(self, on_unreadable: OnUnreadable, /, work: Work = ...) -> Iterator[Sample]: ...


@runtime_checkable
class LaterSamples(Protocol):
    """The same from the place `start` up to `stop`, and not one image more: None is the end."""

    def __call__(
        self, on_unreadable: OnUnreadable, /, work: Work = ..., start: int = ..., stop: int | None = ...
    ) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class Restart:
    """How a pass goes on in the middle.

    `identity()` is a digest of which images there are, in which order and with which labels, without reading them;
    `samples(on_unreadable, start=n, stop=m)` are those of the images n to m - 1 that can be decoded.
    """

    identity: Callable[[], str]
    samples: LaterSamples


@dataclass(frozen=True)
class Listing:
    """Image files by name below `folder`, with labels (None: unlabelled); `order` int64 `[n]` is how they are read."""

    folder: Path
    names: list[str]
    labels: list[int | None]
    order: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Images that can be streamed. `count` is None when only a pass tells; `classes` None when nothing names them.

    `samples(on_unreadable, work=...)` iterates over the samples; an image that cannot be decoded is reported by
    `on_unreadable(name, reason)` and left out. `restart` is None for streams that only begin at their beginning;
    `files` is None where images are no files of their own.
    """

    name: str
    classes: tuple[str, ...] | None
    count: int | None
    samples: Samples
    restart: Restart | None = None
    files: Listing | None = None


def restart_of(dataset: Dataset) -> Restart:
    """Return how a pass over the data set goes on in the middle.

    Raises:
        UsageError: it cannot.
    """
    if dataset.restart is None:
        raise UsageError(
            f"--spool needs a folder or an .npz, but {dataset.name} is a stream: what it gave before an interruption "
            "cannot be told from what it gives after. Leave --spool out, or write the images to a folder"
        )
    return dataset.restart


def open_dataset(data: Any, labels: LabelSource, classes: tuple[str, ...] | None = None, seed: int = 0) -> Dataset:
    """Open the user's images.

    Args:
        data: a folder, an .npz, `package.module:factory` (runs the user's code; returns an iterable of batches),
            or an iterable of (images, labels) batches: images uint8 `[n, h, w, c]` or `[n, c, h, w]`.
        labels: `folder` (folder names, the .npz's or the batches' labels) or `predicted` (no labels are read).
        classes: class names in the classifier's order; folder names must be among them. None: sorted folder names.
        seed: of the order in which files are read, so that every prefix is a fair sample.

    Raises:
        DatasetError: nothing there, a folder that is no class, missing labels.
    """
    if not isinstance(data, str | Path | Iterable):
        raise DatasetError(f"the data is a {type(data).__name__}; expected a path or an iterable of (images, labels)")
    if not isinstance(data, str | Path):
        return _dataset_from_batches(data, "the given batches", labels, classes)
    path, text = Path(data), str(data)
    if os.path.isfile(path) and path.suffix.lower() == ".npz":  # False for a name that is too long
        return _dataset_from_npz(path, labels, classes)
    if os.path.isdir(path):
        return _flat_folder(path, classes, seed) if labels == "predicted" else _class_folders(path, classes, seed)
    if not os.path.exists(path) and ":" in text:
        return _dataset_from_batches(_batches_of_factory(text), text, labels, classes)
    raise DatasetError(
        f"{text} does not exist or is no data set; expected class folders, an .npz or package.module:factory"
    )


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names in the classifier's order: a JSON list, or one name a line.

    Raises:
        DatasetError: unreadable, empty, or names that repeat.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONTRACT_BYTES + 1)
        if len(raw) > MAX_CONTRACT_BYTES:
            raise DatasetError(f"{path} has more than {MAX_CONTRACT_BYTES:,} bytes; expected class names")
        text = raw.decode()
        names = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"cannot read class names from {path}: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{path} holds no JSON list of strings; expected class names in the classifier's order")
    cleaned = tuple(name.strip() for name in names if name.strip())
    repeated = sorted(name for name, count in Counter(cleaned).items() if count > 1)
    if not cleaned or repeated:
        raise DatasetError(
            f"{path} has {len(cleaned)} class names, repeated: {repeated}; expected one a line, each once"
        )
    return cleaned


def _class_folders(folder: Path, classes: tuple[str, ...] | None, seed: int) -> Dataset:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DatasetError(
            f"{folder} has no class folders; expected one folder of images a class. For unlabelled frames from a "
            "robot use --labels predicted"
        )
    order = classes or tuple(names)
    unknown = sorted(set(names) - set(order))
    if unknown:
        raise DatasetError(f"{folder} has folders {unknown[:5]} that are not among the {len(order)} class names")
    files: list[str] = []
    labels: list[int | None] = []
    for name in names:
        files += _relative(find_images(folder / name), folder)
        labels += [order.index(name)] * (len(files) - len(labels))
    return _dataset_from_files(folder, files, labels, order, seed)


def _flat_folder(folder: Path, classes: tuple[str, ...] | None, seed: int) -> Dataset:
    files = _relative(find_images(folder), folder)
    return _dataset_from_files(folder, files, [None] * len(files), classes, seed)


def _relative(paths: list[Path], folder: Path) -> list[str]:
    """Return the paths below `folder` as text: a million `Path`s take most of a gigabyte."""
    return [path.relative_to(folder).as_posix() for path in paths]


def _dataset_from_files(
    folder: Path, names: list[str], labels: list[int | None], classes: tuple[str, ...] | None, seed: int
) -> Dataset:
    order = np.random.default_rng(seed).permutation(len(names))

    def samples(
        on_unreadable: OnUnreadable, work: Work = as_it_is, start: int = 0, stop: int | None = None
    ) -> Iterator[Sample]:
        def load(index: int) -> Sample:
            return work(Sample(names[index], load_image(folder / names[index]), labels[index]))

        for index, sample in decoded(map(int, order[start:stop]), load):
            if isinstance(sample, UnreadableImageError):
                on_unreadable(names[index], str(sample))
            else:
                yield sample

    def identity() -> str:
        digest = hashlib.sha256()
        for index in order:
            digest.update(json.dumps([names[index], *_size_and_time(folder / names[index]), labels[index]]).encode())
        return digest.hexdigest()

    files = Listing(folder, names, labels, order)
    return Dataset(str(folder), classes, len(names), samples, Restart(identity, samples), files)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:  # reading it will say so
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _dataset_from_npz(path: Path, labels: LabelSource, classes: tuple[str, ...] | None) -> Dataset:
    archive = open_npz(path)
    if labels == "folder" and archive.labels is None:
        raise DatasetError(f"{path} has no array 'labels'; add one (integers [n]), or use --labels predicted")

    def samples(_: OnUnreadable, work: Work = as_it_is, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        for index, frame in islice(enumerate(archive.frames()), start, stop):
            label = int(archive.labels[index]) if archive.labels is not None and labels == "folder" else None
            yield work(Sample(f"{path.name}[{index}]", frame, label))

    def identity() -> str:
        return hashlib.sha256(json.dumps([path.name, *_size_and_time(path), labels]).encode()).hexdigest()

    return Dataset(str(path), classes, len(archive), samples, Restart(identity, samples))


def _batches_of_factory(text: str) -> Any:
    factory = import_attribute(text, DatasetError, "a folder, .npz or package.module:factory")
    return call_factory(factory, text, DatasetError)


def _dataset_from_batches(
    batches: Iterable[Any], name: str, labels: LabelSource, classes: tuple[str, ...] | None
) -> Dataset:
    def samples(_: OnUnreadable, work: Work = as_it_is) -> Iterator[Sample]:
        index = 0
        for batch in batches:
            images, batch_labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
            if batch_labels is None and labels == "folder":
                raise DatasetError(f"{name} gives images without labels; give (images, labels), or labels='predicted'")
            frames = _frames(images, name)
            ids = [None] * len(frames) if labels == "predicted" else _labels(batch_labels, len(frames), name)
            for frame, label in zip(frames, ids, strict=True):
                yield work(Sample(f"image {index}", frame, label))
                index += 1

    return Dataset(name, classes, None, samples)


def _labels(labels: Any, count: int, name: str) -> list[int]:
    array = np.asarray(labels)
    if array.shape != (count,) or (count and array.dtype.kind not in "iu"):
        raise DatasetError(
            f"{name} gives labels of dtype {array.dtype} and shape {list(array.shape)} for {count} images; "
            "expected one integer class id an image"
        )
    return [int(label) for label in array]


def _frames(images: Any, name: str) -> np.ndarray:
    array = np.asarray(images)
    if array.ndim == 3 and array.shape[2] not in (1, 3):  # [h, w, c] would be one frame, not a batch
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        raise DatasetError(
            f"{name} gives images of dtype {array.dtype} and shape {list(array.shape)}; expected raw uint8 frames "
            "[n, h, w, c] or [n, c, h, w]: resize, crop and normalisation are part of the artifact"
        )
    return array
