"""Nothing is published unverified: faults put into an artifact on purpose are found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from grood_edge.artifact import Artifact, artifact_bytes, read_artifact
from grood_edge.conformal import count_at_least
from grood_edge.demo.images import DemoImages
from grood_edge.errors import ArtifactError, BackendError, VerificationError
from grood_edge.export import ExportOptions, export_model
from grood_edge.export import pipeline as pipeline_module
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.dataset import Sample, open_dataset
from grood_edge.export.features import FeaturePass
from grood_edge.export.graph import base_model
from grood_edge.export.verify import (
    reopen,
    require_equal_logits,
    require_equal_scores,
    run_frames,
    verification_frames,
)
from grood_edge.ort import open_ort
from grood_edge.preprocessing import Preprocessing
from grood_edge.scoring import ood_scores
from grood_edge.stored_head import (
    BANK_SCALE,
    CALIBRATION_SCORES,
    CENTER,
    PROTOTYPES_SQ,
    PROTOTYPES_T,
    RANK,
    SCALE,
    head_from_model,
    ood_names,
)
from tests.export.conftest import DIGIT_PREPROCESSING

NAMES = ood_names(0)
LAST = ood_names(2)


@pytest.fixture(scope="module")
def artifact(artifact_path: Path) -> Artifact:
    return read_artifact(artifact_path)


@pytest.fixture(scope="module")
def frames(artifact: Artifact, digit_pass: FeaturePass, digits: DemoImages) -> np.ndarray:
    """Training digits, as export itself takes them, and unseen ones, near and far OOD."""
    others: list[Sample] = []
    for folder in (digits.test, digits.near, digits.far_photos, digits.far_noise):
        others += list(open_dataset(folder, "predicted").samples(lambda *_: None))[:15]
    preprocessing = artifact.contract.preprocessing
    return np.concatenate(
        [verification_frames(digit_pass.check_samples, preprocessing), verification_frames((*others,), preprocessing)]
    )


def with_fault(model: bytes, name: str, change: float) -> bytes:
    """Add a number to an initializer of the graph."""
    proto = onnx.load_model_from_string(model)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array + np.array(change)).astype(array.dtype), name))
    changed: bytes = proto.SerializeToString()
    return changed


def test_good_artifact_is_within_the_tolerances(artifact: Artifact, frames: np.ndarray) -> None:
    found = require_equal_scores(open_ort(artifact.model), artifact.model, artifact.contract, frames)
    assert found.frames == len(frames)
    assert found.largest_score_error <= 2e-4
    assert found.flips == 0
    assert found.compared_scores > 60


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (NAMES.bank_log_s, 0.01),
        (LAST.bank_log_s, 0.02),
        (BANK_SCALE, 0.001),
        (NAMES.bank_offset, 0.5),
        (LAST.bank_inverse_length, 0.01),
        (NAMES.ood_prototype, 0.01),
        (LAST.ood_prototype, 0.05),
        (NAMES.map_slope, 0.01),
        (LAST.map_bias, 0.01),
        (NAMES.map_knots, 0.1),
        (LAST.map_weights, 0.01),
        (SCALE, 0.01),
        (PROTOTYPES_T, 0.01),
        (PROTOTYPES_SQ, 0.5),
        (CENTER, 0.01),
        ("grood/half", 0.001),
        ("grood/two", -0.01),
    ],
)
def test_fault_in_the_head_is_found(name: str, change: float, artifact: Artifact, frames: np.ndarray) -> None:
    faulty = open_ort(with_fault(artifact.model, name, change))
    with pytest.raises(VerificationError, match=r"ood_score differs from its definition by .*; nothing was written"):
        require_equal_scores(faulty, artifact.model, artifact.contract, frames)


@pytest.mark.parametrize(("name", "change"), [(RANK, 3), (RANK, -3), (CALIBRATION_SCORES, 1.0)])
def test_fault_in_the_decision_is_found(name: str, change: float, artifact: Artifact, frames: np.ndarray) -> None:
    """Scores are right, decisions are not. Half of the calibration scores stand in for borderline frames."""
    scores = artifact.contract.calibration.sorted_scores()
    k = len(scores) // 2
    contract = replace(artifact.contract, calibration=replace(artifact.contract.calibration, k=k))
    fitting = with_fault(artifact.model, RANK, k - artifact.contract.calibration.k)
    assert require_equal_scores(open_ort(fitting), artifact.model, contract, frames).flips == 0
    with pytest.raises(VerificationError, match=r"differs from its definition by .* and \d+ decisions differ"):
        require_equal_scores(open_ort(with_fault(fitting, name, 10 * change)), artifact.model, contract, frames)


def test_finite_features_that_are_called_invalid_are_found(artifact: Artifact, frames: np.ndarray) -> None:
    proto = onnx.load_model_from_string(artifact.model)
    less = next(node for node in proto.graph.node if node.output[0] == "valid")
    less.input[1] = "grood/zero"  # "no bad values" becomes "fewer than no bad values"
    with pytest.raises(VerificationError, match="do not say which features and logits are finite"):
        require_equal_scores(open_ort(proto.SerializeToString()), artifact.model, artifact.contract, frames)


def test_rows_that_depend_on_the_batch_are_found(artifact: Artifact, frames: np.ndarray) -> None:
    proto = onnx.load_model_from_string(artifact.model)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "both"))
    node = next(node for node in proto.graph.node if node.output[0] == "grood/class_weight")
    node.input[1] = "both"  # sums over the batch, too; the same for a batch of one
    model = open_ort(proto.SerializeToString())
    batch_1 = replace(artifact.contract, classifier=replace(artifact.contract.classifier, batch="1"))
    assert require_equal_scores(model, artifact.model, batch_1, frames).flips == 0
    with pytest.raises(VerificationError, match="differs from its definition"):
        require_equal_scores(model, artifact.model, artifact.contract, frames)


def test_bank_rows_are_no_excuse_for_a_wrong_decision(
    digit_onnx: Path, digits: DemoImages, digit_pass: FeaturePass, tmp_path: Path
) -> None:
    """Of a training image float32 only knows that it is near the bank: its decision is compared with that in mind."""
    options = ExportOptions(
        calibration_data=digits.calibration, preprocessing=DIGIT_PREPROCESSING, ood_prototype="mean", bank="all",
        bank_dtype="float32", scale=1.0,
    )  # fmt: skip
    export_model(digit_onnx, digits.train, tmp_path / "all.onnx", options)
    artifact = read_artifact(tmp_path / "all.onnx")
    rows = np.stack([sample.frame for sample in digit_pass.check_samples[:100]])
    frames = np.concatenate([rows, rows[:5, :, ::-1]])  # mirrored, so that there is something to compare
    contract = artifact.contract
    calibration = replace(contract.calibration, k=len(contract.calibration.sorted_scores()) // 2)
    deep = replace(contract, calibration=calibration)  # a threshold below what float32 gives for some bank rows
    model = with_fault(artifact.model, RANK, calibration.k - contract.calibration.k)
    head = head_from_model(artifact.model)
    outputs = run_frames(open_ort(model), frames, 10)
    expected = ood_scores(outputs.features.astype(np.float64), head).astype(np.float32)
    ranks = count_at_least(calibration.sorted_scores(), expected)
    assert (outputs.is_ood != (ranks < calibration.k)).any()
    found = require_equal_scores(open_ort(model), artifact.model, deep, frames)
    assert found.flips == 0
    assert 0 < found.compared_scores <= 5
    with pytest.raises(VerificationError, match="no frame's score can be compared"):
        require_equal_scores(open_ort(model), artifact.model, deep, rows)
    always = onnx.load_model_from_string(model)
    always.graph.node.append(helper.make_node("Not", ["never"], ["is_ood"]))
    next(node for node in always.graph.node if node.output[0] == "is_ood").output[0] = "never"
    with pytest.raises(VerificationError, match="decisions differ"):
        require_equal_scores(open_ort(always.SerializeToString()), artifact.model, contract, frames)


def test_logits_are_compared_relative_to_the_largest(artifact: Artifact, frames: np.ndarray) -> None:
    outputs = run_frames(open_ort(artifact.model), frames, 8)
    assert require_equal_logits(outputs, outputs.logits) == 0
    scale = np.abs(outputs.logits).max()
    slightly = (outputs.logits + np.float32(4e-6) * scale).astype(np.float32)
    assert 1e-6 < require_equal_logits(outputs, slightly) < 1e-5
    with pytest.raises(VerificationError, match=r"logits differ from the classifier's by .*; nothing was written"):
        require_equal_logits(outputs, (outputs.logits + np.float32(1e-4) * scale).astype(np.float32))
    with pytest.raises(VerificationError, match="by nan"):
        require_equal_logits(outputs, np.full_like(outputs.logits, np.nan))


@pytest.mark.parametrize("change", [2.0, -0.5])
def test_wrong_normalisation_never_reaches_a_file(
    change: float,
    digit_onnx: Path,
    digits: DemoImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault in the preprocessing nodes: the artifact's statistics agree with it, and only the logits tell."""

    def faulty(classifier: ClassifierGraph, preprocessing: Preprocessing) -> ModelProto:
        model = base_model(classifier, preprocessing)
        return onnx.load_model_from_string(with_fault(model.SerializeToString(), "preprocess/std", change))

    monkeypatch.setattr(pipeline_module, "base_model", faulty)
    options = ExportOptions(calibration_data=digits.calibration, preprocessing=DIGIT_PREPROCESSING)
    with pytest.raises(VerificationError, match="logits differ from the classifier's"):
        export_model(digit_onnx, digits.train, tmp_path / "faulty.onnx", options)
    assert list(tmp_path.iterdir()) == []


def test_verification_frames_are_real_mirrored_and_synthetic(digit_pass: FeaturePass, artifact: Artifact) -> None:
    found = verification_frames(digit_pass.check_samples, artifact.contract.preprocessing)
    assert found.shape == (24 + 24 + 10, 32, 32, 1)
    np.testing.assert_array_equal(found[0], digit_pass.check_samples[0].frame)
    np.testing.assert_array_equal(found[24], digit_pass.check_samples[0].frame[:, ::-1])
    assert verification_frames((), artifact.contract.preprocessing).shape == (10, 32, 32, 1)


def test_reopening_finds_a_damaged_file(artifact_path: Path, artifact: Artifact, tmp_path: Path) -> None:
    reopen(artifact_path)
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(artifact_path.read_bytes()[:-1000])
    with pytest.raises(ArtifactError):
        reopen(copy)
    data = bytearray(artifact_path.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="digest does not match"):
        reopen(copy)
    proto = onnx.load_model_from_string(artifact.model)
    proto.graph.node[0].op_type = "Sinh" if proto.graph.node[0].op_type == "Cast" else "Cast"
    copy.write_bytes(artifact_bytes(proto.SerializeToString(), artifact.contract))  # whole, but no runtime reads it
    with pytest.raises(BackendError, match="cannot open the model"):
        reopen(copy)
