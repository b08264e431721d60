"""What can be chosen, end to end: OOD prototypes, space, bank, rule, classes; and refitting what was chosen."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.errors import CalibrationError, DatasetError, UsageError
from grood_edge.evaluate.metrics import auroc
from grood_edge.export import ExportOptions, RecalibrateOptions, export_model, recalibrate
from grood_edge.images import find_images, load_image
from grood_edge.runtime import open_session
from grood_edge.stored_head import head_from_model
from tests.export.conftest import DIGIT_PREPROCESSING, Batches

NAMES = tuple("0123456")
PLAIN = ExportOptions(
    preprocessing=DIGIT_PREPROCESSING, classes=NAMES, ood_prototype="mean,origin", bank="none", scale=1.0
)
THRESHOLD = RecalibrateOptions(threshold_only=True)


@pytest.fixture(scope="module")
def plain(calibration_batches: Batches) -> ExportOptions:
    """Nothing to choose, log s alone, separate calibration images: quick."""
    return replace(PLAIN, calibration_data=calibration_batches)


def outputs_of(path: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_session(path) as session:
        found = session.infer([load_image(image) for image in find_images(folder)[::3]])
    return found.ood_score, found.is_ood


def test_several_prototypes_and_a_folder(
    digit_onnx: Path, digits: DemoImages, train_batches: Batches, plain: ExportOptions, tmp_path: Path
) -> None:
    names = f"mean,mixup,noise,origin,images:{digits.far_photos}"
    options = replace(plain, ood_prototype=names, bank=32, mixup_layer="early")
    found = export_model(digit_onnx, train_batches, tmp_path / "m.onnx", options)
    entries = found.contract.ood_prototypes
    assert [entry.source for entry in entries] == ["mean", "mixup", "noise", "origin", "images"]
    assert [entry.uses_ood_data for entry in entries] == [False] * 4 + [True]
    asked = "mean,mixup,noise,origin,images"  # without the folder: paths are nobody's business
    assert (found.contract.selection.asked, found.contract.selection.candidates) == (asked, ())
    head = head_from_model(read_artifact(found.path).model)
    assert (len(head.ood_heads), head.bank.shape) == (5, (32, 64))
    far = np.array([1e6])
    assert sum(float(h.score_map.slope_at(far)[0]) for h in head.ood_heads) == pytest.approx(1, rel=1e-5)
    known, _ = outputs_of(found.path, digits.test)
    assert auroc(known, outputs_of(found.path, digits.far_noise)[0]) > 0.95


def test_logits_of_images_seen_in_training_state_no_alpha(
    digit_onnx: Path, digits: DemoImages, train_batches: Batches, plain: ExportOptions, tmp_path: Path
) -> None:
    options = replace(PLAIN, space="logits")
    seen = export_model(digit_onnx, train_batches, tmp_path / "seen.onnx", options).contract
    assert seen.space == "logits"
    assert (seen.calibration.guarantee, seen.calibration.delta) == ("none", None)
    with pytest.raises(UsageError, match="--delta promises a false-alarm rate"):
        export_model(digit_onnx, train_batches, tmp_path / "x.onnx", replace(options, delta=0.05))
    fresh = export_model(digit_onnx, train_batches, tmp_path / "m.onnx", replace(plain, space="logits", bank=32))
    assert fresh.contract.calibration.guarantee == "conformal"
    assert head_from_model(read_artifact(fresh.path).model).bank.shape == (32, 7)
    known, _ = outputs_of(fresh.path, digits.test)
    assert auroc(known, outputs_of(fresh.path, digits.far_noise)[0]) > 0.9


def test_int8_and_float32_banks_decide_alike(
    digit_onnx: Path, digits: DemoImages, train_batches: Batches, plain: ExportOptions, tmp_path: Path
) -> None:
    found = {}
    for dtype in ("int8", "float32"):
        options = replace(plain, bank=64, bank_dtype=dtype)
        path = export_model(digit_onnx, train_batches, tmp_path / f"{dtype}.onnx", options).path
        assert head_from_model(read_artifact(path).model).bank_dtype == dtype
        parts = [outputs_of(path, folder) for folder in (digits.test, digits.near, digits.far_photos)]
        found[dtype] = (np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
    assert (found["int8"][1] != found["float32"][1]).mean() <= 0.005
    assert np.corrcoef(found["int8"][0], found["float32"][0])[0, 1] > 0.999
    assert (tmp_path / "int8.onnx").stat().st_size < (tmp_path / "float32.onnx").stat().st_size


def test_bank_rows_keep_the_names_of_their_images(
    digit_onnx: Path, digits: DemoImages, plain: ExportOptions, tmp_path: Path
) -> None:
    options = replace(plain, classes=None, bank=32, keep_paths=True)
    bank = export_model(digit_onnx, digits.train, tmp_path / "m.onnx", options).contract.bank
    assert len(bank.paths) == bank.rows == 32
    for name, label in zip(bank.paths, bank.row_classes(), strict=True):
        assert (digits.train / name).is_file()
        assert not Path(name).is_absolute()
        assert 0 <= label < 7
    without = export_model(digit_onnx, digits.train, tmp_path / "n.onnx", replace(options, keep_paths=False))
    assert without.contract.bank.paths == ()


def test_per_class_names_the_class_that_is_too_small(
    digit_onnx: Path, digits: DemoImages, train_batches: Batches, plain: ExportOptions, tmp_path: Path
) -> None:
    message = r"--per-class: of the images predicted as '\d', \d+ calibration images cannot .*at least 59 are needed"
    with pytest.raises(CalibrationError, match=message):
        export_model(digit_onnx, train_batches, tmp_path / "m.onnx", replace(plain, per_class=True))
    assert list(tmp_path.iterdir()) == []
    options = replace(plain, per_class=True, alpha=0.2)
    found = export_model(digit_onnx, train_batches, tmp_path / "m.onnx", options).contract.calibration
    assert len(found.class_sizes) == len(found.class_ranks) == 7
    assert sum(found.class_sizes) == found.n
    frames = [load_image(path) for path in find_images(digits.test)[::4]]
    fresh = recalibrate(tmp_path / "m.onnx", [np.stack(frames)], options=replace(THRESHOLD, per_class=True, alpha=0.4))
    assert sum(fresh.contract.calibration.class_sizes) == len(frames)


def test_marginal_rule(digit_onnx: Path, train_batches: Batches, plain: ExportOptions, tmp_path: Path) -> None:
    options = replace(plain, rule="marginal")
    found = export_model(digit_onnx, train_batches, tmp_path / "m.onnx", options).contract.calibration
    assert (found.guarantee, found.delta, found.k) == ("marginal", None, int(0.05 * (found.n + 1) + 1e-9))


def test_constant_scores_are_refused(
    digit_onnx: Path, train_batches: Batches, plain: ExportOptions, tmp_path: Path
) -> None:
    same = np.repeat(train_batches[0][0][:1], 100, axis=0)
    same[..., 0, 0] = 77  # unlike any fit image
    with pytest.raises(CalibrationError, match="all 100 calibration images have the same score"):
        export_model(digit_onnx, train_batches, tmp_path / "m.onnx", replace(plain, calibration_data=[same]))
    assert list(tmp_path.iterdir()) == []


def test_images_that_calibrate_choose_nothing(
    digit_onnx: Path, train_batches: Batches, calibration_batches: Batches, fresh_batches: Batches, tmp_path: Path
) -> None:
    """Two exports whose calibration images differ choose alike, to the last digit."""
    auto = replace(PLAIN, ood_prototype="auto", bank="auto", scale="auto")
    contracts = []
    for name, data in (("a", calibration_batches), ("b", fresh_batches)):
        options = replace(auto, calibration_data=data)
        contracts.append(export_model(digit_onnx, train_batches, tmp_path / name, options).contract)
    a, b = contracts
    assert a.calibration.data_digest != b.calibration.data_digest
    assert a.selection == b.selection
    assert a.selection.candidates
    assert (a.bank, a.scale, a.ood_prototypes) == (b.bank, b.scale, b.ood_prototypes)


@pytest.mark.parametrize(
    "changes",
    [
        {"ood_prototype": "mean,mixup,origin", "bank": 32},
        {"bank": "none"},
        {"space": "logits", "bank": 32},
        {"per_class": True, "alpha": 0.4, "ood_prototype": "mean"},
    ],
    ids=["three prototypes", "no bank", "logits", "per class"],
)
def test_refitting_keeps_what_was_chosen(
    changes: dict[str, object],
    digit_onnx: Path,
    train_batches: Batches,
    fresh_batches: Batches,
    plain: ExportOptions,
    tmp_path: Path,
) -> None:
    options = replace(plain, **changes)  # type: ignore[arg-type]
    path = export_model(digit_onnx, train_batches, tmp_path / "m.onnx", options).path
    before = read_artifact(path)
    per_class = bool(changes.get("per_class"))
    for refit in (THRESHOLD, RecalibrateOptions()):
        out = tmp_path / f"{refit.threshold_only}.onnx"
        after = recalibrate(path, fresh_batches, out, replace(refit, per_class=per_class)).contract
        assert (after.space, after.scale, after.selection) == (
            before.contract.space, before.contract.scale, before.contract.selection,
        )  # fmt: skip
        assert after.ood_prototypes == before.contract.ood_prototypes
        assert (after.bank.choice, after.bank.rows) == (before.contract.bank.choice, before.contract.bank.rows)
        assert bool(after.calibration.class_sizes) == per_class
        old, new = (head_from_model(m) for m in (before.model, read_artifact(out).model))
        assert np.array_equal(old.prototypes, new.prototypes) == refit.threshold_only
        assert [len(h.bank_log_s) for h in new.ood_heads] == [len(h.bank_log_s) for h in old.ood_heads]


@pytest.mark.parametrize("changes", [{"bank": 32}, {"space": "logits", "bank": "none"}], ids=["kmeans", "logits"])
def test_fitted_images_are_recognised_whatever_the_bank(
    changes: dict[str, object], digit_onnx: Path, digits: DemoImages, plain: ExportOptions, tmp_path: Path
) -> None:
    """The bank has no row of an image of its own any more: the sketch knows it all the same, and a part of them."""
    options = replace(plain, classes=None, **changes)  # type: ignore[arg-type]
    path = export_model(digit_onnx, digits.train, tmp_path / "m.onnx", options).path
    part = tmp_path / "part"
    part.mkdir()
    for index, image in enumerate(find_images(digits.train)[::6]):
        shutil.copy(image, part / f"{index}.png")
    for data in (digits.train, part):
        with pytest.raises(DatasetError, match="are among those that this artifact was fitted on"):
            recalibrate(path, data, tmp_path / "out.onnx", THRESHOLD)
    assert not (tmp_path / "out.onnx").exists()
