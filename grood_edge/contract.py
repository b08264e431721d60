"""The contract: everything an artifact promises, as frozen dataclasses and as one JSON document.

`docs/format.md` is the normative text and `docs/contract.schema.json` the schema. Reading is strict: an
unknown or missing key, a wrong type or a value out of bounds is an `ArtifactError`, because a contract is
untrusted input. Nothing here needs torch or onnx.
"""

import base64
import dataclasses
import hashlib
import json
import math
import types
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
    "contract_from_json",
    "decode_scores",
    "encode_scores",
]

SCHEMA_NAME = "grood-edge.contract"
CONTRACT_VERSION = 1
MAX_CONTRACT_BYTES = 16 << 20
MAX_CLASSES = 100_000

_T = TypeVar("_T")


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


def contract_from_json(text: str) -> tuple[Contract, dict[str, str]]:
    """Read a contract and its digests.

    Raises:
        ArtifactError: not JSON, another schema, a newer version, or any field that is not as specified.
    """
    if len(text) > MAX_CONTRACT_BYTES:
        raise ArtifactError(f"the contract has {len(text):,} characters; at most {MAX_CONTRACT_BYTES:,} are read")
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the contract is not valid JSON ({error}); export the artifact again") from error
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA_NAME:
        raise ArtifactError(f"the contract's schema is not {SCHEMA_NAME!r}: another tool wrote this file")
    version = document.pop("version", None)
    if version != CONTRACT_VERSION:
        raise ArtifactError(
            f"the contract has version {version!r} and this grood-edge reads version {CONTRACT_VERSION}; "
            "upgrade grood-edge, or export the artifact again"
        )
    digests = _read(dict[str, str], document.pop("digests", {}), "digests")
    contract = _read(Contract, document, "contract")
    _check_consistency(contract)
    return contract, digests


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


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check_consistency(contract: Contract) -> None:
    calibration = contract.calibration
    n_scores = calibration.sorted_scores().size
    rules = [
        (2 <= len(contract.classes) <= MAX_CLASSES, f"{len(contract.classes)} classes"),
        (len(contract.ood_prototypes) == 1, f"{len(contract.ood_prototypes)} OOD prototypes (this version reads one)"),
        (n_scores == calibration.n, f"{n_scores} calibration scores where n is {calibration.n}"),
        (1 <= calibration.k <= calibration.n, f"k {calibration.k} where n is {calibration.n}"),
        (0 < calibration.alpha < 1, f"alpha {calibration.alpha}"),
        (calibration.delta is None or 0 < calibration.delta < 1, f"delta {calibration.delta}"),
        (contract.classifier.dimension >= 1, f"feature dimension {contract.classifier.dimension}"),
        (contract.bank.rows >= 1, f"{contract.bank.rows} bank rows"),
        (all(len(p.logits) == len(contract.classes) for p in contract.probes), "probes with other class counts"),
    ]
    for holds, found in rules:
        if not holds:
            raise ArtifactError(f"the contract contradicts itself: it has {found}; export the artifact again")


def _read(kind: Any, value: Any, where: str) -> Any:  # noqa: PLR0911 - one return a kind
    """Read `value` as the annotated type `kind`: dataclass, tuple, dict, Literal, optional or scalar."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ArtifactError(f"{where} is {value!r}; expected one of {', '.join(map(repr, arguments))}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _read(inner, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ArtifactError(f"{where} is {_short(value)}; expected {getattr(kind, '__name__', kind)}")


def _read_dataclass(kind: type[_T], value: Any, where: str) -> _T:
    hints = get_type_hints(kind)
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} is {_short(value)}; expected an object")
    if set(value) != set(hints):
        missing, unknown = sorted(set(hints) - set(value)), sorted(set(value) - set(hints))
        raise ArtifactError(f"{where}: missing keys {missing}, unknown keys {unknown}")
    return kind(**{name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
