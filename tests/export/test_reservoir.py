"""The stratified sample: fair within a class, as even as the counts allow, bounded, and blind to batches."""

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import chi2

from grood_edge.export.reservoir import Reservoir, Rows, water_filled


def numbered(count: int, start: int = 0) -> Rows:
    """Rows whose only feature, and whose name, is their number in the stream."""
    numbers = np.arange(start, start + count)
    return Rows(
        numbers[:, None].astype(np.float32), np.zeros(count, np.int64), numbers % 7, tuple(str(i) for i in numbers)
    )


def parts(rows: Rows, sizes: list[int]) -> Iterator[tuple[slice, Rows]]:
    start = index = 0
    while start < len(rows.labels):
        chosen = slice(start, start + sizes[index % len(sizes)])
        yield chosen, Rows(rows.features[chosen], rows.labels[chosen], rows.predictions[chosen], rows.names[chosen])
        start, index = chosen.stop, index + 1


def sampled(strata: np.ndarray, budget: int, seed: int, sizes: list[int], kinds: int) -> tuple[np.ndarray, int]:
    """Return the numbers of the kept rows, and the most rows that were held at a time."""
    reservoir, most = Reservoir(kinds, budget, seed), 0
    for chosen, part in parts(numbered(len(strata)), sizes):
        reservoir.add(part, strata[chosen])
        most = max(most, reservoir.held)
    rows = reservoir.rows()
    numbers = rows.features[:, 0].astype(np.int64)
    assert rows.names == tuple(str(i) for i in numbers)
    np.testing.assert_array_equal(rows.predictions, numbers % 7)
    return numbers, most


@pytest.mark.parametrize(
    ("counts", "budget", "quotas"),
    [
        ([5, 3, 2], 10, [5, 3, 2]),
        ([5, 3, 2], 9, [4, 3, 2]),
        ([100, 3, 50], 43, [20, 3, 20]),
        ([100, 3, 50], 44, [20, 3, 21]),  # what is left over goes to the favoured class, here the last one
        ([4, 4, 4], 2, [0, 1, 1]),
        ([0, 9, 0], 4, [0, 4, 0]),
        ([0, 0, 0], 4, [0, 0, 0]),
    ],
)
def test_small_classes_keep_all_and_large_ones_share(counts: list[int], budget: int, quotas: list[int]) -> None:
    found = water_filled(np.array(counts), budget, np.array([2, 1, 0]))
    np.testing.assert_array_equal(found, quotas)


def test_quotas_use_the_whole_budget_and_full_classes_never_gain() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        kinds, budget = int(rng.integers(1, 9)), int(rng.integers(1, 40))
        favoured = rng.permutation(kinds)
        counts = np.zeros(kinds, np.int64)
        before, full = np.zeros(kinds, np.int64), np.zeros(kinds, bool)
        for _ in range(12):
            counts = counts + rng.integers(0, 6, kinds)
            quotas = water_filled(counts, budget, favoured)
            assert quotas.sum() == min(budget, counts.sum())
            assert (quotas <= counts).all()
            cut = quotas < counts
            least = quotas[cut].min(initial=budget)
            assert (quotas <= least + 1).all()  # equal shares, but for what is left over
            assert (quotas[full] <= before[full]).all()
            before, full = quotas, cut


def test_everything_is_kept_while_it_fits_in_the_order_of_the_stream() -> None:
    strata = np.random.default_rng(0).integers(0, 3, 50)
    numbers, _ = sampled(strata, 50, 0, [7], 3)
    np.testing.assert_array_equal(numbers, np.arange(50))


@pytest.mark.parametrize("sizes", [[1], [3, 11, 40], [1000]])
def test_batches_change_nothing(sizes: list[int]) -> None:
    strata = np.random.default_rng(3).choice(4, 1000, p=[0.7, 0.2, 0.09, 0.01])
    expected, _ = sampled(strata, 60, 5, [32], 4)
    numbers, _ = sampled(strata, 60, 5, sizes, 4)
    np.testing.assert_array_equal(numbers, expected)
    counts = np.bincount(strata, minlength=4)
    assert sorted(np.bincount(strata[numbers])) == sorted(water_filled(counts, 60, np.arange(4)))


def test_the_seed_changes_the_sample() -> None:
    strata = np.zeros(500, np.int64)
    samples = [tuple(sampled(strata, 20, seed, [32], 1)[0]) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


def test_every_row_of_a_class_is_kept_equally_often() -> None:
    """Chi-square over 800 seeds: a reservoir that favours early or late rows of a class is far beyond 1e-6."""
    strata = (np.arange(150) % 3 == 0).astype(np.int64)  # 100 of class 0, 50 of class 1; each gets 20 rows
    seeds = 800
    kept = np.zeros(150)
    for seed in range(seeds):
        kept[sampled(strata, 40, seed, [17], 2)[0]] += 1
    for kind, size in ((0, 100), (1, 50)):
        p, counts = 20 / size, kept[strata == kind]
        assert counts.sum() == seeds * 20
        # with a fixed number of rows a sample the counts' covariance has this scale
        statistic = ((counts - seeds * p) ** 2).sum() / (seeds * p * (1 - p)) * (size - 1) / size
        assert statistic < chi2.ppf(1 - 1e-6, size - 1)
        assert statistic > chi2.ppf(1e-6, size - 1)


@pytest.mark.parametrize("size", [1, 32, 5_000])
def test_no_more_than_a_quarter_above_the_budget_is_held(size: int) -> None:
    strata = np.random.default_rng(0).integers(0, 10, 5_000)
    numbers, most = sampled(strata, 400, 0, [size], 10)
    assert len(numbers) == 400
    assert most <= 501


def test_more_classes_than_rows_leaves_some_without_any() -> None:
    numbers, _ = sampled(np.arange(1000) % 100, 30, 0, [32], 100)
    assert len(numbers) == 30
    assert len({int(n) % 100 for n in numbers}) == 30
    assert max(int(n) % 100 for n in numbers) > 60  # not simply the first classes


def test_a_class_that_comes_late_gets_its_share() -> None:
    strata = np.repeat([0, 1], [5_000, 25])
    numbers, _ = sampled(strata, 100, 0, [32], 2)
    assert (strata[numbers] == 1).sum() == 25


@pytest.mark.parametrize("size", [1, 32])
def test_the_rows_with_the_smallest_keys_of_each_class_are_kept(size: int) -> None:
    """Against the definition, with all keys at once; sample sizes just above the budget prune most closely."""
    for seed, count in enumerate((61, 70, 76, 77, 80, 90, 120, 400)):
        strata = np.random.default_rng(seed).choice(3, count, p=[0.6, 0.3, 0.1])
        rng = np.random.default_rng(seed)
        favoured, keys = rng.permutation(3), rng.random(count)
        quotas = water_filled(np.bincount(strata, minlength=3), 60, favoured)
        expected: list[int] = []
        for kind in range(3):
            own = np.flatnonzero(strata == kind)
            expected += own[np.argsort(keys[own])][: quotas[kind]].tolist()
        numbers, _ = sampled(strata, 60, seed, [size], 3)
        assert numbers.tolist() == sorted(expected)
