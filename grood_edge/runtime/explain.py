"""Why a frame got its score: the nearest class, log s, and the bank row that its gradient is nearest to."""

from dataclasses import dataclass

import numpy as np

from grood_edge.contract import Contract
from grood_edge.outputs import Outputs
from grood_edge.scoring import Head, class_distances, nearest_rows

__all__ = ["Reason", "reasons"]


@dataclass(frozen=True)
class Reason:
    """What stands behind one frame's score.

    nearest_class: of the class prototypes, by distance; it may differ from the network's class. log_s: log of the OOD
    probability for each OOD prototype, by its source; near 0 means "as near to the OOD prototype as to any class".
    bank_class, bank_path: class of the bank row nearest from the first OOD prototype, and the image behind it; None
    without a bank, or where the export did not keep paths.
    """

    nearest_class: str
    log_s: dict[str, float]
    bank_class: str | None
    bank_path: str | None


def reasons(outputs: Outputs, contract: Contract, head: Head) -> list[Reason | None]:
    """Return the reason behind each row of the outputs; None for rows that are not valid."""
    found: list[Reason | None] = [None] * len(outputs)
    rows = np.flatnonzero(outputs.valid)
    if len(rows) == 0:
        return found
    features = getattr(outputs, contract.space)[rows].astype(np.float64)
    nearest = nearest_rows(features, head)
    without = set(contract.fit.classes_without_prototype)
    modelled = [name for name in contract.classes if name not in without]
    classes = class_distances(features, head.prototypes).argmin(axis=1)
    row_classes, paths = contract.bank.row_classes(), contract.bank.paths
    sources = [prototype.source for prototype in contract.ood_prototypes]
    for index, row in enumerate(rows):
        bank_row = int(nearest[0].row[index])
        found[row] = Reason(
            nearest_class=modelled[classes[index]],
            log_s={source: float(n.log_s[index]) for source, n in zip(sources, nearest, strict=True)},
            bank_class=contract.classes[row_classes[bank_row]] if bank_row >= 0 else None,
            bank_path=paths[bank_row] if bank_row >= 0 and paths else None,
        )
    return found
