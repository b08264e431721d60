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
from grood_edge.errors import ArtifactError
from grood_edge.preprocessing import Preprocessing

__all__ = [
    "CONTRACT_VERSION",
    "SCHEMA_NAME",
    "Calibration",
    "Classifier",
    "Contract",
    "Fit",
    "GradientBank",
    "OodPrototype",
    "Probe",
    "decode_scores",
    "encode_scores",
]

SCHEMA_NAME = "grood-edge.contract"
CONTRACT_VERSION = 1


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
class OodPrototype:
    """One OOD prototype: its source, the number of images behind it, and whether those were real OOD data."""

    source: Literal["mean", "noise", "images"]
    images: int
    uses_ood_data: bool


@dataclass(frozen=True)
class GradientBank:
    """How the gradient bank was made: `rows` in the file, from `candidates` correctly classified images."""

    choice: Literal["all", "kmeans"]
    rows: int
    candidates: int


@dataclass(frozen=True)
class Fit:
    """What the statistics were fitted on. `accuracy` is None when the labels were the predictions."""

    images: int
    unreadable: int
    labels: Literal["folder", "predicted"]
    accuracy: float | None
    seed: int
    data_digest: str
    classes_without_prototype: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """The calibration scores and what may be promised from them.

    provenance: `unseen` images, or images `seen-in-training` by the network.
    method: `separate` folder, `split` of the data, or 10-fold `cross-fitted`.
    guarantee: `conformal` (false-alarm rate <= alpha with probability 1 - delta), `approximate`
    (cross-fitted: right in measurements, no theorem) or `none` (seen in training).
    delta: None when nothing may be promised; k is then floor(alpha (n + 1)).
    scores: base64 of the n sorted little-endian float32 calibration scores.
    """

    provenance: Literal["unseen", "seen-in-training"]
    method: Literal["separate", "split", "cross-fitted"]
    guarantee: Literal["conformal", "approximate", "none"]
    alpha: float
    delta: float | None
    n: int
    k: int
    scores: str
    data_digest: str
    quantiles: tuple[float, ...]

    def sorted_scores(self) -> IdScores:
        """Return the n calibration scores, float32 `[n]`, ascending."""
        return decode_scores(self.scores)


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
    """All that an artifact promises. Without digests: those are computed over it (see `artifact`)."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    classifier: Classifier
    precision: Literal["fp32"]
    ood_prototypes: tuple[OodPrototype, ...]
    bank: GradientBank
    fit: Fit
    calibration: Calibration
    tools: dict[str, str]
    probes: tuple[Probe, ...]

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


def encode_scores(scores: IdScores) -> str:
    """Return base64 of the scores as sorted little-endian float32."""
    return base64.b64encode(np.sort(scores).astype("<f4").tobytes()).decode("ascii")


def decode_scores(text: str) -> IdScores:
    """Inverse of `encode_scores`.

    Raises:
        ArtifactError: not base64, not whole float32 values, not finite, or not sorted.
    """
    try:
        raw = base64.b64decode(text, validate=True)
        scores: IdScores = np.frombuffer(raw, dtype="<f4").astype(np.float32)
    except ValueError as error:
        raise ArtifactError(f"the contract's calibration scores cannot be decoded: {error}") from error
    if not np.isfinite(scores).all() or (np.diff(scores) < 0).any():
        raise ArtifactError("the contract's calibration scores are not finite and ascending")
    return scores
