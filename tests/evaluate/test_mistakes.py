"""The pictures are those of the most confident mistakes, worst first."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from grood_edge.evaluate.mistakes import MOST, SIDE, mistakes_of
from grood_edge.evaluate.results import Evaluation


def test_worst_first_and_at_most_twelve(evaluation: Evaluation) -> None:
    near = evaluation.ood_sets[0]
    none_found = replace(near, rows=replace(near.rows, flagged=np.zeros(len(near.paths), bool)))
    title, mistakes = list(mistakes_of(replace(evaluation, ood_sets=(none_found,))))[-1]
    assert title == f'"near" accepted as known, lowest ood_score first ({len(near.paths)} in all)'
    assert len(mistakes) == MOST
    assert [m.ood_score for m in mistakes] == sorted(near.rows.scores.tolist())[:MOST]
    first = near.paths[int(near.rows.scores.argmin())]
    assert mistakes[0].name == first.relative_to(near.folder).as_posix()
    assert mistakes[0].own_class is None


def test_false_alarms_come_with_their_class(evaluation: Evaluation) -> None:
    known = evaluation.id_set
    all_alarms = replace(known, rows=replace(known.rows, flagged=np.ones(len(known.paths), bool)))
    _, mistakes = next(iter(mistakes_of(replace(evaluation, id_set=all_alarms))))
    assert mistakes[0].ood_score == known.rows.scores.max()
    assert all(mistake.own_class == Path(mistake.name).parent.name for mistake in mistakes)


def test_sets_without_mistakes_are_left_out(evaluation: Evaluation) -> None:
    known = evaluation.id_set
    perfect = replace(known, rows=replace(known.rows, flagged=np.zeros(len(known.paths), bool)))
    found = tuple(
        replace(one, rows=replace(one.rows, flagged=np.ones(len(one.paths), bool))) for one in evaluation.ood_sets
    )
    assert list(mistakes_of(replace(evaluation, id_set=perfect, ood_sets=found))) == []


def test_thumbnails_decode_and_images_that_vanished_are_skipped(evaluation: Evaluation, tmp_path: Path) -> None:
    near = evaluation.ood_sets[0]
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (900, 300), "red").save(folder / "wide.png")
    chosen = replace(near, folder=folder, paths=(folder / "gone.png", folder / "wide.png"))
    rows = replace(
        near.rows, flagged=np.zeros(2, bool), scores=np.zeros(2, np.float32), p_values=np.zeros(2, np.float32),
        class_ids=np.zeros(2, np.int64), valid=np.ones(2, bool), others={},
    )  # fmt: skip
    galleries = dict(mistakes_of(replace(evaluation, ood_sets=(replace(chosen, rows=rows),))))
    (mistake,) = galleries['"near" accepted as known, lowest ood_score first (2 in all)']
    with Image.open(io.BytesIO(base64.b64decode(mistake.jpeg))) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE, round(SIDE / 3)))
