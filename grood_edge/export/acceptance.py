"""Does a graph of lower precision decide like the float32 one? Asked of fit images alone, never of calibration images.

Both graphs get heads of their own, fitted to their own features. A decision is `is_ood` and `class_id`: every image is
scored by a head that was fitted without it, and the threshold is each graph's own quantile. AUROC is lost or won with
a class left out (`leave_class_out`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from grood_edge.arrays import Features64, Flags, Frames, Labels
from grood_edge.export.bank import HeadPlan, fit_head
from grood_edge.export.calibration import cross_fitted_scores
from grood_edge.export.dataset import Dataset, OnUnreadable, Sample, Work, as_it_is
from grood_edge.export.features import FeaturePass, Reading, collect_features
from grood_edge.export.leave_class_out import class_aurocs, divisible_classes, leave_out
from grood_edge.export.mixup import FEATURES, mixup_source
from grood_edge.export.ood_prototype import plain_source
from grood_edge.ort import OrtModel, open_ort
from grood_edge.progress import Progress, silent

__all__ = [
    "CONFIDENCE",
    "FEW_IMAGES",
    "Behaviour",
    "Comparison",
    "Judge",
    "Limits",
    "behaviour",
    "behaviour_of",
    "compared",
]

CONFIDENCE = 0.95  # of the one-sided bounds
FEW_IMAGES = 300  # below, nothing is refused: the bounds are too wide to mean much


@dataclass(frozen=True)
class Limits:
    """What a lower precision may cost: mean AUROC over left-out classes, and the share of other decisions."""

    auroc_drop: float
    flips: float


@dataclass(frozen=True)
class Judge:
    """The fit images that graphs are compared on, uint8 `[n, h, w, c]`, and how they are read and decided.

    labels int64 `[n]` and names `[n]` are those of the float32 graph's pass. scale: of the distances.
    """

    frames: Frames
    labels: Labels
    names: tuple[str, ...]
    reading: Reading
    alpha: float
    scale: float = 1.0

    def dataset(self) -> Dataset:
        """Return the frames as a data set."""

        def samples(_: OnUnreadable, work: Work = as_it_is) -> Iterator[Sample]:
            for name, frame, label in zip(self.names, self.frames, self.labels, strict=True):
                yield work(Sample(name, frame, int(label)))

        return Dataset("fit images", None, len(self.frames), samples)

    def read(self, model: OrtModel, progress: Progress = silent) -> FeaturePass:
        """Run a graph over the frames; every row is kept, in order."""
        return collect_features(self.dataset(), model, self.reading, progress)


@dataclass(frozen=True)
class Behaviour:
    """What a graph makes of the judge's frames: features float64 `[n, d]`, flags bool `[n]`, class_ids int64 `[n]`.

    aurocs float64: of each left-out class; empty with fewer than three classes.
    """

    features: Features64
    flags: Flags
    class_ids: Labels
    aurocs: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """A graph against the float32 one: see `contract.PrecisionTrial` for the words."""

    images: int
    feature_error: float
    auroc_drop: float | None
    auroc_drop_bound: float | None
    flips: float
    flips_bound: float

    def within(self, limits: Limits) -> bool:
        """Tell whether the measured values keep the limits."""
        return self.flips <= limits.flips and (self.auroc_drop is None or self.auroc_drop <= limits.auroc_drop)

    def clearly_beyond(self, limits: Limits) -> bool:
        """Tell whether a limit is exceeded with confidence 95 %, on enough images."""
        drop = -np.inf if self.auroc_drop_bound is None else self.auroc_drop_bound
        return self.images >= FEW_IMAGES and bool(self.flips_bound > limits.flips or drop > limits.auroc_drop)


def behaviour(judge: Judge, graph: ModelProto, progress: Progress = silent) -> Behaviour:
    """Run a graph (`image` to `features` and `logits`) over the frames; decide each with a head fitted without it.

    Raises:
        ClassifierError: features that are not finite: the precision overflows.
        DatasetError: no image is classified correctly.
    """
    model = open_ort(graph.SerializeToString())
    return behaviour_of(judge, graph, model, judge.read(model, progress), progress)


def behaviour_of(
    judge: Judge, graph: ModelProto, model: OrtModel, found: FeaturePass, progress: Progress = silent
) -> Behaviour:
    """Return the behaviour of a graph that is open, and has run over the frames already.

    Raises:
        DatasetError: no image is classified correctly.
    """
    table = found.fit
    mixup = mixup_source(graph, model, found, judge.reading, FEATURES, progress)
    sources = (plain_source("mean"), mixup, plain_source("origin"))  # the default's: no image beyond the judge's
    plan = HeadPlan(sources, None, "float32", judge.reading.seed, judge.scale)
    scores = cross_fitted_scores(table, plan, progress)
    alarms = max(1, round(judge.alpha * len(scores)))
    flags = np.zeros(len(scores), bool)
    flags[np.argsort(-scores, kind="stable")[:alarms]] = True
    aurocs = np.zeros(0)
    if divisible_classes(table) >= 3:
        half = leave_out(table, plan.seed)
        aurocs = class_aurocs(half, plan, fit_head(half.bank, plan))["combination"]
    return Behaviour(table.features.astype(np.float64), flags, table.predictions, aurocs)


def compared(reference: Behaviour, other: Behaviour) -> Comparison:
    """Compare a graph with the float32 one on the same frames.

    The bound of the flips is Clopper and Pearson's; that of the AUROC is Student's over the left-out classes, paired.
    """
    from scipy import stats  # comes with scikit-learn, which `export` installs

    n = len(reference.flags)
    changed = int(((reference.flags != other.flags) | (reference.class_ids != other.class_ids)).sum())
    bound = float(stats.beta.ppf(1 - CONFIDENCE, changed, n - changed + 1)) if changed else 0.0
    drop = drop_bound = None
    if len(reference.aurocs):
        lost = reference.aurocs - other.aurocs
        drop = float(lost.mean())
        error = float(lost.std(ddof=1)) / np.sqrt(len(lost))
        drop_bound = drop - float(stats.t.ppf(CONFIDENCE, len(lost) - 1)) * error
    centred = reference.features - reference.features.mean(axis=0)
    distance = np.linalg.norm(other.features - reference.features, axis=1).mean()
    return Comparison(
        images=n,
        feature_error=round(float(distance / max(np.linalg.norm(centred, axis=1).mean(), 1e-30)), 6),
        auroc_drop=None if drop is None else round(drop, 6),
        auroc_drop_bound=None if drop_bound is None else round(float(drop_bound), 6),
        flips=round(changed / n, 6),
        flips_bound=round(bound, 6),
    )
