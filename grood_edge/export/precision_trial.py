"""A lower precision on trial: rewritten, judged on fit images, its worst layers given back, and judged again."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from onnx import ModelProto

from grood_edge.contract import Precision, PrecisionTrial
from grood_edge.errors import ClassifierError, DatasetError, VerificationError
from grood_edge.export.acceptance import Behaviour, Comparison, Judge, Limits, behaviour, compared
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.graph import base_model, network_input
from grood_edge.export.half import half_layer_errors, half_precision
from grood_edge.export.layers import LayerError
from grood_edge.export.quantize import choose_ranges, default_float_layers, layer_errors, quantized
from grood_edge.export.ranges import RangeMethod
from grood_edge.export.rounding import rounded
from grood_edge.ort import open_ort
from grood_edge.preprocessing import Preprocessing
from grood_edge.progress import Progress

__all__ = ["Attempt", "Lower", "Trial", "best_attempt", "graph_size"]

Lower = Literal["fp16", "int8"]

RANGE_IMAGES = 128  # fit images that ranges of activations are measured on
ERROR_IMAGES = 8  # and layers compared on
TIMED_RUNS = 20
ROUNDS = 3  # of giving the worst layers back
WORST_SHARE = 0.5  # of the squared error that goes back in each


@dataclass(frozen=True)
class Attempt:
    """A rewritten graph and what it costs; `comparison` is None where it overflowed.

    errors: of its layers, largest first; empty where it keeps the limits, and nobody asked.
    """

    name: Lower
    classifier: ClassifierGraph
    kept: frozenset[str]
    ranges: RangeMethod | None
    comparison: Comparison | None
    errors: tuple[LayerError, ...] = ()

    def within(self, limits: Limits) -> bool:
        """Tell whether the measured values keep the limits."""
        return self.comparison is not None and self.comparison.within(limits)

    def require_acceptable(self, limits: Limits) -> None:
        """Refuse a precision that certainly costs too much, by the names of its worst layers.

        Raises:
            VerificationError: a limit is exceeded with confidence 95 %, or the precision overflows.
        """
        if self.comparison is not None and not self.comparison.clearly_beyond(limits):
            return
        names = ", ".join(f"{error.node} ({error.operator})" for error in self.errors[:3]) or "none"
        cost = "its features are not finite, or recognise no image"
        if self.comparison is not None:
            drop = self.comparison.auroc_drop
            lost = "" if drop is None else f" and the AUROC falls by {100 * drop:.2f} points"
            cost = f"{100 * self.comparison.flips:.1f} % of {self.comparison.images} decisions change{lost}"
        raise VerificationError(
            f"--precision {self.name} does not decide like float32: {cost}, with {len(self.kept)} layers kept in "
            f"float32 (accepted: {100 * limits.flips:g} %, {100 * limits.auroc_drop:g} points). Layers with the "
            f"largest error: {names}. Keep more in float32 with --keep-float NAME, accept more with --max-flips and "
            "--max-auroc-drop, or use --precision fp16 or auto; nothing was written"
        )

    def entry(self) -> PrecisionTrial:
        """Return the attempt as the contract has it."""
        c = self.comparison
        return PrecisionTrial(
            precision=self.name,
            float_layers=len(self.kept),
            size=graph_size(self.classifier),
            feature_error=None if c is None else c.feature_error,
            auroc_drop=None if c is None else c.auroc_drop,
            auroc_drop_bound=None if c is None else c.auroc_drop_bound,
            flips=1.0 if c is None else c.flips,
            flips_bound=1.0 if c is None else c.flips_bound,
        )


@dataclass(frozen=True)
class Trial:
    """The float32 graph's behaviour on fit images, and the limits that others are held to."""

    classifier: ClassifierGraph
    preprocessing: Preprocessing
    judge: Judge
    reference: Behaviour
    limits: Limits

    def attempts(self, name: Lower, keep: frozenset[str], progress: Progress) -> list[Attempt]:
        """Rewrite the graph, judge it, and give the worst layers back while the limits are not kept.

        Raises:
            ClassifierError: the graph cannot be rewritten.
        """
        way = self._half(keep) if name == "fp16" else self._int8(keep, progress)
        kept, found = way.kept, list[Attempt]()
        for turn in range(ROUNDS + 1):
            progress(f"judging {name}" + (f", {turn} times relaxed" if turn else ""), 0, None)
            try:
                graph = way.rewritten(kept)
            except ClassifierError:
                if not found:
                    raise
                break  # nothing would be left in lower precision
            base = base_model(graph, self.preprocessing)
            attempt = Attempt(name, graph, kept, way.ranges, self._compared(rounded(base) if name == "fp16" else base))
            if attempt.within(self.limits):
                return [*found, attempt]
            found.append(replace(attempt, errors=tuple(way.errors(kept))))
            worst = _worst(found[-1].errors)
            if not worst - kept:
                break
            kept |= worst
        return found

    def _compared(self, judged: ModelProto) -> Comparison | None:
        try:
            return compared(self.reference, behaviour(self.judge, judged))
        except (ClassifierError, DatasetError):  # features that are not finite, or no image recognised any more
            return None

    def _half(self, keep: frozenset[str]) -> "_Way":
        images = self._network_images(ERROR_IMAGES)
        return _Way(
            lambda kept: half_precision(self.classifier, kept),
            lambda kept: half_layer_errors(self.classifier, images, kept),
            keep,
        )

    def _int8(self, keep: frozenset[str], progress: Progress) -> "_Way":
        progress("measuring ranges of activations", 0, None)
        images = self._network_images(RANGE_IMAGES)
        kept = keep | default_float_layers(self.classifier)
        ranges, _ = choose_ranges(self.classifier, images, kept)
        some = images[:: max(1, len(images) // ERROR_IMAGES)]
        return _Way(
            lambda chosen: quantized(self.classifier, ranges, chosen),
            lambda chosen: layer_errors(self.classifier, ranges, some, chosen),
            kept,
            ranges.method,
        )

    def _network_images(self, count: int) -> np.ndarray:
        """Return some fit images as the network takes them, spread over the classes."""
        chosen = np.linspace(0, len(self.judge.frames) - 1, min(count, len(self.judge.frames))).astype(np.int64)
        return network_input(self.classifier, self.preprocessing, self.judge.frames[chosen])

    def entry(self, best: Attempt | None, asked: str, reason: str, attempts: list[Attempt]) -> Precision:
        """Return the contract's entry for the attempt that ships; None: the float32 graph."""
        return Precision(
            name="fp32" if best is None else best.name,
            asked=asked,
            reason=reason,
            float_layers=() if best is None else tuple(sorted(best.kept)),
            ranges=None if best is None else best.ranges,
            images=len(self.judge.frames),
            float32_size=graph_size(self.classifier),
            trials=tuple(attempt.entry() for attempt in attempts),
        )

    def speeds(self, attempts: list[Attempt], progress: Progress) -> tuple[tuple[Lower, float], ...]:
        """Time one image at a time on onnxruntime's CPU provider, the graphs in turn, over the float32 graph's."""
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
        medians = np.median(times[TIMED_RUNS // 4 :], axis=0)
        return tuple((a.name, round(float(m / medians[0]), 3)) for a, m in zip(attempts, medians[1:], strict=True))


@dataclass(frozen=True)
class _Way:
    """How a precision is made: from the layers kept in float32 to a graph, and to the error of each other layer."""

    rewritten: Callable[[frozenset[str]], ClassifierGraph]
    errors: Callable[[frozenset[str]], list[LayerError]]
    kept: frozenset[str]
    ranges: RangeMethod | None = None


def best_attempt(attempts: list[Attempt], limits: Limits) -> Attempt:
    """Return the first that keeps the limits, else the one with the fewest changed decisions."""
    judged = [(a, a.comparison) for a in attempts if a.comparison is not None]
    good = [attempt for attempt in attempts if attempt.within(limits)]
    if good:
        return good[0]
    return min(judged, key=lambda pair: (pair[1].clearly_beyond(limits), pair[1].flips))[0] if judged else attempts[-1]


def graph_size(classifier: ClassifierGraph) -> int:
    """Return the bytes of a classifier graph."""
    return len(classifier.model.SerializeToString())


def _worst(errors: tuple[LayerError, ...]) -> frozenset[str]:
    """Return the layers that make up half of the squared error; those that overflow, where some do."""
    infinite = [e.node for e in errors if not np.isfinite(e.error)]
    squares = np.array([e.error**2 for e in errors])
    if infinite or not squares.sum() > 0:
        return frozenset(infinite)
    count = int(np.searchsorted(np.cumsum(squares), WORST_SHARE * squares.sum())) + 1
    return frozenset(e.node for e in errors[:count])
