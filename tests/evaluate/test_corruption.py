"""Corruptions keep shape and type, get worse with strength, and touch the raw frame."""

from pathlib import Path

import numpy as np
import pytest

from grood_edge.arrays import Frame
from grood_edge.evaluate import corruption as module
from grood_edge.evaluate.corruption import CORRUPTIONS, Corruption, corrupted, score_corrupted
from grood_edge.evaluate.passes import score_set
from grood_edge.evaluate.sets import id_set
from grood_edge.images import load_image
from grood_edge.runtime.session import Session

KINDS = ("blur", "low light", "noise", "JPEG", "occlusion")


@pytest.fixture(scope="module")
def photo() -> Frame:
    import skimage

    return load_image(Path(skimage.__file__).parent / "data" / "chelsea.png")


def test_five_kinds_at_three_strengths() -> None:
    assert [(c.kind) for c in CORRUPTIONS] == [kind for kind in KINDS for _ in range(3)]
    assert len({(c.kind, c.strength) for c in CORRUPTIONS}) == 15


@pytest.mark.parametrize("kind", KINDS)
def test_stronger_means_further_from_the_original(kind: str, photo: Frame) -> None:
    errors = []
    for corruption in (c for c in CORRUPTIONS if c.kind == kind):
        worse = corrupted(photo, corruption, np.random.default_rng(0))
        assert worse.shape == photo.shape
        assert worse.dtype == np.uint8
        errors.append(float(np.abs(worse.astype(float) - photo).mean()))
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 1), (40, 3, 1), (3, 200, 3)])
@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: f"{c.kind}-{c.amount}")
def test_frames_of_any_shape(shape: tuple[int, ...], corruption: Corruption) -> None:
    frame = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    kept = frame.copy()
    assert corrupted(frame, corruption, np.random.default_rng(0)).shape == shape
    np.testing.assert_array_equal(frame, kept, "the frame itself is left alone")


def test_amounts_are_what_the_words_say(photo: Frame) -> None:
    by_kind = {(c.kind, c.amount): c for c in CORRUPTIONS}
    grey = np.full((400, 400, 3), 128, np.uint8)
    noisy = corrupted(grey, by_kind["noise", 25.0], np.random.default_rng(0))
    assert noisy.std() == pytest.approx(25, rel=0.05)
    hidden = corrupted(np.zeros_like(grey), by_kind["occlusion", 0.25], np.random.default_rng(0))
    assert (hidden > 0).mean() == pytest.approx(0.25, abs=0.01)
    dark = corrupted(np.full_like(grey, 255), by_kind["low light", 0.1], np.random.default_rng(0))
    assert (dark[0, 0, 0] / 255) ** 2.2 == pytest.approx(0.1, abs=0.01)


def test_rows_of_each_corruption_belong_to_the_picked_images(
    session: Session, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_IMAGES", 9)
    known, _ = id_set(few / "test", session.contract.classes)
    clean = score_set(known, session)
    shifted, again = (score_corrupted(clean, session) for _ in range(2))
    assert [one.corruption for one in shifted] == list(CORRUPTIONS)
    for number in (0, 7, 14):
        one = shifted[number]
        assert len(one.picked) == len(one.rows.scores) == 9
        np.testing.assert_array_equal(one.rows.scores, again[number].rows.scores)
        index = int(one.picked[4])
        frame = corrupted(load_image(clean.paths[index]), one.corruption, np.random.default_rng([0, index, number]))
        assert one.rows.scores[4] == pytest.approx(session.predict(frame).ood_score, abs=1e-4)
