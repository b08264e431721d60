"""The SVG figures are well-formed, show every set, and put the threshold where decisions change."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from grood_edge.evaluate.figures import WRONG, histograms, risk_figure, roc_figure
from grood_edge.evaluate.results import Evaluation

SVG = "{http://www.w3.org/2000/svg}"


def rectangles(svg: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(svg).iter(f"{SVG}rect") if element.get("fill")]


def test_histograms_show_every_set_and_colour_wrong_decisions(evaluation: Evaluation) -> None:
    svg = histograms(evaluation)
    root = ET.fromstring(svg)
    text = " ".join("".join(element.itertext()) for element in root.iter(f"{SVG}text"))
    for one in (evaluation.id_set, *evaluation.ood_sets):
        assert one.name in text
        assert f"{len(one.paths)} images" in text
    assert f"threshold {evaluation.threshold:.2f}" in text
    line = next(element for element in root.iter(f"{SVG}line") if element.get("class") == "threshold")
    at = float(line.get("x1", "nan"))
    rows = sorted({round(float(r.get("y", 0)) + float(r.get("height", 0))) for r in rectangles(svg)})
    assert len(rows) == 1 + len(evaluation.ood_sets)
    for rectangle in rectangles(svg):
        left, width = float(rectangle.get("x", 0)), float(rectangle.get("width", 0))
        right_side = left + width / 2 > at
        known = round(float(rectangle.get("y", 0)) + float(rectangle.get("height", 0))) == rows[0]
        assert (rectangle.get("fill") == WRONG) == (right_side == known)


def test_without_one_threshold_the_decisions_themselves_are_coloured(evaluation: Evaluation) -> None:
    known = evaluation.id_set
    half = np.arange(len(known.paths)) % 2 == 0
    mixed = replace(known, rows=replace(known.rows, flagged=half, scores=np.zeros(len(half), np.float32)))
    svg = histograms(replace(evaluation, threshold=None, id_set=mixed))
    assert 'class="threshold"' not in svg
    heights = {r.get("fill"): float(r.get("height", 0)) for r in rectangles(svg)[:2]}
    assert heights[WRONG] == pytest.approx(sum(heights.values()) * half.mean(), abs=0.2)


@pytest.mark.parametrize("scores", [[5.0] * 20, [3.4e38] * 20, [-1e30, 1e30] * 10, [1e-20, 2e-20] * 10])
def test_extreme_scores_still_draw(scores: list[float], evaluation: Evaluation) -> None:
    one = evaluation.ood_sets[0]
    values = np.array(scores, np.float32)
    rows = replace(
        one.rows, scores=values, flagged=values > 0, valid=values < 3e38, p_values=values,
        class_ids=np.zeros(20, np.int64), others={},
    )  # fmt: skip
    strange = replace(one, paths=one.paths[:20], rows=rows)
    changed = replace(evaluation, ood_sets=(strange, evaluation.ood_sets[1]))
    for svg in (histograms(changed), roc_figure(changed)):
        ET.fromstring(svg)
        assert not re.search(r"nan|inf", svg)


def test_roc_has_a_curve_and_a_point_a_set(evaluation: Evaluation) -> None:
    root = ET.fromstring(roc_figure(evaluation))
    assert len(list(root.iter(f"{SVG}circle"))) == len(evaluation.ood)
    assert len(list(root.iter(f"{SVG}polyline"))) == 1 + len(evaluation.ood)
    points = next(e for e in root.iter(f"{SVG}polyline") if e.get("stroke") == "#0072b2").get("points", "").split()
    xs, ys = np.array([point.split(",") for point in points], float).T
    assert (np.diff(xs) >= 0).all()
    assert (np.diff(ys) <= 0).all()


def test_risk_needs_labels(evaluation: Evaluation) -> None:
    ET.fromstring(risk_figure(evaluation))
    assert risk_figure(replace(evaluation, id=replace(evaluation.id, risk_coverage=None))) == ""


def test_names_are_escaped(evaluation: Evaluation) -> None:
    name = '<script>"&'
    ood = (replace(evaluation.ood[0], name=name), evaluation.ood[1])
    sets = (replace(evaluation.ood_sets[0], name=name), evaluation.ood_sets[1])
    changed = replace(evaluation, ood=ood, ood_sets=sets)
    for svg in (histograms(changed), roc_figure(changed)):
        assert "<script" not in svg
        ET.fromstring(svg)
