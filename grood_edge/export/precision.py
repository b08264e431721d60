"""fp16 and int8: rewrite the classifier graph before features are extracted, and find out whether it decides alike.

So prototypes, bank and calibration belong to the precision that ships. A precision that costs too much gets its worst
layers back in float32, at most three times; what still costs too much is refused (`precision_trial`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, cast

from onnx import ModelProto, TensorProto

from grood_edge.contract import Precision
from grood_edge.errors import ClassifierError, UsageError
from grood_edge.export.acceptance import FEW_IMAGES, Judge, Limits, behaviour_of
from grood_edge.export.bank import HeadPlan
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.dataset import Dataset, OnUnreadable, Sample, Work, as_it_is
from grood_edge.export.features import collect_features
from grood_edge.export.graph import base_model
from grood_edge.export.inputs import ExportOptions, Inputs, reading_of
from grood_edge.export.layers import WEIGHTED, layers_named
from grood_edge.export.ood_prototype import plain_source
from grood_edge.export.precision_trial import Attempt, Lower, Trial, best_attempt, graph_size
from grood_edge.export.scale import choose_scale, shuffled_features
from grood_edge.ort import open_ort
from grood_edge.progress import Progress

__all__ = ["PrecisionChoice", "choose_precision", "graph_precision"]

Name = Literal["fp32", "fp16", "int8"]

JUDGED_IMAGES = 2_000  # read for the comparison, in the data set's seeded order


@dataclass(frozen=True)
class PrecisionChoice:
    """The classifier in the precision that ships, its entry in the contract, and what the user should know.

    speeds: of `auto`, the time of one image over the float32 graph's, on onnxruntime's CPU provider on this machine. It
    says nothing about another device, and decides nothing.
    """

    classifier: ClassifierGraph
    entry: Precision
    warnings: tuple[str, ...] = ()
    speeds: tuple[tuple[Lower, float], ...] = ()


def graph_precision(model: ModelProto) -> Name:
    """Return the precision of a classifier graph as it is: what its operators and weights say."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "int8"
    half = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    products = [node for node in model.graph.node if node.op_type in WEIGHTED]
    return "fp16" if any(half.intersection(node.input) for node in products) else "fp32"


def choose_precision(
    inputs: Inputs, data: Callable[[], Dataset], options: ExportOptions, progress: Progress
) -> PrecisionChoice:
    """Return the classifier in the precision that was asked for, or that `auto` chose.

    Args:
        inputs: what the user handed in.
        data: opens the ID images once more: they are read here and again for the statistics.
        options: `precision`, `keep_float`, `max_auroc_drop` and `max_flips`.
        progress: called as the work goes on.

    Raises:
        ClassifierError: the graph cannot be rewritten.
        VerificationError: the precision costs more than the limits, with confidence 95 %.
        UsageError: layers to keep in float32 where nothing is lowered.
    """
    own, asked = graph_precision(inputs.classifier.model), options.precision
    if asked in ("fp32", own):
        if options.keep_float:
            raise UsageError(f"--keep-float has no use: the classifier is {own} and stays so; leave it out")
        reason = "as asked for" if asked == own else f"the classifier came in {own}, and is used as it is"
        return PrecisionChoice(inputs.classifier, Precision(own, asked, reason, (), None, 0, 0, ()))
    if own != "fp32":
        raise ClassifierError(
            f"the classifier is {own} already, and --precision {asked} needs its float32 graph; export that one, or "
            "leave --precision out to use the graph as it is"
        )
    keep = layers_named(inputs.classifier, frozenset(options.keep_float))
    trial = _trial(inputs, data(), options, progress)
    notes = _notes(trial, inputs, options)
    if asked == "auto":
        return _smallest(trial, keep, notes, progress)
    attempts = trial.attempts(cast(Lower, asked), keep, progress)
    best = best_attempt(attempts, trial.limits)
    best.require_acceptable(trial.limits)
    return _chosen(trial, best, attempts, (asked, "as asked for"), notes)


def _smallest(trial: Trial, keep: frozenset[str], notes: list[str], progress: Progress) -> PrecisionChoice:
    """Return the smallest graph that keeps the limits, which may be the float32 one."""
    attempts: list[Attempt] = []
    names: tuple[Lower, ...] = ("int8", "fp16")
    for name in names:
        try:
            attempts += trial.attempts(name, keep, progress)
        except ClassifierError as error:
            notes.append(f"{name} was passed over: {error}")
    good = [attempt for attempt in attempts if attempt.within(trial.limits)]
    if good:
        smallest = min(good, key=lambda attempt: graph_size(attempt.classifier))
        reason = "the smallest that decides like float32"
        chosen = _chosen(trial, smallest, attempts, ("auto", reason), notes)
        return replace(chosen, speeds=trial.speeds(good, progress))
    reason = "neither int8 nor fp16 keeps the limits" if attempts else "the graph can be written in no other precision"
    return PrecisionChoice(trial.classifier, trial.entry(None, "auto", reason, attempts), tuple(notes))


def _chosen(
    trial: Trial, best: Attempt, attempts: list[Attempt], asked_and_reason: tuple[str, str], notes: list[str]
) -> PrecisionChoice:
    comparison, (asked, reason) = best.comparison, asked_and_reason
    assert comparison is not None
    if not best.within(trial.limits):
        notes.append(
            f"{best.name} costs more than was asked for ({100 * comparison.flips:.1f} % of {comparison.images} "
            "decisions differ from float32), but these are too few images to be sure. Kept in float32: "
            f"{', '.join(sorted(best.kept)[:5]) or 'nothing'}"
        )
    elif comparison.images < FEW_IMAGES:
        notes.append(f"{best.name} was judged on {comparison.images} images; {FEW_IMAGES} or more say more about it")
    reason += f", with {len(best.kept)} layers in float32" if best.kept else ""
    return PrecisionChoice(best.classifier, trial.entry(best, asked, reason, attempts), tuple(notes))


def _trial(inputs: Inputs, data: Dataset, options: ExportOptions, progress: Progress) -> Trial:
    """Read some images with the float32 graph, and judge it; those that will calibrate are not among them."""
    base = base_model(inputs.classifier, inputs.preprocessing)
    model = open_ort(base.SerializeToString())

    def first(on_unreadable: OnUnreadable, work: Work = as_it_is) -> Iterator[Sample]:
        return islice(data.samples(on_unreadable, work), JUDGED_IMAGES)

    some = replace(
        data,
        samples=first,
        count=None if data.count is None else min(data.count, JUDGED_IMAGES),
    )
    reading = reading_of(inputs, options, hold_out=inputs.calibration_data is None)
    found = collect_features(some, model, reading, progress)
    reading = replace(reading, hold_out=False)
    judge = Judge(found.frames, found.frame_labels, found.frame_names, reading, options.alpha)
    judged = judge.read(model)
    scale = options.scale
    if scale == "auto":
        shuffled = shuffled_features(model, found, reading, progress)
        plan = HeadPlan((plain_source("mean"),), None, "float32", options.seed)
        scale = choose_scale(judged.fit, shuffled, plan, progress).value
    judge = replace(judge, scale=float(scale))
    progress("judging fp32", 0, None)
    reference = behaviour_of(judge, base, model, judged, progress)
    limits = Limits(options.max_auroc_drop, options.max_flips)
    return Trial(inputs.classifier, inputs.preprocessing, judge, reference, limits)


def _notes(trial: Trial, inputs: Inputs, options: ExportOptions) -> list[str]:
    """Say what the comparison cannot tell."""
    notes = []
    if not len(trial.reference.aurocs):
        notes.append(
            f"--max-auroc-drop was not looked at: the {len(trial.judge.frames)} images that were compared leave fewer "
            "than three classes with two images"
        )
    if options.labels == "predicted" and inputs.calibration_data is None:
        notes.append(
            "of unlabelled images a few may both have judged the precision and calibrate; give separate ones with "
            "--calibration-data"
        )
    return notes
