"""One pass over images: exact sums and counts, a fair reservoir, a fair split, bounded memory, nothing skipped."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from grood_edge.demo.images import DemoImages
from grood_edge.errors import ClassifierError, DatasetError
from grood_edge.export import kept_frames
from grood_edge.export.batches import BATCH
from grood_edge.export.classifier import ClassifierOptions, graph_from_onnx
from grood_edge.export.dataset import Dataset, Sample, Work, as_it_is, open_dataset
from grood_edge.export.features import Reading, collect_features, merged, rows_of
from grood_edge.export.graph import base_model
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import Preprocessing, PreprocessingOptions, preprocess_frame, resolve_preprocessing
from tests.export.networks import SIZE, onnx_classifier

COLOURS = resolve_preprocessing(PreprocessingOptions(preset="none"), 3, (SIZE, SIZE))
READING = Reading(COLOURS, 3)


def colour_model(batch: int | str = "N", logarithm: bool = False) -> OrtModel:
    return open_ort(colour_graph(batch, logarithm))


def colour_graph(batch: int | str = "N", logarithm: bool = False) -> bytes:
    """A classifier whose features are the mean of each colour, and whose class is the strongest one."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["level"]),
        helper.make_node("Log" if logarithm else "Abs", ["level"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w2"], ["logits"]),
    ]
    eye = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w2")
    if logarithm:  # of absolute values, so that random images are no trouble
        nodes.insert(2, helper.make_node("Abs", ["level"], ["positive"]))
        nodes[3].input[0] = "positive"
    graph = graph_from_onnx(onnx_classifier(nodes, [eye]), "onnx", ClassifierOptions())
    return bytes(base_model(replace(graph, dynamic_batch=batch == "N"), COLOURS).SerializeToString())


@pytest.fixture(scope="module")
def model() -> OrtModel:
    return colour_model()


def coloured_frames(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 `[count, SIZE, SIZE, 3]` with one strong colour each, and that colour's number."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    frames = rng.integers(0, 60, (count, SIZE, SIZE, 3))
    frames[np.arange(count), :, :, labels] += 120
    return frames.astype(np.uint8), labels


def in_batches(frames: np.ndarray, labels: np.ndarray | None, size: int = 7) -> list[tuple[np.ndarray, object]]:
    return [
        (frames[i : i + size], None if labels is None else labels[i : i + size]) for i in range(0, len(frames), size)
    ]


def test_sums_counts_and_rows_are_exact(model: OrtModel) -> None:
    frames, labels = coloured_frames(100)
    labels[::10] = (labels[::10] + 1) % 3  # mislabelled on purpose
    found = collect_features(open_dataset(in_batches(frames, labels), "folder"), model, READING)
    expected = frames.mean(axis=(1, 2))
    assert found.held_out is None
    assert found.fit.images == 100
    np.testing.assert_allclose(found.fit.features, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.fit.labels, labels)
    np.testing.assert_array_equal(found.fit.predictions, expected.argmax(axis=1))
    np.testing.assert_array_equal(found.fit.class_counts, np.bincount(labels, minlength=3))
    sums = [expected[labels == label].sum(axis=0) for label in range(3)]
    np.testing.assert_allclose(found.fit.class_sums, sums, rtol=1e-6)
    assert found.fit.confusion == Counter(zip(labels.tolist(), expected.argmax(axis=1).tolist(), strict=True))
    assert found.fit.accuracy == pytest.approx(0.9)
    assert found.unreadable == ()


def test_batch_size_of_the_data_changes_nothing(model: OrtModel) -> None:
    frames, labels = coloured_frames(75)
    passes = [
        collect_features(open_dataset(in_batches(frames, labels, size), "folder"), model, READING) for size in (1, 75)
    ]
    assert passes[0].digest == passes[1].digest
    np.testing.assert_array_equal(passes[0].fit.features, passes[1].fit.features)


def test_graph_with_batch_1_gives_the_same(model: OrtModel) -> None:
    frames, labels = coloured_frames(40)
    single = colour_model(batch=1)
    assert single.inputs["image"][0] == 1
    a, b = (collect_features(open_dataset(in_batches(frames, labels), "folder"), m, READING) for m in (model, single))
    np.testing.assert_allclose(a.fit.features, b.fit.features, rtol=1e-6)
    np.testing.assert_array_equal(a.fit.labels, b.fit.labels)


def test_without_labels_predictions_are_the_labels(model: OrtModel) -> None:
    frames, labels = coloured_frames(30)
    found = collect_features(open_dataset(in_batches(frames, None), "predicted"), model, READING)
    np.testing.assert_array_equal(found.fit.labels, labels)
    assert found.fit.accuracy == 1.0


def test_every_fifth_image_of_each_class_is_held_out(model: OrtModel) -> None:
    frames, labels = coloured_frames(203)
    reading = replace(READING, hold_out=True)
    found = collect_features(open_dataset(in_batches(frames, labels), "folder"), model, reading)
    assert found.held_out is not None
    nth = np.array([(labels[: i + 1] == label).sum() for i, label in enumerate(labels)])  # 1, 2, 3 ... in each class
    chosen = np.isin(np.arange(len(labels)), [int(name[6:]) for name in found.held_out.names])
    for label in range(3):  # from a random start, and never among the first two
        places = nth[chosen & (labels == label)]
        assert set(np.diff(places)) == {5}
        assert 2 < places[0] <= 7
        assert (labels == label).sum() - places[-1] < 5
    features = frames.mean(axis=(1, 2))
    np.testing.assert_allclose(found.held_out.features, features[chosen], rtol=1e-5)
    np.testing.assert_allclose(found.fit.features, features[~chosen], rtol=1e-5)
    np.testing.assert_array_equal(found.held_out.class_counts, np.bincount(labels[chosen], minlength=3))
    everything = merged(found.fit, found.held_out)
    whole = collect_features(open_dataset(in_batches(frames, labels), "folder"), model, READING)
    np.testing.assert_allclose(everything.class_sums, whole.fit.class_sums, rtol=1e-12)
    np.testing.assert_array_equal(everything.class_counts, whole.fit.class_counts)
    assert everything.names == found.fit.names + found.held_out.names
    np.testing.assert_array_equal(everything.labels, [labels[int(name[6:])] for name in everything.names])
    assert (everything.images, everything.confusion) == (whole.fit.images, whole.fit.confusion)
    assert found.digest == whole.digest


def test_kept_rows_are_a_bounded_sample_with_their_labels_and_names(model: OrtModel) -> None:
    frames, labels = coloured_frames(300)
    reading = replace(READING, max_rows=40)
    table = collect_features(open_dataset(in_batches(frames, labels), "folder"), model, reading).fit
    assert table.features.shape == (40, 3)
    assert table.images == 300
    np.testing.assert_array_equal(table.class_counts, np.bincount(labels, minlength=3))  # of all images
    which = np.array([int(name.removeprefix("image ")) for name in table.names])
    np.testing.assert_allclose(table.features, frames[which].mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(table.labels, labels[which])
    np.testing.assert_array_equal(np.sort(np.bincount(table.labels)), [13, 13, 14])  # spread over the classes
    assert (np.diff(which) > 0).all()  # in the order of the stream
    assert which.max() >= 40  # not simply the first ones
    again = collect_features(open_dataset(in_batches(frames, labels), "folder"), model, reading).fit
    np.testing.assert_array_equal(again.features, table.features)
    other = collect_features(open_dataset(in_batches(frames, labels), "folder"), model, replace(reading, seed=1)).fit
    assert other.names != table.names


def test_kept_rows_do_not_depend_on_the_batch(model: OrtModel) -> None:
    """A graph that takes one image at a time keeps the very rows that batches of 32 keep."""
    frames, labels = coloured_frames(300)
    reading = replace(READING, max_rows=40, hold_out=True)
    a, b = (
        collect_features(open_dataset(in_batches(frames, labels), "folder"), m, reading)
        for m in (model, colour_model(batch=1))
    )
    assert a.fit.names == b.fit.names
    assert a.held_out is not None
    assert b.held_out is not None
    assert a.held_out.names == b.held_out.names
    assert len(a.held_out.names) == 40


def test_calibration_rows_keep_the_mix_of_the_stream(model: OrtModel) -> None:
    """A stratified sample would over-represent rare classes: its scores would not be exchangeable with new ones."""
    frames, labels = coloured_frames(3_000)
    common = (labels == 0) | (np.arange(3_000) % 10 == 0)
    batches = in_batches(frames[common], labels[common])
    share = (labels[common] == 0).mean()
    assert share > 0.8
    for reading in (replace(READING, max_rows=100).for_calibration(), replace(READING, max_rows=100, hold_out=True)):
        found = collect_features(open_dataset(batches, "folder"), model, reading)
        table = found.held_out or found.fit
        assert len(table.labels) == 100
        assert abs((table.labels == 0).mean() - share) < 5 * (share * (1 - share) / 100) ** 0.5
    fit = collect_features(open_dataset(batches, "folder"), model, replace(READING, max_rows=100)).fit
    assert (fit.labels == 0).mean() < 0.4


def test_logit_space_keeps_logits_with_the_same_predictions(model: OrtModel) -> None:
    frames, labels = coloured_frames(40)
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w2"], ["logits"]),
    ]
    doubled = numpy_helper.from_array(2 * np.eye(3, 5, dtype=np.float32), "w2")
    graph = graph_from_onnx(onnx_classifier(nodes, [doubled]), "onnx", ClassifierOptions())
    doubling = open_ort(base_model(graph, COLOURS).SerializeToString())
    logits, features = (
        collect_features(
            open_dataset(in_batches(frames, labels), "folder"), doubling, Reading(COLOURS, 5, space=space)
        ).fit
        for space in ("logits", "features")
    )
    assert logits.features.shape == (40, 5)
    np.testing.assert_allclose(logits.features[:, :3], 2 * features.features, rtol=1e-5)
    np.testing.assert_array_equal(logits.predictions, features.predictions)
    np.testing.assert_allclose(logits.class_sums[:, :3], 2 * features.class_sums, rtol=1e-5)


def test_kept_frames_are_fit_images_only_and_match_their_labels(model: OrtModel) -> None:
    frames, labels = coloured_frames(203)
    reading = replace(READING, hold_out=True)
    found = collect_features(open_dataset(in_batches(frames, labels), "folder"), model, reading)
    which = [int(name.removeprefix("image ")) for name in found.fit.names]
    np.testing.assert_array_equal(found.frames, frames[which])  # few images: every fit frame, no held-out one
    np.testing.assert_array_equal(found.frame_labels, labels[which])


def test_rows_of_a_table_count_again(model: OrtModel) -> None:
    frames, labels = coloured_frames(50)
    table = collect_features(open_dataset(in_batches(frames, labels), "folder"), model, READING).fit
    keep = np.arange(50) % 3 == 0
    part = rows_of(table, keep)
    assert part.names == tuple(f"image {i}" for i in np.flatnonzero(keep))
    assert part.images == keep.sum()
    np.testing.assert_array_equal(part.class_counts, np.bincount(labels[keep], minlength=3))
    sums = [frames[keep][labels[keep] == label].mean(axis=(1, 2)).sum(axis=0) for label in range(3)]
    np.testing.assert_allclose(part.class_sums, sums, rtol=1e-5)


def test_frames_are_not_held(model: OrtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_frames, "CHECK_SAMPLES", 10)
    alive = peak = 0

    def forget() -> None:
        nonlocal alive
        alive -= 1

    def samples(_: Callable[[str, str], None], work: Work = as_it_is) -> Iterator[Sample]:
        nonlocal alive, peak
        for index in range(1000):
            frame = np.full((24, 24, 3), index % 200, np.uint8)
            frame[..., index % 3] += 50
            weakref.finalize(frame, forget)
            alive += 1
            peak = max(peak, alive)
            yield work(Sample(f"{index}", frame, index % 3))

    found = collect_features(Dataset("stream", None, None, samples), model, READING)
    assert found.fit.images == 1000
    assert len(found.check_samples) == 10
    gc.collect()
    assert alive == 10  # the check samples
    assert peak <= 10 + 2 * BATCH


def test_check_samples_are_bounded_in_bytes(model: OrtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, labels = coloured_frames(20)
    monkeypatch.setattr(kept_frames, "CHECK_BYTES", 5 * frames[0].nbytes + 1)
    found = collect_features(open_dataset(in_batches(frames, labels), "folder"), model, READING)
    assert len(found.check_samples) == 5


def test_infinite_features_are_refused_by_image(model: OrtModel) -> None:
    frames, labels = coloured_frames(12)
    frames[7, :, :, 1] = 0
    reading = in_batches(frames, labels)
    collect_features(open_dataset(reading, "folder"), model, READING)
    with pytest.raises(ClassifierError, match=r"NaN or Inf for 1 of 12 images, such as image 7; check its weights"):
        collect_features(open_dataset(reading, "folder"), colour_model(logarithm=True), READING)


@pytest.mark.parametrize("label", [3, -1])
def test_label_out_of_range_is_refused(label: int, model: OrtModel) -> None:
    frames, labels = coloured_frames(12)
    labels[5] = label
    with pytest.raises(DatasetError, match=rf"image 5 has label {label}, but the classifier has 3 classes"):
        collect_features(open_dataset(in_batches(frames, labels), "folder"), model, READING)


def test_no_images_is_an_error(model: OrtModel) -> None:
    with pytest.raises(DatasetError, match="the given batches gave no images"):
        collect_features(open_dataset([], "folder"), model, READING)


def write_with_broken(folder: Path, good: int, broken: int) -> Path:
    frames, labels = coloured_frames(good)
    for index, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        (folder / "abc"[label]).mkdir(exist_ok=True)
        Image.fromarray(frame).save(folder / "abc"[label] / f"{index:03d}.png")
    for index in range(broken):
        (folder / "a" / f"broken {index}.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    return folder


def test_a_few_unreadable_images_are_reported_by_name(model: OrtModel, tmp_path: Path) -> None:
    folder = write_with_broken(tmp_path, good=198, broken=2)
    found = collect_features(open_dataset(folder, "folder"), model, READING)
    assert {name for name, _ in found.unreadable} == {"a/broken 0.png", "a/broken 1.png"}
    assert all(reason for _, reason in found.unreadable)
    assert found.fit.images == 198


def test_more_than_one_percent_unreadable_is_an_error_unless_allowed(model: OrtModel, tmp_path: Path) -> None:
    folder = write_with_broken(tmp_path, good=98, broken=2)
    with pytest.raises(DatasetError, match=r"2 of 100 images in .* cannot be read: a/broken .*--allow-unreadable"):
        collect_features(open_dataset(folder, "folder"), model, READING)
    allowed = replace(READING, allow_unreadable=True)
    assert len(collect_features(open_dataset(folder, "folder"), model, allowed).unreadable) == 2


def test_allowing_unreadable_images_does_not_allow_no_images(model: OrtModel, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"1 of 1 images .* cannot be read"):
        collect_features(open_dataset(tmp_path, "folder"), model, replace(READING, allow_unreadable=True))


def test_hashes_find_the_images_that_two_passes_share(model: OrtModel) -> None:
    frames, labels = coloured_frames(60)
    first = collect_features(open_dataset(in_batches(frames[:40], labels[:40]), "folder"), model, READING)
    second = collect_features(open_dataset(in_batches(frames[30:], labels[30:], 4), "folder"), model, READING)
    assert first.frame_hashes.dtype == np.uint64
    assert len(set(first.frame_hashes.tolist())) == 40
    np.testing.assert_array_equal(np.isin(second.frame_hashes, first.frame_hashes), np.arange(30) < 10)


def test_digest_names_the_images_in_any_order_and_with_any_labels(model: OrtModel) -> None:
    frames, labels = coloured_frames(10)
    changed = frames.copy()
    changed[3, 0, 0, 0] ^= 1

    def digest(frames: np.ndarray, labels: np.ndarray) -> str:
        return collect_features(open_dataset(in_batches(frames, labels), "folder"), model, READING).digest

    assert digest(frames[::-1], labels[::-1]) == digest(frames, (labels + 1) % 3) == digest(frames, labels)
    assert digest(changed, labels) != digest(frames, labels)
    assert digest(frames[:9], labels[:9]) != digest(frames, labels)
    assert digest(np.concatenate([frames, frames[:1]]), np.append(labels, 0)) != digest(frames, labels)


def test_progress_tells_how_far_it_is(model: OrtModel) -> None:
    frames, labels = coloured_frames(70)
    calls: list[tuple[str, int, int | None]] = []
    dataset = open_dataset(in_batches(frames, labels), "folder")
    collect_features(dataset, model, READING, lambda label, done, total: calls.append((label, done, total)))
    assert [done for _, done, _ in calls] == [32, 64, 70]
    assert {label for label, _, _ in calls} == {"reading the given batches"}


def test_features_are_those_of_single_real_images(
    digits: DemoImages, digit_model: OrtModel, digit_preprocessing: Preprocessing
) -> None:
    dataset = open_dataset(digits.test, "folder")
    table = collect_features(dataset, digit_model, Reading(digit_preprocessing, 7)).fit
    assert table.accuracy > 0.9
    for row, sample in enumerate(dataset.samples(lambda *_: None)):
        if row % 40 == 0:
            frame = preprocess_frame(sample.frame, digit_preprocessing)
            outputs = digit_model.run({"image": frame[None]})
            np.testing.assert_allclose(outputs["features"][0], table.features[row], atol=1e-4)
            assert outputs["logits"].argmax() == table.predictions[row]
            assert sample.label == table.labels[row]
