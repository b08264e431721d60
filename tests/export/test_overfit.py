"""Why calibration images must be unseen: a network that memorised its training images, calibrated in both ways."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from grood_edge.demo.images import DemoImages
from grood_edge.demo.network import DigitNetwork
from grood_edge.errors import UsageError
from grood_edge.evaluate.metrics import beta_binomial_band
from grood_edge.export import ExportOptions, RecalibrateOptions, export_model, recalibrate
from grood_edge.images import find_images, load_image
from grood_edge.runtime import open_session
from tests.export.conftest import DIGIT_PREPROCESSING, Batches
from tests.export.networks import legacy_onnx

PER_CLASS = 20
NOISY_LABELS = 0.2
OPTIONS = ExportOptions(preprocessing=DIGIT_PREPROCESSING, classes=tuple("0123456"))


@pytest.fixture(scope="module")
def memorised(train_batches: Batches) -> Batches:
    """A few images of every digit, a fifth of them with a wrong label: all that there is to learn is by heart."""
    frames, labels = train_batches[0]
    rows = np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in range(7)])
    rng = np.random.default_rng(0)
    wrong = rng.random(len(rows)) < NOISY_LABELS
    noisy = np.where(wrong, (labels[rows] + rng.integers(1, 7, len(rows))) % 7, labels[rows])
    return [(frames[rows], noisy)]


@pytest.fixture(scope="module")
def overfitted(memorised: Batches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network trained on them until it is right about every one."""
    images = torch.from_numpy(memorised[0][0].transpose(0, 3, 1, 2).astype(np.float32) / 255)
    labels = torch.from_numpy(memorised[0][1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DigitNetwork(7).train()
        optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(80):
            loss = nn.functional.cross_entropy(network(images), labels)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    network.eval()
    with torch.no_grad():
        assert (network(images).argmax(1) == labels).all()
    path = tmp_path_factory.mktemp("overfit") / "overfitted.onnx"
    return legacy_onnx(network, path, np.zeros((1, 1, 32, 32), np.float32), open_batch=True)


@pytest.fixture(scope="module")
def unseen(digits: DemoImages) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Unseen digits: frames to calibrate with, and frames to count false alarms on."""
    calibration, counted = ([load_image(p) for p in find_images(f)] for f in (digits.calibration, digits.test))
    return calibration, counted


def false_alarms(path: Path, frames: list[np.ndarray]) -> int:
    with open_session(path) as session:
        return sum(verdict.is_ood for verdict in session.predict_batch(frames))


def test_memorised_images_calibrate_nothing_and_unseen_ones_do(
    overfitted: Path,
    memorised: Batches,
    unseen: tuple[list[np.ndarray], list[np.ndarray]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calibration, counted = unseen
    m = len(counted)
    seen = export_model(overfitted, memorised, tmp_path / "seen.onnx", OPTIONS).contract
    options = ExportOptions(
        preprocessing=OPTIONS.preprocessing, classes=OPTIONS.classes, calibration_data=[np.stack(calibration)]
    )
    fresh = export_model(overfitted, memorised, tmp_path / "unseen.onnx", options).contract
    assert seen.fit.accuracy == fresh.fit.accuracy == 1.0
    assert (seen.calibration.provenance, seen.calibration.guarantee) == ("seen-in-training", "none")
    assert seen.calibration.delta is None
    assert (fresh.calibration.provenance, fresh.calibration.guarantee) == ("unseen", "conformal")
    counts = {name: false_alarms(tmp_path / f"{name}.onnx", counted) for name in ("seen", "unseen")}
    low, high = beta_binomial_band(m, fresh.calibration.n, fresh.calibration.k)
    with capsys.disabled():
        print(
            f"\nfalse alarms on {m} unseen ID images at alpha 5 %: calibrated on the training images "
            f"{counts['seen'] / m:.1%}, on unseen images {counts['unseen'] / m:.1%} (99 % band {low}..{high} images)"
        )
    assert counts["seen"] / m > 2 * 0.05
    assert low <= counts["unseen"] <= high


def test_no_rate_can_be_promised_for_memorised_images(overfitted: Path, memorised: Batches, tmp_path: Path) -> None:
    options = ExportOptions(preprocessing=OPTIONS.preprocessing, classes=OPTIONS.classes, delta=0.05)
    with pytest.raises(UsageError, match="calibration images were seen in training, so no rate can be promised"):
        export_model(overfitted, memorised, tmp_path / "promise.onnx", options)
    assert list(tmp_path.iterdir()) == []


def test_the_remedy_repairs_the_rate(
    overfitted: Path, memorised: Batches, unseen: tuple[list[np.ndarray], list[np.ndarray]], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    export_model(overfitted, memorised, path, OPTIONS)
    frames = [np.stack(unseen[0])]
    entry = recalibrate(path, frames, options=RecalibrateOptions(threshold_only=True)).contract.calibration
    low, high = beta_binomial_band(len(unseen[1]), entry.n, entry.k)
    assert low <= false_alarms(path, unseen[1]) <= high
