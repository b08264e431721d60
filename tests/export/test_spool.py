"""An interrupted pass goes on to the very same result; what is damaged, foreign or of other inputs is not read."""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grood_edge.errors import DatasetError, OutputError, UsageError
from grood_edge.export import kept_frames
from grood_edge.export import spool as spool_module
from grood_edge.export.dataset import Dataset, open_dataset
from grood_edge.export.features import Reading, collect_features
from grood_edge.export.reservoir import Rows
from grood_edge.export.spool import (
    BatchShape,
    Spool,
    SpooledBatch,
    SpoolPlan,
    check_spool_folder,
    opened_spool,
    remove_spools,
)
from grood_edge.ort import OrtModel
from tests.export.test_features import COLOURS, colour_model, coloured_frames, in_batches
from tests.test_publishing import unprivileged

IMAGES = 270  # nine batches, the last of them not whole
BROKEN = 5


class CountingModel(OrtModel):
    """The colour classifier, counting the images that it gets."""

    def __init__(self) -> None:
        self._session = colour_model()._session
        self.inputs = {"image": ("N",)}
        self.outputs = ["features", "logits"]
        self.images = 0

    def run(self, feeds: Mapping[str, np.ndarray], outputs: list[str] | None = None) -> dict[str, np.ndarray]:
        self.images += len(feeds["image"])
        return super().run(feeds, outputs)


@pytest.fixture
def model() -> CountingModel:
    return CountingModel()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folder(tmp_path_factory.mktemp("images"))


def colour_folder(root: Path) -> Path:
    """Fill a folder with class folders of PNG, a few of them broken."""
    frames, labels = coloured_frames(IMAGES)
    for index, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        (root / "abc"[label]).mkdir(exist_ok=True)
        Image.fromarray(frame).save(root / "abc"[label] / f"{index:03d} \u00e9.png")
    for index in range(BROKEN):
        (root / "a" / f"broken {index}.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    return root


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("npz") / "images.npz"
    frames, labels = coloured_frames(IMAGES)
    np.savez(path, images=frames, labels=labels)
    return path


def reading_to(folder: Path | None, **changes: Any) -> Reading:
    plan = None if folder is None else SpoolPlan(folder, "0" * 64)
    reading = Reading(COLOURS, 3, hold_out=True, allow_unreadable=True, max_rows=60, spool=plan)
    changed: Reading = replace(reading, **changes)
    return changed


def after(batches: int) -> Callable[[str, int, int | None], None]:
    """A progress function that interrupts once so many batches are done."""

    def report(label: str, done: int, total: int | None) -> None:
        if done >= 32 * batches:
            raise KeyboardInterrupt

    return report


def interrupted(data: Dataset, model: OrtModel, reading: Reading, batches: int) -> Path:
    with pytest.raises(KeyboardInterrupt):
        collect_features(data, model, reading, after(batches))
    assert reading.spool is not None
    return reading.spool.path


def same(a: Any, b: Any) -> bool:
    """Compare bit by bit, through dataclasses and sequences."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("kind", ["folder", "npz"])
@pytest.mark.parametrize("changes", [{}, {"hold_out": False, "stratified": False}, {"space": "logits", "max_rows": 20}])
def test_interrupted_pass_goes_on_to_the_same_result(
    kind: str,
    changes: dict[str, Any],
    model: CountingModel,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_frames, "CHECK_SAMPLES", 50)
    monkeypatch.setattr(kept_frames, "KEPT_FRAMES", 90)
    data = open_dataset(request.getfixturevalue(kind), "folder")
    whole = collect_features(data, model, reading_to(None, **changes))
    assert len(whole.unreadable) == (BROKEN if kind == "folder" else 0)
    assert len(whole.check_samples) == 50
    assert len(whole.frames) == 90
    reading = reading_to(tmp_path, **changes)
    model.images = 0
    for batches in (1, 3, 7, 7):  # again and again
        interrupted(data, model, reading, batches)
    assert 7 * 32 <= model.images < IMAGES
    assert same(collect_features(data, model, reading), whole)
    assert model.images == IMAGES  # each once
    assert same(collect_features(data, model, reading), whole)  # a pass that was complete, before a later step failed
    assert model.images == IMAGES


def test_predicted_labels_and_a_graph_that_keeps_batch_1(folder: Path, tmp_path: Path) -> None:
    single = colour_model(batch=1)
    data = open_dataset(folder, "predicted")
    whole = collect_features(data, single, reading_to(None))
    reading = reading_to(tmp_path)
    interrupted(data, single, reading, 2)
    assert same(collect_features(data, single, reading), whole)


def test_without_a_spool_nothing_is_written(
    folder: Path, model: OrtModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    collect_features(open_dataset(folder, "folder"), model, reading_to(None))
    assert list(tmp_path.iterdir()) == []


def test_torn_spool_goes_on_from_the_last_whole_batch(folder: Path, model: CountingModel, tmp_path: Path) -> None:
    data = open_dataset(folder, "folder")
    whole = collect_features(data, model, reading_to(None))
    reading = reading_to(tmp_path)
    path = interrupted(data, model, reading, 2)
    stored = path.read_bytes()
    (one, first), (two, second), *_ = _records(stored)
    stored = stored[:two]
    for length in (two - 1, one + 1, one, one - 1, spool_module._HEADER + 1, spool_module._HEADER):
        path.write_bytes(stored[:length])
        model.images = 0
        assert same(collect_features(data, model, reading), whole)
        assert model.images == IMAGES - (first if length >= one else 0)
    path.write_bytes(stored + bytes(5_000))  # a file system that grew the file before it wrote the data
    model.images = 0
    assert same(collect_features(data, model, reading), whole)
    assert model.images == IMAGES - first - second


def test_damaged_record_is_not_read(folder: Path, model: CountingModel, tmp_path: Path) -> None:
    data = open_dataset(folder, "folder")
    whole = collect_features(data, model, reading_to(None))
    reading = reading_to(tmp_path)
    path = interrupted(data, model, reading, 3)
    stored = path.read_bytes()
    one, first = _records(stored)[0]
    for place in (spool_module._HEADER + 5, spool_module._HEADER + 100, one - 2, one + 6, one + 500):
        damaged = bytearray(stored)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        model.images = 0
        assert same(collect_features(data, model, reading), whole)
        assert model.images == IMAGES - (first if place >= one else 0)


def test_spool_of_other_inputs_is_replaced_and_named(folder: Path, model: CountingModel, tmp_path: Path) -> None:
    data = open_dataset(folder, "folder")
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"hold_out": False},
        {"space": "logits"},
        {"class_count": 4},
        {"preprocessing": replace(COLOURS, mean=(1.0, 2.0, 3.0))},
        {"spool": SpoolPlan(tmp_path, "1" * 64)},
    ]
    for change in changes:
        interrupted(data, model, reading_to(tmp_path), 3)
        reading = reading_to(tmp_path, **change)
        labels: list[str] = []
        model.images = 0
        found = collect_features(data, model, reading, _labels_to(labels))
        assert model.images == IMAGES, change
        assert len(found.notes) == 1
        assert "fit.spool was of other images, options or versions; all images are read" in found.notes[0]
        assert labels[0] == found.notes[0]  # before the work
        assert same(replace(found, notes=()), collect_features(data, model, replace(reading, spool=None)))


def test_other_images_are_other_inputs(npz: Path, model: CountingModel, tmp_path: Path) -> None:
    frames, labels = coloured_frames(IMAGES)
    root, spool = tmp_path / "images", tmp_path / "spool"
    spool.mkdir()
    for index, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        (root / "abc"[label]).mkdir(exist_ok=True, parents=True)
        Image.fromarray(frame).save(root / "abc"[label] / f"{index:03d}.png")
    first = next(iter((root / "a").iterdir()))

    def restarted(data: Path, labels: Any = "folder", classes: tuple[str, ...] | None = None) -> bool:
        model.images = 0
        collect_features(open_dataset(data, labels, classes), model, reading_to(spool))
        return model.images == IMAGES

    assert restarted(root)
    assert not restarted(root)
    os.utime(first, ns=(1, 1))
    assert restarted(root)
    assert restarted(root, "predicted")
    assert restarted(root, "folder", ("b", "a", "c"))
    assert restarted(npz)
    assert not restarted(npz)
    os.utime(npz, ns=(1, 1))
    assert restarted(npz)


def test_foreign_file_is_refused_and_left(folder: Path, model: OrtModel, tmp_path: Path) -> None:
    mine = tmp_path / "fit.spool"
    for content in (b"", b"my notes", b"grood-edge spool 1 torn"):
        mine.write_bytes(content)
        for call in (
            lambda: check_spool_folder(tmp_path),
            lambda: collect_features(open_dataset(folder, "folder"), model, reading_to(tmp_path)),
        ):
            with pytest.raises(UsageError, match=r"fit\.spool was not written by --spool and is left as it is"):
                call()
        remove_spools(tmp_path)
        assert mine.read_bytes() == content
    mine.unlink()
    mine.mkdir()
    with pytest.raises(UsageError, match="was not written by --spool"):
        check_spool_folder(tmp_path)


def test_only_spools_are_removed(folder: Path, model: OrtModel, tmp_path: Path) -> None:
    data = open_dataset(folder, "folder")
    reading = reading_to(tmp_path)
    interrupted(data, model, reading, 1)
    interrupted(data, model, reading.for_calibration(), 1)
    (tmp_path / "other.spool").write_bytes(b"mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.spool", "fit.spool", "other.spool"]
    remove_spools(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other.spool"]


def test_stream_cannot_be_resumed(model: OrtModel, tmp_path: Path) -> None:
    frames, labels = coloured_frames(10)
    with pytest.raises(UsageError, match=r"--spool needs a folder or an \.npz, but the given batches is a stream"):
        collect_features(open_dataset(in_batches(frames, labels), "folder"), model, reading_to(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"--spool .*file is a file; expected a folder"):
        check_spool_folder(tmp_path / "file")
    with pytest.raises(OutputError, match=r"cannot make the folder .* for --spool"):
        check_spool_folder(tmp_path / "missing" / "folder")
    check_spool_folder(tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_read_only_folder() -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own must not be entered by another user
    try:
        folder.chmod(0o555)
        with unprivileged():
            with pytest.raises(OutputError, match=r"is not writable; choose another one for --spool"):
                check_spool_folder(folder)
            with pytest.raises(OutputError, match="is not writable"), opened_spool(folder / "fit.spool", INPUTS, SHAPE):
                pass
        assert list(folder.iterdir()) == []
    finally:
        folder.chmod(0o755)
        folder.rmdir()


def test_full_disk_keeps_what_is_there(
    folder: Path, model: CountingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    import signal

    data = open_dataset(folder, "folder")
    whole = collect_features(data, model, reading_to(None))
    reading = reading_to(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write the spool .*fit\.spool: .* the same command goes on"):
            collect_features(data, model, reading)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    model.images = 0
    assert same(collect_features(data, model, reading), whole)
    assert 0 < model.images < IMAGES


SHAPE = BatchShape(images=2, class_count=3, frame=(1, 2, 3))
INPUTS = {"seed": 0}


def batch(**changes: Any) -> SpooledBatch:
    rows = Rows(np.ones((2, 4), np.float32), np.array([0, 2]), np.array([1, 1]), ("x", "y \udc80"))
    frames = np.arange(6, dtype=np.uint8).reshape(1, 1, 2, 3)
    stored = SpooledBatch(rows, np.array([1, 2**64 - 1], np.uint64), frames, (("z", "torn"),))
    return replace(stored, **changes)


def forged(instance: Any, **changes: Any) -> Any:
    """Change a copy without asking its types."""
    changed = copy.copy(instance)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed


def reread(path: Path) -> list[SpooledBatch]:
    with opened_spool(path, INPUTS, SHAPE) as spool:
        return list(iter(spool.read, None))


def test_batches_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "fit.spool"
    second = batch(frames=np.zeros((0, 1, 2, 3), np.uint8), unreadable=())
    with opened_spool(path, INPUTS, SHAPE) as spool:
        assert spool.read() is None
        spool.append(batch())
        spool.append(second)
    assert same(tuple(reread(path)), (batch(), second))


@pytest.mark.parametrize(
    "bad",
    [
        {"rows": forged(batch().rows, labels=np.array([0, 3]))},
        {"rows": forged(batch().rows, predictions=np.array([-1, 0]))},
        {"rows": forged(batch().rows, names=("x",))},
        {"rows": forged(batch().rows, names=("x", 3))},
        {"rows": forged(batch().rows, features=np.ones((2, 5), np.float32))},  # another dimension than before
        {"unreadable": (("z",),)},
        {"unreadable": (("z", None),)},
        {"unreadable": 7},
    ],
)
def test_record_that_says_the_impossible_ends_the_spool(bad: dict[str, Any], tmp_path: Path) -> None:
    """Their CRC is right: they were made, not damaged."""
    path = tmp_path / "fit.spool"
    wrong = forged(batch(), **bad)
    with opened_spool(path, INPUTS, SHAPE) as spool:
        spool.append(batch())
        size = path.stat().st_size
        spool.append(wrong)
        spool.append(batch())
    assert len(reread(path)) == 1
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    "sizes",
    [(2, 2**32 - 1, 0, 0), (2, 4, 3, 0), (2, 4, 0, 2**32 - 1), (2, 4, 2, 64 << 20), (2**32 - 1, 4, 0, 0), (0, 4, 0, 2)],
)
def test_sizes_are_checked_before_memory_is_taken(sizes: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "fit.spool"
    with opened_spool(path, INPUTS, SHAPE):
        pass
    with path.open("ab") as file:
        file.write(spool_module._HEAD.pack(0, *sizes))
        file.truncate(1 << 40)  # a sparse file: a terabyte of zeros that takes no disk
    assert reread(path) == []
    assert path.stat().st_size == spool_module._HEADER


def test_text_that_is_nested_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.spool"
    monkeypatch.setattr(json, "dumps", lambda *_, **__: "[" * 100_000)
    with pytest.raises(RecursionError):
        json.loads(json.dumps(0))
    with opened_spool(path, INPUTS, SHAPE) as spool:
        spool.append(batch())
    assert reread(path) == []


def test_frames_that_do_not_fit_the_labels_are_refused(folder: Path, model: OrtModel, tmp_path: Path) -> None:
    data = open_dataset(folder, "folder")
    reading = reading_to(tmp_path)
    original = Spool.append

    def without_frames(self: Spool, stored: SpooledBatch) -> None:
        original(self, replace(stored, frames=stored.frames[:-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spool, "append", without_frames)
        interrupted(data, model, reading, 2)
    with pytest.raises(DatasetError, match=r"fit\.spool contradicts itself; remove that file and start again"):
        collect_features(data, model, reading)


def test_two_exports_do_not_share_a_spool(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "fit.spool"
    with opened_spool(path, INPUTS, SHAPE) as spool:
        for inputs in (INPUTS, {"seed": 1}):
            with pytest.raises(UsageError, match="another export uses the spool"), opened_spool(path, inputs, SHAPE):
                pass
        spool.append(batch())
    assert len(reread(path)) == 1


def test_resumed_pass_tells_how_far_it_is(folder: Path, model: OrtModel, tmp_path: Path) -> None:
    data = open_dataset(folder, "folder")
    interrupted(data, model, reading_to(tmp_path), 3)
    done: list[int] = []
    collect_features(data, model, reading_to(tmp_path), lambda _, count, total: done.append(count))
    again: list[int] = []
    collect_features(data, model, reading_to(None), lambda _, count, total: again.append(count))
    assert done == again
    assert again[-1] == IMAGES


def _labels_to(labels: list[str]) -> Callable[[str, int, int | None], None]:
    return lambda label, done, total: labels.append(label)


def _records(stored: bytes) -> list[tuple[int, int]]:
    """Return where each record of a spool ends, and how many images are in it."""
    records, place = [], spool_module._HEADER
    while place < len(stored):
        _, images, dimension, frames, text = spool_module._HEAD.unpack_from(stored, place)
        length = images * (24 + 4 * dimension) + frames * COLOURS.height * COLOURS.width * COLOURS.channels + text
        place += spool_module._HEAD.size + length
        records.append((place, images))
    return records
