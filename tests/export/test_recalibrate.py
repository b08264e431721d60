"""Refitting an artifact on the device: without torch and onnx, and the artifact stays whole whatever happens."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grood_edge.artifact import graph_digest, read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.errors import ArtifactError, CalibrationError, DatasetError, OutputError, UsageError
from grood_edge.evaluate.metrics import beta_binomial_band
from grood_edge.export import ExportOptions, RecalibrateOptions, export_model, recalibrate
from grood_edge.images import find_images, load_image
from grood_edge.ort import open_ort
from grood_edge.probes import replay_probes
from grood_edge.runtime import open_session
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.stored_head import calibration_tensors, head_from_model, head_tensors, model_with_tensors
from tests.export.conftest import DIGIT_PREPROCESSING, Batches

THRESHOLD = RecalibrateOptions(threshold_only=True)


@pytest.fixture
def artifact(artifact_path: Path, tmp_path: Path) -> Path:
    """A copy that may be changed, alone in its folder."""
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "digits.onnx"
    shutil.copy(artifact_path, path)
    return path


@pytest.fixture(scope="module")
def fresh(fresh_batches: Batches) -> list[np.ndarray]:
    """Half of the test digits, unlabelled, the other half being left to count false alarms."""
    return [fresh_batches[0][0][::2]]


def test_threshold_only_changes_the_calibration_alone(artifact: Path, fresh: list[np.ndarray]) -> None:
    before, frames = read_artifact(artifact), fresh[0]
    report = recalibrate(artifact, fresh, options=THRESHOLD)
    after = read_artifact(artifact)
    assert (report.path, report.before, report.contract) == (artifact, before.contract, after.contract)
    calibration = after.contract.calibration
    assert (calibration.provenance, calibration.method, calibration.guarantee) == ("unseen", "separate", "conformal")
    assert (calibration.n, calibration.alpha, calibration.delta) == (len(frames), 0.05, 0.05)
    assert calibration.data_digest != before.contract.calibration.data_digest
    assert replace(after.contract, calibration=before.contract.calibration, probes=before.contract.probes) == (
        before.contract
    )
    for name, tensor in head_tensors(head_from_model(before.model)).items():
        np.testing.assert_array_equal(head_tensors(head_from_model(after.model))[name], tensor)
    old = before.contract.calibration
    restored = model_with_tensors(after.model, calibration_tensors(old.rule(7)))
    assert graph_digest(restored) == before.graph_digest  # nothing else in the graph has changed
    with open_session(artifact) as session:
        scores = session.infer(list(frames)).ood_score
    np.testing.assert_array_equal(np.sort(scores), calibration.sorted_scores())
    assert report.verification.flips == 0


def test_false_alarms_after_recalibration_lie_in_the_band(
    artifact: Path, fresh: list[np.ndarray], fresh_batches: Batches
) -> None:
    entry = recalibrate(artifact, fresh, options=THRESHOLD).contract.calibration
    with open_session(artifact) as session:
        verdicts = session.predict_batch(list(fresh_batches[0][0][1::2]))
    low, high = beta_binomial_band(len(verdicts), entry.n, entry.k)
    assert low <= sum(verdict.is_ood for verdict in verdicts) <= high


def test_threshold_only_restores_the_promise(
    digit_onnx: Path, train_batches: Batches, fresh: list[np.ndarray], tmp_path: Path
) -> None:
    """The remedy that a contract without guarantee names."""
    path = tmp_path / "seen.onnx"
    options = ExportOptions(preprocessing=DIGIT_PREPROCESSING)
    before = export_model(digit_onnx, train_batches, path, options).contract.calibration
    assert (before.guarantee, before.delta) == ("none", None)
    after = recalibrate(path, fresh, options=THRESHOLD).contract.calibration
    assert (after.provenance, after.guarantee, after.delta) == ("unseen", "conformal", 0.05)


def test_full_refit_changes_the_statistics(artifact: Path, digits: DemoImages, fresh_batches: Batches) -> None:
    before = read_artifact(artifact)
    report = recalibrate(artifact, fresh_batches)
    after = read_artifact(artifact)
    old, new = head_from_model(before.model), head_from_model(after.model)
    assert not np.allclose(new.prototypes, old.prototypes)
    places = dict(zip([entry.source for entry in after.contract.ood_prototypes], new.ood_heads, strict=True))
    np.testing.assert_allclose(places["mean"].prototype, new.prototypes.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(places["origin"].prototype, 0, atol=1e-5)
    np.testing.assert_allclose(places["mixup"].prototype, old.ood_heads[1].prototype, atol=1e-5)  # stays where it was
    images = len(fresh_batches[0][1])
    assert after.contract.fit.images == images
    assert after.contract.fit.data_digest != before.contract.fit.data_digest
    assert after.contract.fit.accuracy is not None
    bank = after.contract.bank
    assert bank.choice == before.contract.bank.choice
    assert bank.rows == len(new.bank) <= bank.candidates < images + 1
    assert not np.array_equal(new.bank[:20], old.bank[:20])
    calibration = after.contract.calibration
    assert (calibration.method, calibration.guarantee, calibration.n) == ("cross-fitted", "approximate", images)
    unchanged = ("classes", "preprocessing", "classifier", "precision", "ood_prototypes", "tools")
    assert all(getattr(after.contract, name) == getattr(before.contract, name) for name in unchanged)
    frames = np.stack([load_image(path) for path in find_images(digits.near)[:8]])
    ours, theirs = (open_ort(each.model).run({"image": frames}) for each in (after, before))
    np.testing.assert_array_equal(ours["logits"], theirs["logits"])
    np.testing.assert_array_equal(ours["features"], theirs["features"])
    assert not np.allclose(ours["ood_score"], theirs["ood_score"])
    assert report.verification.largest_score_error <= 2e-4


@pytest.mark.parametrize("options", [THRESHOLD, RecalibrateOptions()], ids=["threshold", "refit"])
def test_result_verifies_itself(options: RecalibrateOptions, artifact: Path, fresh_batches: Batches) -> None:
    recalibrate(artifact, fresh_batches, options=options)
    after = read_artifact(artifact)
    report = replay_probes(after.contract, OnnxRuntimeBackend(after).run, "cpu")
    assert report.passed
    assert report.largest_error <= 1e-5  # one product over all bank rows: rounded otherwise in other batches
    assert report.rows


def test_refit_keeps_the_size_of_a_kmeans_bank_and_a_noise_prototype(
    digit_onnx: Path, train_batches: Batches, fresh_batches: Batches, tmp_path: Path
) -> None:
    path = tmp_path / "bank.onnx"
    options = ExportOptions(preprocessing=DIGIT_PREPROCESSING, bank=24, ood_prototype="noise")
    export_model(digit_onnx, train_batches, path, options)
    before = head_from_model(read_artifact(path).model)
    contract = recalibrate(path, fresh_batches, options=RecalibrateOptions(seed=3)).contract
    after = head_from_model(read_artifact(path).model)
    assert (contract.bank.choice, contract.bank.rows, after.bank.shape) == ("kmeans", 24, (24, 64))
    assert not np.allclose(after.bank, before.bank)
    np.testing.assert_allclose(after.ood_heads[0].prototype, before.ood_heads[0].prototype, atol=1e-4)
    assert contract.ood_prototypes[0].source == "noise"
    assert contract.fit.seed == 3


def test_unlabelled_frames_refit_by_their_predictions(artifact: Path, fresh_batches: Batches) -> None:
    options = RecalibrateOptions(labels="predicted")
    contract = recalibrate(artifact, fresh_batches, options=options).contract
    assert contract.fit.labels == "predicted"
    assert contract.fit.accuracy is None
    assert contract.bank.candidates == contract.fit.images


def test_out_leaves_the_original_alone(artifact: Path, fresh: list[np.ndarray], tmp_path: Path) -> None:
    before, out = artifact.read_bytes(), tmp_path / "new.onnx"
    report = recalibrate(artifact, fresh, out, THRESHOLD)
    assert report.path == out
    assert artifact.read_bytes() == before
    assert read_artifact(out).contract.calibration.n == len(fresh[0])
    with pytest.raises(OutputError, match="exists and was left as it is; use --force"):
        recalibrate(artifact, fresh, out, THRESHOLD)
    recalibrate(artifact, fresh, out, replace(THRESHOLD, alpha=0.1, force=True))
    assert read_artifact(out).contract.calibration.alpha == 0.1


def test_same_data_and_seed_give_the_same_bytes(artifact: Path, fresh_batches: Batches, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        recalibrate(artifact, fresh_batches, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_alpha_and_delta_can_change(artifact: Path, fresh: list[np.ndarray]) -> None:
    recalibrate(artifact, fresh, options=replace(THRESHOLD, alpha=0.1, delta=0.2))
    entry = read_artifact(artifact).contract.calibration
    assert (entry.alpha, entry.delta) == (0.1, 0.2)
    again = recalibrate(artifact, fresh, options=THRESHOLD).contract.calibration
    assert (again.alpha, again.delta, again.k) == (0.1, 0.2, entry.k)  # the artifact's own are kept


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (replace(THRESHOLD, alpha=0.001), CalibrationError, r"cannot carry alpha 0.001 .*at least 2,995 are needed"),
        (replace(THRESHOLD, alpha=0.0), UsageError, "--alpha 0.0; expected a number above 0 and below 1"),
        (replace(THRESHOLD, delta=1.0), UsageError, "--delta 1.0"),
        (RecalibrateOptions(), DatasetError, "images without labels"),
    ],
)
def test_failure_leaves_the_artifact_as_it_was(
    options: RecalibrateOptions, error: type[Exception], message: str, artifact: Path, fresh: list[np.ndarray]
) -> None:
    before = artifact.read_bytes()
    with pytest.raises(error, match=message):
        recalibrate(artifact, fresh, options=options)
    assert artifact.read_bytes() == before
    assert [path.name for path in artifact.parent.iterdir()] == ["digits.onnx"]


def test_too_few_images(artifact: Path, fresh: list[np.ndarray]) -> None:
    before = artifact.read_bytes()
    with pytest.raises(
        CalibrationError, match=r"30 calibration images cannot carry alpha 0.05 .*at least 59 are needed"
    ):
        recalibrate(artifact, [fresh[0][:30]], options=THRESHOLD)
    assert artifact.read_bytes() == before


@pytest.mark.parametrize("kind", ["missing", "empty", "unreadable", "one class"])
def test_data_that_cannot_be_used(kind: str, artifact: Path, digits: DemoImages, tmp_path: Path) -> None:
    before, data = artifact.read_bytes(), tmp_path / "data"
    options = RecalibrateOptions() if kind == "one class" else THRESHOLD
    if kind != "missing":
        data.mkdir()
    if kind == "unreadable":
        (data / "broken.png").write_bytes(b"x")
    if kind == "one class":
        shutil.copytree(digits.test / "3", data / "3")
    message = "does not exist|contains no image file|cannot be read|cover 1 of 7 classes"
    with pytest.raises(DatasetError, match=message):
        recalibrate(artifact, data, options=options)
    assert artifact.read_bytes() == before


def test_unreadable_images_are_reported(artifact: Path, digits: DemoImages, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits.test, data)
    (data / "1" / "broken.png").write_bytes(b"x")
    assert [name for name, _ in recalibrate(artifact, data, options=THRESHOLD).unreadable] == ["1/broken.png"]


@pytest.mark.parametrize("options", [THRESHOLD, RecalibrateOptions()], ids=["threshold", "refit"])
@pytest.mark.parametrize("step", ["reading", "fitting statistics"])
def test_interruption_leaves_the_artifact_as_it_was(
    step: str, options: RecalibrateOptions, artifact: Path, fresh_batches: Batches
) -> None:
    def interrupt(label: str, done: int, total: int | None) -> None:
        if label.startswith(step) and done:
            raise KeyboardInterrupt

    before = artifact.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        recalibrate(artifact, fresh_batches, options=options, progress=interrupt)
    assert artifact.read_bytes() == before
    assert [path.name for path in artifact.parent.iterdir()] == ["digits.onnx"]


def test_full_disk_leaves_the_artifact_as_it_was(
    artifact: Path, fresh: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = artifact.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full; nothing was changed"):
        recalibrate(artifact, fresh, options=THRESHOLD)
    assert artifact.read_bytes() == before
    assert [path.name for path in artifact.parent.iterdir()] == ["digits.onnx"]


def test_plain_onnx_is_no_artifact(digit_onnx: Path, fresh: list[np.ndarray], tmp_path: Path) -> None:
    shutil.copy(digit_onnx, tmp_path / "plain.onnx")
    with pytest.raises(ArtifactError, match="without a grood-edge contract"):
        recalibrate(tmp_path / "plain.onnx", fresh, options=THRESHOLD)
    assert (tmp_path / "plain.onnx").read_bytes() == digit_onnx.read_bytes()


DEVICE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnxscript", "sklearn", "scipy", "skimage", "google"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import onnx
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the blocker does not work")
from grood_edge.export import RecalibrateOptions, recalibrate

path, data = sys.argv[1:3]
report = recalibrate(path, data, options=RecalibrateOptions(threshold_only=sys.argv[3] == "threshold"))
print(report.contract.calibration.method, report.contract.calibration.n)
print(sorted({"torch", "onnx", "sklearn"} & set(sys.modules)))
"""


@pytest.mark.parametrize(("what", "method"), [("threshold", "separate"), ("refit", "cross-fitted")])
def test_no_torch_and_no_onnx_on_the_device(what: str, method: str, artifact: Path, digits: DemoImages) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DEVICE, str(artifact), str(digits.test), what],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{method} {len(find_images(digits.test))}", "[]"]
    assert read_artifact(artifact).contract.calibration.method == method


def test_exporting_on_the_device_names_the_extra() -> None:
    text = DEVICE.partition("from grood_edge.export")[0] + "import grood_edge.export\ngrood_edge.export.export_model"
    done = subprocess.run(
        [sys.executable, "-c", text], check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1
    assert re.search(r"MissingExtraError: Exporting needs the package onnx.*grood-edge\[export\]", done.stderr)


def test_rotated_camera_frames_are_read_like_in_export(artifact: Path, digits: DemoImages, tmp_path: Path) -> None:
    """EXIF orientation is honoured here as well: the same scores as the upright images."""
    upright, turned = tmp_path / "upright", tmp_path / "turned"
    for folder in (upright, turned):
        folder.mkdir()
    for path in find_images(digits.test)[::4]:
        name = f"{path.parent.name}-{path.stem}.png"
        image = Image.open(path)
        image.save(upright / name)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned 90 degrees clockwise for display
        image.transpose(Image.Transpose.ROTATE_90).save(turned / name, exif=exif)
    entries: list[Any] = [
        recalibrate(artifact, data, tmp_path / f"{data.name}.onnx", THRESHOLD).contract.calibration
        for data in (upright, turned)
    ]
    assert entries[0] == entries[1]


@pytest.mark.parametrize("threshold_only", [True, False])
def test_images_that_the_artifact_was_fitted_on_are_refused(
    threshold_only: bool, artifact_path: Path, digits: DemoImages, tmp_path: Path
) -> None:
    """They would turn "guarantee: none" into a promise: the whole set, and a part of it under other names."""
    part = tmp_path / "part"
    for index, path in enumerate(sorted(digits.train.rglob("*.png"))[::4]):
        (part / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part / path.parent.name / f"renamed-{index}.png")
    options = RecalibrateOptions(threshold_only=threshold_only)
    for data in (digits.train, part):
        with pytest.raises(DatasetError, match=r"images are among those that this artifact was fitted on"):
            recalibrate(artifact_path, data, tmp_path / "out.onnx", options)
    assert not (tmp_path / "out.onnx").exists()


def test_images_of_the_first_fit_are_refused_after_a_refit(
    artifact: Path, digits: DemoImages, fresh_batches: Batches
) -> None:
    """The network may have been trained on them: a refit on other images does not make them new."""
    recalibrate(artifact, fresh_batches)
    with pytest.raises(DatasetError, match=r"images are among those that this artifact was fitted on"):
        recalibrate(artifact, digits.train, options=RecalibrateOptions(threshold_only=True))


def test_rule_of_the_artifact_is_kept_unless_another_is_given(
    artifact: Path, fresh: list[np.ndarray], tmp_path: Path
) -> None:
    ruled = tmp_path / "ruled.onnx"
    options = RecalibrateOptions(threshold_only=True, marginal=True, per_class=True, alpha=0.2)
    recalibrate(artifact, fresh, ruled, options)
    kept = recalibrate(ruled, fresh, options=RecalibrateOptions(threshold_only=True)).contract.calibration
    assert (kept.guarantee, kept.delta, len(kept.class_ranks), kept.alpha) == ("marginal", None, 7, 0.2)
    other = RecalibrateOptions(threshold_only=True, marginal=False, per_class=False)
    changed = recalibrate(ruled, fresh, options=other).contract.calibration
    assert (changed.guarantee, changed.delta, changed.class_ranks) == ("conformal", 0.05, ())
    with pytest.raises(UsageError, match="--rule marginal has none"):
        recalibrate(ruled, fresh, options=RecalibrateOptions(threshold_only=True, marginal=True, delta=0.1))
