"""Sums of all images, exact in float64, whatever is kept of them."""

import math

import numpy as np

from grood_edge.export.reservoir import Rows
from grood_edge.export.table import Gatherer, rows_of


def random_rows(count: int, classes: int) -> Rows:
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((count, 5)) * 10.0 ** rng.integers(-3, 4, (count, 1))).astype(np.float32)
    labels = rng.integers(0, classes, count)
    return Rows(features, labels, rng.integers(0, classes, count), tuple(f"{i}" for i in range(count)))


def gathered(rows: Rows, size: int, stratified: bool = True) -> Gatherer:
    gatherer = Gatherer(9, 50, 0, stratified)
    for start in range(0, len(rows.labels), size):
        gatherer.add(rows.where(np.isin(np.arange(len(rows.labels)), np.arange(start, start + size))))
    return gatherer


def test_sums_and_counts_are_exact_over_all_images() -> None:
    rows = random_rows(2_000, 8)  # class 8 has none
    table = gathered(rows, 32).table()
    assert len(table.labels) == 50
    for label in range(9):
        own = rows.features[rows.labels == label].astype(np.float64)
        assert table.class_counts[label] == len(own)
        for column in range(5):
            exact = math.fsum(own[:, column])
            assert abs(table.class_sums[label, column] - exact) <= 1e-12 * max(1.0, np.abs(own[:, column]).sum())
    pairs = list(zip(rows.labels.tolist(), rows.predictions.tolist(), strict=True))
    assert all(table.confusion[pair] == pairs.count(pair) for pair in set(pairs))
    assert table.images == 2_000


def test_rows_are_the_same_in_any_batches() -> None:
    rows = random_rows(2_000, 9)
    for stratified in (True, False):
        tables = [gathered(rows, size, stratified).table() for size in (1, 32, 2_000)]
        assert len({table.names for table in tables}) == 1
        for table in tables:
            np.testing.assert_array_equal(table.features, rows.features[[int(name) for name in table.names]])


def test_no_rows_at_all() -> None:
    gatherer = Gatherer(3, 10, 0, stratified=True)
    assert gatherer.table().class_sums.shape == (3, 0)
    gatherer.add(random_rows(4, 3).where(np.zeros(4, bool)))
    table = gatherer.table()
    assert (table.features.shape, table.class_sums.shape, table.images) == ((0, 5), (3, 5), 0)


def test_chosen_rows_come_in_the_order_that_was_asked_for() -> None:
    table = gathered(random_rows(20, 3), 32).table()
    part = rows_of(table, np.array([7, 2]))
    assert part.names == ("7", "2")
    np.testing.assert_array_equal(part.features, table.features[[7, 2]])
    assert part.class_counts.sum() == 2
