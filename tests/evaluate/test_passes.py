"""A pass gives what the session gives, image by image, and counts its images as export does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError
from grood_edge.evaluate import passes
from grood_edge.evaluate.passes import batched, score_set
from grood_edge.evaluate.sets import id_set, ood_set
from grood_edge.images import find_images, load_image
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.session import Session, open_session
from tests.evaluate.conftest import copied
from tests.runtime.conftest import overflowing_path  # noqa: F401

CLASSES = tuple("0123456")


def test_rows_are_the_sessions_verdicts(session: Session, few: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    known, _ = id_set(few / "test", CLASSES)
    scored = score_set(known, session, progress=lambda *call: calls.append(call))
    for index in range(0, len(scored.paths), 9):
        verdict = session.predict(load_image(scored.paths[index]))
        assert scored.rows.class_ids[index] == verdict.class_id
        assert scored.rows.flagged[index] == verdict.is_ood
        assert scored.rows.scores[index] == pytest.approx(verdict.ood_score, abs=1e-4)
        assert scored.rows.p_values[index] == pytest.approx(verdict.p_value, abs=1e-2)
    assert calls[-1] == ("scoring ID", len(known.paths), len(known.paths))


def test_frames_are_resized_and_cropped_once(artifact_path: Path, few: Path) -> None:
    """A preset with a centre crop would cut a second time from a frame that is already of the graph's size."""
    artifact = read_artifact(artifact_path)
    cropping = replace(artifact.contract.preprocessing, crop="center", short_side=48)
    cropped = replace(artifact, contract=replace(artifact.contract, preprocessing=cropping))
    with Session(cropped, OnnxRuntimeBackend(cropped)) as session:
        scored = score_set(ood_set("near", few / "near"), session)
        one_by_one = [session.predict(load_image(path)).ood_score for path in scored.paths]
    np.testing.assert_allclose(scored.rows.scores, one_by_one, atol=1e-4)


def test_an_image_is_prepared_once(session: Session, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, prepare = [], session.write

    def counted(frame: object, target: np.ndarray) -> None:
        prepared.append(1)
        prepare(frame, target)

    monkeypatch.setattr(session, "write", counted)
    assert len(score_set(ood_set("near", few / "near"), session).paths) == len(prepared)


def test_the_digest_is_the_one_in_the_contract(session: Session, digits: DemoImages) -> None:
    scored = score_set(ood_set("calibration", digits.calibration), session)
    assert scored.digest == session.contract.calibration.data_digest


def test_the_sessions_alpha_decides(artifact_path: Path, few: Path) -> None:
    near = ood_set("near", few / "near")
    with open_session(artifact_path) as usual, open_session(artifact_path, alpha=0.3) as eager:
        assert score_set(near, usual).rows.flagged.sum() < score_set(near, eager).rows.flagged.sum()


def test_batches_are_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [np.zeros((10, 10, 3), np.uint8)] * 70
    assert [len(batch) for batch in batched(frames)] == [32, 32, 6]
    monkeypatch.setattr(passes, "BATCH_BYTES", 700)
    assert {len(batch) for batch in batched(frames)} == {3, 1}


def test_unreadable_images_are_left_out_and_too_many_are_refused(session: Session, few: Path, tmp_path: Path) -> None:
    folder = copied(few / "test", tmp_path / "test")
    broken = folder / "3" / "0.png"
    broken.write_bytes(b"no image")
    known, _ = id_set(folder, CLASSES)
    with pytest.raises(DatasetError, match=r"1 of \d+ images .*0\.png.*Repair or remove them, or .*--allow-unreadable"):
        score_set(known, session)
    scored = score_set(known, session, allow_unreadable=True)
    assert [path for path, _ in scored.unreadable] == [str(broken)]
    assert scored.labels is not None
    assert len(scored.paths) == len(scored.rows.scores) == len(scored.labels) == len(known.paths) - 1
    assert [CLASSES[label] for label in scored.labels] == [path.parent.name for path in scored.paths]


def test_a_set_that_is_left_with_one_image_is_refused(session: Session, few: Path, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(find_images(few / "near")[0].read_bytes())
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="1 of 2 images"):
        score_set(ood_set("near", tmp_path), session, allow_unreadable=True)


def test_invalid_images_get_the_worst_of_every_score(overflowing_path: Path, few: Path, tmp_path: Path) -> None:  # noqa: F811
    from PIL import Image

    Image.new("L", (32, 32), 204).save(tmp_path / "grey.png")
    (tmp_path / "digit.png").write_bytes(find_images(few / "test")[0].read_bytes())
    with open_session(overflowing_path) as session:
        scored = score_set(ood_set("mixed", tmp_path), session, lambda features, _: {"norm": features.sum(axis=1)})
    assert scored.rows.valid.tolist() == [True, False]
    assert scored.rows.flagged[1]
    assert scored.rows.others["norm"][1] == np.finfo(np.float32).max
    assert scored.rows.others["norm"][0] < 1e6
