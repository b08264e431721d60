"""The spine: folders -> one pass a set -> results. Nothing is written here."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grood_edge.arrays import Flags, Frame, Scores
from grood_edge.artifact import read_artifact
from grood_edge.errors import DatasetError, UsageError
from grood_edge.evaluate.baselines import Baselines, build_baselines
from grood_edge.evaluate.corruption import ShiftedRows, score_corrupted
from grood_edge.evaluate.decision import one_threshold
from grood_edge.evaluate.fitted import collect_fit
from grood_edge.evaluate.linear import NoLinearLayer, read_linear_layer
from grood_edge.evaluate.metrics import aupr, auroc, auroc_interval, fpr95, rate_interval, risk_coverage
from grood_edge.evaluate.passes import BATCH_IMAGES, ScoredSet, score_set
from grood_edge.evaluate.promise import check_promise, sentence_of_missed
from grood_edge.evaluate.results import BaselineResult, ClassResult, Evaluation, IdResult, OodResult, ShiftResult
from grood_edge.evaluate.sets import FolderSet, id_set, ood_set, overlaps, require_every_class
from grood_edge.images import UnreadableImageError, load_image
from grood_edge.progress import Progress, silent
from grood_edge.ray_engine import Engine, opened_engine, require_engine
from grood_edge.runtime.session import Session
from grood_edge.runtime.shards import workers_for

__all__ = ["EvaluateOptions", "evaluate"]

OURS = "GROOD (this artifact)"
FEW = 100  # images below which an interval is too wide to decide on


@dataclass(frozen=True)
class EvaluateOptions:
    """What to compare. `ood`: (name, folder). `fit`: the images that export got, for the baselines that need them.

    engine: `ray` spreads the passes over the sets on a cluster, that of `ray_address` or one on this machine.
    """

    model: Path
    id_folder: Path
    ood: tuple[tuple[str, Path], ...]
    corrupt: bool = False
    baselines: bool = False
    fit: str | None = None
    allow_unreadable: bool = False
    engine: Engine = "local"
    ray_address: str | None = None


def evaluate(session: Session, options: EvaluateOptions, progress: Progress = silent) -> Evaluation:
    """Score every set once and compute everything that the report shows.

    Raises:
        UsageError: `fit` without `baselines`; a Ray address without `engine="ray"`, or a session on another backend.
        DatasetError: folders that are missing, too small, unreadable or no classes, or scores that are all equal.
        MissingExtraError: baselines without onnx, `engine="ray"` without Ray.
        BackendError: the device or the cluster failed.
    """
    if options.fit is not None and not options.baselines:
        raise UsageError("--fit is for the baselines alone; add --baselines, or leave it out")
    require_engine(options.engine, options.ray_address)
    classes = session.contract.classes
    known, warnings = id_set(options.id_folder, classes)
    require_every_class(known, classes, session.contract.fit.classes_without_prototype)
    others = [ood_set(name, folder) for name, folder in options.ood]
    warnings += overlaps([known, *others], progress)
    baselines, more = _baselines(session, options, known, progress) if options.baselines else (None, ())
    with opened_engine(options.engine, options.ray_address) as cluster:
        workers = None if cluster is None else workers_for(cluster, options.model, session)
        scored_id, *scored_ood = [
            score_set(one, session, baselines, options.allow_unreadable, progress, workers) for one in (known, *others)
        ]
    _require_spread([scored_id, *scored_ood])
    shifted = score_corrupted(scored_id, session, progress=progress) if options.corrupt else ()
    ood = tuple(_ood_result(scored_id, one) for one in scored_ood)
    return Evaluation(
        alpha=session.alpha,
        threshold=one_threshold(session),
        guarantee=session.contract.calibration.guarantee,
        promise=check_promise(session, scored_id),
        missed_most=sentence_of_missed(ood),
        id=_id_result(scored_id, classes),
        ood=ood,
        shift=tuple(_shift_result(scored_id, one) for one in shifted),
        baselines=_compared(scored_id, scored_ood) if options.baselines else (),
        left_out=baselines.left_out if baselines else (),
        warnings=(*warnings, *more, *_doubts(scored_id, scored_ood, classes)),
        id_set=scored_id,
        ood_sets=tuple(scored_ood),
        classes=classes,
    )


def _require_spread(sets: list[ScoredSet]) -> None:
    scores = np.concatenate([one.rows.scores for one in sets])
    if scores.min() == scores.max():
        reason = (
            "no image gave finite features: check the model with grood-edge verify"
            if not any(one.rows.valid.any() for one in sets)
            else "the score cannot tell anything apart: check that the folders hold different images, and export again"
        )
        raise DatasetError(f"all {scores.size} images have the same ood_score {scores[0]:.5g}; {reason}")


def _doubts(known: ScoredSet, others: list[ScoredSet], classes: tuple[str, ...]) -> tuple[str, ...]:
    doubts: list[str] = []
    if known.labels is None:
        doubts.append(
            f"{known.folder} has no class folders, so accuracy, risk and false alarms by class are unknown; put the "
            "images into folders named like the classes to get them"
        )
    for one in (known, *others):
        if len(one.paths) < FEW:
            doubts.append(f'"{one.name}" has {len(one.paths)} images: the intervals are wide; {FEW} or more are better')
        if invalid := int((~one.rows.valid).sum()):
            doubts.append(
                f'{invalid} images of "{one.name}" gave features or logits that are not finite; they count as OOD with '
                "the highest score"
            )
    return tuple(doubts)


def _id_result(known: ScoredSet, classes: tuple[str, ...]) -> IdResult:
    rows, labels = known.rows, known.labels
    count = int(rows.flagged.sum())
    right = None if labels is None else labels == rows.class_ids
    accepted = ~rows.flagged
    return IdResult(
        folder=str(known.folder),
        images=len(known.paths),
        unreadable=len(known.unreadable),
        invalid=int((~rows.valid).sum()),
        false_alarms=count,
        interval=rate_interval(count, len(known.paths)),
        accuracy=None if right is None else float(right.mean()),
        accuracy_accepted=None if right is None or not accepted.any() else float(right[accepted].mean()),
        risk_coverage=None if right is None else risk_coverage(rows.scores, ~right),
        classes=() if right is None else _class_results(known, right, classes),
    )


def _class_results(known: ScoredSet, right: Flags, classes: tuple[str, ...]) -> tuple[ClassResult, ...]:
    assert known.labels is not None
    results = []
    for label in np.unique(known.labels):
        chosen = known.labels == label
        count, images = int(known.rows.flagged[chosen].sum()), int(chosen.sum())
        interval = rate_interval(count, images)
        results.append(ClassResult(classes[label], images, float(right[chosen].mean()), count, interval))
    return tuple(results)


def _ood_result(known: ScoredSet, other: ScoredSet) -> OodResult:
    id_scores, scores = known.rows.scores, other.rows.scores
    return OodResult(
        name=other.name,
        folder=str(other.folder),
        images=len(other.paths),
        unreadable=len(other.unreadable),
        found=int(other.rows.flagged.sum()),
        auroc=auroc(id_scores, scores),
        auroc_interval=auroc_interval(id_scores, scores),
        aupr_ood=aupr(scores, id_scores),
        aupr_id=aupr(-id_scores, -scores),
        fpr95=fpr95(id_scores, scores),
    )


def _shift_result(clean: ScoredSet, shifted: ShiftedRows) -> ShiftResult:
    rows = shifted.rows
    labels = None if clean.labels is None else clean.labels[shifted.picked]
    return ShiftResult(
        kind=shifted.corruption.kind,
        strength=shifted.corruption.strength,
        images=len(shifted.picked),
        accuracy=None if labels is None else float((labels == rows.class_ids).mean()),
        flagged=float(rows.flagged.mean()),
        auroc=auroc(clean.rows.scores[shifted.picked], rows.scores),
    )


def _baselines(
    session: Session, options: EvaluateOptions, known: FolderSet, progress: Progress
) -> tuple[Baselines, tuple[str, ...]]:
    frames: list[Frame] = []
    for path in known.paths:
        if len(frames) == BATCH_IMAGES:
            break
        try:
            frames.append(load_image(path))
        except UnreadableImageError:
            continue  # counted and reported by the pass
    if not frames:
        raise DatasetError(f"none of the {len(known.paths)} images in {known.folder} can be read")
    outputs = session.infer(frames)
    features, logits = outputs.features[outputs.valid], outputs.logits[outputs.valid]
    linear, reason = None, ""
    try:
        linear = read_linear_layer(read_artifact(options.model), features, logits)
    except NoLinearLayer as found:
        reason = f"needs logits that are W h + b: {found}"
    fit = None if options.fit is None else collect_fit(session, options.fit, progress=progress)
    warnings: tuple[str, ...] = ()
    if fit is not None and fit.digest != session.contract.fit.data_digest:
        warnings = (
            f"--fit {options.fit} holds other images than this artifact was fitted on ({fit.images:,} images now, "
            f"{session.contract.fit.images:,} then): baselines that learn from them do not compare like with like",
        )
    return build_baselines(fit, linear, reason, features), warnings


def _compared(known: ScoredSet, others: list[ScoredSet]) -> tuple[BaselineResult, ...]:
    """Ours and the baselines, best mean AUROC first."""

    def scores_of(one: ScoredSet, name: str) -> Scores:
        return one.rows.scores if name == OURS else one.rows.others[name]

    results = [
        BaselineResult(
            name,
            name == OURS,
            tuple(auroc(scores_of(known, name), scores_of(one, name)) for one in others),
            tuple(fpr95(scores_of(known, name), scores_of(one, name)) for one in others),
        )
        for name in (OURS, *known.rows.others)
    ]
    return tuple(sorted(results, key=lambda result: -result.mean))
