"""fp16 and int8: rewrite the classifier graph before features are extracted, and find out whether it decides alike.

So prototypes, bank and calibration belong to the precision that ships. A precision that costs too much gets its worst
layers back in float32, at most three times; what still costs too much is refused.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, cast

import numpy as np
from onnx import ModelProto, TensorProto

from grood_edge.contract import Precision, PrecisionTrial
from grood_edge.errors import ClassifierError, DatasetError, UsageError, VerificationError
from grood_edge.export.acceptance import FEW_IMAGES, Behaviour, Comparison, Judge, Limits, behaviour, compared
from grood_edge.export.bank import HeadPlan
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.dataset import Dataset
from grood_edge.export.features import FeaturePass, collect_features
from grood_edge.export.graph import base_model, network_input
from grood_edge.export.half import half_layer_errors, half_precision
from grood_edge.export.inputs import ExportOptions, Inputs, reading_of
from grood_edge.export.layers import WEIGHTED, LayerError, layers_named
from grood_edge.export.ood_prototype import plain_source
from grood_edge.export.quantize import choose_ranges, default_float_layers, layer_errors, quantized
from grood_edge.export.rounding import rounded
from grood_edge.export.scale import choose_scale, shuffled_features
from grood_edge.ort import open_ort
from grood_edge.preprocessing import Preprocessing
from grood_edge.progress import Progress

__all__ = ["PrecisionChoice", "choose_precision", "graph_precision"]

Lower = Literal["fp16", "int8"]
Name = Literal["fp32", "fp16", "int8"]

JUDGED_IMAGES = 2_000  # read for the comparison, in the data set's seeded order
RANGE_IMAGES = 128  # fit images that ranges of activations are measured on
ERROR_IMAGES = 8  # and layers compared on
TIMED_RUNS = 20
ROUNDS = 3  # of giving the worst layers back
WORST_SHARE = 0.5  # of the squared error that goes back in each


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
    if options.keep_float and asked in ("fp32", own):
        raise UsageError(f"--keep-float has no use: the classifier is {own} and stays so; leave it out")
    if asked in ("fp32", own):
        reason = "as asked for" if asked == own else f"the classifier came in {own}, and is used as it is"
        return PrecisionChoice(inputs.classifier, Precision(own, asked, reason, (), None, 0, 0, ()))
    if own != "fp32":
        raise ClassifierError(
            f"the classifier is {own} already, and --precision {asked} needs its float32 graph; export that one, or "
            "leave --precision out to use the graph as it is"
        )
    keep = layers_named(inputs.classifier, frozenset(options.keep_float))
    trial = _Trial.of(inputs, data(), options, progress)
    names: tuple[Lower, ...] = ("int8", "fp16") if asked == "auto" else (cast(Lower, asked),)
    attempts: list[_Attempt] = []
    for name in names:
        try:
            found = trial.attempts(name, keep, progress)
        except ClassifierError as error:
            if asked != "auto":
                raise
            trial.passed_over.append(f"{name} was passed over: {error}")
            continue
        attempts += found
        best = _best(found, trial.limits)
        if asked != "auto":
            trial.require_acceptable(best, progress)
            return trial.choice(best, attempts, asked)
    return trial.smallest(attempts, progress)


@dataclass(frozen=True)
class _Attempt:
    """A rewritten graph and what it costs; `comparison` is None where it overflowed."""

    name: Lower
    classifier: ClassifierGraph
    kept: frozenset[str]
    ranges: Literal["minmax", "entropy", "percentile"] | None
    comparison: Comparison | None


@dataclass(frozen=True)
class _Trial:
    """The float32 graph's behaviour on fit images, and the limits that others are held to."""

    classifier: ClassifierGraph
    preprocessing: Preprocessing
    judge: Judge
    reference: Behaviour
    limits: Limits
    notes: tuple[str, ...]
    passed_over: list[str] = field(default_factory=list)

    @staticmethod
    def of(inputs: Inputs, data: Dataset, options: ExportOptions, progress: Progress) -> "_Trial":
        found = _fit_images(inputs, data, options, progress)
        reading = replace(reading_of(inputs, options, hold_out=False), spool=None)
        judge = Judge(found.frames, found.frame_labels, found.frame_names, reading, options.alpha)
        base = base_model(inputs.classifier, inputs.preprocessing)
        if options.scale != "auto":
            judge = replace(judge, scale=float(options.scale))
        else:
            model = open_ort(base.SerializeToString())
            shuffled = shuffled_features(model, found, reading, progress)
            plan = HeadPlan((plain_source("mean"),), None, "float32", options.seed)
            judge = replace(judge, scale=choose_scale(judge.read(model).fit, shuffled, plan, progress).value)
        progress("judging fp32", 0, None)
        limits = Limits(options.max_auroc_drop, options.max_flips)
        reference = behaviour(judge, base, progress)
        notes = []
        if not len(reference.aurocs):
            notes.append(
                f"--max-auroc-drop was not looked at: the {len(judge.frames)} images that were compared leave fewer "
                "than three classes with two images"
            )
        if options.labels == "predicted" and inputs.calibration_data is None:
            notes.append(
                "of unlabelled images a few may both have judged the precision and calibrate; give separate ones with "
                "--calibration-data"
            )
        return _Trial(inputs.classifier, inputs.preprocessing, judge, reference, limits, tuple(notes))

    def attempts(self, name: Lower, keep: frozenset[str], progress: Progress) -> list[_Attempt]:
        """Rewrite the graph, judge it, and give the worst layers back while the limits are not kept."""
        way = _half(self, keep) if name == "fp16" else _int8(self, keep, progress)
        kept, found = way.kept, list[_Attempt]()
        for turn in range(ROUNDS + 1):
            progress(f"judging {name}" + (f", {turn} times relaxed" if turn else ""), 0, None)
            try:
                graph = way.rewritten(kept)
            except ClassifierError:
                if not found:
                    raise
                break  # nothing would be left in lower precision
            base = base_model(graph, self.preprocessing)
            attempt = _Attempt(name, graph, kept, way.ranges, self._compared(rounded(base) if name == "fp16" else base))
            found.append(attempt)
            if attempt.comparison is not None and attempt.comparison.within(self.limits):
                break
            worst = _worst(way.errors(kept))
            if turn == ROUNDS or not worst - kept:
                break
            kept |= worst
        return found

    def _compared(self, judged: ModelProto) -> Comparison | None:
        try:
            return compared(self.reference, behaviour(self.judge, judged))
        except (ClassifierError, DatasetError):  # features that are not finite, or no image recognised any more
            return None

    def network_images(self, count: int) -> np.ndarray:
        """Return some fit images as the network takes them, spread over the classes."""
        chosen = np.linspace(0, len(self.judge.frames) - 1, min(count, len(self.judge.frames))).astype(np.int64)
        return network_input(self.classifier, self.preprocessing, self.judge.frames[chosen])

    def require_acceptable(self, best: _Attempt, progress: Progress) -> None:
        """Refuse a precision that certainly costs too much, by the names of its worst layers."""
        if best.comparison is not None and not best.comparison.clearly_beyond(self.limits):
            return
        way = _half(self, best.kept) if best.name == "fp16" else _int8(self, best.kept, progress)
        names = ", ".join(f"{error.node} ({error.operator})" for error in way.errors(best.kept)[:3]) or "none"
        cost = "its features are not finite, or recognise no image"
        if best.comparison is not None:
            drop = best.comparison.auroc_drop
            lost = "" if drop is None else f" and the AUROC falls by {100 * drop:.2f} points"
            cost = f"{100 * best.comparison.flips:.1f} % of {best.comparison.images} decisions change{lost}"
        raise VerificationError(
            f"--precision {best.name} does not decide like float32: {cost}, with {len(best.kept)} layers kept in "
            f"float32 (accepted: {100 * self.limits.flips:g} %, {100 * self.limits.auroc_drop:g} points). Layers with "
            f"the largest error: {names}. Keep more in float32 with --keep-float NAME, accept more with --max-flips "
            "and --max-auroc-drop, or use --precision fp16 or auto; nothing was written"
        )

    def choice(self, best: _Attempt, attempts: list[_Attempt], asked: str) -> PrecisionChoice:
        assert best.comparison is not None
        warnings = [*self.notes, *self.passed_over]
        if not best.comparison.within(self.limits):
            warnings.append(
                f"{best.name} costs more than was asked for ({100 * best.comparison.flips:.1f} % of "
                f"{best.comparison.images} decisions differ from float32), but these are too few images to be sure. "
                f"Kept in float32: {', '.join(sorted(best.kept)[:5]) or 'nothing'}"
            )
        elif best.comparison.images < FEW_IMAGES:
            warnings.append(
                f"{best.name} was judged on {best.comparison.images} images; {FEW_IMAGES} or more say more about it"
            )
        reason = "the smallest that decides like float32" if asked == "auto" else "as asked for"
        kept = len(best.kept)
        reason += f", with {kept} layers in float32" if kept else ""
        return PrecisionChoice(best.classifier, self.entry(best, asked, reason, attempts), tuple(warnings))

    def smallest(self, attempts: list[_Attempt], progress: Progress) -> PrecisionChoice:
        """Return the smallest graph that keeps the limits, which may be the float32 one."""
        good = [a for a in attempts if a.comparison is not None and a.comparison.within(self.limits)]
        speeds = self.speeds(good, progress)
        if good:
            smallest = min(good, key=lambda attempt: _size(attempt.classifier))
            return replace(self.choice(smallest, attempts, "auto"), speeds=speeds)
        reason = (
            "neither int8 nor fp16 keeps the limits" if attempts else "the graph can be written in no other precision"
        )
        entry = self.entry("fp32", "auto", reason, attempts)
        return PrecisionChoice(self.classifier, entry, (*self.notes, *self.passed_over))

    def speeds(self, attempts: list[_Attempt], progress: Progress) -> tuple[tuple[Lower, float], ...]:
        """Time one image at a time, the graphs in turn."""
        progress("timing", 0, None)
        graphs = [self.classifier, *(attempt.classifier for attempt in attempts)]
        models = [open_ort(base_model(graph, self.preprocessing).SerializeToString()) for graph in graphs]
        frame = {"image": self.judge.frames[:1]}
        times = np.zeros((TIMED_RUNS, len(models)))
        for turn in range(TIMED_RUNS):
            for index, model in enumerate(models):
                start = time.perf_counter()
                model.run(frame, ["logits"])
                times[turn, index] = time.perf_counter() - start
        ratios = np.median(times[TIMED_RUNS // 4 :], axis=0) / np.median(times[TIMED_RUNS // 4 :, 0])
        return tuple((a.name, round(float(ratio), 3)) for a, ratio in zip(attempts, ratios[1:], strict=True))

    def entry(self, best: "_Attempt | Literal['fp32']", asked: str, reason: str, attempts: list[_Attempt]) -> Precision:
        lowered = None if best == "fp32" else best
        return Precision(
            name="fp32" if lowered is None else lowered.name,
            asked=asked,
            reason=reason,
            float_layers=() if lowered is None else tuple(sorted(lowered.kept)),
            ranges=None if lowered is None else lowered.ranges,
            images=len(self.judge.frames),
            float32_size=_size(self.classifier),
            trials=tuple(_entry(attempt) for attempt in attempts),
        )


@dataclass(frozen=True)
class _Way:
    """How a precision is made: from the layers kept in float32 to a graph, and to the error of each other layer."""

    rewritten: Callable[[frozenset[str]], ClassifierGraph]
    errors: Callable[[frozenset[str]], list[LayerError]]
    kept: frozenset[str] = frozenset()
    ranges: Literal["minmax", "entropy", "percentile"] | None = None


def _half(trial: _Trial, keep: frozenset[str]) -> _Way:
    images = trial.network_images(ERROR_IMAGES)
    return _Way(
        lambda kept: half_precision(trial.classifier, kept),
        lambda kept: half_layer_errors(trial.classifier, images, kept),
        keep,
    )


def _int8(trial: _Trial, keep: frozenset[str], progress: Progress) -> _Way:
    progress("measuring ranges of activations", 0, None)
    images = trial.network_images(RANGE_IMAGES)
    kept = keep | default_float_layers(trial.classifier)
    ranges, _ = choose_ranges(trial.classifier, images, kept)
    return _Way(
        lambda chosen: quantized(trial.classifier, ranges, chosen),
        lambda chosen: layer_errors(trial.classifier, ranges, images[:: max(1, len(images) // ERROR_IMAGES)], chosen),
        kept,
        ranges.method,
    )


def _fit_images(inputs: Inputs, data: Dataset, options: ExportOptions, progress: Progress) -> FeaturePass:
    """Read some images with the float32 graph; those that will calibrate are not among the frames that it keeps."""
    reading = replace(reading_of(inputs, options, hold_out=inputs.calibration_data is None), spool=None)
    some = replace(
        data,
        samples=lambda on_unreadable: islice(data.samples(on_unreadable), JUDGED_IMAGES),
        count=None if data.count is None else min(data.count, JUDGED_IMAGES),
    )
    model = open_ort(base_model(inputs.classifier, inputs.preprocessing).SerializeToString())
    return collect_features(some, model, reading, progress)


def _best(attempts: list[_Attempt], limits: Limits) -> _Attempt:
    """Return the first that keeps the limits, else the one with the fewest changed decisions."""
    judged = [(a, a.comparison) for a in attempts if a.comparison is not None]
    good = [attempt for attempt, comparison in judged if comparison.within(limits)]
    if good:
        return good[0]
    return min(judged, key=lambda pair: (pair[1].clearly_beyond(limits), pair[1].flips))[0] if judged else attempts[-1]


def _worst(errors: list[LayerError]) -> frozenset[str]:
    """Return the layers that make up half of the squared error, all that overflow among them."""
    infinite = [e.node for e in errors if not np.isfinite(e.error)]
    finite = sorted((e for e in errors if np.isfinite(e.error)), key=lambda e: -e.error)
    squares = np.array([e.error**2 for e in finite])
    if infinite or not squares.sum() > 0:
        return frozenset(infinite)
    count = int(np.searchsorted(np.cumsum(squares), WORST_SHARE * squares.sum())) + 1
    return frozenset(e.node for e in finite[:count])


def _entry(attempt: _Attempt) -> PrecisionTrial:
    c = attempt.comparison
    return PrecisionTrial(
        precision=attempt.name,
        float_layers=len(attempt.kept),
        size=_size(attempt.classifier),
        feature_error=None if c is None else c.feature_error,
        auroc_drop=None if c is None else c.auroc_drop,
        auroc_drop_bound=None if c is None else c.auroc_drop_bound,
        flips=1.0 if c is None else c.flips,
        flips_bound=1.0 if c is None else c.flips_bound,
    )


def _size(classifier: ClassifierGraph) -> int:
    return len(classifier.model.SerializeToString())
