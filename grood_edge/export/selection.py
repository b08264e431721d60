"""Choose OOD prototypes and the size of the bank from ID images, and keep the table that decided."""

from dataclasses import dataclass, replace

import numpy as np

from grood_edge.arrays import Flags
from grood_edge.contract import BankTrial, Candidate, Selection
from grood_edge.export.bank import HeadPlan, fit_head
from grood_edge.export.features import FeatureTable
from grood_edge.export.leave_class_out import MAX_BANK, LeaveOut, class_aurocs, divisible_classes, leave_out
from grood_edge.export.ood_prototype import OodSource
from grood_edge.progress import Progress, silent
from grood_edge.scoring import Head, ood_scores

__all__ = ["MOST_ROWS", "BankChoice", "SourceChoice", "choose_bank", "choose_sources"]

BETTER_BY = 0.02  # AUROC that a single OOD prototype must gain over the combination,
STANDARD_ERRORS = 2.0  # and so many paired standard errors over classes
MOST_ROWS = 4096
SIZES = tuple(64 << i for i in range(7))
MANY_IMAGES = 4096
AUROC_LOSS = 0.001
CHANGED = 0.002


@dataclass(frozen=True)
class SourceChoice:
    """The OOD prototypes, the table that decided, and the leave-class-out AUROC of them all over every float32 row.

    full_auroc: None where they are not all kept, or nothing could be measured.
    """

    sources: tuple[OodSource, ...]
    selection: Selection
    full_auroc: float | None = None


@dataclass(frozen=True)
class BankChoice:
    """The bank's size (None: every gradient, 0: none), why, and what was measured."""

    rows: int | None
    reason: str
    trials: tuple[BankTrial, ...]


def choose_sources(
    table: FeatureTable, sources: tuple[OodSource, ...], plan: HeadPlan, progress: Progress = silent
) -> SourceChoice:
    """Choose among the sources and their combination by leave-class-out.

    The combination is kept unless one source alone is better by more than 2 points and 2 paired standard errors.

    Args:
        table: fit images; those that calibrate are not among them.
        sources: the combination; `mean` comes first.
        plan: scale and seed.
        progress: called as the work goes on.
    """
    classes = divisible_classes(table)
    if classes < 3:
        reason = f"with {classes} classes none can be left out, so nothing was chosen: mean is the default"
        return SourceChoice(sources[:1], Selection("auto", reason, classes, 0, ()))
    progress("choosing the OOD prototype", 0, None)
    half = leave_out(table, plan.seed)
    plan = _full(replace(plan, sources=sources))
    aurocs = class_aurocs(half, plan, fit_head(half.bank, plan))
    progress("choosing the OOD prototype", 1, 1)
    together = aurocs.pop("combination")
    candidates = [Candidate("combination", float(together.mean()), None, None)]
    for name, values in aurocs.items():
        gain = values - together
        error = float(gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else float("inf")
        candidates.append(Candidate(name, float(values.mean()), float(gain.mean()), error))
    chosen, reason = _decided(sources, candidates)
    rounded = tuple(_rounded(candidate) for candidate in candidates)
    selection = Selection("auto", reason, len(half.classes), len(half.labels), rounded)
    return SourceChoice(chosen, selection, float(together.mean()) if chosen == sources else None)


def _full(plan: HeadPlan) -> HeadPlan:
    """Return the plan with every bank row as it is: what the choices are measured with, and against."""
    return replace(plan, rows=None, dtype="float32")


def _decided(sources: tuple[OodSource, ...], candidates: list[Candidate]) -> tuple[tuple[OodSource, ...], str]:
    singles = {str(source.entry.source): source for source in sources}
    best = max((c for c in candidates if c.difference is not None), key=lambda c: c.auroc)
    assert best.difference is not None
    assert best.standard_error is not None
    if best.difference > max(BETTER_BY, STANDARD_ERRORS * best.standard_error):
        return (singles[best.name],), (
            f"{best.name} alone is better than the combination by {100 * best.difference:.1f} points of AUROC "
            f"(standard error {100 * best.standard_error:.1f})"
        )
    return sources, "no single OOD prototype is clearly better than the combination"


def _rounded(candidate: Candidate) -> Candidate:
    difference, error = (None if v is None else round(v, 6) for v in (candidate.difference, candidate.standard_error))
    return Candidate(candidate.name, round(candidate.auroc, 6), difference, error)


def choose_bank(
    table: FeatureTable, plan: HeadPlan, alpha: float, progress: Progress = silent, full_auroc: float | None = None
) -> BankChoice:
    """Choose the smallest bank that loses nothing against the full one.

    A size is good enough when its leave-class-out AUROC is at most 0.1 points below the full bank's, and when it
    decides at most 0.2 % of the ID images otherwise at the same false-alarm rate (0.5 % are accepted; this is an
    estimate from 1,000 images, with fewer images a row than in the end). Sizes: none, 64, 128, ... 4,096; found by
    bisection, as less is lost with more rows. `full_auroc` is measured where `choose_sources` has not done it.
    """
    classes = divisible_classes(table)
    kept = int((table.labels == table.predictions).sum())
    most = None if kept <= MOST_ROWS else MOST_ROWS
    if classes < 3:
        reason = f"with {classes} classes none can be left out, so no smaller bank was tried"
        return BankChoice(most, reason, ())
    trial = _SizeTrial.of(table, plan, alpha, full_auroc)
    sizes = [0, *(size for size in SIZES if size < trial.available)]
    trials = [BankTrial(trial.available, round(trial.full_auroc, 6), 0.0)]
    low, high = 0, len(sizes)  # the smallest good size is among sizes[low:high], or there is none
    while low < high:
        progress("choosing the bank's size", len(trials), None)
        middle = (low + high) // 2
        found = trial.measured(sizes[middle])
        trials.append(found)
        good = found.auroc >= trial.full_auroc - AUROC_LOSS and found.changed <= CHANGED
        low, high = (low, middle) if good else (middle + 1, high)
    if low == len(sizes):
        return BankChoice(most, f"no smaller bank decides like {trial.available:,} rows", tuple(trials))
    what = "log s alone" if low == 0 else f"{sizes[low]:,} rows"
    return BankChoice(sizes[low], f"{what}: the smallest that loses nothing against {trial.available:,}", tuple(trials))


@dataclass(frozen=True)
class _SizeTrial:
    """The full bank's measurements, and what is needed to make them for a smaller one.

    `few` has at most 2,048 bank images, and serves AUROCs with every class left out; `many` has up
    to 4,096, and serves decisions, which change more the more images a row stands for. They are one where there are no
    more images, so that a head is fitted once.
    """

    few: LeaveOut
    many: LeaveOut
    plan: HeadPlan
    alpha: float
    full_auroc: float
    full_flags: np.ndarray

    @staticmethod
    def of(table: FeatureTable, plan: HeadPlan, alpha: float, full_auroc: float | None) -> "_SizeTrial":
        few = many = leave_out(table, plan.seed, MANY_IMAGES)
        if len(many.bank.labels) > MAX_BANK:
            few = leave_out(table, plan.seed)
        if full_auroc is not None:
            return _SizeTrial(
                few, many, plan, alpha, full_auroc, _flags(many, fit_head(many.bank, _full(plan))[0], alpha)
            )
        return _SizeTrial(few, many, plan, alpha, *_auroc_and_flags(few, many, _full(plan), alpha))

    @property
    def available(self) -> int:
        """Rows of the full bank."""
        return int((self.many.bank.labels == self.many.bank.predictions).sum())

    def measured(self, rows: int) -> BankTrial:
        plan = replace(self.plan, rows=rows)
        auroc, flags = _auroc_and_flags(self.few, self.many, plan, self.alpha)
        return BankTrial(rows, round(auroc, 6), round(float((flags != self.full_flags).mean()), 6))


def _auroc_and_flags(few: LeaveOut, many: LeaveOut, plan: HeadPlan, alpha: float) -> tuple[float, np.ndarray]:
    """Return the mean AUROC of `few`, and marks on the images of `many` with the largest scores."""
    fitted = fit_head(many.bank, plan)
    flags = _flags(many, fitted[0], alpha)
    if few is not many:
        fitted = fit_head(few.bank, plan)
    return float(class_aurocs(few, plan, fitted)["combination"].mean()), flags


def _flags(half: LeaveOut, head: Head, alpha: float) -> Flags:
    """Mark the share alpha of the scored images with the largest scores."""
    scores = ood_scores(half.scored, head)
    flags = np.zeros(len(scores), bool)
    flags[np.argsort(-scores, kind="stable")[: max(1, round(alpha * len(scores)))]] = True
    return flags
