"""Which frames stay in memory: balanced over the classes, bounded in number and bytes."""

from dataclasses import replace

import numpy as np
import pytest

from grood_edge.export import kept_frames
from grood_edge.export.dataset import Sample
from grood_edge.export.kept_frames import CheckSamples, KeptFrames
from grood_edge.preprocessing import PreprocessingOptions, resolve_preprocessing

SMALL = resolve_preprocessing(PreprocessingOptions(preset="none"), 1, (2, 3))


def kept(labels: np.ndarray, classes: int, held_out: np.ndarray | None = None) -> KeptFrames:
    """Offer frames whose first pixel is their label and whose second is their number modulo 256."""
    frames = np.zeros((len(labels), 2, 3, 1), np.uint8)
    frames[:, 0, 0, 0], frames[:, 0, 1, 0] = labels % 256, np.arange(len(labels)) % 256
    held_out = np.zeros(len(labels), bool) if held_out is None else held_out
    result = KeptFrames(SMALL, classes)
    for start in range(0, len(labels), 32):
        part = slice(start, start + 32)
        result.add(frames[part][result.wanted(labels[part], tuple(map(str, range(len(labels))))[part], held_out[part])])
    frames = result.frames[: result.count]
    np.testing.assert_array_equal(frames[:, 0, 0, 0], np.array(result.labels) % 256)
    return result


@pytest.mark.parametrize(
    ("classes", "each", "most"), [(10, 200, 2_000), (3, 666, 1_998), (900, 2, 1_800), (1_500, 2, 2_000)]
)
def test_as_many_of_each_class_as_2000_frames_allow(classes: int, each: int, most: int) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(classes * 700 if classes < 100 else classes * 4) % classes)
    counts = np.bincount(kept(labels, classes).labels, minlength=classes)
    assert counts.max() == each
    assert counts.sum() == most


def test_the_first_of_each_class_that_are_not_held_out() -> None:
    labels = np.arange(5_000) % 10
    held_out = np.arange(5_000) % 3 == 0
    frames = kept(labels, 10, held_out).frames
    assert len(frames) == 2_000
    numbers = [[i for i in range(5_000) if i % 10 == label and i % 3][:200] for label in range(10)]
    expected = sorted(number for of_class in numbers for number in of_class)
    np.testing.assert_array_equal(frames[:, 0, 1, 0], np.array(expected) % 256)


@pytest.mark.parametrize(("room", "each"), [(100, 10), (25, 2), (19, 1)])
def test_bytes_shrink_every_class_alike(room: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_frames, "KEPT_BYTES", room * 6 + 5)
    found = kept(np.arange(5_000) % 10, 10)
    np.testing.assert_array_equal(np.bincount(found.labels), [each] * 10)
    assert found.frames.nbytes <= room * 6


def test_few_frames_of_a_size_that_fills_the_memory() -> None:
    large = replace(SMALL, height=10_000, width=10_000, channels=1)
    found = KeptFrames(large, 4)
    assert len(found.wanted(np.array([0, 1, 2, 3]), ("a", "b", "c", "d"), np.zeros(4, bool))) == 1


def test_check_samples_are_the_first_ones_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_frames, "CHECK_BYTES", 250)
    check = CheckSamples()
    for index, size in enumerate((10, 10, 30, 1)):  # 100, 100, 900 and 1 bytes
        check.offer(Sample(f"{index}", np.zeros((size, size, 1), np.uint8), None))
    assert [sample.name for sample in check.kept] == ["0", "1"]  # the last would fit, but is not among the first
    assert check.full
