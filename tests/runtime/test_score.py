import csv
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError, OutputError, UsageError
from grood_edge.images import UnreadableImageError, find_images, load_image
from grood_edge.preprocessing import preprocess_frame
from grood_edge.runtime import open_session
from grood_edge.runtime.score import ScoreRow, ScoreSummary, require_readable, row_writer, score_images
from grood_edge.threads import limited_threads
from tests.runtime.conftest import ColorPhotos


def scored(artifact: Path, *sources: str | Path, batch_size: int = 32) -> list[ScoreRow]:
    rows: list[ScoreRow] = []
    with open_session(artifact) as session:
        score_images(session, sources, rows.append, batch_size)
    return rows


def test_rows_equal_the_session_verdicts_whatever_the_batch_size(artifact_path: Path, digits: DemoImages) -> None:
    folder = digits.near / "7"
    rows = scored(artifact_path, folder)
    assert [row.path for row in rows] == [str(path) for path in find_images(folder)]
    with open_session(artifact_path) as session:
        for row in rows[:5]:
            frame = load_image(Path(row.path))
            verdict, outputs = session.predict(frame), session.infer([frame])
            assert (row.class_id, row.is_ood, row.valid) == (verdict.class_id, verdict.is_ood, verdict.valid)
            assert row.ood_score == pytest.approx(verdict.ood_score, abs=1e-5)
            second, best = np.sort(outputs.logits[0])[-2:]
            assert row.logit_margin == pytest.approx(float(best - second), abs=1e-4)
    single = scored(artifact_path, folder, batch_size=1)
    assert [row.is_ood for row in single] == [row.is_ood for row in rows]
    np.testing.assert_allclose([r.ood_score for r in single], [r.ood_score for r in rows], atol=1e-5)


def test_rows_are_those_of_reading_one_image_after_the_other(
    artifact_path: Path, digits: DemoImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, path in enumerate(find_images(digits.test)[:150]):
        (tmp_path / f"{index:03d}.png").write_bytes(b"no image" if index % 40 == 7 else path.read_bytes())

    def all_rows() -> tuple[list[ScoreRow], ScoreSummary]:
        rows: list[ScoreRow] = []
        with open_session(artifact_path, threads=1) as session:
            return rows, score_images(session, [tmp_path], rows.append)

    def one_after_the_other(items: Iterable[Any], load: Callable[[Any], Any]) -> Iterator[Any]:
        for item in items:
            try:
                yield item, load(item)
            except UnreadableImageError as error:
                yield item, error

    with limited_threads(5):
        rows, summary = all_rows()
    monkeypatch.setattr("grood_edge.runtime.score.decoded", one_after_the_other)
    assert (rows, summary) == all_rows()
    assert [Path(name).name for name, _ in summary.unreadable] == ["007.png", "047.png", "087.png", "127.png"]
    assert len(rows) == 146


def test_ctrl_c_ends_every_thread_at_once(artifact_path: Path, digits: DemoImages) -> None:
    def interrupted(_: ScoreRow) -> None:
        raise KeyboardInterrupt

    with open_session(artifact_path) as session:
        try:
            score_images(session, [digits.test], interrupted)
        except KeyboardInterrupt:  # here, where the traceback is alive
            assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("decoding-")]
        else:
            pytest.fail("nothing was raised")


def test_file_glob_and_npz_give_the_same_scores_as_the_folder(
    artifact_path: Path, digits: DemoImages, tmp_path: Path
) -> None:
    folder = digits.near / "8"
    by_folder = [row.ood_score for row in scored(artifact_path, folder)]
    paths = find_images(folder)
    np.savez_compressed(tmp_path / "frames.npz", images=np.stack([load_image(path) for path in paths]))
    by_npz = scored(artifact_path, tmp_path / "frames.npz")
    by_glob = [row.ood_score for row in scored(artifact_path, f"{folder}/*.png")]
    by_file = [row.ood_score for row in scored(artifact_path, *paths)]
    assert by_glob == by_folder == by_file == [row.ood_score for row in by_npz]
    assert by_npz[3].path.endswith("frames.npz[3]")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_holds_the_same_rows(suffix: str, artifact_path: Path, digits: DemoImages, tmp_path: Path) -> None:
    rows = scored(artifact_path, digits.far_noise)
    out = tmp_path / f"scores{suffix}"
    with row_writer(out, force=False) as write:
        for row in rows:
            write(row)
    if suffix == ".jsonl":
        read = [json.loads(line) for line in out.read_text().splitlines()]
    elif suffix == ".parquet":
        read = pq.read_table(out).to_pylist()
    else:
        with out.open(newline="") as file:
            read = list(csv.DictReader(file))
    assert [entry["path"] for entry in read] == [row.path for row in rows]
    np.testing.assert_allclose([float(entry["ood_score"]) for entry in read], [row.ood_score for row in rows])
    assert [str(entry["is_ood"]) for entry in read] == [str(row.is_ood) for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_names_that_are_no_utf8_are_written(suffix: str, tmp_path: Path) -> None:
    out, name = tmp_path / f"scores{suffix}", os.fsdecode(b"caf\xe9/1.png")
    name += "\x7f\x9b\u202e\u200f" if suffix == ".jsonl" else ""  # what terminals obey
    with row_writer(out, force=False) as write:
        write(ScoreRow(name, 0, "a", None, 0.0, 0.5, False, True))
    if suffix == ".jsonl":
        assert json.loads(out.read_text())["path"] == name  # it names the file again
        assert out.read_text().strip().isprintable()
    elif suffix == ".parquet":
        assert pq.read_table(out).to_pylist()[0]["path"] == r"caf\udce9/1.png"
    else:
        assert r"caf\udce9/1.png," in out.read_text()


def test_writer_leaves_nothing_when_the_block_fails_and_touches_no_existing_file(tmp_path: Path) -> None:
    row = ScoreRow("a.png", 0, "cup", 1.0, -3.0, 0.5, False, True)
    for suffix in (".jsonl", ".csv", ".parquet"):
        out = tmp_path / f"scores{suffix}"
        with pytest.raises(KeyboardInterrupt):
            _write_and_interrupt(out, row)
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept.csv"
    kept.write_text("mine")
    with pytest.raises(OutputError, match="exists"), row_writer(kept, force=False) as write:
        write(row)
    assert kept.read_text() == "mine"


def _write_and_interrupt(out: Path, row: ScoreRow) -> None:
    with row_writer(out, force=False) as write:
        write(row)
        raise KeyboardInterrupt


def test_unknown_suffix_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.jsonl, \.csv, \.parquet"):
        row_writer(tmp_path / "scores.xml", force=False)


def test_unreadable_images_are_named_and_more_than_one_percent_is_an_error(
    artifact_path: Path, digits: DemoImages, tmp_path: Path
) -> None:
    for path in find_images(digits.far_noise)[:10]:
        Image.open(path).save(tmp_path / path.name)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    rows: list[ScoreRow] = []
    with open_session(artifact_path) as session:
        summary = score_images(session, [tmp_path], rows.append)
    assert summary.images == len(rows) == 10
    assert summary.unreadable[0][0].endswith("broken.png")
    assert summary.flagged == sum(row.is_ood for row in rows)
    with pytest.raises(DatasetError, match=r"1 of 11 images cannot be read: .*broken\.png.*The others were scored"):
        require_readable(summary)


def test_missing_source_and_bad_batch_size(artifact_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        scored(artifact_path, tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="does not exist"):
        scored(artifact_path, "x" * 5000)
    with pytest.raises(UsageError, match="batch-size"):
        scored(artifact_path, tmp_path, batch_size=0)


def test_short_side_above_the_input_is_applied_once(color_photos: ColorPhotos) -> None:
    """A preset that resizes to 55 and crops 48: scores are those of the session on the raw image."""
    rows = scored(color_photos.artifact, color_photos.folder / "test")
    with open_session(color_photos.artifact) as session:
        p = session.contract.preprocessing
        assert p.short_side is not None
        assert p.short_side > max(p.height, p.width)
        frames = color_photos.test_frames()
        expected = [verdict.ood_score for verdict in session.predict_batch(frames)]
        twice = [v.ood_score for v in session.predict_batch([preprocess_frame(frame, p) for frame in frames])]
    np.testing.assert_allclose([row.ood_score for row in rows], expected, atol=1e-4)
    assert np.abs(np.array(twice) - expected).max() > 0.01  # the second crop would have been seen


def test_explained_rows_hold_the_reasons(artifact_path: Path, digits: DemoImages, tmp_path: Path) -> None:
    rows: list[ScoreRow] = []
    with open_session(artifact_path) as session:
        score_images(session, [digits.near / "7"], rows.append, explain=True)
        frames = [load_image(path) for path in find_images(digits.near / "7")[:4]]
        for row, verdict in zip(rows, session.predict_batch(frames, explain=True), strict=False):
            assert verdict.reason is not None
            assert (row.nearest_class, row.bank_class) == (verdict.reason.nearest_class, verdict.reason.bank_class)
            assert row.log_s == pytest.approx(max(verdict.reason.log_s.values()), abs=1e-4)
            assert row.bank_path is None  # not kept in this artifact
    for suffix in (".jsonl", ".csv", ".parquet"):
        out = tmp_path / f"scores{suffix}"
        with row_writer(out, force=False) as write:
            for row in rows:
                write(row)
    written = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [entry["nearest_class"] for entry in written] == [row.nearest_class for row in rows]
    np.testing.assert_allclose([entry["log_s"] for entry in written], [row.log_s or 0.0 for row in rows], rtol=1e-6)
    with (tmp_path / "scores.csv").open(newline="") as file:
        assert [entry["bank_class"] for entry in csv.DictReader(file)] == [row.bank_class for row in rows]


def test_rows_without_explanation_have_none(artifact_path: Path, digits: DemoImages) -> None:
    row = scored(artifact_path, digits.far_noise)[0]
    assert (row.nearest_class, row.log_s, row.bank_class, row.bank_path) == (None, None, None, None)
