"""Probes on the real artifact: they pass here, and every way of being wrong makes them fail."""

import base64
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grood_edge.arrays import Frames, InputFrame
from grood_edge.artifact import read_artifact
from grood_edge.contract import Contract, Probe, encode_scores
from grood_edge.contract_rules import MAX_PROBE_CHARACTERS, MAX_PROBES
from grood_edge.demo.images import DemoImages
from grood_edge.errors import ArtifactError, VerificationError
from grood_edge.images import find_images, load_image
from grood_edge.outputs import Outputs
from grood_edge.preprocessing import PreprocessingOptions, preprocess_frame, resolve_preprocessing
from grood_edge.probes import (
    MARGIN,
    ProbeReport,
    decode_png,
    encode_png,
    left_out,
    make_probes,
    replay_probes,
    synthetic_frames,
)
from grood_edge.runtime import Session, open_session
from grood_edge.scoring import nearest_rows
from grood_edge.stored_head import head_from_model


@pytest.fixture(scope="module")
def session(artifact_path: Path) -> Session:
    return open_session(artifact_path)


@pytest.fixture(scope="module")
def contract(artifact_path: Path) -> Contract:
    return read_artifact(artifact_path).contract


@pytest.fixture(scope="module")
def real_frames(digits: DemoImages, contract: Contract) -> list[tuple[str, InputFrame]]:
    paths = [*find_images(digits.test)[::4], *find_images(digits.near)[::9], *find_images(digits.far_photos)[::5]]
    return [
        (f"{path.parent.name}/{path.name}", preprocess_frame(load_image(path), contract.preprocessing))
        for path in paths
    ]


def replace_probe(contract: Contract, index: int, **changes: Any) -> Contract:
    probes = list(contract.probes)
    probes[index] = dataclasses.replace(probes[index], **changes)
    return dataclasses.replace(contract, probes=tuple(probes))


def calibrated_by(contract: Contract, *groups: np.ndarray) -> Contract:
    """Return the contract with other calibration scores, rank 1: one group, or one a class."""
    arrays = tuple(np.asarray(group, np.float32) for group in groups)
    per_class = len(arrays) > 1
    calibration = dataclasses.replace(
        contract.calibration,
        n=sum(array.size for array in arrays),
        k=1,
        class_sizes=tuple(array.size for array in arrays) if per_class else (),
        class_ranks=(1,) * len(arrays) if per_class else (),
        scores=encode_scores(arrays),
    )
    return dataclasses.replace(contract, calibration=calibration)


def narrowness(contract: Contract) -> float:
    """Where calibration scores lie closer together than 1, margins and tolerances shrink with their range."""
    return min(1.0, contract.calibration.quantiles[5] - contract.calibration.quantiles[1])


class Altered:
    """The real backend with one change to what it answers: a device that is wrong in one way."""

    def __init__(self, session: Session, **changes: Any) -> None:
        self.session, self.changes = session, changes

    def __call__(self, frames: Frames) -> Outputs:
        outputs = self.session.backend.run(frames)
        return dataclasses.replace(outputs, **{k: change(getattr(outputs, k)) for k, change in self.changes.items()})


class TestReplay:
    def test_the_real_artifact_passes(self, session: Session, contract: Contract) -> None:
        report = replay_probes(contract, session.backend.run, "cpu")
        assert report.passed
        assert report.flips == 0
        assert report.largest_error <= 1e-4
        assert len(report.rows) == len(contract.probes) + 2 * (len(contract.probes) - 1)  # alone, and in pairs
        assert {row.name for row in report.rows} == {probe.name for probe in contract.probes}

    def test_probes_are_of_both_kinds(self, contract: Contract) -> None:
        assert {probe.is_ood for probe in contract.probes} >= {True}
        assert all(probe.valid for probe in contract.probes)
        assert all(math.isfinite(probe.ood_score) for probe in contract.probes)

    @pytest.mark.parametrize("index", [0, 3, -1])
    @pytest.mark.parametrize("shift", [0.002, -0.002, 1.0])
    def test_a_changed_expected_score_fails(
        self, session: Session, contract: Contract, index: int, shift: float
    ) -> None:
        wrong = replace_probe(contract, index, ood_score=contract.probes[index].ood_score + shift)
        report = replay_probes(wrong, session.backend.run, "cpu")
        assert not report.passed
        assert report.flips == 0
        assert report.largest_error == pytest.approx(abs(shift), rel=0.1)

    @pytest.mark.parametrize("name", ["is_ood", "valid", "class_id"])
    def test_a_flipped_decision_fails(self, session: Session, contract: Contract, name: str) -> None:
        value = getattr(contract.probes[1], name)
        wrong = replace_probe(contract, 1, **{name: (value + 1) % 7 if name == "class_id" else not value})
        report = replay_probes(wrong, session.backend.run, "cpu")
        assert not report.passed
        assert report.flips == 3  # alone, and in two pairs
        assert report.largest_error <= 1e-4

    def test_a_device_that_answers_nan_fails(self, session: Session, contract: Contract) -> None:
        """NaN compares false with everything, so that a maximum of errors can miss it."""
        run = Altered(session, ood_score=lambda s: np.full_like(s, np.nan))
        report = replay_probes(contract, run, "cpu")
        assert not report.passed
        assert report.largest_error == math.inf
        rows = (dataclasses.replace(report.rows[0], ood_score=report.rows[0].expected_score), *report.rows[1:])
        assert not dataclasses.replace(report, rows=rows).passed

    def test_a_device_that_is_wrong_in_batches_only_fails(self, session: Session, contract: Contract) -> None:
        run = Altered(session, ood_score=lambda s: s + np.float32(0.1 * (len(s) > 1)))
        report = replay_probes(contract, run, "cpu")
        assert not report.passed
        assert max(row.error for row in report.rows[: len(contract.probes)]) <= 1e-4

    def test_the_tolerance_grows_with_a_scale_above_1(self, session: Session, contract: Contract) -> None:
        """Distances are rounded, and the score has the scale times the distances; below 1 nothing is taken off."""

        def report(scale: float, shift: float) -> ProbeReport:
            wrong = replace_probe(contract, 1, ood_score=contract.probes[1].ood_score + shift)
            scaled = dataclasses.replace(wrong, scale=dataclasses.replace(wrong.scale, value=scale))
            return replay_probes(scaled, session.backend.run, "cpu")

        for scale, factor in ((0.125, 1), (1.0, 1), (8.0, 8)):
            tolerance = 1e-3 * factor * narrowness(contract)
            assert report(scale, 0.0).tolerance == pytest.approx(tolerance)
            assert report(scale, 0.8 * tolerance).passed
            assert not report(scale, 1.2 * tolerance).passed

    def test_no_probes_do_not_pass(self, session: Session, contract: Contract) -> None:
        report = replay_probes(dataclasses.replace(contract, probes=()), session.backend.run, "cpu")
        assert not report.passed
        assert report.largest_error == math.inf

    def test_batch_of_one_is_not_asked_for_pairs(self, session: Session, contract: Contract) -> None:
        classifier = dataclasses.replace(contract.classifier, batch="1")
        sizes = []

        def run(frames: Frames) -> Outputs:
            sizes.append(len(frames))
            return session.backend.run(frames)

        assert replay_probes(dataclasses.replace(contract, classifier=classifier), run, "cpu").passed
        assert set(sizes) == {1}

    def test_damaged_picture(self, session: Session, contract: Contract) -> None:
        png = bytearray(base64.b64decode(contract.probes[2].png))
        for damaged in (png[: len(png) // 2], png[:40] + bytes([png[40] ^ 255]) + png[41:], b"", b"GIF89a"):
            text = base64.b64encode(bytes(damaged)).decode()
            with pytest.raises(ArtifactError, match="cannot be decoded"):
                replay_probes(replace_probe(contract, 2, png=text), session.backend.run, "cpu")
        with pytest.raises(ArtifactError, match="cannot be decoded"):
            replay_probes(replace_probe(contract, 2, png="not base64!"), session.backend.run, "cpu")

    @pytest.mark.parametrize(("mode", "size"), [("L", (16, 32)), ("L", (33, 32)), ("RGB", (32, 32)), ("1", (32, 32))])
    def test_picture_of_another_size_or_kind(self, contract: Contract, mode: str, size: tuple[int, int]) -> None:
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, "PNG")
        with pytest.raises(ArtifactError, match=r"expected \(32, 32\)"):
            decode_png(base64.b64encode(buffer.getvalue()).decode(), contract.preprocessing)

    def test_picture_with_an_empty_colour_profile(self, contract: Contract) -> None:
        raw = base64.b64decode(contract.probes[0].png)
        text = base64.b64encode(raw[:-12] + b"\0\0\0\0iCCP\xa5\x89\x19\x3e" + raw[-12:]).decode()
        with pytest.raises(ArtifactError, match="cannot be decoded"):  # Pillow raises IndexError
            decode_png(text, contract.preprocessing)

    def test_picture_in_another_format(self, contract: Contract) -> None:
        buffer = io.BytesIO()
        Image.new("L", (32, 32)).save(buffer, "BMP")
        with pytest.raises(ArtifactError, match="cannot be decoded"):
            decode_png(base64.b64encode(buffer.getvalue()).decode(), contract.preprocessing)


class TestMake:
    def make(self, frames: Any, session: Session) -> tuple[Probe, ...]:
        return make_probes(frames, session.backend.run, session.contract)

    def test_they_record_what_the_graph_answers(
        self, session: Session, contract: Contract, real_frames: list[tuple[str, InputFrame]]
    ) -> None:
        probes = self.make(real_frames[::11], session)
        assert {probe.is_ood for probe in probes} == {True, False}
        for probe in probes:
            frame = decode_png(probe.png, contract.preprocessing)
            outputs = session.backend.run(frame[None])
            assert probe.ood_score == outputs.ood_score[0]
            assert probe.logits == tuple(outputs.logits[0].tolist())
            assert (probe.class_id, probe.is_ood) == (outputs.class_id[0], outputs.is_ood[0])
            assert probe.p_value == outputs.p_value[0]
        assert replay_probes(dataclasses.replace(contract, probes=probes), session.backend.run, "cpu").passed

    def test_frames_close_to_the_threshold_are_dropped(
        self, session: Session, contract: Contract, real_frames: list[tuple[str, InputFrame]]
    ) -> None:
        """Put the threshold exactly on a frame's score: that frame goes, and the others stay."""
        all_names = [probe.name for probe in self.make(real_frames[:8], session)]
        assert len(all_names) >= 4
        frames = dict(real_frames[:8])
        for name in all_names:
            score = session.backend.run(frames[name][None]).ood_score
            margin = MARGIN["fp32"] * narrowness(contract)
            for share, dropped in [(0.0, True), (0.9, True), (-0.9, True), (1.5, False)]:
                scores = (score + np.float32(share * margin)).astype(np.float32)
                other = calibrated_by(contract, scores)
                kept = [p.name for p in make_probes(real_frames[:8], session.backend.run, other)]
                assert (name not in kept) == dropped

    def test_the_threshold_is_that_of_the_predicted_class(
        self, session: Session, contract: Contract, real_frames: list[tuple[str, InputFrame]]
    ) -> None:
        """On its own class's threshold a frame goes; on that of all other classes it stays."""
        name, frame = next((n, f) for n, f in real_frames if n in {p.name for p in self.make(real_frames[:8], session)})
        outputs = session.backend.run(frame[None])
        own, score = int(outputs.class_id[0]), float(outputs.ood_score[0])
        for on_own in (True, False):
            groups = [np.array([score if (c == own) == on_own else 1e6]) for c in range(7)]
            other = calibrated_by(contract, *groups)
            kept = [p.name for p in make_probes(real_frames[:8], session.backend.run, other)]
            assert (name in kept) != on_own

    def test_frames_between_two_classes_are_dropped(
        self, session: Session, real_frames: list[tuple[str, InputFrame]]
    ) -> None:
        def tie(logits: np.ndarray) -> np.ndarray:
            best = logits.max(axis=1, keepdims=True)
            return np.where(logits == np.sort(logits)[:, -2:-1], best - np.float32(0.5 * MARGIN["fp32"]), logits)

        with pytest.raises(VerificationError, match="no probe frame is decided clearly enough"):
            make_probes(real_frames[:8], Altered(session, logits=tie), session.contract)

    def test_frames_that_are_not_valid_are_dropped(
        self, session: Session, real_frames: list[tuple[str, InputFrame]]
    ) -> None:
        run = Altered(session, valid=np.zeros_like)
        with pytest.raises(VerificationError, match="give some clear images with --probes DIR"):
            make_probes(real_frames[:8], run, session.contract)

    def test_frames_on_bank_rows_are_dropped(self, session: Session, digits: DemoImages, artifact_path: Path) -> None:
        """At the floor of S float32 carries no score: verification would fail on every other correct device."""
        p, run = session.contract.preprocessing, session.backend.run
        paths = find_images(digits.train)[::60]
        images = [(f"bank {i}", preprocess_frame(load_image(path), p)) for i, path in enumerate(paths)]
        head = head_from_model(artifact_path.read_bytes())
        features = run(np.stack([frame for _, frame in images])).features.astype(np.float64)
        bank = dataclasses.replace(head, bank=features, ood_heads=tuple(
            dataclasses.replace(h, bank_log_s=n.log_s) for h, n in zip(
                head.ood_heads, nearest_rows(features, head), strict=True)
        ))  # fmt: skip
        synthetic = synthetic_frames(p)
        names = [p.name for p in make_probes(images + synthetic, run, session.contract, bank)]
        assert not any(name.startswith("bank") for name in names)
        assert names == [p.name for p in make_probes(synthetic, run, session.contract, bank)]
        assert any(p.name.startswith("bank") for p in make_probes(images, run, session.contract))

    def test_no_frames(self, session: Session) -> None:
        with pytest.raises(VerificationError):
            self.make([], session)

    def test_number_is_bounded(self, session: Session, real_frames: list[tuple[str, InputFrame]]) -> None:
        assert len(real_frames) > 2 * MAX_PROBES
        assert len(self.make(real_frames, session)) == MAX_PROBES

    def test_bytes_are_bounded(self, session: Session, contract: Contract) -> None:
        """Noise of 300x300 takes 120 KB of base64 as PNG: four fit, and a small one after them still fits."""
        rng = np.random.default_rng(0)
        noise = [(f"noise {i}", rng.integers(0, 256, (300, 300, 1), dtype=np.uint8)) for i in range(8)]
        flat = [("flat", np.zeros((300, 300, 1), np.uint8))]
        outputs = session.backend.run(np.zeros((1, 32, 32, 1), np.uint8))
        probes = make_probes(noise + flat, lambda _: outputs, calibrated_by(contract, np.array([1e6])))
        assert [probe.name for probe in probes] == ["noise 0", "noise 1", "noise 2", "noise 3", "flat"]
        assert sum(len(probe.png) for probe in probes) <= MAX_PROBE_CHARACTERS == 512 * 1024


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (1, 1), (1, 7), (299, 200), (3, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_synthetic_frames(height: int, width: int, channels: int) -> None:
    p = resolve_preprocessing(PreprocessingOptions(input_size=(height, width), crop="stretch"), channels, (None, None))
    frames = synthetic_frames(p)
    assert len({name for name, _ in frames}) == 10
    for _, frame in frames:
        assert frame.shape == (height, width, channels)
        assert frame.dtype == np.uint8
        np.testing.assert_array_equal(decode_png(encode_png(frame), p), frame)
    assert sum(len(encode_png(frame)) for _, frame in frames) < MAX_PROBE_CHARACTERS
    again = synthetic_frames(p)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(frames, again, strict=True))
    if min(height, width) > 30:
        assert len({frame.tobytes() for _, frame in frames}) == 10


def test_frames_that_do_not_fit_are_named_with_their_sizes(
    session: Session, contract: Contract, real_frames: list[tuple[str, InputFrame]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a camera's frames, of which one alone may be larger than all that probes may take."""
    clear = make_probes(real_frames, session.backend.run, contract)
    chosen = [(name, frame) for name, frame in real_frames if name in {probe.name for probe in clear}]
    assert left_out(chosen, clear) is None
    sizes = [len(encode_png(frame)) for _, frame in chosen]
    monkeypatch.setattr("grood_edge.probes.MAX_PROBE_CHARACTERS", sizes[0] + sizes[1])
    some = make_probes(chosen[:2] + chosen[:1], session.backend.run, contract)
    assert len(some) == 2
    note = left_out(chosen[:3], some)
    assert note is not None
    assert "2 of 3 probe images are in the file" in note
    assert f"{chosen[2][0]} {sizes[2] / 1024:,.0f} KB" in note
    monkeypatch.setattr("grood_edge.probes.MAX_PROBE_CHARACTERS", min(sizes) - 1)
    with pytest.raises(VerificationError, match=rf"none of the 3 probe frames fits in the file: {chosen[0][0]} "):
        make_probes(chosen[:3], session.backend.run, contract)
