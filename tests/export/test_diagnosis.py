"""The usual silent errors stop an export with their likely cause; a correct export does not stop.

A small colour network is really trained, on crops of twelve places in scikit-image's photos.
"""

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from torch import nn

from grood_edge.errors import DatasetError
from grood_edge.export import ClassifierOptions, ExportOptions, PreprocessingOptions, export_model
from grood_edge.export.diagnosis import require_plausible_classes
from grood_edge.preprocessing import PRESETS
from tests.export.networks import legacy_onnx

SIZE = 24
PER_CLASS = 25
# photo and the corner of a region of 100x100 pixels, two of each photo
PLACES = (
    ("astronaut.png", 150, 60), ("astronaut.png", 380, 300), ("chelsea.png", 60, 150), ("chelsea.png", 180, 320),
    ("coffee.png", 40, 40), ("coffee.png", 150, 300), ("ihc.png", 20, 20), ("ihc.png", 350, 380),
    ("rocket.jpg", 20, 60), ("rocket.jpg", 200, 270), ("retina.jpg", 600, 300), ("retina.jpg", 650, 1000),
)  # fmt: skip
NAMES = tuple(str(index) for index in range(len(PLACES)))
# what the names of presets mean for a network: mean and std in grey levels
NORMALISATIONS = {name: (preset.mean, preset.std) for name, preset in PRESETS.items()}
NORMALISATIONS["ToTensor"] = ((0.0,) * 3, (255.0,) * 3)


@cache
def crops(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return frames uint8 `[n, SIZE, SIZE, 3]` and the number of the place they show, shuffled."""
    rng = np.random.default_rng(seed)
    frames, labels = [], []
    for label, (name, top, left) in enumerate(PLACES):
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            region = image.convert("RGB").crop((left, top, left + 100, top + 100))
        for _ in range(PER_CLASS):
            side = int(rng.integers(60, 90))
            x, y = (int(v) for v in rng.integers(0, 100 - side, 2))
            frames.append(np.asarray(region.crop((x, y, x + side, y + side)).resize((SIZE, SIZE))))
            labels.append(label)
    order = rng.permutation(len(frames))
    return np.stack(frames)[order], np.array(labels)[order]


class ColourNetwork(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 5, stride=2), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(24 * 4 * 4, 48), nn.ReLU(), nn.Linear(48, len(PLACES)),
        )  # fmt: skip


@cache
def trained(normalisation: str, bgr: bool = False) -> ColourNetwork:
    """Train on the crops; `none` feeds grey levels 0..255 as they are."""
    frames, labels = crops()
    mean, std = (np.array(values, np.float32) for values in NORMALISATIONS[normalisation])
    images = (frames.astype(np.float32) - mean) / std
    inputs = torch.from_numpy((images[..., ::-1] if bgr else images).transpose(0, 3, 1, 2).copy())
    targets = torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ColourNetwork()
        optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(25):
            for rows in torch.split(torch.randperm(len(inputs)), 50):
                loss = nn.functional.cross_entropy(network(inputs[rows]), targets[rows])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    network.eval()
    with torch.no_grad():
        assert (network(inputs).argmax(1) == targets).float().mean() > 0.95
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The crops in class folders 0 to 11: sorted as text, the eleventh comes third."""
    root = tmp_path_factory.mktemp("places")
    for index, (frame, label) in enumerate(zip(*crops(), strict=True)):
        (root / NAMES[label]).mkdir(exist_ok=True)
        Image.fromarray(frame).save(root / NAMES[label] / f"{index:03d}.png")
    return root


def asked(normalisation: str) -> PreprocessingOptions:
    if normalisation == "ToTensor":
        return PreprocessingOptions(mean=(0.0,), std=(1.0,), crop="stretch")
    return PreprocessingOptions(preset=normalisation, crop="stretch")


def export(network: nn.Module, folder: Path, out: Path, options: ExportOptions) -> float | None:
    """Export by way of an .onnx; returns the accuracy that the contract states."""
    out.mkdir(exist_ok=True)
    images = np.zeros((1, 3, SIZE, SIZE), np.float32)
    model = legacy_onnx(network, out.parent / f"{out.name}.onnx", images, open_batch=True)
    return export_model(model, folder, out / "artifact.onnx", options).contract.fit.accuracy


@pytest.mark.parametrize("normalisation", ["imagenet", "inception", "none", "ToTensor"])
def test_correct_export_does_not_stop(normalisation: str, folder: Path, tmp_path: Path) -> None:
    options = ExportOptions(classes=NAMES, preprocessing=asked(normalisation))
    accuracy = export(trained(normalisation), folder, tmp_path / "out", options)
    assert accuracy is not None
    assert accuracy > 0.95


def test_correct_bgr_export_does_not_stop(folder: Path, tmp_path: Path) -> None:
    options = ExportOptions(classes=NAMES, preprocessing=asked("imagenet"), classifier=ClassifierOptions(bgr=True))
    accuracy = export(trained("imagenet", bgr=True), folder, tmp_path / "out", options)
    assert accuracy is not None
    assert accuracy > 0.95


@pytest.mark.parametrize(
    ("truth", "given", "remedy"),
    [
        ("imagenet", "none", "--preprocess imagenet fits clearly better"),
        ("imagenet", "ToTensor", "--preprocess imagenet fits clearly better"),
        ("inception", "imagenet", "--preprocess (inception|efficientnet-lite) fits clearly better"),  # 0.5 grey levels
        ("none", "imagenet", "--preprocess none fits clearly better"),
        ("ToTensor", "imagenet", "--mean 0 --std 1 fits clearly better"),
    ],
)
def test_wrong_mean_and_std_stop(truth: str, given: str, remedy: str, folder: Path, tmp_path: Path) -> None:
    options = ExportOptions(classes=NAMES, preprocessing=asked(given))
    with pytest.raises(
        DatasetError, match=rf"{remedy}: on 128 images the accuracy is .* preprocessing is probably not"
    ):
        export(trained(truth), folder, tmp_path / "out", options)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("normalisation", ["imagenet", "ToTensor"])
def test_swapped_colours_stop(normalisation: str, folder: Path, tmp_path: Path) -> None:
    """Swapped colours confuse classes as well, and a permutation of them explains some of it; colours explain all."""
    swapped = ExportOptions(classes=NAMES, preprocessing=asked(normalisation), classifier=ClassifierOptions(bgr=True))
    with pytest.raises(DatasetError, match=r"RGB \(no --classifier-bgr\) fits clearly better"):
        export(trained(normalisation), folder, tmp_path / "out", swapped)
    assert list((tmp_path / "out").iterdir()) == []


def test_forgotten_bgr_stops(folder: Path, tmp_path: Path) -> None:
    options = ExportOptions(classes=NAMES, preprocessing=asked("imagenet"))
    with pytest.raises(DatasetError, match=r"--classifier-bgr fits clearly better"):
        export(trained("imagenet", bgr=True), folder, tmp_path / "out", options)


def test_folder_names_sorted_as_text_stop(folder: Path, tmp_path: Path) -> None:
    """Trained on classes 0 to 11 in numeric order; the folders come as 0, 1, 10, 11, 2 ..."""
    network = trained("imagenet")
    options = ExportOptions(preprocessing=asked("imagenet"))
    message = (
        r"accuracy is 1\d\.\d%, but 100\.0% if the classifier's outputs meant the classes in this order: "
        r"0, 1, 2, 3, 4, 5, 6, 7, \.\.\..*--classes FILE"
    )
    with pytest.raises(DatasetError, match=message):
        export(network, folder, tmp_path / "out", options)
    assert list((tmp_path / "out").iterdir()) == []


def test_permuted_class_list_stops(folder: Path, tmp_path: Path) -> None:
    permuted = NAMES[6:] + NAMES[:6]
    options = ExportOptions(classes=permuted, preprocessing=asked("imagenet"))
    with pytest.raises(
        DatasetError, match=r"accuracy is 0\.0%, but 100\.0% if .* in this order: 0, 1, 2, 3, 4, 5, 6, 7"
    ):
        export(trained("imagenet"), folder, tmp_path / "out", options)


def test_unlabelled_frames_are_not_diagnosed(folder: Path, tmp_path: Path) -> None:
    """Predictions agree with themselves: there is nothing to compare with."""
    options = ExportOptions(
        classes=NAMES, preprocessing=asked("imagenet"), classifier=ClassifierOptions(bgr=True), labels="predicted"
    )
    assert export(trained("imagenet"), folder, tmp_path / "out", options) is None


def confusion(rows: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter({(i, j): n for i, row in enumerate(rows) for j, n in enumerate(row) if n})


@pytest.mark.parametrize(
    "rows",
    [
        [[50, 0, 0], [0, 50, 0], [0, 0, 50]],
        [[20, 15, 15], [15, 20, 15], [15, 15, 20]],  # bad, but in the right order
        [[30, 20, 0], [26, 24, 0], [0, 0, 50]],  # two classes that are hard to tell apart
        [[10, 25, 15], [15, 10, 25], [25, 15, 10]],  # another order is better, and explains little
    ],
)
def test_order_that_nothing_speaks_against(rows: list[list[int]]) -> None:
    require_plausible_classes(confusion(rows), ("a", "b", "c"))


def test_order_of_a_weak_classifier_is_found_too() -> None:
    rows = [[4, 40, 6], [6, 4, 40], [40, 6, 4]]  # a is output 1, b is output 2, c is output 0
    with pytest.raises(DatasetError, match=r"accuracy is 8\.0%, but 80\.0% if .* in this order: c, a, b\. "):
        require_plausible_classes(confusion(rows), ("a", "b", "c"))


def test_classes_without_images_do_not_disturb() -> None:
    require_plausible_classes(Counter({(0, 0): 40, (2, 2): 40, (2, 1): 3}), ("a", "b", "c", "d"))
