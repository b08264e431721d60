"""Names of images that `--keep-paths` writes into the file: none that a reader of contracts would refuse."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from grood_edge.artifact import read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError
from grood_edge.export import ExportOptions, export_model, fit
from grood_edge.images import find_images
from tests.export.conftest import DIGIT_PREPROCESSING, Batches

KEPT = ExportOptions(preprocessing=DIGIT_PREPROCESSING, ood_prototype="mean", bank="all", scale=1.0, keep_paths=True)
IMAGES = 15  # of each class


@pytest.fixture
def data(digits: DemoImages, tmp_path: Path) -> Path:
    """A few training digits, to be renamed."""
    for folder in digits.train.iterdir():
        (tmp_path / "data" / folder.name).mkdir(parents=True)
        for path in find_images(folder)[:IMAGES]:
            shutil.copy(path, tmp_path / "data" / folder.name / path.name)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def options(calibration_batches: Batches) -> ExportOptions:
    return replace(KEPT, calibration_data=calibration_batches)


def rename_all(folder: Path, add: bytes) -> None:
    for path in find_images(folder):
        os.rename(os.fsencode(path), os.fsencode(path.with_suffix("")) + add + b".png")


BAD_NAMES = {
    "escape sequence": (b"\x1b[2J", r"\x1b[2J"),
    "line feed": (b"\n", r"\n"),
    "turned round": ("\u202e".encode(), r"\u202e"),
    "not UTF-8": (b"\xff", r"\udcff"),
}


@pytest.mark.parametrize("kind", BAD_NAMES)
def test_names_that_a_reader_refuses_are_not_written(
    kind: str, digit_onnx: Path, data: Path, options: ExportOptions, tmp_path: Path
) -> None:
    added, shown = BAD_NAMES[kind]
    rename_all(data / "3", added)
    out = tmp_path / "a.onnx"
    with pytest.raises(DatasetError, match="Rename it, or export without --keep-paths") as caught:
        export_model(digit_onnx, data, out, options)
    assert "image '3/" in str(caught.value)
    assert shown in str(caught.value)
    assert str(caught.value).isprintable()
    assert not out.exists()


def test_a_name_of_more_than_1024_characters(
    digit_onnx: Path, data: Path, options: ExportOptions, tmp_path: Path
) -> None:
    deep = data / "3" / "/".join(["x" * 200] * 5)
    deep.mkdir(parents=True)
    for path in find_images(data / "3"):
        path.rename(deep / f"{path.stem}{'y' * 40}.png")
    with pytest.raises(DatasetError, match="at most 1,024 characters"):
        export_model(digit_onnx, data, tmp_path / "a.onnx", options)
    export_model(digit_onnx, data, tmp_path / "a.onnx", replace(options, keep_paths=False))
    assert read_artifact(tmp_path / "a.onnx").contract.bank.paths == ()


def test_names_in_any_writing_are_kept(digit_onnx: Path, data: Path, options: ExportOptions, tmp_path: Path) -> None:
    rename_all(data / "3", " ж日本🦆".encode())
    export_model(digit_onnx, data, tmp_path / "a.onnx", options)
    paths = read_artifact(tmp_path / "a.onnx").contract.bank.paths
    assert {path for path in paths if path.startswith("3/")} <= {f"3/{p.name}" for p in find_images(data / "3")}
    assert any(path.endswith(" ж日本🦆.png") for path in paths)


def test_number_of_names_is_bounded(
    digit_onnx: Path, data: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "MAX_KEPT_PATHS", 30)
    out = tmp_path / "a.onnx"
    with pytest.raises(DatasetError, match=r"bank of \d\d+ rows; expected at most 30\..*smaller with --bank N"):
        export_model(digit_onnx, data, out, options)
    export_model(digit_onnx, data, out, replace(options, bank=30))
    assert len(read_artifact(out).contract.bank.paths) == 30
    export_model(digit_onnx, data, out, replace(options, keep_paths=False, force=True))
    assert read_artifact(out).contract.bank.rows > 30
