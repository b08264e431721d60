"""Which folders are taken, refused or warned about, before anything is scored."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError, UsageError
from grood_edge.evaluate.sets import FolderSet, id_set, ood_set, overlaps, parse_ood, require_every_class
from grood_edge.images import find_images

CLASSES = tuple("0123456")


@pytest.mark.parametrize("text", ["photos", "=photos", "near=", " =x", "x" * 41 + "=d", "a\nb=d", "a\x1b[31m=d"])
def test_a_bad_ood_option_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"--ood .*(expected NAME=DIR, such as --ood near=|at most 40, all printable)"):
        parse_ood([text])


def test_ood_options_need_names_of_their_own_and_folders_may_contain_equals() -> None:
    assert parse_ood(["a=x=y", "b=z"]) == (("a", Path("x=y")), ("b", Path("z")))
    with pytest.raises(UsageError, match="names 'a' twice"):
        parse_ood(["a=x", "a =y"])
    with pytest.raises(UsageError, match="no --ood was given"):
        parse_ood([])


def test_class_folders_become_labels_in_the_contracts_order(digits: DemoImages) -> None:
    found, warnings = id_set(digits.test, tuple(reversed(CLASSES)))
    assert found.labels is not None
    assert warnings == ()
    assert [6 - int(path.parent.name) for path in found.paths] == found.labels.tolist()


def test_images_in_nested_folders_belong_to_the_outer_class(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few / "test" / "3", tmp_path / "3" / "camera-a")
    shutil.copytree(few / "test" / "4", tmp_path / "4")
    found, _ = id_set(tmp_path, CLASSES)
    assert found.labels is not None
    assert set(found.labels.tolist()) == {3, 4}


def test_a_flat_folder_has_no_labels_and_loose_images_are_named(few: Path, tmp_path: Path) -> None:
    flat, _ = id_set(few / "test" / "3", CLASSES)
    assert flat.labels is None
    shutil.copytree(few / "test" / "3", tmp_path / "3")
    shutil.copy(find_images(few / "test" / "4")[0], tmp_path / "loose.png")
    mixed, warnings = id_set(tmp_path, CLASSES)
    assert len(mixed.paths) == len(find_images(tmp_path / "3"))
    assert "1 images lie directly in" in warnings[0]


def test_folders_that_are_no_class_are_named(few: Path) -> None:
    with pytest.raises(DatasetError, match=r"folders \['far-photos', 'near', 'test'\] that are none of the"):
        id_set(few, CLASSES)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused_with_what_to_do(count: int, few: Path, tmp_path: Path) -> None:
    for path in find_images(few / "near")[:count]:
        shutil.copy(path, tmp_path)
    expected = "contains no image file; expected images" if count == 0 else "has 1 image; at least 2 are needed"
    with pytest.raises(DatasetError, match=expected):
        ood_set("near", tmp_path)
    with pytest.raises(DatasetError, match=expected):
        id_set(tmp_path, CLASSES)
    with pytest.raises(DatasetError, match="is no folder"):
        ood_set("near", tmp_path / "nowhere")


def test_shared_files_are_found_by_content_and_named(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few / "near", tmp_path / "near")
    stolen = find_images(few / "test")[:2]
    for index, path in enumerate(stolen):
        shutil.copy(path, tmp_path / "near" / f"other-name-{index}.png")
    known, _ = id_set(few / "test", CLASSES)
    clean, mixed = ood_set("clean", few / "far-photos"), ood_set("near", tmp_path / "near")
    assert overlaps([known, clean]) == ()
    (sentence,) = overlaps([known, clean, mixed])
    assert sentence.startswith('2 images of "near" are also in "ID"')
    assert str(stolen[0]) in sentence
    assert "other-name-0.png" in sentence


def test_class_without_id_images_is_refused(tmp_path: Path) -> None:
    known = FolderSet("ID", tmp_path, (), np.array([0, 2, 2]))
    with pytest.raises(DatasetError, match=r"no image of 2 of 4 classes \(b, d\).*Add images of them"):
        require_every_class(known, ("a", "b", "c", "d"), ())
    with pytest.raises(DatasetError, match=r"no image of 1 of 4 classes \(b\)"):
        require_every_class(known, ("a", "b", "c", "d"), ("d",))  # the artifact has no prototype of it either
    require_every_class(known, ("a", "b", "c"), ("b",))
    require_every_class(FolderSet("ID", tmp_path, (), None), ("a", "b"), ())  # a flat folder has no classes
