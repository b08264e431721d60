"""Class prototypes are means over all images of a class, misclassified ones too."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from grood_edge.errors import DatasetError
from grood_edge.export.features import FeaturePass, FeatureTable, rows_of
from grood_edge.export.prototypes import class_prototypes, require_usable_classes

CLASSES = tuple("0123456")


def test_prototypes_are_class_means(digit_pass: FeaturePass) -> None:
    table = digit_pass.fit
    found = class_prototypes(table)
    assert found.class_ids == tuple(range(7))
    assert found.prototypes.dtype == np.float64
    for label in range(7):
        expected = table.features[table.labels == label].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(found.prototypes[label], expected, rtol=1e-9, atol=1e-12)


def test_misclassified_images_count(digit_pass: FeaturePass) -> None:
    table = digit_pass.fit
    wrong = replace(table, predictions=np.where(np.arange(len(table.labels)) % 2 == 0, 6, table.predictions))
    keep = np.ones(len(table.labels), bool)
    np.testing.assert_array_equal(
        class_prototypes(rows_of(wrong, keep)).prototypes, class_prototypes(rows_of(table, keep)).prototypes
    )


def test_classes_without_images_have_no_prototype(digit_pass: FeaturePass) -> None:
    table = rows_of(digit_pass.fit, ~np.isin(digit_pass.fit.labels, [2, 5]))
    found = class_prototypes(table)
    assert found.class_ids == (0, 1, 3, 4, 6)
    assert found.prototypes.shape == (5, 64)
    assert np.isfinite(found.prototypes).all()
    require_usable_classes(table, CLASSES)  # enough are left


def first_of_class(table: FeatureTable, label: int, count: int) -> np.ndarray:
    """All rows, but only the first `count` of one class."""
    of_class = table.labels == label
    keep: np.ndarray = ~of_class | (np.cumsum(of_class) <= count)
    return keep


def test_one_image_in_a_class_is_refused(digit_pass: FeaturePass) -> None:
    table = digit_pass.fit
    with pytest.raises(
        DatasetError, match=r"class '3' has one image .*at least two images.*leave the class's folder out"
    ):
        require_usable_classes(rows_of(table, first_of_class(table, 3, 1)), CLASSES)
    two = rows_of(table, first_of_class(table, 3, 2))
    require_usable_classes(replace(two, confusion=two.confusion + Counter({(3, 3): 1})), CLASSES)


def test_class_that_is_misclassified_throughout_is_refused(digit_pass: FeaturePass) -> None:
    table = digit_pass.fit
    predictions = np.where(table.labels == 4, np.where(np.arange(len(table.labels)) % 3, 1, 2), table.predictions)
    wrong = rows_of(replace(table, predictions=predictions), np.ones(len(predictions), bool))
    with pytest.raises(
        DatasetError, match=r"all 90 images of class '4' are misclassified, most as '1'.*--classes FILE"
    ):
        require_usable_classes(wrong, CLASSES)


@pytest.mark.parametrize(("labels", "count"), [([5], 1), ([], 0)])
def test_fewer_than_two_classes_are_refused(labels: list[int], count: int, digit_pass: FeaturePass) -> None:
    with pytest.raises(DatasetError, match=f"the images cover {count} of 7 classes; at least two are needed"):
        require_usable_classes(rows_of(digit_pass.fit, np.isin(digit_pass.fit.labels, labels)), CLASSES)


def test_predicted_labels_may_name_a_class_once(digit_pass: FeaturePass) -> None:
    """Nobody can leave out the folder of a class that the network predicts for a single frame."""
    labelled = replace(digit_pass.fit, predictions=digit_pass.fit.labels)
    table = rows_of(labelled, first_of_class(labelled, 3, 1))
    require_usable_classes(table, CLASSES, predicted=True)
    assert class_prototypes(table).prototypes.shape == (7, 64)
