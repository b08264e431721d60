"""The contract: everything an artifact promises, as frozen dataclasses and as one JSON document.

`docs/format.md` is the normative text and `docs/contract.schema.json` the schema. Reading is strict: an
unknown or missing key, a wrong type or a value out of bounds is an `ArtifactError`, because a contract is
untrusted input. Nothing here needs torch or onnx.
"""

import base64
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from grood_edge.arrays import IdScores
from grood_edge.conformal import DecisionRule, rank_for
from grood_edge.errors import ArtifactError
from grood_edge.preprocessing import Preprocessing

__all__ = [
    "CONTRACT_VERSION",
    "MAX_SKETCH",
    "SCHEMA_NAME",
    "BankTrial",
    "Calibration",
    "Candidate",
    "Classifier",
    "Contract",
    "Fit",
    "GradientBank",
    "OodPrototype",
    "Precision",
    "PrecisionTrial",
    "Probe",
    "Scale",
    "ScaleTrial",
    "Selection",
    "StreamCalibration",
    "decode_scores",
    "encode_array",
    "encode_scores",
]

SCHEMA_NAME = "grood-edge.contract"
CONTRACT_VERSION = 1
MAX_SKETCH = 1024  # hashes of fit images


@dataclass(frozen=True)
class Classifier:
    """Where the classifier graph came from and how the artifact adapts to it."""

    source: Literal["module", "pt2", "onnx"]
    layout: Literal["NCHW", "NHWC"]
    bgr: bool
    batch: Literal["dynamic", "1"]
    opset: int
    features_tensor: str
    features_pooled: bool
    logits_tensor: str
    dimension: int


@dataclass(frozen=True)
class PrecisionTrial:
    """A precision against float32, on fit images: what it weighs, and what it changes.

    float_layers: convolutions and products left in float32. size: bytes of the classifier graph. feature_error: mean
    distance of the features from float32's, over their mean length about the mean (None: not finite, the precision
    overflows). auroc_drop: mean over left-out classes (None with fewer than three). flips: share of images whose
    is_ood or class_id differs. The bounds are one-sided at 95 %: the true value lies above them.
    """

    precision: Literal["fp16", "int8"]
    float_layers: int
    size: int
    feature_error: float | None
    auroc_drop: float | None
    auroc_drop_bound: float | None
    flips: float
    flips_bound: float


@dataclass(frozen=True)
class Precision:
    """Of the classifier graph; the head is always float32.

    asked, reason: what was asked for, and why it is `name`. float_layers: nodes left in float32 in a graph of lower
    precision. ranges: how the ranges of int8 activations were found. images: fit images that it was judged on (0: it
    was not). float32_size: bytes of the classifier graph in float32 (0: not known). trials: what was tried, in order.
    """

    name: Literal["fp32", "fp16", "int8"]
    asked: str
    reason: str
    float_layers: tuple[str, ...]
    ranges: Literal["minmax", "entropy", "percentile"] | None
    images: int
    float32_size: int
    trials: tuple[PrecisionTrial, ...]


@dataclass(frozen=True)
class OodPrototype:
    """One OOD prototype: its source, the number of images behind it, and whether those were real OOD data.

    layer: of `mixup`, where was mixed: `features`, `logits`, a tensor of the graph, or `image`.
    """

    source: Literal["mean", "mixup", "noise", "origin", "images"]
    images: int
    uses_ood_data: bool
    layer: str | None


@dataclass(frozen=True)
class Candidate:
    """One choice of OOD prototypes under leave-class-out.

    auroc: mean over the left-out classes. difference: to the combination, with its paired standard error over classes;
    None for the combination itself.
    """

    name: str
    auroc: float
    difference: float | None
    standard_error: float | None


@dataclass(frozen=True)
class ScaleTrial:
    """A scale and the AUROC with which held-out fit images and shuffled ones are told apart at it."""

    scale: float
    auroc: float


@dataclass(frozen=True)
class Scale:
    """The scale a of the distances, what was asked for, why, and the scales that `auto` measured (else empty)."""

    value: float
    asked: str
    reason: str
    trials: tuple[ScaleTrial, ...]


@dataclass(frozen=True)
class Selection:
    """Why these OOD prototypes: what was asked for, the reason, and the table that `auto` decided by (else empty)."""

    asked: str
    reason: str
    classes: int
    images: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class BankTrial:
    """One size of the bank under leave-class-out: AUROC, and the share of ID images decided otherwise than in full.

    rows: 0 for log s alone. changed: after recalibration, against the full bank.
    """

    rows: int
    auroc: float
    changed: float


@dataclass(frozen=True)
class GradientBank:
    """How the gradient bank was made: `rows` in the file, from `candidates` correctly classified images.

    choice: `none` scores by log s alone. asked, reason, trials: what was asked for, why this size, and the sizes that
    `auto` measured (else empty). classes: base64 of the rows' class ids, little-endian int32. paths: of the image
    nearest to each row, where the export kept them (else empty).
    """

    choice: Literal["all", "kmeans", "none"]
    rows: int
    candidates: int
    dtype: Literal["int8", "float32"]
    asked: str
    reason: str
    trials: tuple[BankTrial, ...]
    classes: str
    paths: tuple[str, ...]

    def row_classes(self) -> np.ndarray:
        """Return the class id of each row, int32 `[m]`."""
        return _decoded(self.classes, "<i4", "the classes of the bank rows").astype(np.int32)


@dataclass(frozen=True)
class Fit:
    """What the statistics were fitted on. `accuracy` is None when the labels were the predictions.

    sketch: base64 of the smallest hashes of the fit images, little-endian uint64, ascending: recognises them later.
    """

    images: int
    unreadable: int
    labels: Literal["folder", "predicted"]
    accuracy: float | None
    seed: int
    data_digest: str
    sketch: str
    classes_without_prototype: tuple[str, ...]

    def recognised(self, hashes: np.ndarray) -> tuple[int, int]:
        """Count images that were fitted on among those that the sketch can tell of; and count those.

        A full sketch tells of hashes up to its largest, a shorter one of all. `hashes` uint64 `[n]`.
        """
        sketch = self.sketch_hashes()
        covered = hashes if sketch.size < MAX_SKETCH else hashes[hashes <= sketch[-1]]
        return int(np.isin(covered, sketch).sum()), covered.size

    def sketch_hashes(self) -> np.ndarray:
        """Return the hashes of the sketch, uint64, ascending."""
        return _decoded(self.sketch, "<u8", "the sketch of the fit images").astype(np.uint64)


@dataclass(frozen=True)
class Calibration:
    """The calibration scores and what may be promised from them.

    provenance: `unseen` images, or images `seen-in-training` by the network.
    method: `separate` folder, `split` of the data, or 10-fold `cross-fitted`.
    guarantee: `conformal` (false-alarm rate <= alpha with probability 1 - delta), `marginal` (alpha on average over
    calibration sets), `approximate` (cross-fitted: right in measurements, no theorem) or `none` (seen in training).
    delta: None where no confidence is stated; k is then floor(alpha (n + 1)).
    scores: base64 of the n little-endian float32 calibration scores, ascending within each group.
    class_sizes, class_ranks: empty, or (per-class p-values) the number of scores and the rank k of each predicted
    class; the scores then stand class by class, and k, the rank over all of them, does not decide.
    """

    provenance: Literal["unseen", "seen-in-training"]
    method: Literal["separate", "split", "cross-fitted"]
    guarantee: Literal["conformal", "marginal", "approximate", "none"]
    alpha: float
    delta: float | None
    n: int
    k: int
    class_sizes: tuple[int, ...]
    class_ranks: tuple[int, ...]
    scores: str
    data_digest: str
    quantiles: tuple[float, ...]

    def grouped_scores(self) -> tuple[IdScores, ...]:
        """Return the calibration scores, float32, ascending: one array, or one a class."""
        return decode_scores(self.scores, self.class_sizes)

    def sorted_scores(self) -> IdScores:
        """Return all n calibration scores, float32 `[n]`, ascending."""
        scores: IdScores = np.sort(np.concatenate(self.grouped_scores()))
        return scores

    def rule(self, classes: int, alpha: float | None = None) -> DecisionRule:
        """Return the decision rule, at the contract's alpha or at another one.

        Raises:
            CalibrationError: the scores cannot carry that alpha.
        """
        scores = self.grouped_scores()
        ranks = self.class_ranks or (self.k,)
        if alpha is not None and alpha != self.alpha:
            ranks = tuple(rank_for(alpha, self.delta, group.size) for group in scores)
        groups = np.arange(classes) if self.class_sizes else np.zeros(classes)
        return DecisionRule(scores, ranks, groups.astype(np.int32))


@dataclass(frozen=True)
class StreamCalibration:
    """What ID video showed: how far apart frames are nearly independent, and the largest evidence in each episode.

    fps: frames a second at which the episodes were scored. episodes, frames: how many. correlation: seconds after which
    the autocorrelation of log e stays below 0.05 (None: the episodes are too short or it never does). interval: seconds
    between the frames that the e-CUSUM is fed (None: no decimation could be set). maxima: log of the detector's largest
    value in each independent episode, descending; the k-th largest is the threshold by episode.
    """

    fps: float
    episodes: int
    frames: int
    correlation: float | None
    interval: float | None
    maxima: tuple[float, ...]
    data_digest: str


@dataclass(frozen=True)
class Probe:
    """One test vector: a PNG (base64) of the graph's input size and the outputs the artifact gave for it."""

    name: str
    png: str
    logits: tuple[float, ...]
    class_id: int
    ood_score: float
    p_value: float
    is_ood: bool
    valid: bool


@dataclass(frozen=True)
class Contract:
    """All that an artifact promises. Without digests: those are computed over it (see `artifact`).

    space: which output the head reads: `features`, or the classifier's own `logits`. stream: None until the artifact
    was calibrated on episodes of ID video.
    """

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    classifier: Classifier
    precision: Precision
    space: Literal["features", "logits"]
    scale: Scale
    selection: Selection
    ood_prototypes: tuple[OodPrototype, ...]
    bank: GradientBank
    fit: Fit
    calibration: Calibration
    stream: StreamCalibration | None
    tools: dict[str, str]
    probes: tuple[Probe, ...]

    @property
    def head_dimension(self) -> int:
        """Number of values that the head reads of each frame."""
        return self.classifier.dimension if self.space == "features" else len(self.classes)

    @property
    def prototype_count(self) -> int:
        """Number of classes that have a prototype."""
        return len(self.classes) - len(self.fit.classes_without_prototype)

    def to_json(self, digests: dict[str, str] | None = None) -> str:
        """Return the canonical JSON text: sorted keys, no spaces, UTF-8, no NaN; with `digests` when given."""
        document: dict[str, Any] = {"schema": SCHEMA_NAME, "version": CONTRACT_VERSION}
        document.update(dataclasses.asdict(self))
        if digests is not None:
            document["digests"] = digests
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the canonical JSON without digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def encode_scores(groups: tuple[IdScores, ...]) -> str:
    """Return base64 of the scores, group by group, each ascending, as little-endian float32."""
    return encode_array(np.concatenate([np.sort(group) for group in groups]).astype("<f4"))


def decode_scores(text: str, sizes: tuple[int, ...] = ()) -> tuple[IdScores, ...]:
    """Inverse of `encode_scores`; `sizes`: of the groups, empty for one.

    Raises:
        ArtifactError: not base64, not whole float32 values, not finite, not sorted, or other sizes.
    """
    scores: IdScores = _decoded(text, "<f4", "the contract's calibration scores").astype(np.float32)
    if sizes and (min(sizes) < 1 or sum(sizes) != scores.size):
        raise ArtifactError(f"the contract has {scores.size} calibration scores in groups of {sum(sizes)}")
    groups = tuple(np.split(scores, np.cumsum(sizes)[:-1])) if sizes else (scores,)
    if not np.isfinite(scores).all() or any((np.diff(group) < 0).any() for group in groups):
        raise ArtifactError("the contract's calibration scores are not finite and ascending")
    return groups


def encode_array(array: np.ndarray) -> str:
    """Return base64 of an array's bytes."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _decoded(text: str, dtype: str, what: str) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
    except ValueError as error:
        raise ArtifactError(f"{what} cannot be decoded: {error}") from error
