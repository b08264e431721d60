"""Leave-class-out: how well would a head find a class that it has never seen? Asked of ID images alone.

A class's prototype, bank rows and mixes are dropped; its images stand for OOD, those of the other classes for ID. Half
of the fit images make the bank, the other half is scored; images that calibrate have no part. The answer is optimistic,
as the features were trained on the class, and ranks OOD prototypes roughly: see docs/method.md.
"""

from dataclasses import dataclass, replace

import numpy as np

from grood_edge.arrays import Features64, Flags, Labels, Prototypes, Scores64
from grood_edge.export.bank import BankRows, HeadPlan, head_of
from grood_edge.export.features import FeatureTable
from grood_edge.export.prototypes import class_prototypes
from grood_edge.ranking import auroc
from grood_edge.scoring import Head, ScoreMap, nearest_rows

__all__ = ["MAX_BANK", "LeaveOut", "class_aurocs", "divisible_classes", "leave_out", "left_out_scores"]

MAX_CLASSES = 20
MAX_SCORED = 1000
MAX_BANK = 2048


@dataclass(frozen=True)
class LeaveOut:
    """The two halves: `bank` (with prototypes of every image that is not scored), and the scored images.

    `classes`: those that are left out in turn.
    """

    bank: FeatureTable
    prototypes: Prototypes
    class_ids: tuple[int, ...]
    scored: Features64
    labels: Labels
    classes: tuple[int, ...]


def divisible_classes(table: FeatureTable) -> int:
    """Return the number of classes with two kept rows or more: one to be scored, one for the bank."""
    return int(_divisible(table).sum())


def _divisible(table: FeatureTable) -> Flags:
    divisible: Flags = np.bincount(table.labels, minlength=len(table.class_counts)) >= 2
    return divisible


def leave_out(table: FeatureTable, seed: int, most: int = MAX_BANK) -> LeaveOut:
    """Divide a table into scored images and at most `most` images for the bank, seeded, class by class."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(table.labels))
    present = np.flatnonzero(_divisible(table))
    classes = np.sort(rng.permutation(present)[:MAX_CLASSES])
    few = max(1, MAX_SCORED // (2 * max(1, len(present) - len(classes))))
    many = (MAX_SCORED if len(present) == len(classes) else MAX_SCORED // 2) // max(1, len(classes))
    scored = np.zeros(len(order), bool)
    for label in present:
        rows = order[table.labels[order] == label]
        scored[rows[: min(len(rows) // 2, many if label in classes else few)]] = True
    some = order[scored[order]]  # in seeded order, those to be left out first: a cut takes of all other classes alike
    some = some[np.argsort(~np.isin(table.labels[some], classes), kind="stable")]
    chosen = np.sort(some[:MAX_SCORED])
    rest = np.sort(order[~scored[order]][:most])
    labels = table.labels[chosen]
    sums = table.class_sums.copy()
    for label, image in zip(labels, chosen, strict=True):  # `np.subtract.at` takes twenty times as long
        sums[label] -= table.features[image]
    counts = table.class_counts - np.bincount(labels, minlength=len(sums))
    bank = replace(
        table,
        features=table.features[rest],
        labels=table.labels[rest],
        predictions=table.predictions[rest],
        names=tuple(table.names[i] for i in rest),
        class_sums=sums,
        class_counts=counts,
    )
    found = class_prototypes(bank)
    return LeaveOut(
        bank,
        found.prototypes,
        found.class_ids,
        table.features[chosen].astype(np.float64),
        labels,
        tuple(int(c) for c in classes),
    )


def left_out_scores(half: LeaveOut, rows: BankRows, plan: HeadPlan, label: int) -> list[Scores64]:
    """Return log S of the scored images, one array an OOD prototype, with a head that does not know `label`."""
    prototypes = np.delete(half.prototypes, half.class_ids.index(label), axis=0)
    sources = tuple(source.without_class(label) for source in plan.sources)
    head = head_of(rows.without_class(label), prototypes, replace(plan, sources=sources), with_maps=False)
    return [nearest.score for nearest in nearest_rows(half.scored, head)]


def class_aurocs(half: LeaveOut, plan: HeadPlan, fitted: tuple[Head, BankRows]) -> dict[str, np.ndarray]:
    """Return the AUROC of each left-out class, float64 `[classes]`: of every OOD prototype, and of all together.

    fitted: `fit_head(half.bank, plan)`: its rows, from which each class is left out, and its maps are used.
    """
    head, rows = fitted
    maps = [ood_head.score_map for ood_head in head.ood_heads]
    found: dict[str, list[float]] = {}
    for label in half.classes:
        scores = left_out_scores(half, rows, plan, label)
        out = half.labels == label
        named = dict(zip((source.entry.source for source in plan.sources), scores, strict=True))
        for name, values in (named | {"combination": combined(maps, scores)}).items():
            found.setdefault(name, []).append(auroc(values[~out], values[out]))
    return {name: np.array(values) for name, values in found.items()}


def combined(maps: list[ScoreMap], scores: list[Scores64]) -> Scores64:
    """Return the sum of the mapped scores."""
    total: Scores64 = np.sum([m(s) for m, s in zip(maps, scores, strict=True)], axis=0)
    return total
