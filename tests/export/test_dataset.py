"""Whatever holds the images becomes one stream of frames and labels, in an order that the seed alone decides."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError, UsageError
from grood_edge.export.dataset import Dataset, Sample, open_dataset, read_class_names, restart_of
from grood_edge.images import load_image


def read(dataset: Dataset) -> list[Sample]:
    unreadable: list[tuple[str, str]] = []
    samples = list(dataset.samples(lambda name, reason: unreadable.append((name, reason))))
    assert unreadable == []
    return samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with 4, 3 and 2 small images; each is filled with its own grey level."""
    level = 0
    for name, count in (("ant", 4), ("bee", 3), ("cat", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(count):
            frame = np.full((5, 6, 3), level, np.uint8)
            Image.fromarray(frame).save(tmp_path / "data" / name / f"{index}.png")
            level += 1
    return tmp_path / "data"


def test_class_folders_are_labelled_by_sorted_names(folder: Path) -> None:
    dataset = open_dataset(folder, "folder")
    assert dataset.classes == ("ant", "bee", "cat")
    assert dataset.count == 9
    samples = read(dataset)
    assert {(s.name.split("/")[0], s.label) for s in samples} == {("ant", 0), ("bee", 1), ("cat", 2)}
    assert {s.name for s in samples} == {p.relative_to(folder).as_posix() for p in folder.rglob("*.png")}
    for sample in samples:
        np.testing.assert_array_equal(sample.frame, load_image(folder / sample.name))


def test_images_below_a_class_folder_belong_to_it(folder: Path) -> None:
    (folder / "bee" / "summer").mkdir()
    shutil.move(folder / "bee" / "0.png", folder / "bee" / "summer" / "0.png")
    assert {s.label for s in read(open_dataset(folder, "folder")) if s.name == "bee/summer/0.png"} == {1}


def test_hidden_folders_are_no_classes(folder: Path) -> None:
    (folder / ".cache").mkdir()
    assert open_dataset(folder, "folder").classes == ("ant", "bee", "cat")


def test_given_classes_set_the_order_and_may_have_no_folder(folder: Path) -> None:
    classes = ("cat", "dog", "ant", "bee")
    dataset = open_dataset(folder, "folder", classes)
    assert dataset.classes == classes
    assert {(s.name.split("/")[0], s.label) for s in read(dataset)} == {("cat", 0), ("ant", 2), ("bee", 3)}


def test_folder_that_is_no_class_is_refused(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"folders \['bee'\] that are not among the 2 class names"):
        open_dataset(folder, "folder", ("ant", "cat"))


def test_flat_folder_has_no_labels(folder: Path) -> None:
    dataset = open_dataset(folder, "predicted")
    assert dataset.classes is None
    assert dataset.count == 9
    assert {s.label for s in read(dataset)} == {None}


@pytest.mark.parametrize("kind", ["missing", "long name", "empty", "empty class", "flat", "file"])
@pytest.mark.parametrize("labels", ["folder", "predicted"])
def test_folders_that_cannot_be_used(kind: str, labels: Any, folder: Path, tmp_path: Path) -> None:
    paths = {"missing": tmp_path / "nowhere", "long name": tmp_path / ("x" * 5000), "flat": folder / "ant"}
    path = paths.get(kind, tmp_path / kind)
    messages = {
        "missing": "nowhere does not exist or is no data set; expected class folders",
        "long name": "x does not exist or is no data set",
        "empty": "has no class folders" if labels == "folder" else "contains no image file",
        "empty class": "empty class/bee contains no image file" if labels == "folder" else "",
        "flat": "has no class folders; expected one folder of images a class.*--labels predicted",
        "file": "is no data set; expected class folders, an .npz or package.module:factory",
    }
    if kind == "empty":
        path.mkdir()
    elif kind == "empty class":
        shutil.copytree(folder, path)
        for file in (path / "bee").iterdir():
            file.unlink()
    elif kind == "file":
        path.write_text("not images")
    if labels == "predicted" and kind in ("flat", "empty class"):
        assert open_dataset(path, labels).count == (4 if kind == "flat" else 6)
        return
    with pytest.raises(DatasetError, match=messages[kind]):
        open_dataset(path, labels)


def test_order_depends_on_the_seed_and_not_on_the_place(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "zzz" / "elsewhere"
    shutil.copytree(folder, copy)
    names = [s.name for s in read(open_dataset(folder, "folder", seed=3))]
    assert [s.name for s in read(open_dataset(copy, "folder", seed=3))] == names
    assert [s.name for s in read(open_dataset(folder, "folder", seed=4))] != names
    assert names != sorted(names)
    assert sorted(names) == sorted(s.name for s in read(open_dataset(folder, "folder", seed=4)))


def test_every_prefix_is_a_fair_sample(digits: DemoImages) -> None:
    labels = [s.label for s in read(open_dataset(digits.train, "folder"))]
    assert set(labels[:60]) == set(range(7))  # in folder order the first 60 would all be zeros


def test_a_second_pass_gives_the_same(folder: Path) -> None:
    dataset = open_dataset(folder, "folder")
    assert [s.name for s in read(dataset)] == [s.name for s in read(dataset)]


def test_unreadable_images_are_reported_and_left_out(folder: Path) -> None:
    (folder / "bee" / "1.png").write_bytes(b"no image")
    reported: list[tuple[str, str]] = []
    dataset = open_dataset(folder, "folder")
    samples = list(dataset.samples(lambda name, reason: reported.append((name, reason))))
    assert len(samples) == 8
    assert [name for name, _ in reported] == ["bee/1.png"]
    assert "identify" in reported[0][1]


def test_npz_with_and_without_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)
    np.savez(tmp_path / "labelled.npz", images=images, labels=np.arange(7) % 3)
    np.savez_compressed(tmp_path / "plain.npz", images=images[..., 0])
    dataset = open_dataset(tmp_path / "labelled.npz", "folder", ("a", "b", "c"))
    samples = read(dataset)
    assert (dataset.classes, dataset.count) == (("a", "b", "c"), 7)
    assert [s.label for s in samples] == [0, 1, 2, 0, 1, 2, 0]
    np.testing.assert_array_equal(np.stack([s.frame for s in samples]), images)
    assert {s.label for s in read(open_dataset(tmp_path / "labelled.npz", "predicted"))} == {None}
    assert read(open_dataset(tmp_path / "plain.npz", "predicted"))[2].frame.shape == (4, 5, 1)
    with pytest.raises(DatasetError, match=r"has no array 'labels'; add one .* or use --labels predicted"):
        open_dataset(tmp_path / "plain.npz", "folder")


def _frames() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (6, 8, 9, 3), np.uint8)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_batches_of_arrays_and_tensors(kind: str, layout: str) -> None:
    images, labels = _frames(), np.array([2, 0, 1, 1, 0, 2])
    given = images.transpose(0, 3, 1, 2) if layout == "NCHW" else images
    batches: Any = [(given[:4], labels[:4]), (given[4:], labels[4:])]
    if kind == "torch":
        batches = [(torch.from_numpy(np.ascontiguousarray(i)), torch.from_numpy(y)) for i, y in batches]
    dataset = open_dataset(batches, "folder")
    samples = read(dataset)
    assert (dataset.classes, dataset.count) == (None, None)
    assert [s.label for s in samples] == labels.tolist()
    assert [s.name for s in samples] == [f"image {i}" for i in range(6)]
    np.testing.assert_array_equal(np.stack([s.frame for s in samples]), images)


def test_a_torch_data_loader_is_an_iterable_of_batches() -> None:
    images = torch.from_numpy(_frames())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(6)), batch_size=4)
    assert [s.label for s in read(open_dataset(loader, "folder"))] == list(range(6))


def test_grey_batches_and_lists_of_labels() -> None:
    samples = read(open_dataset([(_frames()[..., 0], [1, 0, 1, 0, 1, 0])], "folder"))
    assert {s.frame.shape for s in samples} == {(8, 9, 1)}
    assert [s.label for s in samples] == [1, 0, 1, 0, 1, 0]


def test_batches_without_labels() -> None:
    assert {s.label for s in read(open_dataset([_frames()], "predicted"))} == {None}
    assert {s.label for s in read(open_dataset([(_frames(), [0] * 6)], "predicted"))} == {None}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((_frames().astype(np.float32) / 255, [0] * 6), "dtype float32 .*expected raw uint8 frames.*part of the artif"),
        ((torch.from_numpy(_frames()).float(), [0] * 6), "dtype float32"),
        ((_frames()[0], 1), r"shape \[8, 9, 3\]; expected raw uint8 frames \[n, h, w, c\]"),
        ((_frames()[..., :2], [0] * 6), r"shape \[6, 8, 9, 2\]"),
        ((_frames(), [0, 1]), r"labels of dtype int64 and shape \[2\] for 6 images; expected one integer class id"),
        ((_frames(), np.eye(6)), r"labels of dtype float64 and shape \[6, 6\]"),
        ((_frames(), [0.5] * 6), "labels of dtype float64"),
        ((_frames(), ["ant"] * 6), "labels of dtype <U3"),
        ((_frames(), None), r"images without labels; give \(images, labels\), or labels='predicted'"),
        (_frames(), r"images without labels"),
    ],
)
def test_batches_that_cannot_be_used(batch: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(open_dataset([batch], "folder"))


def test_data_that_is_no_iterable() -> None:
    with pytest.raises(DatasetError, match="the data is a NoneType; expected a path or an iterable"):
        open_dataset(None, "folder")


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_images.py").write_text(
        "import numpy as np\n"
        "def batches():\n    return [(np.full((2, 4, 4, 3), i, np.uint8), [i, i]) for i in range(3)]\n"
        "def broken():\n    raise FileNotFoundError('/mnt/images')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_images", raising=False)


@pytest.mark.usefixtures("factories")
def test_factory_in_the_working_folder() -> None:
    path = list(sys.path)
    assert [s.label for s in read(open_dataset("my_images:batches", "folder"))] == [0, 0, 1, 1, 2, 2]
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my_images:missing", "cannot import 'my_images:missing'.*expected a folder, .npz or package.module:factory"),
        ("no_such_module:batches", "cannot import"),
        ("my_images:broken", "my_images:broken failed with FileNotFoundError: /mnt/images"),
    ],
)
@pytest.mark.usefixtures("factories")
def test_factories_that_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(text, "folder")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "dog\n cat \n\nant\n"),
        ("names.json", '["dog", "cat", "ant"]'),
        ("names.JSON", '["dog", "cat", "ant"]'),
    ],
)
def test_class_names_in_the_classifiers_order(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / name) == ("dog", "cat", "ant")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "cannot read class names from .*gone.txt"),
        ("empty.txt", b"\n\n", "has 0 class names"),
        ("twice.txt", b"cat\ndog\ncat\n", r"repeated: \['cat'\]; expected one a line, each once"),
        ("broken.json", b'["cat", ', "cannot read class names"),
        ("object.json", b'{"0": "cat"}', "holds no JSON list of strings"),
        ("numbers.json", b"[0, 1]", "holds no JSON list of strings"),
        ("deep.json", b"[" * 100_000, "cannot read class names"),
        ("endless.txt", b"cat " * (5 << 20), "has more than 16,777,216 bytes"),
        ("binary.txt", b"\xff\xfe\x00", "cannot read class names"),
    ],
)
def test_class_names_that_cannot_be_used(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_class_names(tmp_path / name)


def names_from(dataset: Dataset, start: int) -> tuple[list[str], list[str]]:
    unreadable: list[str] = []
    samples = restart_of(dataset).samples(lambda name, _: unreadable.append(name), start=start)
    return [sample.name for sample in samples], unreadable


@pytest.mark.parametrize("labels", ["folder", "predicted"])
def test_pass_can_begin_in_the_middle_of_a_folder(labels: Any, folder: Path) -> None:
    broken = folder / "bee" / "1.png"
    broken.write_bytes(b"broken")
    dataset = open_dataset(folder, labels)
    everything, _ = names_from(open_dataset(folder, labels), 0)
    assert len(everything) == 8
    for start in range(10):
        names, unreadable = names_from(dataset, start)
        assert len(names) + len(unreadable) == 9 - start  # broken ones count
        assert names == everything[len(everything) - len(names) :]
        assert unreadable in ([], ["bee/1.png"])


def test_pass_can_begin_in_the_middle_of_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=np.zeros((5, 4, 4, 3), np.uint8), labels=np.arange(5))
    samples = list(restart_of(open_dataset(path, "folder")).samples(lambda *_: None, start=3))
    assert [(sample.name, sample.label) for sample in samples] == [("images.npz[3]", 3), ("images.npz[4]", 4)]


def test_stream_has_no_middle() -> None:
    with pytest.raises(UsageError, match=r"--spool needs a folder or an \.npz, but the given batches is a stream"):
        restart_of(open_dataset([(np.zeros((1, 4, 4, 3), np.uint8), [0])], "folder"))


def test_identity_names_the_images_their_order_and_their_labels(folder: Path, tmp_path: Path) -> None:
    def identity(path: Path, **options: Any) -> str:
        return restart_of(open_dataset(path, **{"labels": "folder", **options})).identity()

    first = identity(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copy2)
    assert identity(folder) == identity(copy) == first
    others = [
        identity(folder, seed=1),
        identity(folder, labels="predicted"),
        identity(folder, classes=("bee", "ant", "cat")),
    ]
    (folder / "ant" / "0.png").rename(folder / "ant" / "00.png")
    others.append(identity(folder))
    (folder / "ant" / "00.png").unlink()
    others.append(identity(folder))
    assert len({first, *others}) == 6
