"""The words and tables that terminal and report share."""

import json
from dataclasses import replace
from typing import Literal

import pytest
from rich.console import Console

from grood_edge.evaluate.results import Evaluation
from grood_edge.evaluate.summary import (
    FPR95,
    evaluation_document,
    evaluation_tables,
    gets_through,
    headline,
    text_tables,
)


def test_headlines_name_promise_and_the_set_that_is_missed_most(evaluation: Evaluation) -> None:
    worst = max(evaluation.ood, key=lambda result: result.missed)
    expected: dict[Literal["kept", "broken", "stricter", "none", "untested"], str] = {
        "kept": "within what was promised",
        "stricter": "rarer than promised",
        "broken": "Recalibrate before use",
        "none": "No false-alarm rate was promised",
        "untested": "cannot test the promise",
    }
    for outcome, words in expected.items():
        promise = replace(evaluation.promise, outcome=outcome)
        text = headline(replace(evaluation, alpha=0.5, promise=promise))
        assert words in text
        assert f'"{worst.name}", of which {worst.missed:.1%}' in text
        assert text.count(".") - text.count("%") <= 2, "one sentence"
    above = replace(evaluation, alpha=evaluation.id.rate / 2, promise=replace(evaluation.promise, outcome="kept"))
    assert f"agree with the promise, as far as {evaluation.id.images} images can tell" in headline(above)


def test_a_set_that_gets_through_is_said_even_when_the_promise_is_kept(evaluation: Evaluation) -> None:
    through = replace(evaluation, ood=(replace(evaluation.ood[0], found=0), evaluation.ood[1]))
    assert gets_through(through)
    assert not gets_through(evaluation)
    assert headline(through).endswith(', but 100.0% of "near" is taken for a known class: it does not stop these.')


def test_a_single_set_and_a_perfect_one(evaluation: Evaluation) -> None:
    near = evaluation.ood[0]
    assert f'of "near" {near.missed:.1%}' in headline(replace(evaluation, ood=(near,)))
    assert "every OOD image was found" in headline(replace(evaluation, ood=(replace(near, found=near.images),)))


def test_fpr95_is_written_out_wherever_it_stands(evaluation: Evaluation) -> None:
    tables = {table.title: table for table in text_tables(evaluation)}
    assert FPR95 in tables["OOD sets"].columns
    assert any(FPR95 in note for note in tables["beside other scores"].notes)
    everything = str(tables) + json.dumps(evaluation_document(evaluation)["verdict"])
    assert "FPR95" not in everything


def test_ood_and_corrupted_id_images_are_different_tables(evaluation: Evaluation) -> None:
    tables = {table.title: table for table in text_tables(evaluation)}
    assert [row[0] for row in tables["OOD sets"].rows] == ["near", "far-photos"]
    assert len(tables["covariate shift (still ID)"].rows) == 16
    assert tables["beside other scores"].rows[tables["beside other scores"].marked or 0][0].startswith("GROOD")


def test_many_classes_are_cut_and_it_is_said(evaluation: Evaluation) -> None:
    table = next(table for table in text_tables(evaluation, most_classes=3) if table.title == "ID images by class")
    assert len(table.rows) == 3
    assert "4 more classes are not shown" in table.notes[0]
    rates = [result.rate for result in sorted(evaluation.id.classes, key=lambda result: -result.rate)]
    assert rates[0] == max(rates)
    assert table.rows[0][2].endswith(f"({rates[0]:.1%})")


def test_names_of_others_do_not_drive_the_terminal(evaluation: Evaluation) -> None:
    evil = replace(evaluation.ood[0], name="[red]x\x1b[31m", found=0)
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        for item in evaluation_tables(replace(evaluation, ood=(evil,), baselines=())):
            console.print(item, markup=False)
    assert "\x1b" not in captured.get()
    assert "[red]x" in captured.get()


def test_the_document_is_json_and_has_the_figures(evaluation: Evaluation) -> None:
    document = json.loads(json.dumps(evaluation_document(evaluation), allow_nan=False))
    assert document["id"]["false_alarm_rate"] == pytest.approx(evaluation.id.rate)
    assert [row["name"] for row in document["ood"]] == ["near", "far-photos"]
    assert len(document["covariate_shift"]) == 15
    assert len(document["baselines"]) == 9
    assert document["promise"]["outcome"] == evaluation.promise.outcome
