"""Why a frame got its score: against nearest class, log s and bank row computed by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from grood_edge.arrays import Frame
from grood_edge.artifact import artifact_bytes, read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.demo.network import DigitNetwork
from grood_edge.errors import ArtifactError
from grood_edge.export import ExportOptions, export_model
from grood_edge.images import find_images, load_image
from grood_edge.runtime import Session, open_session
from grood_edge.runtime.explain import Reason, reasons
from grood_edge.scoring import nearest_rows
from grood_edge.stored_head import head_from_model
from tests.conftest import DIGIT_OPTIONS
from tests.runtime.conftest import OVERFLOW_LEVEL


@pytest.fixture(scope="module")
def frames(digits: DemoImages) -> list[Frame]:
    return [load_image(path) for path in (*find_images(digits.test)[::12], *find_images(digits.near)[::30])]


@pytest.fixture(scope="module")
def session(artifact_path: Path) -> Session:
    return open_session(artifact_path)


def explained(session: Session, frames: list[Frame]) -> list[Reason]:
    found = [verdict.reason for verdict in session.predict_batch(frames, explain=True)]
    assert all(reason is not None for reason in found)
    return [reason for reason in found if reason is not None]


def test_reasons_by_hand(session: Session, artifact_path: Path, frames: list[Frame]) -> None:
    """One frame at a time, and one distance at a time."""
    head, contract = head_from_model(artifact_path.read_bytes()), session.contract
    features = session.infer(frames).features.astype(np.float64)
    for reason, h in zip(explained(session, frames), features, strict=True):
        distances = head.scale * np.linalg.norm(head.prototypes - h, axis=1)
        assert reason.nearest_class == contract.classes[distances.argmin()]
        assert list(reason.log_s) == [prototype.source for prototype in contract.ood_prototypes]
        for log_s, ood_head in zip(reason.log_s.values(), head.ood_heads, strict=True):
            d_ood = head.scale * np.linalg.norm(h - ood_head.prototype)
            assert log_s == pytest.approx(-np.logaddexp.reduce(np.append(-distances, -d_ood)) - d_ood, abs=1e-6)
        row = int(nearest_rows(h[None], head)[0].row[0])
        assert reason.bank_class == contract.classes[contract.bank.row_classes()[row]]
        assert reason.bank_path is None


def test_known_digits_are_near_their_own_class(session: Session, digits: DemoImages) -> None:
    paths = find_images(digits.test)[::5]
    found = explained(session, [load_image(path) for path in paths])
    for name in ("nearest_class", "bank_class"):
        right = [getattr(r, name) == path.parent.name for r, path in zip(found, paths, strict=True)]
        assert np.mean(right) > 0.9


def test_nobody_asked(session: Session, frames: list[Frame]) -> None:
    assert all(verdict.reason is None for verdict in session.predict_batch(frames))
    assert session.predict(frames[0], explain=True).reason is not None
    plain = [dataclasses.replace(v, reason=None) for v in session.predict_batch(frames, explain=True)]
    assert plain == session.predict_batch(frames)  # a reason changes no verdict


def test_frames_that_are_not_valid_have_no_reason(overflowing_path: Path, frames: list[Frame]) -> None:
    bright = np.full((32, 32), OVERFLOW_LEVEL, np.uint8)
    with open_session(overflowing_path) as session:
        verdicts = session.predict_batch([frames[0], bright, frames[1]], explain=True)
        assert [verdict.reason is not None for verdict in verdicts] == [True, False, True]
        assert verdicts[2].reason == session.predict(frames[1], explain=True).reason
        assert session.predict(bright, explain=True).reason is None


def test_classes_without_prototype_are_passed_over(artifact_path: Path, session: Session, frames: list[Frame]) -> None:
    """With no prototype for class 0, the first prototype is that of class 1."""
    head, outputs = head_from_model(artifact_path.read_bytes()), session.infer(frames)
    fewer = dataclasses.replace(head, prototypes=head.prototypes[1:])
    fit = dataclasses.replace(session.contract.fit, classes_without_prototype=("0",))
    contract = dataclasses.replace(session.contract, fit=fit)
    for reason, h in zip(reasons(outputs, contract, fewer), outputs.features.astype(np.float64), strict=True):
        assert reason is not None
        nearest = 1 + np.linalg.norm(head.prototypes[1:] - h, axis=1).argmin()
        assert reason.nearest_class == str(nearest)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, digits: DemoImages, network: DigitNetwork) -> Path:
    path = tmp_path_factory.mktemp("paths") / "a.onnx"
    options = ExportOptions(
        calibration_data=digits.calibration,
        preprocessing=DIGIT_OPTIONS.preprocessing,
        ood_prototype="mean",
        bank=24,
        keep_paths=True,
    )
    export_model(network, digits.train, path, options)
    return path


class TestKeptPaths:
    def test_the_image_behind_the_row_is_one_of_its_class(
        self, kept: Path, digits: DemoImages, frames: list[Frame]
    ) -> None:
        with open_session(kept) as session:
            assert len(session.contract.bank.paths) == 24
            found = explained(session, frames)
        for reason in found:
            assert reason.bank_path is not None
            (path,) = [p for p in find_images(digits.train) if str(p).endswith(reason.bank_path)]
            assert path.parent.name == reason.bank_class
        assert len({reason.bank_path for reason in found}) > 5

    def test_an_image_of_the_row_explains_itself(self, kept: Path, digits: DemoImages) -> None:
        """The image nearest to a row has, most of the time, that row as its nearest one."""
        with open_session(kept) as session:
            paths = [
                p for name in session.contract.bank.paths for p in find_images(digits.train) if str(p).endswith(name)
            ]
            found = explained(session, [load_image(path) for path in paths])
        same = [str(path).endswith(str(reason.bank_path)) for path, reason in zip(paths, found, strict=True)]
        assert np.mean(same) > 0.5


def test_without_a_bank(network: DigitNetwork, digits: DemoImages, tmp_path: Path, frames: list[Frame]) -> None:
    options = ExportOptions(
        calibration_data=digits.calibration,
        preprocessing=DIGIT_OPTIONS.preprocessing,
        ood_prototype="mean",
        bank="none",
    )
    export_model(network, digits.train, tmp_path / "a.onnx", options)
    with open_session(tmp_path / "a.onnx") as session:
        (reason,) = explained(session, frames[:1])
        assert (reason.bank_class, reason.bank_path) == (None, None)
        assert reason.log_s["mean"] == pytest.approx(session.predict(frames[0]).ood_score, abs=1e-3)


def test_the_program_may_change_its_folder(
    artifact_path: Path, tmp_path: Path, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifact_path.parent)
    with open_session(artifact_path.name) as session:
        monkeypatch.chdir(tmp_path)
        assert session.predict(frames[0], explain=True).reason is not None


def test_an_artifact_that_was_replaced_since(artifact_path: Path, tmp_path: Path, frames: list[Frame]) -> None:
    """The head is read when a reason is first asked for: that of another file would explain nothing."""
    path = tmp_path / "a.onnx"
    path.write_bytes(artifact_path.read_bytes())
    with open_session(path) as session:
        artifact = read_artifact(artifact_path)
        other = artifact.model.replace(b"classifier/relu_3", b"classifier/relu_x")
        path.write_bytes(artifact_bytes(other, artifact.contract))
        with pytest.raises(ArtifactError, match="was replaced since the session was opened; open the session again"):
            session.predict(frames[0], explain=True)
        assert session.predict(frames[0]).valid
