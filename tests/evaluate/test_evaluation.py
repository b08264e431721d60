"""The whole evaluation on real digits: figures, warnings, refusals."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError, UsageError
from grood_edge.evaluate.baselines import BASELINES
from grood_edge.evaluate.evaluation import EvaluateOptions, evaluate
from grood_edge.evaluate.results import Evaluation
from grood_edge.images import find_images, load_image
from grood_edge.runtime.session import Session
from tests.evaluate.conftest import copied
from tests.test_imports import heavy_modules_after


def test_figures_are_those_of_the_sessions_verdicts(evaluation: Evaluation, session: Session, few: Path) -> None:
    verdicts = {
        name: [session.predict(load_image(path)) for path in find_images(few / name)] for name in ("test", "near")
    }
    known, near = verdicts["test"], evaluation.ood[0]
    truth = [path.parent.name for path in find_images(few / "test")]
    right = np.array([verdict.class_name == name for verdict, name in zip(known, truth, strict=True)])
    accepted = np.array([not verdict.is_ood for verdict in known])
    assert evaluation.id.false_alarms == (~accepted).sum()
    assert evaluation.id.accuracy == pytest.approx(right.mean())
    assert evaluation.id.accuracy_accepted == pytest.approx(right[accepted].mean())
    assert near.found == sum(verdict.is_ood for verdict in verdicts["near"])
    scores = [verdict.ood_score for verdict in (*known, *verdicts["near"])]
    assert near.auroc == pytest.approx(roc_auc_score(np.repeat([0, 1], [len(known), near.images]), scores), abs=1e-3)
    assert near.auroc_interval[0] < near.auroc < near.auroc_interval[1]


def test_classes_add_up_to_the_whole(evaluation: Evaluation) -> None:
    results = evaluation.id.classes
    assert [result.name for result in results] == list("0123456")
    assert sum(result.images for result in results) == evaluation.id.images
    assert sum(result.false_alarms for result in results) == evaluation.id.false_alarms
    for result in results:
        assert result.interval[0] <= result.rate <= result.interval[1]


def test_corrupted_images_are_apart_and_get_worse(evaluation: Evaluation) -> None:
    assert len(evaluation.shift) == 15
    blur = [result for result in evaluation.shift if result.kind == "low light"]
    assert evaluation.id.rate < blur[-1].flagged
    assert blur[0].auroc < blur[-1].auroc
    assert {result.name for result in evaluation.ood} == {"near", "far-photos"}


def test_baselines_are_sorted_and_ours_is_one_of_them(evaluation: Evaluation) -> None:
    results = evaluation.baselines
    assert {result.name for result in results if not result.ours} == set(BASELINES)
    assert [result.mean for result in results] == sorted((result.mean for result in results), reverse=True)
    ours = next(result for result in results if result.ours)
    assert ours.aurocs == tuple(result.auroc for result in evaluation.ood)
    assert ours.fpr95s == tuple(result.fpr95 for result in evaluation.ood)
    assert min(result.mean for result in results) > 0.8, "each of them works on digits against photos"


def plain(options: EvaluateOptions) -> EvaluateOptions:
    return replace(options, corrupt=False, baselines=False, fit=None)


def test_without_fit_the_reason_stands_in_the_table(session: Session, options: EvaluateOptions) -> None:
    found = evaluate(session, replace(plain(options), baselines=True))
    assert {name for name, reason in found.left_out if "--fit DIR" in reason} == {
        "nearest prototype", "KNN", "Mahalanobis", "ViM",
    }  # fmt: skip
    assert {result.name for result in found.baselines if not result.ours} == {"MSP", "max logit", "energy", "SCALE"}


def test_other_images_than_the_fitted_ones_are_warned_about(
    session: Session, options: EvaluateOptions, digits: DemoImages
) -> None:
    found = evaluate(session, replace(plain(options), baselines=True, fit=str(digits.calibration)))
    assert any("holds other images than this artifact was fitted on" in text for text in found.warnings)
    with pytest.raises(UsageError, match="add --baselines"):
        evaluate(session, replace(plain(options), fit=str(digits.train)))


def test_a_flat_id_folder_gives_rates_without_labels(session: Session, options: EvaluateOptions, few: Path) -> None:
    found = evaluate(session, replace(plain(options), id_folder=few / "test" / "3"))
    assert (found.id.accuracy, found.id.accuracy_accepted, found.id.risk_coverage, found.id.classes) == (
        None, None, None, (),
    )  # fmt: skip
    assert any("no class folders" in text for text in found.warnings)
    assert any('"ID" has' in text and "intervals are wide" in text for text in found.warnings)


def test_a_class_without_images_is_named(session: Session, options: EvaluateOptions, few: Path, tmp_path: Path) -> None:
    folder = copied(few / "test", tmp_path / "test")
    shutil.rmtree(folder / "5")
    with pytest.raises(DatasetError, match=r"no image of 1 of 7 classes \(5\).*one flat folder"):
        evaluate(session, replace(plain(options), id_folder=folder))


def test_overlap_is_warned_about_with_names(
    session: Session, options: EvaluateOptions, few: Path, tmp_path: Path
) -> None:
    folder = copied(few / "near", tmp_path / "near")
    shutil.copy(find_images(few / "test")[0], folder / "known.png")
    found = evaluate(session, replace(plain(options), ood=(("near", folder),)))
    assert any("known.png" in text and 'also in "ID"' in text for text in found.warnings)


def test_constant_scores_are_refused(session: Session, options: EvaluateOptions, few: Path, tmp_path: Path) -> None:
    image = find_images(few / "test")[0]
    for name in ("id", "ood"):
        (tmp_path / name).mkdir()
        for index in range(3):
            shutil.copy(image, tmp_path / name / f"{index}.png")
    same = replace(plain(options), id_folder=tmp_path / "id", ood=(("same", tmp_path / "ood"),))
    with pytest.raises(DatasetError, match=r"all 6 images have the same ood_score .*check that the folders"):
        evaluate(session, same)


def test_the_evaluation_keeps_no_features(evaluation: Evaluation) -> None:
    for one in (evaluation.id_set, *evaluation.ood_sets):
        arrays = [value for value in vars(one.rows).values() if isinstance(value, np.ndarray)]
        assert all(array.shape == (len(one.paths),) for array in (*arrays, *one.rows.others.values()))


def test_without_baselines_it_runs_where_only_onnxruntime_is_installed(options: EvaluateOptions) -> None:
    statement = (
        "from pathlib import Path\n"
        "from grood_edge.evaluate.evaluation import EvaluateOptions, evaluate\n"
        "from grood_edge.evaluate.report import report_html\n"
        "from grood_edge.runtime.session import open_session\n"
        f"options = EvaluateOptions(Path({str(options.model)!r}), Path({str(options.id_folder)!r}), "
        f"(('near', Path({str(options.ood[0][1])!r})),), corrupt=True)\n"
        "with open_session(options.model) as session: report_html(evaluate(session, options), '', [], [])"
    )
    assert heavy_modules_after(statement) == ["onnxruntime"]
