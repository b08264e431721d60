"""What an evaluation found, as frozen dataclasses: the terminal, `--json` and the report are made of these."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from grood_edge.evaluate.metrics import Interval, RiskCoverage
from grood_edge.evaluate.passes import ScoredSet

__all__ = ["BaselineResult", "ClassResult", "Evaluation", "IdResult", "OodResult", "Promise", "ShiftResult"]


@dataclass(frozen=True)
class ClassResult:
    """False alarms and accuracy on the ID images of one class (by folder name)."""

    name: str
    images: int
    accuracy: float
    false_alarms: int
    interval: Interval

    @property
    def rate(self) -> float:
        """Share of the class's images that are called OOD."""
        return self.false_alarms / self.images


@dataclass(frozen=True)
class IdResult:
    """The ID set. What needs labels is None for a flat folder; `accuracy_accepted` also when nothing is accepted."""

    folder: str
    images: int
    unreadable: int
    invalid: int
    false_alarms: int
    interval: Interval
    accuracy: float | None
    accuracy_accepted: float | None
    risk_coverage: RiskCoverage | None
    classes: tuple[ClassResult, ...]

    @property
    def rate(self) -> float:
        """The false-alarm rate: share of ID images that are called OOD."""
        return self.false_alarms / self.images


@dataclass(frozen=True)
class OodResult:
    """One OOD set against the ID set; shares in 0..1. `fpr95`: share of OOD accepted when 95 % of ID is accepted."""

    name: str
    folder: str
    images: int
    unreadable: int
    found: int
    auroc: float
    auroc_interval: Interval
    aupr_ood: float
    aupr_id: float
    fpr95: float

    @property
    def missed(self) -> float:
        """Share of the set's images that the artifact accepts as known."""
        return 1 - self.found / self.images


@dataclass(frozen=True)
class ShiftResult:
    """ID images under one corruption: they are still ID. `auroc` is against the same images without it."""

    kind: str
    strength: str
    images: int
    accuracy: float | None
    flagged: float
    auroc: float


@dataclass(frozen=True)
class BaselineResult:
    """One score against every OOD set, in their order; `ours` is the artifact's own ood_score."""

    name: str
    ours: bool
    aurocs: tuple[float, ...]
    fpr95s: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean AUROC over the OOD sets."""
        return float(np.mean(self.aurocs))


@dataclass(frozen=True)
class Promise:
    """The false alarms held against what the calibration promises.

    outcome: `kept`, `broken` (more than the 99 % band allows), `stricter` (fewer), `none` (nothing was promised) or
    `untested` (these images cannot test it); the last two have no band. `sentence` says it for people, with what to do.
    """

    outcome: Literal["kept", "broken", "stricter", "none", "untested"]
    count: int
    images: int
    band: tuple[int, int] | None
    sentence: str


@dataclass(frozen=True)
class Evaluation:
    """Everything: results, and the scored sets behind them for the figures.

    `threshold`: an image is OOD above it; None where each predicted class has a threshold of its own.
    """

    alpha: float
    threshold: float | None
    guarantee: str
    promise: Promise
    missed_most: str
    id: IdResult
    ood: tuple[OodResult, ...]
    shift: tuple[ShiftResult, ...]
    baselines: tuple[BaselineResult, ...]
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    id_set: ScoredSet
    ood_sets: tuple[ScoredSet, ...]
    classes: tuple[str, ...]

    @property
    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """(path, reason) over all sets."""
        return tuple(pair for one in (self.id_set, *self.ood_sets) for pair in one.unreadable)
