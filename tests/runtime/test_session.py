"""Frames in, verdicts out: on real digits and photos, at any alpha, and with whatever a camera may deliver."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grood_edge.arrays import Frame
from grood_edge.artifact import artifact_bytes, read_artifact
from grood_edge.conformal import rank_for
from grood_edge.contract import encode_scores
from grood_edge.demo.images import DemoImages
from grood_edge.errors import ArtifactError, BackendError, CalibrationError, FrameError, UsageError
from grood_edge.images import find_images, load_image
from grood_edge.preprocessing import preprocess_frame
from grood_edge.runtime import Session, Verdict, open_session
from grood_edge.stored_head import calibration_tensors, model_with_tensors
from tests.runtime.conftest import OVERFLOW_LEVEL, ColorPhotos
from tests.without_hook import without_hook


@pytest.fixture(scope="module")
def frames(digits: DemoImages) -> list[Frame]:
    """Known digits, unknown digits, and crops of photos."""
    paths = [*find_images(digits.test)[::8], *find_images(digits.near)[::20], *find_images(digits.far_photos)[::10]]
    return [load_image(path) for path in paths]


@pytest.fixture(scope="module")
def session(artifact_path: Path) -> Iterator[Session]:
    with open_session(artifact_path) as opened:
        yield opened


def assert_same(found: list[Verdict], expected: list[Verdict]) -> None:
    """Equal decisions; scores equal to float32 rounding, which depends on the batch size."""
    assert [(v.class_id, v.class_name, v.p_value, v.is_ood, v.valid) for v in found] == [
        (v.class_id, v.class_name, v.p_value, v.is_ood, v.valid) for v in expected
    ]
    np.testing.assert_allclose([v.ood_score for v in found], [v.ood_score for v in expected], atol=2e-4)


class TestVerdicts:
    def test_equal_the_graphs_own_outputs(self, session: Session, frames: list[Frame]) -> None:
        outputs = session.infer(frames)
        verdicts = session.predict_batch(frames)
        assert [v.is_ood for v in verdicts] == outputs.is_ood.tolist()
        assert [v.valid for v in verdicts] == outputs.valid.tolist()
        assert [v.p_value for v in verdicts] == outputs.p_value.tolist()
        assert [v.ood_score for v in verdicts] == outputs.ood_score.tolist()
        assert [v.class_id for v in verdicts] == outputs.logits.argmax(axis=1).tolist()
        assert {v.is_ood for v in verdicts} == {True, False}
        assert all(v.class_name == session.contract.classes[v.class_id] for v in verdicts)

    def test_known_digits_are_known_and_photos_are_not(self, session: Session, digits: DemoImages) -> None:
        paths = find_images(digits.test)
        verdicts = session.predict_batch([load_image(path) for path in paths])
        right = [v.class_name == path.parent.name for v, path in zip(verdicts, paths, strict=True)]
        assert np.mean(right) > 0.95
        assert np.mean([v.is_ood for v in verdicts]) < 0.1
        photos = [load_image(path) for path in find_images(digits.far_photos)]
        assert np.mean([v.is_ood for v in session.predict_batch(photos)]) > 0.8

    def test_one_frame_at_a_time(self, session: Session, frames: list[Frame]) -> None:
        assert_same([session.predict(frame) for frame in frames[:12]], session.predict_batch(frames)[:12])

    def test_verdict_holds_plain_python_values(self, session: Session, frames: list[Frame]) -> None:
        verdict = session.predict(frames[0])
        assert {name: type(value) for name, value in dataclasses.asdict(verdict).items()} == {
            "class_id": int, "class_name": str, "ood_score": float, "p_value": float, "is_ood": bool, "valid": bool,
            "reason": type(None),
        }  # fmt: skip
        attributes: Any = verdict
        with pytest.raises(AttributeError):
            attributes.is_ood = False

    def test_outputs_belong_to_the_caller(self, session: Session, frames: list[Frame]) -> None:
        first = session.infer(frames[:4])
        kept = first.features.copy()
        session.infer(frames[4:8])
        np.testing.assert_array_equal(first.features, kept)


class TestAlpha:
    @pytest.mark.parametrize("alpha", [0.3, 0.1, 0.02])
    def test_another_alpha_counts_again(
        self, artifact_path: Path, session: Session, frames: list[Frame], alpha: float
    ) -> None:
        calibration = session.contract.calibration
        with open_session(artifact_path, alpha=alpha) as other:
            assert other.alpha == alpha
            (rank,) = other.rule.ranks
            assert rank == rank_for(alpha, calibration.delta, calibration.n)
            assert other.rule.ranks != session.rule.ranks
            outputs = other.infer(frames)
            threshold = np.sort(calibration.sorted_scores())[-rank]
            expected = outputs.ood_score > threshold
            assert [v.is_ood for v in other.predict_batch(frames)] == expected.tolist()
            assert 0 < expected.sum() < len(expected)
            assert (expected != outputs.is_ood).any() == (alpha != calibration.alpha)

    def test_the_artifacts_own_alpha(self, artifact_path: Path, session: Session, frames: list[Frame]) -> None:
        assert session.alpha == 0.05
        assert session.rule.ranks == (session.contract.calibration.k,)
        with open_session(artifact_path, alpha=0.05) as same:
            assert same.predict_batch(frames) == session.predict_batch(frames)

    def test_larger_alpha_only_adds_alarms(self, artifact_path: Path, frames: list[Frame]) -> None:
        alarms = []
        for alpha in (0.02, 0.05, 0.1, 0.3, 0.9):
            with open_session(artifact_path, alpha=alpha) as opened:
                alarms.append({i for i, v in enumerate(opened.predict_batch(frames)) if v.is_ood})
        assert all(less <= more for less, more in pairwise(alarms))
        assert len(alarms[0]) < len(alarms[-1])

    def test_alpha_that_n_cannot_carry(self, artifact_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"314 calibration images cannot carry alpha 0.001.* at least 2,995"):
            open_session(artifact_path, alpha=0.001)

    @pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")])
    def test_alpha_out_of_range(self, artifact_path: Path, alpha: float) -> None:
        with pytest.raises(UsageError, match="expected a number above 0 and below 1"):
            open_session(artifact_path, alpha=alpha)


@pytest.fixture(scope="module")
def per_class_path(artifact_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digit artifact with a group of calibration scores for each class: those of the digits 0 to 2 are high."""
    artifact = read_artifact(artifact_path)
    scores = artifact.contract.calibration.sorted_scores()
    groups = tuple(scores[-80 - c :] if c < 3 else scores[: 100 + c] for c in range(7))
    ranks = tuple(rank_for(0.05, 0.05, group.size) for group in groups)
    calibration = dataclasses.replace(
        artifact.contract.calibration,
        n=sum(group.size for group in groups),
        class_sizes=tuple(group.size for group in groups),
        class_ranks=ranks,
        scores=encode_scores(groups),
    )
    contract = dataclasses.replace(artifact.contract, calibration=calibration, probes=())
    model = model_with_tensors(artifact.model, calibration_tensors(calibration.rule(7)))
    path = tmp_path_factory.mktemp("per-class") / "a.onnx"
    path.write_bytes(artifact_bytes(model, contract))
    return path


class TestPerClass:
    def test_session_and_graph_decide_by_the_group_of_the_class(
        self, per_class_path: Path, frames: list[Frame]
    ) -> None:
        with open_session(per_class_path) as session:
            outputs = session.infer(frames)
            np.testing.assert_array_equal(session.is_ood(outputs), outputs.is_ood)
            thresholds = np.array([session.rule.threshold(c) for c in range(7)])
            np.testing.assert_array_equal(outputs.is_ood, outputs.ood_score > thresholds[outputs.class_id])
            verdicts = session.predict_batch(frames)
        assert thresholds[:3].min() > thresholds[3:].max()
        assert [v.is_ood for v in verdicts] == outputs.is_ood.tolist()
        one = open_session(per_class_path).rule.threshold(0)
        assert (outputs.is_ood != (outputs.ood_score > one)).any()

    def test_another_alpha_ranks_every_group_anew(self, per_class_path: Path, frames: list[Frame]) -> None:
        with open_session(per_class_path, alpha=0.3) as session:
            sizes, outputs = session.contract.calibration.class_sizes, session.infer(frames)
            assert session.rule.ranks == tuple(rank_for(0.3, 0.05, n) for n in sizes)
            thresholds = np.array([session.rule.threshold(c) for c in range(7)])
            np.testing.assert_array_equal(session.is_ood(outputs), outputs.ood_score > thresholds[outputs.class_id])

    def test_alpha_that_the_smallest_class_cannot_carry(self, per_class_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"80 calibration images cannot carry alpha 0\.03"):
            open_session(per_class_path, alpha=0.03)


class TestPrepared:
    def test_prepared_frames_are_not_prepared_again(self, color_photos: ColorPhotos) -> None:
        frames = color_photos.test_frames()[::7]
        with open_session(color_photos.artifact) as session:
            ready = np.stack([preprocess_frame(frame, session.contract.preprocessing) for frame in frames])
            np.testing.assert_array_equal(session.infer_prepared(ready).features, session.infer(frames).features)
            again = session.infer(list(ready)).features
            assert np.abs(again - session.infer_prepared(ready).features).max() > 1e-3  # cropped once more

    def test_one_at_a_time_where_the_graph_takes_no_more(self, single_path: Path, session: Session) -> None:
        ready = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)
        with open_session(single_path) as single:
            found = single.infer_prepared(ready)
        np.testing.assert_allclose(found.features, session.infer_prepared(ready).features, atol=1e-4)

    @pytest.mark.parametrize(
        "frames",
        [
            np.zeros((2, 31, 32, 1), np.uint8),
            np.zeros((2, 32, 32, 3), np.uint8),
            np.zeros((0, 32, 32, 1), np.uint8),
        ],
    )
    def test_frames_of_another_size(self, session: Session, frames: np.ndarray) -> None:
        with pytest.raises(FrameError, match=r"prepared frames are uint8 .*expected uint8 \[n, 32, 32, 1\]"):
            session.infer_prepared(frames)

    def test_frames_of_another_dtype(self, session: Session) -> None:
        frames: Any = np.zeros((1, 32, 32, 1), np.float32)
        with without_hook(), pytest.raises(FrameError, match="prepared frames are float32"):
            session.infer_prepared(frames)


class TestColor:
    def test_network_tells_the_photos_apart(self, color_photos: ColorPhotos) -> None:
        with open_session(color_photos.artifact) as session:
            verdicts = session.predict_batch(color_photos.test_frames())
            names = [v.class_name for v in verdicts]
            expected = [path.parent.name for path in find_images(color_photos.folder / "test")]
            assert np.mean([a == b for a, b in zip(names, expected, strict=True)]) > 0.9
            assert session.contract.preprocessing.short_side == 55

    def test_bgr_frames_declared_as_such(self, color_photos: ColorPhotos) -> None:
        rgb = color_photos.test_frames()
        bgr = [np.ascontiguousarray(frame[..., ::-1]) for frame in rgb]
        with open_session(color_photos.artifact) as session:
            expected = session.predict_batch(rgb)
            wrong = session.predict_batch(bgr)
        with open_session(color_photos.artifact, color="bgr") as session:
            assert session.predict_batch(bgr) == expected
            assert session.predict_batch(rgb) == wrong
        assert np.mean([a.class_id == b.class_id for a, b in zip(wrong, expected, strict=True)]) < 0.9

    def test_grey_frames_have_no_channel_order(self, color_photos: ColorPhotos) -> None:
        grey = [frame[..., 1] for frame in color_photos.test_frames()[::6]]
        with open_session(color_photos.artifact) as rgb, open_session(color_photos.artifact, color="bgr") as bgr:
            assert rgb.predict_batch(grey) == bgr.predict_batch(grey)
            assert rgb.predict_batch([frame[..., None] for frame in grey]) == rgb.predict_batch(grey)

    def test_unknown_order(self, artifact_path: Path) -> None:
        color: Any = "gbr"
        with without_hook(), pytest.raises(UsageError, match="color is 'gbr'; expected 'rgb' or 'bgr'"):
            open_session(artifact_path, color=color)

    def test_resize_and_crop_are_the_contracts(self, color_photos: ColorPhotos) -> None:
        frames = color_photos.test_frames()[::7]
        with open_session(color_photos.artifact) as session:
            batch = np.stack([preprocess_frame(frame, session.contract.preprocessing) for frame in frames])
            direct = session.backend.run(batch)
            np.testing.assert_array_equal(session.infer(frames).features, direct.features)


class TestFrames:
    @pytest.mark.parametrize("which", ["digits", "color"])
    @pytest.mark.parametrize("shape", [(1, 1), (1, 8000), (32, 32), (4320, 7680)])
    @pytest.mark.parametrize("level", [0, 255])
    def test_black_white_tiny_and_8k(
        self, artifact_path: Path, color_photos: ColorPhotos, which: str, shape: tuple[int, int], level: int
    ) -> None:
        with open_session(artifact_path if which == "digits" else color_photos.artifact) as session:
            for frame in (np.full((*shape, 3), level, np.uint8), np.full(shape, level, np.uint8)):
                verdict = session.predict(frame)
                assert verdict.valid
                assert np.isfinite(verdict.ood_score)
                assert 0 < verdict.p_value <= 1
                # A flat frame looks the same whatever its size.
                assert_same([verdict], [session.predict(np.full((32, 32, 1), level, np.uint8))])

    def test_read_only_and_strided(self, color_photos: ColorPhotos) -> None:
        frames = color_photos.test_frames()[:3]
        with open_session(color_photos.artifact) as session:
            expected = session.predict_batch(frames)
            for frame, verdict in zip(frames, expected, strict=True):
                read_only = frame.copy()
                read_only.flags.writeable = False
                strided = np.repeat(np.repeat(frame, 2, axis=0), 3, axis=1)[::2, ::3]
                flipped = np.ascontiguousarray(frame[::-1])[::-1]
                planar = np.ascontiguousarray(frame.transpose(2, 0, 1)).transpose(1, 2, 0)
                views = [read_only, strided, flipped, np.asfortranarray(frame), planar]
                assert not any(view.flags.c_contiguous for view in views[1:])
                assert_same(session.predict_batch(views), [verdict] * len(views))
                np.testing.assert_array_equal(read_only, frame)

    def test_mixed_sizes_in_one_batch(self, color_photos: ColorPhotos) -> None:
        frames = color_photos.test_frames()[:5]
        odd = [frames[0][:1], frames[1][:, :1], frames[2][..., 0], frames[3][10:61, 5:99], frames[4]]
        with open_session(color_photos.artifact) as session:
            assert_same(session.predict_batch(odd), [session.predict(frame) for frame in odd])

    @pytest.mark.parametrize(
        ("frame", "message"),
        [
            (np.zeros((8, 8, 3), np.float32), "dtype float32"),
            (np.zeros((8, 8), np.int64), "dtype int64"),
            (np.zeros((8, 8, 4), np.uint8), r"shape \[8, 8, 4\]"),
            (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]"),
            (np.zeros((2, 8, 8, 3), np.uint8), r"shape \[2, 8, 8, 3\]"),
            (np.zeros((8, 0, 3), np.uint8), r"shape \[8, 0, 3\]"),
            (None, "dtype object"),
            ("frame.png", "dtype <U9"),
        ],
    )
    @pytest.mark.parametrize("color", ["rgb", "bgr"])
    def test_frames_that_are_none(self, artifact_path: Path, frame: Any, message: str, color: Any) -> None:
        """A camera that lost its signal hands out None, or an empty array."""
        with without_hook(), open_session(artifact_path, color=color) as session:
            good = np.zeros((8, 8), np.uint8)
            with pytest.raises(FrameError, match=message):
                session.predict(frame)
            with pytest.raises(FrameError, match=message):
                session.predict_batch([good, frame])
            assert session.predict(good).valid  # and the session goes on

    def test_no_frames(self, session: Session) -> None:
        with pytest.raises(FrameError, match="no frames were given"):
            session.predict_batch([])


class TestOverflow:
    def test_overflow_is_invalid_ood_and_does_not_touch_its_neighbours(
        self, overflowing_path: Path, session: Session, frames: list[Frame]
    ) -> None:
        bright = np.full((32, 32, 1), OVERFLOW_LEVEL, np.uint8)
        with open_session(overflowing_path) as overflowing:
            outputs = overflowing.infer([bright])
            assert not np.isfinite(outputs.features).all()
            verdicts = overflowing.predict_batch([frames[0], bright, frames[1]])
            alone = overflowing.predict(bright)
        for verdict in (verdicts[1], alone):
            assert not verdict.valid
            assert verdict.is_ood
            assert verdict.p_value == 0
            assert verdict.ood_score == np.float32(3.4e38)
            assert verdict.class_name in session.contract.classes
        assert_same([verdicts[0], verdicts[2]], session.predict_batch(frames[:2]))

    def test_no_alpha_makes_an_invalid_frame_known(self, overflowing_path: Path) -> None:
        bright = np.full((32, 32), OVERFLOW_LEVEL, np.uint8)
        for alpha in (0.02, 0.5, 0.99):
            with open_session(overflowing_path, alpha=alpha) as session:
                assert session.predict(bright).is_ood

    def test_invalid_is_ood_whatever_the_score(self, session: Session, frames: list[Frame]) -> None:
        scores, valid = np.array([-50.0, -50.0, np.nan], np.float32), np.array([True, False, True])
        outputs = dataclasses.replace(session.infer(frames[:3]), ood_score=scores, valid=valid)
        assert session.is_ood(outputs).tolist() == [False, True, True]


def test_network_that_takes_single_images_alone(single_path: Path, session: Session, frames: list[Frame]) -> None:
    with open_session(single_path) as single:
        assert single.contract.classifier.batch == "1"
        assert_same(single.predict_batch(frames[:6]), session.predict_batch(frames[:6]))
        assert single.infer(frames[:6]).features.shape == (6, 64)
        with pytest.raises(BackendError, match="onnxruntime failed"):
            single.backend.run(np.zeros((2, 32, 32, 1), np.uint8))


class TestOpening:
    def test_closed_session(self, artifact_path: Path, frames: list[Frame]) -> None:
        with open_session(artifact_path) as session:
            session.predict(frames[0])
        with pytest.raises(BackendError, match=r"the session is closed; open it again with open_session"):
            session.predict(frames[0])
        session.close()  # twice is no error

    def test_closed_also_after_an_error(self, artifact_path: Path, frames: list[Frame]) -> None:
        session = open_session(artifact_path)
        with pytest.raises(RuntimeError, match="mine"), session:
            raise RuntimeError("mine")
        with pytest.raises(BackendError, match="closed"):
            session.predict(frames[0])

    def test_provider_that_is_not_there(self, artifact_path: Path) -> None:
        with pytest.raises(BackendError, match="provider 'tensorrt' is unknown"):
            open_session(artifact_path, provider="tensorrt")

    def test_threads(self, artifact_path: Path, session: Session, frames: list[Frame]) -> None:
        with open_session(artifact_path, threads=1) as single:
            assert_same(single.predict_batch(frames), session.predict_batch(frames))

    def test_not_an_artifact(self, tmp_path: Path, artifact_path: Path) -> None:
        with pytest.raises(ArtifactError, match="cannot read"):
            open_session(tmp_path / "none.onnx")
        (tmp_path / "half.onnx").write_bytes(artifact_path.read_bytes()[:5000])
        with pytest.raises(ArtifactError):
            open_session(tmp_path / "half.onnx")

    def test_path_as_text(self, artifact_path: Path, session: Session, frames: list[Frame]) -> None:
        with open_session(str(artifact_path)) as opened:
            assert opened.predict(frames[0]) == session.predict(frames[0])
            assert opened.contract == read_artifact(artifact_path).contract
            assert opened.backend.provider == "cpu"


def test_one_frame_is_no_batch(artifact_path: Path) -> None:
    with open_session(artifact_path) as session:
        for shape in ((48, 64, 3), (48, 64, 1), (48, 64)):
            with pytest.raises(FrameError, match="was given as a batch; use predict"):
                session.predict_batch(np.zeros(shape, np.uint8))
        assert len(session.predict_batch(np.zeros((2, 48, 64, 3), np.uint8))) == 2
        assert len(session.predict_batch(np.zeros((2, 48, 64), np.uint8))) == 2
