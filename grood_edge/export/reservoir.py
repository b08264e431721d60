"""A seeded sample of a stream of feature rows, stratified: bounded memory, the same rows whatever the batches are.

Every row draws a uniform key; of each stratum the rows with the smallest keys are kept, as many as its quota says, so
the sample is uniform within the stratum (bottom-k sampling, Cohen and Kaplan, PODC 2007). Quotas are those of
`water_filled`: a row that is outside its quota once stays outside, because quotas of full strata only shrink.
"""

from dataclasses import dataclass
from itertools import compress

import numpy as np

from grood_edge.arrays import ClassCounts, Features, Labels

__all__ = ["Reservoir", "Rows", "water_filled"]


@dataclass(frozen=True)
class Rows:
    """Some images' features float32 `[n, d]`, labels and predictions int64 `[n]`, and sample names."""

    features: Features
    labels: Labels
    predictions: Labels
    names: tuple[str, ...]

    def where(self, chosen: np.ndarray) -> "Rows":
        """Return the rows where `chosen`, bool `[n]`, is true."""
        names = tuple(compress(self.names, chosen.tolist()))
        return Rows(self.features[chosen], self.labels[chosen], self.predictions[chosen], names)


def water_filled(counts: ClassCounts, budget: int, favoured: np.ndarray) -> ClassCounts:
    """Share `budget` rows among strata that have `counts` rows: small ones keep all, the others get equally many.

    What equal shares leave over goes, one row each, to the first strata in the order `favoured` (int64 `[k]`). Since
    the order is fixed, a stratum that does not keep all its rows never gains when counts grow.
    """
    quotas: np.ndarray = counts.copy()
    if quotas.sum() <= budget:
        return quotas
    ascending = np.sort(counts)
    smaller = np.cumsum(ascending) - ascending  # rows of all strata before this one
    shares = (budget - smaller) // np.arange(len(counts), 0, -1)
    level = int(shares[np.argmax(ascending > shares)])
    quotas = np.minimum(counts, level)
    cut = favoured[counts[favoured] > level]
    quotas[cut[: budget - int(quotas.sum())]] += 1
    return quotas


class Reservoir:
    """At most `budget` rows of a stream, and a quarter more while it is read. `counts` int64 `[k]` are of all rows."""

    def __init__(self, strata: int, budget: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._favoured = self._rng.permutation(strata)
        self._budget = budget
        self.counts = np.zeros(strata, np.int64)
        self._thresholds = np.full(strata, np.inf)  # keys from here on cannot enter any more
        size = budget + budget // 4 + 1
        self._order = np.full(size, -1)  # place in the stream; -1: the slot is free
        self._keys, self._strata = np.zeros(size), np.zeros(size, np.int64)
        self._labels, self._predictions = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._names = np.full(size, "", object)
        self._features: np.ndarray | None = None

    @property
    def held(self) -> int:
        """Return the number of rows in memory."""
        return int((self._order >= 0).sum())

    def add(self, rows: Rows, strata: Labels) -> None:
        """Offer rows, each with its stratum, int64 `[n]`."""
        if self._features is None:  # pages that no row has reached yet take no memory
            self._features = np.empty((len(self._order), rows.features.shape[1]), np.float32)
        keys = self._rng.random(len(strata))
        order = int(self.counts.sum()) + np.arange(len(strata))
        self.counts += np.bincount(strata, minlength=len(self.counts))
        waiting = np.arange(len(strata))
        while True:
            waiting = waiting[keys[waiting] < self._thresholds[strata[waiting]]]
            slots = np.flatnonzero(self._order < 0)[: len(waiting)]
            entering, waiting = waiting[: len(slots)], waiting[len(slots) :]
            self._order[slots], self._keys[slots] = order[entering], keys[entering]
            self._strata[slots] = strata[entering]
            self._features[slots], self._labels[slots] = rows.features[entering], rows.labels[entering]
            self._predictions[slots] = rows.predictions[entering]
            self._names[slots] = [rows.names[i] for i in entering]
            if not waiting.size:
                return
            self._prune()

    def rows(self) -> Rows:
        """Return the sample, in the order of the stream."""
        self._prune()
        kept = np.flatnonzero(self._order >= 0)
        kept = kept[np.argsort(self._order[kept])]
        features = np.zeros((0, 0), np.float32) if self._features is None else self._features[kept]
        return Rows(features, self._labels[kept], self._predictions[kept], tuple(self._names[kept].tolist()))

    def _prune(self) -> None:
        """Free the slots of the rows that are outside their stratum's quota."""
        quotas = water_filled(self.counts, self._budget, self._favoured)
        kept = np.flatnonzero(self._order >= 0)
        kept = kept[np.lexsort((self._order[kept], self._keys[kept], self._strata[kept]))]
        strata = self._strata[kept]
        held = np.bincount(strata, minlength=len(quotas))
        rank = np.arange(len(kept)) - (np.cumsum(held) - held)[strata]
        last = kept[rank == quotas[strata] - 1]  # of each stratum that has its quota
        cut = last[self.counts[self._strata[last]] > quotas[self._strata[last]]]
        self._thresholds[self._strata[cut]] = self._keys[cut]
        self._thresholds[quotas == 0] = np.where(self.counts[quotas == 0] > 0, -np.inf, np.inf)
        out = kept[rank >= quotas[strata]]
        self._order[out], self._names[out] = -1, ""
